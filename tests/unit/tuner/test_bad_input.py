"""What a model or an adapter is not, and what nobody may ask of them: a clear error, and the model as it was. CPU."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tuner.bank import TinyLoraLayer


def adapted(base, **fields):
    return get_peft_model(base, TinyLoraConfig(**fields))


def values_of(model, name="default"):
    return model.base_model.bank.vectors(name).values_GK


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target_modules": None}, "`target_modules` must be .*got None"),
        ({"target_modules": []}, r"`target_modules` must be .*got \[\]"),
        ({"target_modules": ""}, "`target_modules` must be .*got ''"),
        ({"target_modules": "(q_proj"}, "`target_modules` is no regular expression"),
        ({"target_modules": "*_proj"}, "`target_modules` is no regular expression"),
        ({"exclude_modules": "[a"}, "`exclude_modules` is no regular expression"),
        ({"target_modules": 5}, "`target_modules` must be a text or a list of names, got 5"),
        ({"target_modules": ["q_proj", 5]}, "`target_modules` must be a text or a list of names"),
        ({"target_modules": b"q_proj"}, "`target_modules` must be a text or a list of names"),
        ({"init_weights": "gaussian"}, "`init_weights` must be True, False or \"uniform\", got 'gaussian'"),
        ({"init_v_bound": -1}, "`init_v_bound` must be finite and at least 0, got -1"),
        ({"init_v_bound": float("inf")}, "`init_v_bound` must be finite"),
        ({"init_v_bound": "0.1"}, "`init_v_bound` must be a number"),
        ({"exclude_modules": 5}, "`exclude_modules` must be a text or a list of names"),
        ({"modules_to_save": "lm_head"}, "`modules_to_save` must be a list of names, got 'lm_head'"),
        ({"modules_to_save": [3]}, "`modules_to_save` must be a list of names"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": "0"},
            "`layers_to_transform` must be a list of integers",
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0.5]}, "`layers_to_transform` must be an integer"),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, "`layers_to_transform` is empty"),
        ({"trainable_token_indices": "x"}, "`trainable_token_indices` must be a list of integers"),
        ({"trainable_token_indices": [1.5]}, "`trainable_token_indices` must be an integer, got 1.5"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, "`trainable_token_indices` must be a list of integers"),
        ({"target_modules": ["q_proj"], "layers_to_transform": ()}, "`layers_to_transform` is empty"),
        ({"inference_mode": "no"}, "`inference_mode` must be True or False, got 'no'"),
        ({"inference_mode": None}, "`inference_mode` must be True or False, got None"),
        ({"base_model_name_or_path": 5}, "`base_model_name_or_path` must be a text or None, got 5"),
        ({"revision": 7}, "`revision` must be a text or None, got 7"),
        ({"auto_mapping": 7}, "`auto_mapping` must be a dictionary or None, got 7"),
    ],
)
def test_a_configuration_that_can_fit_no_model_is_refused(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TinyLoraConfig(**fields)


@pytest.mark.filterwarnings("ignore:u=1000000000 is more than")
@pytest.mark.bad_input("a part of a list that matches nothing")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target_modules": ["q_proj", "k_porj"]}, r"\['k_porj'\] in target_modules"),
        ({"target_modules": ["q_proj", "layers.7.mlp.up_proj"]}, r"\['layers.7.mlp.up_proj'\] in target_modules"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 99]}, r"\[99\] in layers_to_transform=\[0, 99\]"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [-1, 0]}, r"\[-1\] in layers_to_transform"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 99}, "matches no module"),
        ({"exclude_modules": ["up_porj"]}, r"\['up_porj'\] in exclude_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["o_proj", "kproj"]}, r"\['kproj'\] in exclude_modules"),
        ({"modules_to_save": ["lm_haed"]}, r"\['lm_haed'\] in modules_to_save"),
        ({"trainable_token_indices": [3, 64]}, r"trainable_token_indices holds \[64\].* 0 to 63"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices holds \[-1\].* 0 to 63"),
        ({"trainable_token_indices": {"embed_tokens": [10**6]}}, r"holds \[1000000\].* 0 to 63"),
        ({"u": 10**9}, r"u=1000000000 at r=2 on 14 modules needs 209 GiB.*Lower `u`"),
    ],
)
def test_what_matches_nothing_is_named_and_the_model_left_as_it_was(tiny_qwen2, fields, message):
    base = tiny_qwen2()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        adapted(base, **fields)
    assert [name for name, _ in base.named_modules()] == names
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize(
    "field, value, error",
    [
        ("r", 0, ValueError),
        ("r", "2", TypeError),
        ("u", -1, ValueError),
        ("n_tie", None, TypeError),
        ("tying", "loose", ValueError),
        ("tying", {}, ValueError),
        ("tying", {"attention": 1}, TypeError),
        ("tying", {"attention": "self_attn("}, ValueError),
        ("projection", "uniform", ValueError),
        ("projection_seed", 2**32, ValueError),
        ("target_modules", None, ValueError),
        ("inference_mode", "no", TypeError),
        ("init_v_bound", -1, ValueError),
    ],
)
def test_a_field_set_to_nonsense_afterwards_is_refused(tiny_qwen2, field, value, error):
    config = TinyLoraConfig()
    setattr(config, field, value)
    with pytest.raises(error, match=f"`{field}`"):
        get_peft_model(tiny_qwen2(), config)


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize(("field", "value"), [("save_dtype", "int8"), ("save_dtype", "x"), ("target_modules", None)])
def test_a_field_set_to_nonsense_is_not_saved(tiny_qwen2, tmp_path, field, value):
    model = adapted(tiny_qwen2())
    setattr(model.peft_config["default"], field, value)
    with pytest.raises((TypeError, ValueError), match=f"`{field}` must be"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter_*"))


def test_every_linear_layer_is_meant_by_a_list_that_says_so(tiny_qwen2):
    model = adapted(tiny_qwen2(), target_modules=["all-linear"])
    assert len(model.base_model.bank.vectors("default").plan.index) == 14


@pytest.mark.bad_input("a field of the configuration")
@pytest.mark.parametrize(
    ("fixed", "message"),
    [({"u": 0}, "`u` must be at least 1, got 0"), ({"n_tie": "some"}, "`n_tie` must be an integer, got 'some'")],
)
def test_what_is_fixed_in_a_budget_is_checked(tiny_qwen2, fixed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        TinyLoraConfig.for_budget(tiny_qwen2(), 13, **fixed)


@pytest.mark.bad_input("a model")
@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-7B-Instruct", None, 13])
def test_a_budget_is_of_a_model_and_not_of_its_name(model):
    with pytest.raises(TypeError, match=r"expected a model or its configuration, got .*AutoConfig.from_pretrained"):
        TinyLoraConfig.for_budget(model, 13)


@pytest.mark.bad_input("a model")
def test_data_parallel_is_refused_before_anything_is_changed(tiny_qwen2):
    model = nn.DataParallel(tiny_qwen2())
    with pytest.raises(RuntimeError, match="`torch.nn.DataParallel` is not supported.*accelerate launch"):
        get_peft_model(model, TinyLoraConfig(target_modules=["q_proj"]))
    assert not any(isinstance(module, TinyLoraLayer) for module in model.modules())


class Doubled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A linear layer by another name."""


