"""
Adapters on a model through PEFT's own calls, and what TRL's trainers do with them.

Values are always drawn before they are saved, and a model that loads them onto its own holds others and has another
adapter active: a loader that makes the adapter anew would not pass. CPU, seconds.
"""

import copy
import gc
import json
import struct
import warnings
import weakref

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import trl_tinylora.tuner.build
import trl_tinylora.tuner.model
from trl_tinylora import TinyLoraConfig
from trl_tinylora.maths.decomposition import mix
from trl_tinylora.tuner.bank import TinyLoraLayer
from trl_tinylora.tuner.layer import Linear


FIELDS = {"n_tie": 4, "u": 3}
KEY = "base_model.model.tinylora_bank.trl_tinylora_v.lora_magnitude_vector"
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def values_of(model, adapter="default"):
    (values,) = (p for name, p in model.named_parameters() if f"{adapter}.lora_magnitude_vector" in name)
    return values


def draw_values(model, adapter="default", seed=0):
    values = values_of(model, adapter)
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        values.copy_(0.5 * drawn)
    return values.detach().clone()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def adapted(base, **fields):
    model = get_peft_model(base, TinyLoraConfig(**(fields or FIELDS)))
    draw_values(model)
    return model


def assert_same_bits(state, expected):
    assert list(state) == list(expected)
    for name in expected:
        assert state[name].dtype == expected[name].dtype and torch.equal(state[name], expected[name]), name


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def plain_weights(model):
    """The base weights inside an adapted model under the names they have in the base model."""
    base = model.get_base_model().state_dict()
    return {name.replace(".base_layer", ""): t.clone() for name, t in base.items() if "trl_tinylora_" not in name}


# Starting


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapted_model_starts_as_the_base_model_bit_for_bit(tiny_model, token_ids, kind, dtype):
    base = tiny_model(kind).to(dtype)
    expected = logits_of(base, token_ids)

    model = get_peft_model(base, TinyLoraConfig(**FIELDS))

    assert torch.equal(logits_of(model, token_ids), expected)
    assert torch.equal(model(input_ids=token_ids).logits, expected)
    # Negative control: with values it is another model.
    draw_values(model)
    assert not torch.equal(logits_of(model, token_ids), expected)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 14),
        ({"n_tie": 3}, 5),
        ({"n_tie": 14}, 1),
        ({"n_tie": 16}, 1),
        ({"n_tie": "all", "u": 2}, 2),
        ({"n_tie": 4, "u": 3}, 12),
        ({"n_tie": 2, "tying": "structured"}, 7),
        ({"n_tie": "all", "u": 13, "tying": {"attention": "self_attn", "mlp": "mlp"}}, 26),
        ({"n_tie": 4, "tying": {"attention": "self_attn", "mlp": "mlp"}}, 4),
        ({"u": 4, "projection": "basis"}, 56),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*\.layers\.1\.mlp\..*_proj"}, 3),
        ({"exclude_modules": ["o_proj"]}, 12),
    ],
)
def test_the_trained_count_is_groups_times_u(tiny_qwen2, capsys, fields, count):
    base = tiny_qwen2()
    n_base = sum(p.numel() for p in base.parameters())

    model = get_peft_model(base, TinyLoraConfig(**fields))

    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    model.print_trainable_parameters()
    assert f"trainable params: {count:,} || all params: {n_base + count:,} ||" in capsys.readouterr().out


def test_thirteen_values_on_196_modules(tiny_qwen2):
    model = get_peft_model(tiny_qwen2(num_hidden_layers=28), TinyLoraConfig(n_tie=16))

    assert model.get_nb_trainable_parameters()[0] == 13


def test_nothing_but_the_values_is_trained(tiny_qwen2, token_ids):
    model = adapted(tiny_qwen2())
    before = plain_weights(model)

    model(input_ids=token_ids, labels=token_ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()

    assert_same_bits(plain_weights(model), before)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "base_model.model.tinylora_bank.trl_tinylora_v.default.lora_magnitude_vector"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_values_are_float32_whatever_the_base(tiny_qwen2, tmp_path, dtype, autocast_adapter_dtype):
    model = get_peft_model(
        tiny_qwen2().to(dtype), TinyLoraConfig(**FIELDS), autocast_adapter_dtype=autocast_adapter_dtype
    )
    saved = draw_values(model)
    assert values_of(model).dtype == torch.float32
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_qwen2().to(dtype), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype)
    loaded.load_adapter(tmp_path, "second", autocast_adapter_dtype=autocast_adapter_dtype)

    for adapter in ("default", "second"):
        assert values_of(loaded, adapter).dtype == torch.float32
        assert torch.equal(values_of(loaded, adapter), saved)


