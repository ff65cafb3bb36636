"""
A batch whose rows have adapters of their own, against each adapter alone and against the base model.

The cost is counted in products, not timed. CPU, seconds.
"""

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from trl_tinylora import TinyLoraConfig


FIELDS = {"n_tie": 4, "u": 3}
# Two ranks, both ways of tying, both kinds of P, adapters that leave modules out, two on one plan.
ADAPTERS = {
    "one": {},
    "two": {},
    "seeded": {"u": 1, "n_tie": 1, "projection_seed": 5},
    "tied": {"n_tie": "all", "tying": "structured"},
    "basis": {"u": 4, "n_tie": 1, "projection": "basis"},
    "wide": {"r": 3},
    "late": {"r": 3, "layers_to_transform": [1]},
}
BASE = "__base__"


def targets(kind):
    return ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "v_proj", "up_proj", "down_proj"]


def with_adapters(base, kind="qwen2", adapters=ADAPTERS):
    model = None
    for seed, (name, fields) in enumerate(adapters.items()):
        config = TinyLoraConfig(target_modules=targets(kind), **{**FIELDS, **fields})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        values = model.base_model.bank.trl_tinylora_v[name].values_GK
        with torch.no_grad():
            values.copy_(0.5 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def ids_of(rows, length=9):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def rows_alone(model, ids, names, run):
    """Each adapter alone on the whole batch, and of it the rows that are its own."""
    rows = [None] * len(names)
    for name in dict.fromkeys(names):
        if name == BASE:
            with model.disable_adapter():
                outputs = run(ids)
        else:
            model.set_adapter(name)
            outputs = run(ids)
        for row, of_row in enumerate(names):
            if of_row == name:
                rows[row] = outputs[row]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_is_that_of_its_adapter_alone(tiny_model, kind, dtype):
    # `model.double()` would turn the values to float64 as well; the base alone is meant.
    model = with_adapters(tiny_model(kind).to(dtype), kind)
    names = ["two", BASE, "wide", "one", "tied", "basis", BASE, "late", "two", "seeded"]
    ids = ids_of(len(names))

    mixed = logits_of(model, ids, adapter_names=names)

    expected = rows_alone(model, ids, names, lambda ids: logits_of(model, ids))
    # One r x r product in another order; logits of the order of ten.
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(mixed, expected, rtol=0, atol=tolerance)
    # Negative control: the rows' adapters do differ, by far more than that.
    shifted = logits_of(model, ids, adapter_names=names[1:] + names[:1])
    assert (shifted - expected).flatten(1).abs().amax(1).min() > 1000 * tolerance


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_an_adapter_are_the_base_models_bit_for_bit(tiny_model, kind, dtype):
    base = tiny_model(kind).to(dtype)
    names = [BASE, "one", BASE, "wide", "late", BASE]
    ids = ids_of(len(names))
    expected = logits_of(base, ids)
    model = with_adapters(base, kind)

    mixed = logits_of(model, ids, adapter_names=names)

    for row, name in enumerate(names):
        assert torch.equal(mixed[row], expected[row]) == (name == BASE)
    assert torch.equal(logits_of(model, ids, adapter_names=[BASE] * len(names)), expected)


def test_bfloat16_rows_are_those_of_their_adapters_alone(tiny_qwen2):
    model = with_adapters(tiny_qwen2().bfloat16())
    names = ["one", "wide", "two", BASE]
    ids = ids_of(len(names))

    mixed = logits_of(model, ids, adapter_names=names)

    expected = rows_alone(model, ids, names, lambda ids: logits_of(model, ids))
    # Two roundings of eight bits at logits of the order of ten.
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0.15)