@pytest.mark.bad_input("a base layer")
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda linear: Doubled(32, 32, bias=False), "o_proj, a .*Doubled.*exclude_modules.*unquantised"),
        (lambda linear: nn.Bilinear(32, 32, 32), "o_proj, a torch.nn.modules.linear.Bilinear"),
        (lambda linear: linear.to(torch.float8_e4m3fn), "o_proj has dtype torch.float8_e4m3fn.*torch.float32"),
        (lambda linear: linear.to(torch.complex64), "o_proj has dtype torch.complex64"),
        (lambda linear: as_int8(linear), "o_proj has dtype torch.int8"),
    ],
    ids=["derived", "bilinear", "float8", "complex", "int8"],
)
def test_a_base_layer_that_is_not_known_is_refused_by_name(tiny_qwen2, make, message):
    base = tiny_qwen2()
    attention = base.model.layers[1].self_attn
    attention.o_proj = make(attention.o_proj)
    with pytest.raises(ValueError, match=f"layers.1.self_attn.{message}"):
        adapted(base, target_modules=["q_proj", "o_proj"])
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())
    # Left out, it does not matter.
    adapted(base, target_modules=["q_proj", "o_proj"], exclude_modules=["layers.1.self_attn.o_proj"])


@pytest.mark.bad_input("a base layer")
def test_an_embedding_is_refused_with_what_trains_it(tiny_qwen2):
    base = tiny_qwen2()
    with pytest.raises(ValueError, match="embed_tokens, a .*Embedding.*`trainable_token_indices`.*`modules_to_save`"):
        adapted(base, target_modules=["embed_tokens", "q_proj"])
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())
    adapted(base, target_modules=["q_proj"], trainable_token_indices=[3, 4])