def test_values_survive_trls_cast_of_a_quantised_models_parameters(tiny_qwen2):
    model = adapted(tiny_qwen2(), modules_to_save=["lm_head"])

    # trl v1.16.0, trl/trainer/grpo_trainer.py:536-541
    for name, param in model.named_parameters():
        if param.requires_grad and "lora_magnitude_vector" not in name:
            param.data = param.data.to(torch.bfloat16)

    assert values_of(model).dtype == torch.float32
    # Negative control: the loop does cast the other trained parameter.
    assert model.base_model.model.lm_head.modules_to_save["default"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("before", ["nothing", "a pass", "a pass with other values"])
def test_a_layer_called_alone_computes_with_the_present_values_and_gives_them_their_gradient(
    tiny_qwen2, token_ids, before
):
    model = adapted(tiny_qwen2())
    if before == "a pass with other values":
        draw_values(model, seed=2)
    if before != "nothing":
        logits_of(model, token_ids)
    draw_values(model, seed=1)
    layer, x = model.get_submodule(QUERY).train(), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    found = layer(x)

    update_OI = layer.get_delta_weight("default")
    expected = nn.functional.linear(x, layer.base_layer.weight + update_OI, layer.base_layer.bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    vectors = model.base_model.bank.vectors("default")
    values_GK = vectors.values_GK.detach().clone().requires_grad_()
    groups_M, projections_MKRR = vectors.plan.frozen(x.device, x.dtype)
    left_OR, right_RI = layer.factors_of(vectors.plan)
    update_OI = left_OR @ mix(values_GK, groups_M, projections_MKRR)[vectors.plan.index[layer.name]] @ right_RI
    nn.functional.linear(x, layer.base_layer.weight + update_OI, layer.base_layer.bias).square().sum().backward()
    torch.testing.assert_close(values_of(model).grad, values_GK.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_a_layer_called_alone_inside_a_reentrant_checkpoint_is_an_error(tiny_qwen2):
    layer = adapted(tiny_qwen2()).train().get_submodule(QUERY)

    with pytest.raises(RuntimeError, match="called outside the model's forward pass.*Call the whole model"):
        torch.utils.checkpoint.checkpoint(layer, torch.ones(1, 32, requires_grad=True), use_reentrant=True)


# Several adapters


def two_adapters(base):
    model = adapted(base)
    model.add_adapter(
        "other",
        TinyLoraConfig(
            r=3, u=2, n_tie="all", target_modules=["q_proj", "up_proj"], layers_to_transform=[1], projection_seed=9
        ),
    )
    draw_values(model, "other", seed=5)
    return model


def test_adapters_of_different_shape_are_switched(tiny_qwen2, token_ids):
    model = two_adapters(tiny_qwen2())
    only_first, only_second = adapted(tiny_qwen2()), tiny_qwen2()
    only_second = get_peft_model(only_second, model.peft_config["other"])
    draw_values(only_second, seed=5)
    expected = {"default": logits_of(only_first, token_ids), "other": logits_of(only_second, token_ids)}
    assert not torch.equal(expected["default"], expected["other"])

    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)

        assert torch.equal(logits_of(model, token_ids), expected[adapter])
        assert [name for name in ("default", "other") if values_of(model, name).requires_grad] == [adapter]
        assert model.active_adapters == [adapter]


def test_two_active_adapters_add_up(tiny_qwen2, token_ids):
    model = two_adapters(tiny_qwen2().double()).double()
    model.base_model.set_adapter(["default", "other"])
    plain = tiny_qwen2().double()
    with torch.no_grad():
        for name, layer in model.get_base_model().named_modules():
            if isinstance(layer, Linear):
                for adapter in ("default", "other"):
                    if layer.place(adapter) is not None:
                        plain.get_submodule(name).weight.add_(layer.get_delta_weight(adapter))

    # Sums in another order, float64.
    torch.testing.assert_close(logits_of(model, token_ids), logits_of(plain, token_ids), rtol=0, atol=1e-11)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model, token_ids), logits_of(plain, token_ids), rtol=0, atol=1e-11)


