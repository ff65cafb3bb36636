"""
Thousands of adapters on one model: what another one costs, and sums of adapters.

What must not grow is counted (singular vectors, bytes of tensors, walks over the model), not timed. CPU, seconds.
"""

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import trl_tinylora.tuner.model
from trl_tinylora import TinyLoraConfig
from trl_tinylora.tuner.bank import Plan
from trl_tinylora.tuner.layer import Linear


FIELDS = {"n_tie": 4, "u": 3}


def values_of(model, adapter="default"):
    return model.get_parameter(f"base_model.model.tinylora_bank.trl_tinylora_v.{adapter}.lora_magnitude_vector")


def draw_values(model, adapter="default", seed=0):
    values = values_of(model, adapter)
    with torch.no_grad():
        values.copy_(0.5 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def with_adapters(base, names, **fields):
    """A model with adapters of one plan, each with values of its own."""
    model = get_peft_model(base, TinyLoraConfig(**(fields or FIELDS)), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, TinyLoraConfig(**(fields or FIELDS)))
    for seed, name in enumerate(names):
        draw_values(model, name, seed)
    return model.eval()


def plan_of(model, adapter):
    return model.base_model.bank.trl_tinylora_v[adapter].plan


def tensors_of(model):
    """Every tensor that the adapted model keeps, in the tree or beside it, each storage once."""
    bank, found = model.base_model.bank, list(model.state_dict().values())
    for plan in bank.plans:
        found += [plan.projections_MKRR, plan.groups_M]
    for module in model.modules():
        if isinstance(module, Linear):
            found += [factor for factors in module._factors.values() for factor in factors]
    # And whatever an adapter might keep to itself.
    for vectors in bank.trl_tinylora_v.values():
        found += [value for value in vars(vectors).values() if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}


# Sharing


def test_another_adapter_of_a_plan_needs_no_singular_vectors_no_projections_and_no_walk(tiny_qwen2, monkeypatch):
    model = with_adapters(tiny_qwen2(), ["default"])
    calls = []
    for name in ("compute_factors", "resolve_target_modules", "Plan"):
        original = getattr(trl_tinylora.tuner.model, name)
        if name == "Plan":
            monkeypatch.setattr(Plan, "__init__", lambda *args, **kwargs: calls.append("Plan"))
            continue
        monkeypatch.setattr(
            trl_tinylora.tuner.model,
            name,
            lambda *a, name=name, original=original: (calls.append(name), original(*a))[1],
        )
    walk = nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda *a, **k: (calls.append("walk"), walk(*a, **k))[1])

    model.add_adapter("other", TinyLoraConfig(**FIELDS))

    assert calls == []
    assert plan_of(model, "other") is plan_of(model, "default")
    # Negative control: at another rank all of it is needed.
    with pytest.raises(AttributeError):
        model.add_adapter("another rank", TinyLoraConfig(r=3, **FIELDS))
    assert {"compute_factors", "resolve_target_modules", "Plan", "walk"} == set(calls)


def test_two_hundred_adapters_cost_their_values(tiny_qwen2):
    model = with_adapters(tiny_qwen2(), ["default"])
    before = tensors_of(model)
    modules = sum(1 for _ in model.modules())

    for i in range(200):
        model.add_adapter(f"adapter{i}", TinyLoraConfig(**FIELDS))

    after = tensors_of(model)
    # Four groups of three float32 values, and not a byte beside them.
    assert sum(after.values()) - sum(before.values()) == 200 * 4 * 12
    assert sum(1 for _ in model.modules()) - modules == 200
    assert len(model.base_model.bank.plans) == 1
    assert not any(vars(layer).keys() & {"trl_tinylora_place"} for layer in model.modules())


@pytest.mark.parametrize("targets", ["all-linear", r".*_proj", [f"{x}_proj" for x in ("q", "k", "v", "o")]])
def test_a_plan_is_shared_however_its_modules_are_named(tiny_qwen2, targets):
    # PEFT puts names in the place of "all-linear", in the configuration that it is given.
    config = TinyLoraConfig(target_modules=targets, **FIELDS)
    model = get_peft_model(tiny_qwen2(), config)

    model.add_adapter("again", TinyLoraConfig(target_modules=targets, **FIELDS))
    model.add_adapter("ref", model.peft_config["default"])
    names = list(plan_of(model, "default").index)
    model.add_adapter("spelled out", TinyLoraConfig(target_modules=names, **FIELDS))

    assert len({plan_of(model, name) for name in model.peft_config}) == 1
    assert model.peft_config["again"].target_modules == model.peft_config["default"].target_modules