def as_int8(linear):
    linear.weight = nn.Parameter(torch.ones(linear.weight.shape, dtype=torch.int8), requires_grad=False)
    return linear


def test_a_linear_layer_by_another_name_is_known(tiny_qwen2, token_ids):
    base = tiny_qwen2()
    base.model.layers[0].self_attn.o_proj = Renamed(32, 32, bias=False)
    model = adapted(base, target_modules=["o_proj"])
    with torch.no_grad():
        before = model(token_ids).logits
        values_of(model).fill_(0.3)
        assert (model(token_ids).logits - before).abs().max() > 1e-3


def test_a_weight_of_zeros_is_warned_about_by_name(tiny_qwen2):
    base = tiny_qwen2()
    nn.init.zeros_(base.model.layers[1].mlp.up_proj.weight)
    with pytest.warns(UserWarning, match=r"layers.1.mlp.up_proj \(1 of 14 modules\) are all zero.*exclude_modules"):
        adapted(base)


@pytest.mark.bad_input("a model that carries an adapter")
@pytest.mark.parametrize("name", ["default", "second"])
@pytest.mark.parametrize("around", [True, False], ids=["the PEFT model", "the model inside"])
def test_a_second_adapter_by_get_peft_model_is_refused(tiny_qwen2, token_ids, name, around):
    base = tiny_qwen2()
    model = adapted(base)
    if not around and name == "second":
        pytest.skip("that is how transformers adds a second adapter")
    with torch.no_grad():
        values_of(model).fill_(0.3)
        expected = model(token_ids).logits
    with pytest.raises(ValueError, match="carries a TinyLoRA adapter already.*add_adapter"):
        get_peft_model(model if around else base, TinyLoraConfig(), adapter_name=name)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected)
    assert values_of(model).requires_grad
    # The way out.
    model.add_adapter("another", TinyLoraConfig())
    model.set_adapter("another")
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 14


def test_a_second_one_after_unloading_trains(tiny_qwen2):
    model = get_peft_model(adapted(tiny_qwen2()).unload(), TinyLoraConfig())
    assert values_of(model).requires_grad


@pytest.mark.bad_input("a name")
def test_no_adapter_is_named_as_the_base_in_a_mixed_batch(tiny_qwen2):
    with pytest.raises(ValueError, match="cannot be named '__base__'"):
        get_peft_model(tiny_qwen2(), TinyLoraConfig(), adapter_name="__base__")


@pytest.mark.bad_input("a name")
@pytest.mark.parametrize("name", ["", "a.b"])
@pytest.mark.parametrize("fields", [{}, {"r": 3}], ids=["as the first", "other factors"])
def test_a_name_that_no_module_can_have_is_refused(tiny_qwen2, token_ids, name, fields):
    model = adapted(tiny_qwen2())
    names = [part for part, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"name must be a text without dots, got '{name}'"):
        model.add_adapter(name, TinyLoraConfig(**fields))
    assert [part for part, _ in model.named_modules()] == names and list(model.peft_config) == ["default"]
    model(token_ids)