def test_an_added_adapter_leaves_the_first_one_as_it_was(tiny_qwen2, token_ids):
    model = adapted(tiny_qwen2())
    expected = logits_of(model, token_ids)

    model.add_adapter("other", TinyLoraConfig())

    assert torch.equal(logits_of(model, token_ids), expected)
    assert values_of(model).requires_grad and not values_of(model, "other").requires_grad
    assert torch.equal(values_of(model, "other"), torch.zeros(14, 1))


@pytest.fixture
def svd_calls(monkeypatch):
    calls = []
    original = trl_tinylora.tuner.build.truncated_svd

    def spy(weight, rank):
        calls.append((tuple(weight.shape), rank))
        return original(weight, rank)

    monkeypatch.setattr(trl_tinylora.tuner.build, "truncated_svd", spy)
    return calls


def kept_ranks(model):
    """The ranks at which each adapted layer keeps factors."""
    return {name: sorted(layer._factors) for name, layer in model.named_modules() if isinstance(layer, Linear)}


def test_frozen_tensors_are_no_buffers_and_follow_the_model(tiny_qwen2, token_ids):
    # DDP broadcasts every buffer before each forward pass.
    names = [name for name, _ in tiny_qwen2().named_buffers()]
    model = adapted(tiny_qwen2())
    assert [name.removeprefix("base_model.model.") for name, _ in model.named_buffers()] == names
    model = model.double()
    plan = model.base_model.bank.trl_tinylora_v["default"].plan
    frozen = [plan.projections_MKRR, *model.get_submodule(QUERY).factors((2, None))]
    assert [tensor.dtype for tensor in frozen] == [torch.float64] * 3 and plan.groups_M.dtype == torch.int64
    assert logits_of(model, token_ids).dtype == torch.float64


def test_a_second_adapter_of_the_same_rank_shares_the_factors(tiny_qwen2, svd_calls):
    model = adapted(tiny_qwen2())
    assert len(svd_calls) == 14
    factors = model.get_submodule(QUERY).factors((2, None))
    kept = kept_ranks(model)

    model.add_adapter("same", TinyLoraConfig(n_tie="all", projection_seed=3))

    assert len(svd_calls) == 14
    again = model.get_submodule(QUERY).factors((2, None))
    assert all(first is second for first, second in zip(factors, again, strict=True))
    assert kept_ranks(model) == kept and all(keys == [(2, None)] for keys in kept.values())

    model.add_adapter("another rank", TinyLoraConfig(r=3, target_modules=["q_proj"]))
    assert svd_calls[14:] == [((32, 32), 3)] * 2


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("r", [2, 3])
def test_an_adapter_added_to_a_merged_model_is_that_of_the_base_model(tiny_model, token_ids, kind, r):
    fields = {"r": r, "n_tie": 2, "projection_seed": 4}
    merged = adapted(tiny_model(kind))
    merged.merge_adapter()
    merged.add_adapter("other", TinyLoraConfig(**fields))
    merged.unmerge_adapter()
    draw_values(merged, "other", seed=2)
    merged.set_adapter("other")

    alone = adapted(tiny_model(kind), **fields)
    draw_values(alone, seed=2)

    assert torch.equal(logits_of(merged, token_ids), logits_of(alone, token_ids))


def test_setting_an_adapter_on_a_merged_model_unmerges_it(tiny_qwen2, token_ids):
    model = two_adapters(tiny_qwen2())
    before = plain_weights(model)
    model.set_adapter("other")
    expected = logits_of(model, token_ids)
    model.set_adapter("default")
    model.merge_adapter()

    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")

    assert_same_bits(plain_weights(model), before)
    assert torch.equal(logits_of(model, token_ids), expected)


@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_deleting_an_adapter_frees_what_only_it_used(tiny_qwen2, token_ids):
    model = two_adapters(tiny_qwen2())
    model.set_adapter("other")
    expected = logits_of(model, token_ids)
    model.set_adapter("default")
    freed = weakref.ref(values_of(model)), weakref.ref(model.get_submodule(QUERY).factors((2, None))[0])

    model.delete_adapter("default")
    gc.collect()

    assert [reference() for reference in freed] == [None, None]
    assert not any("default" in name for name, _ in model.named_parameters())
    assert not any(2 in ranks for ranks in kept_ranks(model).values())
    assert model.active_adapters == ["other"]
    assert torch.equal(logits_of(model, token_ids), expected)