class CountProducts(TorchDispatchMode):
    """Counts the matrix products by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "matmul", "linear", "einsum", "baddbmm"):
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def products(model, ids, names):
    with CountProducts() as counter:
        logits_of(model, ids, adapter_names=names)
    return counter.counts


def test_the_number_of_products_does_not_depend_on_the_number_of_adapters(tiny_qwen2):
    many = {f"adapter{i}": {} for i in range(32)}
    model = with_adapters(tiny_qwen2(), adapters={**many, "wide": {"r": 3}, "tied": {"n_tie": "all"}})
    ids = ids_of(32)

    one = products(model, ids, ["adapter0"] * 32)
    all_of_them = products(model, ids, list(many))

    assert one == all_of_them and sum(one.values()) > 24
    # Another way of tying at the same rank is one small product more, before the first block; another rank three for
    # each of the eight modules.
    tied = products(model, ids, [*list(many)[:31], "tied"])
    assert sum(tied.values()) - sum(one.values()) == 1
    wide = products(model, ids, [*list(many)[:31], "wide"])
    assert sum(wide.values()) - sum(one.values()) == 1 + 3 * 8


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_generation_continues_each_row_by_its_adapter(tiny_model, kind):
    model = with_adapters(tiny_model(kind), kind)
    names = ["one", BASE, "two", "wide", "tied", "late"]
    ids = ids_of(len(names), 5)
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    def run(ids, **kwargs):
        return model.generate(input_ids=ids, min_new_tokens=8, **arguments, **kwargs)

    mixed = run(ids, adapter_names=names)

    assert torch.equal(mixed, rows_alone(model, ids, names, run))
    assert len({tuple(row.tolist()) for row in mixed[:, 5:]}) > 3
    # Without the cache the same tokens come out.
    assert torch.equal(run(ids, adapter_names=names, use_cache=False), mixed)


def test_beams_belong_to_their_rows(tiny_qwen2):
    model = with_adapters(tiny_qwen2())
    names = ["one", BASE, "wide"]
    ids = ids_of(len(names), 5)
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}

    def run(ids, **kwargs):
        tokens = model.generate(
            input_ids=ids, min_new_tokens=6, attention_mask=torch.ones_like(ids), **arguments, **kwargs
        )
        return tokens.reshape(len(ids), 2, -1)

    mixed = run(ids, adapter_names=names)

    assert torch.equal(mixed, rows_alone(model, ids, names, run))


def test_values_changed_between_passes_are_seen(tiny_qwen2):
    model = with_adapters(tiny_qwen2())
    names, ids = ["one", "two"], ids_of(2)
    before = logits_of(model, ids, adapter_names=names)
    with torch.no_grad():
        model.base_model.bank.trl_tinylora_v["two"].values_GK.mul_(-1)

    after = logits_of(model, ids, adapter_names=names)

    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_the_active_adapter_and_its_gradient_are_left_alone(tiny_qwen2):
    model = with_adapters(tiny_qwen2())
    model.set_adapter("two")
    ids = ids_of(2)
    expected = logits_of(model, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    values = model.base_model.bank.trl_tinylora_v["two"].values_GK
    gradient, values.grad = values.grad.clone(), None

    logits_of(model, ids, adapter_names=["one", BASE])

    assert model.active_adapters == ["two"] and model.base_model.bank.mixed_batch is None
    assert torch.equal(logits_of(model, ids), expected)
    model(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(values.grad, gradient)


def test_disabled_adapters_stay_disabled(tiny_qwen2):
    base = tiny_qwen2()
    ids = ids_of(2)
    expected = logits_of(base, ids)
    model = with_adapters(base)

    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids, adapter_names=["one", "two"]), expected)


# What is refused


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_name_for_each_row_is_needed(tiny_qwen2, count):
    model = with_adapters(tiny_qwen2())

    with pytest.raises(
        ValueError, match=f"Length of `adapter_names` should be the same.*but got {count} and 2 respectively"
    ):
        logits_of(model, ids_of(2), adapter_names=["one"] * count)

    # And the model can be used again.
    assert model.base_model.bank.mixed_batch is None
    logits_of(model, ids_of(2))


def test_unknown_names_are_an_error(tiny_qwen2):
    model = with_adapters(tiny_qwen2())

    with pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): base, nope$"):
        logits_of(model, ids_of(3), adapter_names=["nope", "one", "base"])


def test_training_mode_is_an_error(tiny_qwen2):
    model = with_adapters(tiny_qwen2()).train()

    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model(input_ids=ids_of(1), adapter_names=["one"])


def test_a_merged_model_is_an_error(tiny_qwen2):
    model = with_adapters(tiny_qwen2())
    model.merge_adapter()

    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        logits_of(model, ids_of(1), adapter_names=["one"])
    model.unmerge_adapter()
    logits_of(model, ids_of(1), adapter_names=["one"])


@pytest.mark.parametrize("extra", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [4, 5]}])
def test_what_is_trained_beside_the_values_cannot_differ_between_rows(tiny_qwen2, extra):
    model = with_adapters(tiny_qwen2(), adapters={"one": {}, "two": {}, "more": extra})

    with pytest.raises(NotImplementedError, match="'more' has trained modules or tokens beside its values"):
        logits_of(model, ids_of(2), adapter_names=["one", "more"])
    # Active, it would speak for every row.
    model.set_adapter("more")
    with pytest.raises(NotImplementedError, match="make another adapter active"):
        logits_of(model, ids_of(2), adapter_names=["one", "two"])
    model.set_adapter("one")
    logits_of(model, ids_of(2), adapter_names=["one", "two"])