@pytest.mark.bad_input("a name")
def test_a_text_is_no_list_of_names(tiny_qwen2, token_ids):
    model = adapted(tiny_qwen2()).eval()
    with pytest.raises(TypeError, match="`adapter_names` must be a list.*got 'default'"):
        model(token_ids, adapter_names="default")
    with pytest.raises(TypeError, match=r"`adapter_names` must be a list.*got \[1, 2\]"):
        model(token_ids, adapter_names=[1, 2])
    # A set has no order.
    with pytest.raises(TypeError, match="`adapter_names` must be a list.*got {'default'}"):
        model(token_ids, adapter_names={"default"})


@pytest.mark.bad_input("a name")
def test_an_adapter_is_made_active_once(tiny_qwen2):
    model = adapted(tiny_qwen2())
    with pytest.raises(ValueError, match=r"each adapter must be named once, got \['default', 'default'\]"):
        model.base_model.set_adapter(["default", "default"])
    assert model.active_adapters == ["default"]


@pytest.mark.bad_input("a name")
@pytest.mark.parametrize("names", ["nope", ["default", "nope"]])
def test_activating_an_adapter_that_is_not_there_is_refused(tiny_qwen2, names):
    model = adapted(tiny_qwen2())
    with pytest.raises(ValueError, match=r"Adapter nope not found, there are \['default'\]"):
        model.base_model.set_adapter(names)
    assert model.active_adapters == ["default"]


@pytest.mark.bad_input("a name")
def test_merging_an_adapter_that_is_not_there_is_refused(tiny_qwen2, token_ids):
    model = adapted(tiny_qwen2())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Adapter nope not found, there are \['default'\]"):
        model.merge_adapter(["default", "nope"])
    with pytest.raises(ValueError, match="Adapter nope not found"):
        model.merge_and_unload(adapter_names=["nope"])
    with pytest.raises(TypeError, match=r"should be a list of strings, got \[5\]"):
        model.merge_adapter([5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.bad_input("a weight of a sum")
@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_sum_with_weights_that_are_not_finite_is_refused(tiny_qwen2, weight):
    model = adapted(tiny_qwen2())
    with pytest.raises(ValueError, match="`weights` must be finite"):
        model.base_model.add_weighted_adapter(["default"], [weight], "sum")
    assert list(model.peft_config) == ["default"]


@pytest.mark.bad_input("a weight of a sum")
@pytest.mark.parametrize(
    ("adapters", "weights", "error", "message"),
    [
        (["default"], ["1x"], TypeError, r"`weights` must be numbers, got \['1x'\]"),
        (["default"], [None], TypeError, r"`weights` must be numbers, got \[None\]"),
        (["default"], 1, TypeError, "must be lists"),
        ("default", [1] * 7, TypeError, "must be lists"),
        (["default"], [1e42], ValueError, "exceeds what float32 can hold"),
    ],
)
def test_a_sum_that_cannot_be_is_refused(tiny_qwen2, adapters, weights, error, message):
    model = adapted(tiny_qwen2(), init_weights=False)
    with pytest.raises(error, match=message):
        model.base_model.add_weighted_adapter(adapters, weights, "sum")
    assert list(model.peft_config) == ["default"]


def test_a_sequence_of_layers_is_adapted_as_a_whole():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    x = torch.randn(3, 8)
    before = base(x)
    model = adapted(base, target_modules=["0", "2"], u=2)
    with torch.no_grad():
        values_of(model).fill_(0.5)
    after = model(x)
    assert (after - before).abs().max() > 1e-3
    after.sum().backward()
    assert values_of(model).grad.abs().min() > 0


def test_a_lora_model_may_get_values_of_tinylora_too(tiny_qwen2):
    base = get_peft_model(tiny_qwen2(), LoraConfig(target_modules=["q_proj"])).merge_and_unload()
    adapted(base)