@pytest.mark.filterwarnings("ignore:Adapter .* was active")
def test_deleting_every_adapter_leaves_the_base_model(tiny_qwen2, token_ids):
    base = tiny_qwen2()
    expected = logits_of(base, token_ids)
    model = two_adapters(base)

    model.delete_adapter("default")
    model.delete_adapter("other")

    # PEFT's own wrapper cannot be called without an adapter.
    assert torch.equal(logits_of(model.base_model.model, token_ids), expected)
    model.add_adapter("default", TinyLoraConfig(**FIELDS))
    model.set_adapter("default")
    draw_values(model)
    assert torch.equal(logits_of(model, token_ids), logits_of(adapted(tiny_qwen2()), token_ids))


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_deleting_a_merged_adapter_is_refused(tiny_qwen2):
    model = two_adapters(tiny_qwen2())
    model.merge_adapter()

    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")


# Disabling and merging


def test_a_disabled_adapter_leaves_the_base_model_bit_for_bit(tiny_qwen2, token_ids):
    base = tiny_qwen2()
    expected = logits_of(base, token_ids)
    model = adapted(base)
    with_adapter = logits_of(model, token_ids)

    with model.disable_adapter():
        assert torch.equal(logits_of(model, token_ids), expected)

    assert torch.equal(logits_of(model, token_ids), with_adapter)
    assert values_of(model).requires_grad


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_merges_of_changing_values_change_no_bit(tiny_model, kind, dtype):
    model = adapted(tiny_model(kind).to(dtype))
    before = plain_weights(model)

    for cycle in range(50):
        draw_values(model, seed=cycle)
        model.merge_adapter()
        if cycle == 49:
            changed = [name for name, weight in plain_weights(model).items() if not torch.equal(weight, before[name])]
            assert len(changed) == (14 if kind == "qwen2" else 8)
        model.unmerge_adapter()

    assert_same_bits(plain_weights(model), before)


def test_subtracting_the_update_again_does_change_bits(tiny_qwen2):
    # Negative control of the test above: what unmerging by subtraction would leave in bfloat16.
    model = adapted(tiny_qwen2().bfloat16())
    layer = model.get_submodule(QUERY)
    weight, delta = layer.base_layer.weight.detach().clone(), layer.get_delta_weight("default")

    returned = ((weight + delta).bfloat16() - delta).bfloat16()

    assert not torch.equal(returned, weight)


def test_merging_into_a_merged_model_starts_from_the_base_weights(tiny_qwen2):
    model = two_adapters(tiny_qwen2())
    before = plain_weights(model)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter()
    at_once = plain_weights(model)
    model.unmerge_adapter()

    model.merge_adapter(adapter_names=["default"])
    with warnings.catch_warnings():
        # PEFT tells which adapters are merged already.
        warnings.simplefilter("ignore")
        model.merge_adapter(adapter_names=["default", "other"])

    assert_same_bits(plain_weights(model), at_once)
    model.unmerge_adapter()
    assert_same_bits(plain_weights(model), before)


def test_a_merged_model_computes_with_the_merged_weights_alone(tiny_qwen2, token_ids):
    model = adapted(tiny_qwen2())
    separate = logits_of(model, token_ids)
    model.merge_adapter()
    merged = logits_of(model, token_ids)
    plain = tiny_qwen2()
    plain.load_state_dict(plain_weights(model))

    assert torch.equal(merged, logits_of(plain, token_ids))
    # float32 sums in another order, through two layers.
    torch.testing.assert_close(merged, separate, rtol=0, atol=2e-4)


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_a_merge_that_is_not_finite_is_refused_where_asked_for(tiny_qwen2):
    model = adapted(tiny_qwen2().half())
    before = plain_weights(model)
    with torch.no_grad():
        values_of(model).fill_(1e9)

    with pytest.raises(ValueError, match=r"merging default gives weights that are not finite in torch\.float16.*wider"):
        model.merge_adapter(safe_merge=True)

    model.unmerge_adapter()
    assert_same_bits(plain_weights(model), before)