@pytest.mark.parametrize(
    "other",
    [
        {"r": 3},
        {"u": 2},
        {"n_tie": 3},
        {"tying": "structured"},
        {"projection": "basis"},
        {"projection_seed": 1},
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["o_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
)
def test_adapters_that_differ_in_more_than_values_stand_beside_each_other(tiny_qwen2, token_ids, other):
    fields = {**FIELDS, **other}
    model = with_adapters(tiny_qwen2(), ["default"])
    model.add_adapter("other", TinyLoraConfig(**fields))
    model.add_adapter("third", TinyLoraConfig(**fields))
    draw_values(model, "other", seed=3)
    draw_values(model, "third", seed=4)
    assert plan_of(model, "default") is not plan_of(model, "other") is plan_of(model, "third")

    for name, alone in [
        ("default", with_adapters(tiny_qwen2(), ["default"])),
        ("other", with_adapters(tiny_qwen2(), ["other"], **fields)),
        ("third", with_adapters(tiny_qwen2(), ["third"], **fields)),
    ]:
        draw_values(alone, name, seed={"default": 0, "other": 3, "third": 4}[name])
        model.set_adapter(name)
        assert torch.equal(logits_of(model, token_ids), logits_of(alone, token_ids))


def test_an_adapter_with_a_trained_head_follows_the_plan_too(tiny_qwen2, token_ids):
    model = with_adapters(tiny_qwen2(), ["default"])
    expected = logits_of(model, token_ids)

    model.add_adapter("head", TinyLoraConfig(modules_to_save=["lm_head"], **FIELDS))

    assert plan_of(model, "head") is plan_of(model, "default")
    assert torch.equal(logits_of(model, token_ids), expected)
    model.set_adapter("head")
    assert model.base_model.model.lm_head.modules_to_save["head"].weight.requires_grad


# PEFT's own calls on adapters that share


def test_a_shared_adapter_is_switched_saved_deleted_and_loaded(tiny_qwen2, token_ids, tmp_path):
    names = [f"adapter{i}" for i in range(5)]
    model = with_adapters(tiny_qwen2(), names)
    expected = {}
    for name in names:
        model.set_adapter(name)
        expected[name] = logits_of(model, token_ids)
        assert [n for n in names if values_of(model, n).requires_grad] == [name]
    assert len({logits.sum().item() for logits in expected.values()}) == 5
    model.save_pretrained(tmp_path)

    model.delete_adapter("adapter1")
    assert not any("adapter1" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="adapter1"):
        model.set_adapter("adapter1")
    model.load_adapter(tmp_path / "adapter1", "adapter1")
    model.load_adapter(tmp_path / "adapter2", "a copy", low_cpu_mem_usage=True)
    draw_values(model, "adapter3", seed=99)
    model.load_adapter(tmp_path / "adapter3", "adapter3")

    for name in names:
        model.set_adapter(name)
        assert torch.equal(logits_of(model, token_ids), expected[name]), name
    model.set_adapter("a copy")
    assert torch.equal(logits_of(model, token_ids), expected["adapter2"])
    assert len(model.base_model.bank.plans) == 1
    alone = PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "adapter4")
    assert torch.equal(logits_of(alone, token_ids), expected["adapter4"])


@pytest.mark.filterwarnings("ignore:Adapter (p|q) was active")
def test_a_plan_lives_as_long_as_its_last_adapter(tiny_qwen2):
    model = with_adapters(tiny_qwen2(), ["p", "q"])
    model.add_adapter("s", TinyLoraConfig(r=3, **FIELDS))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")

    model.delete_adapter("p")
    assert model.active_adapters == ["q"] and layer.active_adapters == ["q"]
    assert len(model.base_model.bank.plans) == 2 and sorted(layer._factors) == [2, 3]
    model.delete_adapter("q")

    assert [plan.rank for plan in model.base_model.bank.plans] == [3] and sorted(layer._factors) == [3]


def test_adapters_that_share_are_merged_and_unloaded_one_at_a_time(tiny_qwen2, token_ids):
    model = with_adapters(tiny_qwen2(), ["p", "q"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.set_adapter("q")
    expected = logits_of(model, token_ids)

    model.merge_adapter(["q"])
    model.add_adapter("s", TinyLoraConfig(**FIELDS))
    # float32 sums in another order, through two layers.
    torch.testing.assert_close(logits_of(model, token_ids), expected, rtol=0, atol=2e-4)
    model.unmerge_adapter()
    model.delete_adapter("s")

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with model.disable_adapter():
        assert torch.equal(logits_of(model, token_ids), logits_of(tiny_qwen2(), token_ids))
    assert torch.equal(logits_of(model.unload(), token_ids), logits_of(tiny_qwen2(), token_ids))


def test_training_one_adapter_leaves_those_that_share_its_plan(tiny_qwen2, token_ids):
    model = with_adapters(tiny_qwen2(), ["p", "q"])
    model.set_adapter("q")
    values = values_of(model, "p").detach().clone()

    model(input_ids=token_ids, labels=token_ids).loss.backward()

    assert values_of(model, "p").grad is None and values_of(model, "q").grad.abs().min() > 0
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert torch.equal(values_of(model, "p"), values)


def test_the_plan_follows_the_model_to_another_dtype(tiny_qwen2):
    model = with_adapters(tiny_qwen2(), ["p", "q"]).double()

    assert plan_of(model, "p") is plan_of(model, "q")
    assert plan_of(model, "p").projections_MKRR.dtype == torch.float64
    assert plan_of(model, "p").groups_M.dtype == torch.int64


# Sums


def merged_weights(model, adapter):
    """The dense update of each module, float64."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    return {name: layer.get_delta_weight(adapter).double() for name, layer in layers.items()}


def test_a_weighted_sum_is_the_weighted_sum_of_the_updates(tiny_qwen2):
    model = with_adapters(tiny_qwen2(), ["p", "q", "s"])
    weights = [0.7, -1.3, 0.25]
    expected = sum(
        w * values_of(model, name).detach().numpy().astype(np.float64)
        for w, name in zip(weights, ["p", "q", "s"], strict=True)
    )

    model.add_weighted_adapter(["p", "q", "s"], weights, "sum")

    # Computed in float64 and rounded once.
    assert np.array_equal(values_of(model, "sum").detach().numpy(), expected.astype(np.float32))
    assert not values_of(model, "sum").requires_grad and model.active_adapters == ["p"]
    assert plan_of(model, "sum") is plan_of(model, "p")
    parts = [merged_weights(model, name) for name in ("p", "q", "s")]
    for name, delta in merged_weights(model, "sum").items():
        dense = sum(w * part[name] for w, part in zip(weights, parts, strict=True))
        # float32 rounding of the parts; the updates are of the order of one.
        torch.testing.assert_close(delta, dense, rtol=0, atol=2e-5)


def test_interpolation_begins_and_ends_at_the_adapters(tiny_qwen2, token_ids):
    model = with_adapters(tiny_qwen2(), ["p", "q"])
    for t in (0.0, 1.0):
        model.base_model.add_weighted_adapter(["p", "q"], [1 - t, t], f"at {int(t)}")

    for name, end in [("at 0", "p"), ("at 1", "q")]:
        assert torch.equal(values_of(model, name), values_of(model, end))
        assert model.base_model.distance(name, end) == 0.0


def test_the_distance_is_the_euclidean_norm_of_the_difference(tiny_qwen2):
    model = with_adapters(tiny_qwen2(), ["p", "q"])
    a, b = (values_of(model, name).detach().numpy().astype(np.float64) for name in ("p", "q"))

    assert model.distance("p", "q") == pytest.approx(np.sqrt(((a - b) ** 2).sum()), rel=1e-12)
    assert model.distance("q", "p") == model.distance("p", "q") > 0.5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"r": 3, "u": 2}, r"differ in r \(2 and 3\), u \(3 and 2\)\. Only"),
        ({"n_tie": "all"}, r"differ in n_tie \(4 and 'all'\)\. Only"),
        ({"projection_seed": 7}, r"differ in projection_seed \(0 and 7\)\. Only"),
        ({"target_modules": ["q_proj"]}, r"differ in the adapted modules \(14 and 2 of them\)\. Only"),
    ],
)
def test_adapters_of_two_plans_cannot_be_added_up_or_compared(tiny_qwen2, other, message):
    model = with_adapters(tiny_qwen2(), ["p"])
    model.add_adapter("q", TinyLoraConfig(**{**FIELDS, **other}))

    with pytest.raises(ValueError, match=f"values of 'p' and 'q' do not mean the same: the adapters {message}"):
        model.add_weighted_adapter(["p", "q"], [0.5, 0.5], "sum")
    with pytest.raises(ValueError, match=message):
        model.distance("p", "q")
    assert list(model.peft_config) == ["p", "q"]


def test_a_sum_that_makes_no_sense_is_refused(tiny_qwen2):
    model = with_adapters(tiny_qwen2(), ["p", "q"])
    model.add_adapter("head", TinyLoraConfig(modules_to_save=["lm_head"], **FIELDS))

    for adapters, weights, name, message in [
        (["p", "nope"], [1, 1], "sum", "Adapter nope does not exist"),
        (["p", "q"], [1], "sum", "one weight for each adapter, got 1 for 2"),
        ([], [], "sum", "one weight for each adapter, got 0 for 0"),
        (["p", "q"], [1, 1], "q", "'q' already exists"),
        (["p", "head"], [1, 1], "sum", "'head' has trained modules or tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(adapters, weights, name)
    with pytest.raises(ValueError, match="`combination_type` must be 'linear', got 'svd'"):
        model.add_weighted_adapter(["p", "q"], [1, 1], "sum", combination_type="svd")
    assert list(model.peft_config) == ["p", "q", "head"]