def test_disabling_a_merged_adapter_unmerges_it_and_training_goes_on(tiny_qwen2, token_ids):
    # Layers unmerge when they are called while disabled; the values must then get their gradient as before.
    base = tiny_qwen2()
    expected = logits_of(base, token_ids)
    model = adapted(base)
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    gradient = values_of(model).grad.clone()
    values_of(model).grad = None
    model.merge_adapter()

    with model.disable_adapter():
        assert torch.equal(logits_of(model, token_ids), expected)
    model(input_ids=token_ids, labels=token_ids).loss.backward()

    assert torch.equal(values_of(model).grad, gradient)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_unload_leaves_nothing_behind(tiny_model, token_ids, kind):
    base = tiny_model(kind)
    before, expected = snapshot(base), logits_of(base, token_ids)
    hooks = {name: len(m._forward_pre_hooks) for name, m in base.named_modules()}
    model = adapted(base)
    # The second one begins at another block and has factors of its own.
    names = ["c_attn"] if kind == "gpt2" else ["q_proj"]
    model.add_adapter("other", TinyLoraConfig(r=1, target_modules=names, layers_to_transform=[1]))

    unloaded = model.unload()

    assert_same_bits(unloaded.state_dict(), before)
    assert torch.equal(logits_of(unloaded, token_ids), expected)
    assert {name: len(m._forward_pre_hooks) for name, m in unloaded.named_modules()} == hooks
    assert not any(type(m).__module__.startswith(("trl_tinylora", "peft")) for m in unloaded.modules())
    assert not any(m._forward_pre_hooks for m in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")
    # And it can be adapted again.
    assert torch.equal(logits_of(adapted(unloaded), token_ids), logits_of(adapted(tiny_model(kind)), token_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unload_gives_the_merged_weights(tiny_qwen2, token_ids, dtype):
    base = tiny_qwen2().to(dtype)
    names = list(base.state_dict())
    model = adapted(base)
    model.merge_adapter()
    merged, expected = plain_weights(model), logits_of(model, token_ids)
    model.unmerge_adapter()

    plain = model.merge_and_unload()

    assert list(plain.state_dict()) == names
    assert_same_bits(plain.state_dict(), merged)
    assert torch.equal(logits_of(plain, token_ids), expected)


# What TRL's trainers do


def test_trls_reference_adapter_is_a_copy(tiny_qwen2, token_ids):
    model = adapted(tiny_qwen2())
    expected = logits_of(model, token_ids)

    # trl v1.16.0, trl/trainer/grpo_trainer.py:501-506
    model.add_adapter("ref", model.peft_config["default"])
    copied = []
    for name, param in model.named_parameters():
        if ".default." in name:
            ref_param = model.get_parameter(name.replace(".default.", ".ref."))
            ref_param.data.copy_(param.data)
            copied.append(name)

    assert len(copied) == 1
    assert torch.equal(values_of(model, "ref"), values_of(model))
    # As in trl/trainer/utils.py `use_adapter`; a later step of the trained adapter is none of the reference's.
    draw_values(model, seed=8)
    model.set_adapter("ref")
    assert torch.equal(logits_of(model, token_ids), expected)
    model.set_adapter("default")
    assert not torch.equal(logits_of(model, token_ids), expected)
    assert values_of(model).requires_grad and not values_of(model, "ref").requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_names_and_weights_that_trl_sends_to_vllm_are_those_of_the_merged_model(tiny_qwen2, dtype):
    model = two_adapters(tiny_qwen2().to(dtype))
    before = plain_weights(model)

    # trl v1.16.0, trl/generation/vllm_generation.py:443-470
    sent = {}
    model.merge_adapter()
    for name, param in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix in name:
            continue
        if "original_module" in name:
            continue
        sent[name] = param.data.clone()
    model.unmerge_adapter()

    assert_same_bits(plain_weights(model), before)
    merged = model.merge_and_unload()
    assert_same_bits(sent, {name: parameter.data for name, parameter in merged.named_parameters()})
    assert any(not torch.equal(sent[name], before[name]) for name in sent)


def test_every_parameter_of_ours_carries_the_prefix_and_none_of_the_base(tiny_qwen2):
    base = tiny_qwen2()
    expected = {f"base_model.model.{name}" for name, _ in base.named_parameters()}
    assert not any("trl_tinylora_" in name for name in expected)

    model = two_adapters(base)

    assert model.prefix == "trl_tinylora_"
    ours = {name for name, _ in model.named_parameters() if "trl_tinylora_" in name}
    assert {n.replace(".base_layer", "") for n, _ in model.named_parameters() if n not in ours} == expected
    assert len(ours) == 2


# Saving and loading


@pytest.fixture
def saved(tiny_qwen2, token_ids, tmp_path):
    """A folder with a base model and an adapter on it, its values, and the logits of the two."""
    folder = tmp_path / "base"
    tiny_qwen2().save_pretrained(folder)
    model = adapted(AutoModelForCausalLM.from_pretrained(folder))
    values = values_of(model).detach().clone()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, values, logits_of(model, token_ids)


def assert_loaded(model, saved, ids, adapter="default"):
    _, values, logits = saved
    assert torch.equal(values_of(model, adapter), values)
    assert torch.equal(logits_of(model, ids), logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_loads_what_was_saved(tiny_qwen2, token_ids, saved, low_cpu_mem_usage):
    model = PeftModel.from_pretrained(tiny_qwen2(), saved[0] / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)

    assert_loaded(model, saved, token_ids)
    assert not values_of(model).requires_grad


def test_a_loaded_adapter_may_be_trained_on(tiny_qwen2, token_ids, saved):
    model = PeftModel.from_pretrained(tiny_qwen2(), saved[0] / "adapter", is_trainable=True)
    assert_loaded(model, saved, token_ids)

    model(input_ids=token_ids, labels=token_ids).loss.backward()

    assert values_of(model).requires_grad
    assert values_of(model).grad.abs().min() > 0


def test_auto_peft_model_loads_base_and_adapter(token_ids, saved):
    model = AutoPeftModelForCausalLM.from_pretrained(saved[0] / "adapter")

    assert_loaded(model, saved, token_ids)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter_beside_another_one(tiny_qwen2, token_ids, saved, low_cpu_mem_usage):
    model = two_adapters(tiny_qwen2())
    before = {name: values_of(model, name).detach().clone() for name in ("default", "other")}

    model.load_adapter(saved[0] / "adapter", "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("loaded")

    assert_loaded(model, saved, token_ids, "loaded")
    for name, values in before.items():
        assert torch.equal(values_of(model, name), values)


def test_load_adapter_onto_the_adapter_itself_replaces_its_values(tiny_qwen2, token_ids, saved):
    # What transformers.Trainer does to resume, and to load the best model at the end.
    model = two_adapters(tiny_qwen2())
    draw_values(model, seed=11)
    model.set_adapter("other")

    model.load_adapter(saved[0] / "adapter", "default", is_trainable=True)
    model.set_adapter("default")

    assert_loaded(model, saved, token_ids)
    assert values_of(model).requires_grad


def test_each_adapter_of_a_model_is_saved_in_its_own_folder(tiny_qwen2, token_ids, tmp_path):
    model = two_adapters(tiny_qwen2())
    model.save_pretrained(tmp_path)
    model.set_adapter("other")

    loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "other")

    assert torch.equal(values_of(loaded), values_of(model, "other"))
    assert torch.equal(logits_of(loaded, token_ids), logits_of(model, token_ids))
    assert torch.equal(values_of(PeftModel.from_pretrained(tiny_qwen2(), tmp_path)), values_of(model))


@pytest.mark.parametrize("adapter", ["mine", "a_b-c", "v", "lora_magnitude_vector"])
def test_adapters_may_have_other_names(tiny_qwen2, token_ids, tmp_path, adapter):
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig(**FIELDS), adapter_name=adapter)
    with torch.no_grad():
        model.get_parameter(f"base_model.model.tinylora_bank.trl_tinylora_v.{adapter}.lora_magnitude_vector").fill_(0.3)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path / adapter, adapter_name="default")

    assert torch.equal(values_of(loaded), torch.full((4, 3), 0.3))
    assert torch.equal(logits_of(loaded, token_ids), logits_of(model, token_ids))


def test_the_file_holds_the_values_and_whose_they_are_in_a_name(saved):
    content = (saved[0] / "adapter" / "adapter_model.safetensors").read_bytes()
    (header_length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_length])
    header.pop("__metadata__", None)

    (owner,) = header.keys() - {KEY}
    assert header.pop(owner)["shape"] == [0] and '"projection_seed":0' in owner
    assert header == {KEY: {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}
    assert len(content) - 8 - header_length == 4 * 12


def test_a_merged_model_saves_the_same_adapter(tiny_qwen2, tmp_path):
    model = adapted(tiny_qwen2())
    model.merge_adapter()
    model.save_pretrained(tmp_path)

    assert torch.equal(values_of(PeftModel.from_pretrained(tiny_qwen2(), tmp_path)), values_of(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_modules_to_save_and_trained_tokens_are_trained_saved_and_loaded(
    tiny_qwen2, token_ids, tmp_path, low_cpu_mem_usage
):
    tokens = sorted(set(token_ids.flatten().tolist()))[:3]
    fields = {**FIELDS, "modules_to_save": ["lm_head"], "trainable_token_indices": tokens}
    model = adapted(tiny_qwen2(), **fields)
    head = model.base_model.model.lm_head
    before = head.modules_to_save["default"].weight.detach().clone(), model.get_base_model()(token_ids).logits.detach()

    model(input_ids=token_ids, labels=token_ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()

    assert not torch.equal(head.modules_to_save["default"].weight, before[0])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 and sum("lora_magnitude_vector" in name for name in trained) == 1, trained
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert torch.equal(logits_of(loaded, token_ids), logits_of(model, token_ids))
    assert not torch.equal(logits_of(loaded, token_ids), before[1])
    # Unloading gives the base model's layout back, with the trained head and tokens in it.
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(tiny_qwen2().state_dict())
    torch.testing.assert_close(logits_of(merged, token_ids), logits_of(loaded, token_ids), rtol=0, atol=2e-4)


def test_a_deep_copy_is_a_model_of_its_own(tiny_qwen2, token_ids):
    model = two_adapters(tiny_qwen2())
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    expected, gradient = logits_of(model, token_ids), values_of(model).grad.clone()

    copied = copy.deepcopy(model)

    assert torch.equal(logits_of(copied, token_ids), expected)
    draw_values(copied, seed=6)
    copied.zero_grad()
    copied(input_ids=token_ids, labels=token_ids).loss.backward()
    assert not torch.equal(logits_of(copied, token_ids), expected)
    assert not torch.equal(values_of(copied).grad, gradient)
    assert torch.equal(logits_of(model, token_ids), expected)
    assert torch.equal(values_of(model).grad, gradient)
    copied.unload()
    assert torch.equal(logits_of(model, token_ids), expected)


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_a_checkpoint_of_another_shape_is_refused(tiny_qwen2, saved):
    model = adapted(tiny_qwen2(), n_tie=2, u=3)

    with pytest.raises(
        ValueError, match=r"values of shape \(4, 3\), this adapter has \(7, 3\) \(groups, u\).*own base"
    ):
        model.load_adapter(saved[0] / "adapter", "default")


@pytest.mark.bad_input("a model or a configuration that does not fit")
@pytest.mark.parametrize(("layers", "shape"), [(1, r"\(1, 3\)"), (3, r"\(3, 3\)")])
def test_a_checkpoint_on_a_base_model_of_another_depth_is_refused(tiny_qwen2, tmp_path, layers, shape):
    adapted(tiny_qwen2(), u=3, target_modules=["q_proj"]).save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=f"trained on 2 modules, and its configuration matches {layers} here"):
        PeftModel.from_pretrained(tiny_qwen2(num_hidden_layers=layers), tmp_path)

    config = PeftConfig.from_pretrained(tmp_path)
    config.base_fingerprint = None
    with pytest.raises(ValueError, match=rf"values of shape \(2, 3\), this adapter has {shape}"):
        PeftModel.from_pretrained(tiny_qwen2(num_hidden_layers=layers), tmp_path, config=config)


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_a_checkpoint_with_values_that_are_not_finite_is_refused(tiny_qwen2, tmp_path):
    adapted(tiny_qwen2()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[KEY][1, 2] = float("nan")
    save_file(tensors, path)

    with pytest.raises(ValueError, match="1 of the checkpoint's 12 values are not finite.*take an earlier checkpoint"):
        PeftModel.from_pretrained(tiny_qwen2(), tmp_path)


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_weights_of_another_method_are_refused(tiny_qwen2, saved):
    from peft import LoraConfig

    folder = saved[0]
    get_peft_model(tiny_qwen2(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(
        (folder / "lora" / "adapter_model.safetensors").read_bytes()
    )

    with pytest.raises(
        ValueError, match="this is no TinyLoRA checkpoint: it lacks 'tinylora_bank.trl_tinylora_v.*TRL_TINYLORA"
    ):
        PeftModel.from_pretrained(tiny_qwen2(), folder / "adapter")


# What cannot be adapted


def with_bad_weight(model, value):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    return model


def cannot_adapt_cases():
    return {
        "rank too large": (
            {"r": 17, "target_modules": ["k_proj"]},
            ValueError,
            r"r=17 exceeds the rank 16 that model\.layers\.0\.self_attn\.k_proj",
        ),
        "no match": (
            {"target_modules": ["nope"]},
            ValueError,
            r"matches no module\. Linear layers of this model: model",
        ),
        "embedding": (
            {"target_modules": ["embed_tokens"]},
            ValueError,
            "matches model.embed_tokens, a torch.*Embedding",
        ),
        "unknown token": ({"trainable_token_indices": [999]}, ValueError, "999"),
        "unknown embedding": ({"trainable_token_indices": {"nope": [1]}}, ValueError, "nope"),
        "damaged weight": ({}, ValueError, r"model\.layers\.1\.mlp\.up_proj: 1 of 1536 entries are not finite"),
    }


@pytest.mark.bad_input("a model or a configuration that does not fit")
@pytest.mark.parametrize("case", cannot_adapt_cases())
def test_a_failed_first_adapter_leaves_the_model_as_it_was(tiny_qwen2, token_ids, case):
    fields, error, message = cannot_adapt_cases()[case]
    base = tiny_qwen2()
    if case == "damaged weight":
        base = with_bad_weight(base, float("nan"))
    before, expected = snapshot(base), logits_of(base, token_ids)
    trainable = [p.requires_grad for p in base.parameters()]

    with pytest.raises(error, match=message):
        get_peft_model(base, TinyLoraConfig(**fields))

    assert list(base.state_dict()) == list(before)
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert torch.equal(logits_of(base, token_ids), expected) or case == "damaged weight"
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")
    # And it can be used again.
    base = with_bad_weight(base, 0.25)
    model, healthy = adapted(base), adapted(with_bad_weight(tiny_qwen2(), 0.25))
    assert torch.equal(logits_of(model, token_ids), logits_of(healthy, token_ids))


@pytest.mark.bad_input("a model or a configuration that does not fit")
@pytest.mark.parametrize("case", [case for case in cannot_adapt_cases() if case != "damaged weight"])
def test_a_failed_second_adapter_leaves_the_first_as_it_was(tiny_qwen2, token_ids, case):
    fields, error, message = cannot_adapt_cases()[case]
    model = adapted(tiny_qwen2())
    before, expected = snapshot(model), logits_of(model, token_ids)
    kept = kept_ranks(model)

    with pytest.raises(error, match=message):
        model.add_adapter("other", TinyLoraConfig(**{"r": 3, **fields}))

    assert_same_bits(model.state_dict(), before)
    assert kept_ranks(model) == kept
    assert torch.equal(logits_of(model, token_ids), expected)
    assert values_of(model).requires_grad and list(model.peft_config) == ["default"]
    # And the name is free again.
    model.add_adapter("other", TinyLoraConfig(r=3))
    model.set_adapter("other")
    draw_values(model, "other")
    assert torch.equal(logits_of(model, token_ids), logits_of(adapted(tiny_qwen2(), r=3), token_ids))


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_weights_without_values_are_refused(tiny_qwen2):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_qwen2().config)

    with pytest.raises(ValueError, match=r"weight of model\.layers\.0\.self_attn\.q_proj is on the meta device.*Load"):
        get_peft_model(model, TinyLoraConfig())


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_a_block_without_hidden_states_is_an_error():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, tokens):
            return self.linear(nn.functional.one_hot(tokens, 4).float())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, tokens):
            return self.blocks[0](tokens)

    model = get_peft_model(Model(), TinyLoraConfig(target_modules=["linear"]))

    with pytest.raises(
        RuntimeError, match=r"Block was called without hidden states.*got 1 positional arguments and \[\]"
    ):
        model(torch.tensor([1, 2]))
