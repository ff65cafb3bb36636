"""
Merging and restoring bit for bit, what an exception in between leaves, and what is held meanwhile.

A restored weight is compared as bits. CPU, seconds.
"""

import copy
import sys
import warnings

import numpy as np
import pytest
import torch
from benchmarks.merge import measure_held
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import layers_of
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from trl_tinylora import TinyLoraConfig, distributed
from trl_tinylora.tuner import adapted_layer, merging
from trl_tinylora.tuner import layer as layer_module
from trl_tinylora.tuner.merging import has_room, merged_weight


FIELDS = {"n_tie": 4, "u": 3}
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}

dtypes = pytest.mark.parametrize("dtype", list(BITS))


def values_of(model, adapter="default"):
    return model.base_model.bank.trl_tinylora_v[adapter].values_GK


def set_values(model, seed, scale=0.5, adapter="default"):
    values = values_of(model, adapter)
    with torch.no_grad():
        values.copy_(scale * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))


def adapted(base, seed=0, **fields):
    model = get_peft_model(base, TinyLoraConfig(**(fields or FIELDS)))
    set_values(model, seed)
    return model


def weights_of(model):
    return {layer.name: layer.base_layer.weight.detach().clone() for layer in layers_of(model)}


def bits_of(tensor):
    return tensor.detach().contiguous().view(BITS[tensor.dtype])


def differing(first, second):
    assert first.keys() == second.keys() and all(first[name].dtype == second[name].dtype for name in first)
    return [name for name in first if not torch.equal(bits_of(first[name]), bits_of(second[name]))]


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


class OneLayer(nn.Module):
    def __init__(self, rows, columns, dtype):
        super().__init__()
        self.linear = nn.Linear(columns, rows, bias=False, dtype=dtype)
        self.linear.weight.data = torch.randn(
            rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        ).to(dtype)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(merging, "CHUNK_ON_CPU", 100)


# Bits


@dtypes
@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_every_bit_of_every_weight_is_restored(tiny_model, small_chunks, kind, dtype):
    model = adapted(tiny_model(kind).to(dtype))
    before = weights_of(model)
    model.merge_adapter()

    # Conv1D and nn.Linear, and every one of them changed.
    assert len(differing(weights_of(model), before)) == {"gpt2": 8, "qwen2": 14}[kind] == len(before)
    assert differing({layer.name: layer.unmerged_weight() for layer in layers_of(model)}, before) == []
    model.unmerge_adapter()
    assert differing(weights_of(model), before) == []
    assert not model.base_model.bank.merged_layers
    assert all(not layer._originals for layer in layers_of(model))


def test_the_merged_weight_is_the_formula_rounded_once():
    model = adapted(OneLayer(48, 40, torch.float32), r=3, u=2, target_modules=["linear"])
    (layer,) = layers_of(model)
    weight = layer.base_layer.weight.detach().double().numpy()
    left, right = (factor.double().numpy() for factor in layer.factors((3, None)))
    projections = model.base_model.bank.plans[0].projections_MKRR[0].double().numpy()
    mixing = np.einsum("k,kij->ij", values_of(model)[0].detach().double().numpy(), projections)

    model.merge_adapter()

    expected = weight + left @ mixing @ right
    found = layer.base_layer.weight.detach().numpy()
    # Rounded once to the nearest: half a unit in the last place, and float32's error in D.
    assert np.abs(found - expected).max() <= 0.5 * np.spacing(np.float32(np.abs(expected).max())) + 2e-6
    assert np.abs(found - weight).max() > 0.1


def test_ten_thousand_cycles_with_changing_values_change_no_bit():
    dtype = torch.bfloat16
    model = adapted(OneLayer(6, 5, dtype), r=2, u=4, projection="basis", target_modules=["linear"])
    (layer,) = layers_of(model)
    before, changed = layer.base_layer.weight.detach().clone(), 0
    subtracted = before.clone()
    drawn = torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0))
    for cycle in range(10_000):
        values_of(model).data[0] = 0.1 * drawn[cycle]
        layer.merge()
        changed += not torch.equal(layer.base_layer.weight, before)
        if cycle % 100 == 0:
            # Negative control, as PEFT's own tuners do.
            delta = layer.get_delta_weight("default")
            subtracted = ((subtracted + delta).to(dtype) - delta).to(dtype)
        layer.unmerge()

    assert torch.equal(bits_of(layer.base_layer.weight), bits_of(before))
    assert changed > 9_900
    assert not torch.equal(subtracted, before)


def test_several_adapters_are_summed_in_float32_and_rounded_once(tiny_qwen2, small_chunks):
    model = adapted(tiny_qwen2().bfloat16())
    # Of rank 1, so that the order of its sum is not in question.
    model.add_adapter("other", TinyLoraConfig(r=1, target_modules=["q_proj", "up_proj"]))
    set_values(model, seed=3, adapter="other")
    before = weights_of(model)
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter()
    layer = model.get_submodule(QUERY)
    deltas = [layer.get_delta_weight(name) for name in ("default", "other")]

    assert torch.equal(layer.base_layer.weight, (before[layer.name].float() + (deltas[0] + deltas[1])).bfloat16())
    # Negative control: rounded after each adapter.
    assert not torch.equal(layer.base_layer.weight, (before[layer.name] + deltas[0]).bfloat16() + deltas[1].bfloat16())
    model.unmerge_adapter()
    assert differing(weights_of(model), before) == []


def finite(dtype):
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.tiny, -info.tiny, info.max, info.min, info.eps, 1.0, -1.0, info.smallest_normal / 2]
    return st.one_of(st.sampled_from(special), st.floats(info.min, info.max, width=32), st.floats(-1, 1, width=32))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float16, torch.float32]))
def test_whatever_finite_weights_and_factors_there_are_numpy_merges_the_same_bits(data, dtype):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    rank = data.draw(st.integers(1, 3))

    def draw(dtype, *shape):
        count = int(np.prod(shape))
        numbers = data.draw(st.lists(finite(dtype), min_size=count, max_size=count))
        limits = torch.finfo(dtype)
        return torch.tensor(numbers, dtype=torch.float64).clamp(limits.min, limits.max).reshape(shape).to(dtype)

    weight, left, right = (
        draw(dtype, rows, columns),
        draw(torch.float32, rows, rank),
        draw(torch.float32, rank, columns),
    )
    with np.errstate(all="ignore"):
        outer = [np.outer(left[:, k].numpy(), right[k].numpy()) for k in range(rank)]
        expected = (sum(outer[1:], start=outer[0]) + weight.float().numpy()).astype(weight.numpy().dtype)

    found = merged_weight(weight, left, right).numpy()
    np.testing.assert_array_equal(found, expected)
    is_number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found[is_number]), np.signbit(expected[is_number]))


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_a_merged_weight_has_the_same_bits_in_any_chunks_and_threads(monkeypatch, rank):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(67, rank, generator=generator), torch.randn(rank, 1031, generator=generator)
    weight, found, threads = torch.randn(67, 1031, generator=generator), [], torch.get_num_threads()
    try:
        for chunk in (1, 3000, 2**18):
            for n_threads in (1, 2):
                torch.set_num_threads(n_threads)
                monkeypatch.setattr(merging, "CHUNK_ON_CPU", chunk)
                found.append(merged_weight(weight, left, right))
    finally:
        torch.set_num_threads(threads)

    assert all(torch.equal(bits_of(other), bits_of(found[0])) for other in found)
    # rank products and sums in float32.
    expected = weight.double().numpy() + left.double().numpy() @ right.double().numpy()
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=(rank + 1) * 4e-6)


def test_weights_of_any_strides_are_restored(small_chunks):
    base = OneLayer(20, 30, torch.bfloat16)
    base.linear.weight.data = base.linear.weight.data.t().contiguous().t()
    model = adapted(base, target_modules=["linear"])
    before = weights_of(model)
    model.merge_adapter()
    assert differing(weights_of(model), before) == ["linear"]
    model.unmerge_adapter()
    assert differing(weights_of(model), before) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_is_cast_while_merged_is_restored_as_the_cast_base(tiny_qwen2, dtype):
    model = adapted(tiny_qwen2().bfloat16())
    before = {name: weight.to(dtype) for name, weight in weights_of(model).items()}
    model.merge_adapter()
    model.to(dtype)
    assert len(differing(weights_of(model), before)) == 14
    model.unmerge_adapter()
    assert differing(weights_of(model), before) == []


def test_a_copy_of_a_merged_model_is_restored_by_itself(tiny_qwen2):
    model = adapted(tiny_qwen2().bfloat16())
    before = weights_of(model)
    model.merge_adapter()
    merged, copied = weights_of(model), copy.deepcopy(model)
    copied.unmerge_adapter()
    assert differing(weights_of(copied), before) == [] and differing(weights_of(model), merged) == []
    model.unmerge_adapter()
    assert differing(weights_of(model), before) == []


def test_an_adapter_added_while_merged_is_that_of_the_base(tiny_qwen2):
    models = [adapted(tiny_qwen2().bfloat16()) for _ in range(2)]
    models[0].merge_adapter()
    for model in models:
        model.add_adapter("other", TinyLoraConfig(r=3))
    models[0].unmerge_adapter()
    for first, second in zip(*map(layers_of, models), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.factors((3, None)), second.factors((3, None)), strict=True))


# Host memory


def test_where_a_gpu_is_nearly_full_originals_go_to_host_memory(tiny_qwen2, monkeypatch):
    # Room for q, k, v and o of the first layer, and none for what comes after; a clone stands for the host's copy.
    asked = []
    monkeypatch.setattr(merging, "has_room", lambda device: asked.append(device) or len(asked) <= 4)
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
    model, other = adapted(tiny_qwen2().bfloat16()), adapted(tiny_qwen2().bfloat16(), seed=4)
    addresses, before = [layer.base_layer.weight.data_ptr() for layer in layers_of(model)], weights_of(model)

    model.merge_adapter()

    originals = [layer._originals["weight"].data_ptr() for layer in layers_of(model)]
    assert [a == b for a, b in zip(originals, addresses, strict=True)] == [True] * 4 + [False] * 10
    # Merging again takes them from there.
    set_values(model, seed=4)
    model.merge_adapter()
    other.merge_adapter()
    assert differing(weights_of(model), weights_of(other)) == []
    model.unmerge_adapter()
    assert differing(weights_of(model), before) == []


def test_an_original_in_host_memory_is_restored_to_the_weights_device(monkeypatch):
    monkeypatch.setattr(merging, "has_room", lambda device: device.type == "cpu")
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(4, 3, device="cuda"), requires_grad=False)
        original = merging.set_aside(weight.data)
        merging.restore(weight, original)
    assert original.device.type == "cpu" and weight.device.type == "cuda"


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "room"),
    [
        (100, 0, 0, True),
        (99, 0, 0, False),
        # What torch has reserved and does not use.
        (0, 150, 50, True),
        (0, 150, 51, False),
    ],
)
def test_there_is_room_while_a_sixteenth_of_the_gpu_is_free(monkeypatch, free, reserved, allocated, room):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1600))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    assert has_room(torch.device("cuda", 0)) is room
    assert has_room(torch.device("cpu"))


# Bytes


class LargestFloat(TorchDispatchMode):
    """Entries of the largest tensor in float32 or float64 that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.float64):
            self.entries = max(self.entries, result.numel())
        return result


def test_a_copy_is_held_while_merged_and_no_float32_copy_is_made(monkeypatch):
    monkeypatch.setattr(merging, "CHUNK_ON_CPU", 4096)
    model = adapted(OneLayer(256, 128, torch.bfloat16), r=2, target_modules=["linear"])
    (layer,) = layers_of(model)
    weight = layer.base_layer.weight

    assert measure_held(model) == weight.nbytes
    with LargestFloat() as largest:
        model.merge_adapter()
        model.unmerge_adapter()
    assert largest.entries == 4096 < weight.numel()


# What goes wrong


def test_a_merge_that_is_not_finite_leaves_what_was_merged_before(tiny_qwen2, small_chunks):
    model = adapted(tiny_qwen2().half())
    model.add_adapter("huge", TinyLoraConfig(r=1))
    before = weights_of(model)
    model.merge_adapter()
    merged = weights_of(model)
    with torch.no_grad():
        values_of(model, "huge").fill_(1e9)
        for layer in layers_of(model):
            # Finite in all rows but the last.
            layer.factors((1, None))[0][:-1] = 0

    with pytest.raises(ValueError, match=r"merging default, huge gives weights that are not finite in torch\.float16"):
        model.merge_adapter(safe_merge=True, adapter_names=["huge"])

    assert differing(weights_of(model), merged) == []
    assert all(layer.merged_adapters == ["default"] for layer in layers_of(model))
    model.unmerge_adapter()
    assert differing(weights_of(model), before) == []


class Interrupted:
    """Raises KeyboardInterrupt at the n-th line that is run of the layers, of `merging.py` and of `distributed.py`."""

    FILES = {module.__file__ for module in (adapted_layer, layer_module, merging, distributed)}

    def __init__(self, line):
        self.left = line

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *exception):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self.FILES:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


@pytest.mark.parametrize("call", ["merge", "merge again", "unmerge"])
def test_a_layer_interrupted_at_any_line_is_as_it_was(small_chunks, call):
    model = adapted(OneLayer(12, 25, torch.bfloat16), target_modules=["linear"])
    (layer,), bank = layers_of(model), model.base_model.bank
    unmerged, line = layer.base_layer.weight.detach().clone(), 0
    while True:
        line += 1
        if call != "merge":
            set_values(model, seed=0)
            layer.merge()
            set_values(model, seed=1)
        before = layer.base_layer.weight.detach().clone(), layer.merged, set(bank.merged_layers)
        try:
            with Interrupted(line):
                layer.unmerge() if call == "unmerge" else layer.merge()
            break
        except KeyboardInterrupt:
            if call != "unmerge":
                assert torch.equal(bits_of(layer.base_layer.weight), bits_of(before[0])), line
                assert (layer.merged, bank.merged_layers) == before[1:], line
            layer.unmerge()
        assert torch.equal(bits_of(layer.base_layer.weight), bits_of(unmerged)), line
        assert not layer.merged and not bank.merged_layers and not layer._originals
    # Lines of every step were tried, and the last call ran to its end.
    assert line > (10 if call == "unmerge" else 50)
    assert layer.merged == (call != "unmerge")


def sync_that_fails(model):
    # trl v1.16.0, trl/generation/vllm_generation.py:443-470: no try, no finally.
    model.merge_adapter()
    raise ConnectionError("the server is gone")


def sync(model):
    """What a transfer to vLLM sends."""
    model.merge_adapter()
    sent = weights_of(model)
    model.unmerge_adapter()
    return sent


@pytest.fixture
def reentrant_backwards(monkeypatch):
    """One entry for each backward pass of a reentrant checkpoint."""
    calls, original = [], CheckpointFunction.backward
    monkeypatch.setattr(CheckpointFunction, "backward", staticmethod(lambda *args: calls.append(1) or original(*args)))
    return calls


def training(model, checkpointing):
    if checkpointing != "no checkpointing":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
    return model.train()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", ["no checkpointing", "not reentrant", "reentrant"])
def test_training_after_a_transfer_that_failed_goes_on_from_the_base(
    tiny_qwen2, token_ids, reentrant_backwards, checkpointing
):
    model, untouched = (training(adapted(tiny_qwen2().bfloat16()), checkpointing) for _ in range(2))
    before = weights_of(model)
    expected = loss_of(untouched, token_ids)
    expected.backward()
    with pytest.raises(ConnectionError):
        sync_that_fails(model)
    assert len(differing(weights_of(model), before)) == 14

    with pytest.warns(UserWarning, match="14 layers were still merged when a training pass began.*bit for bit"):
        loss = loss_of(model, token_ids)
    loss.backward()

    assert differing(weights_of(model), before) == [] and not model.base_model.bank.merged
    assert torch.equal(loss, expected)
    assert torch.equal(values_of(model).grad, values_of(untouched).grad) and values_of(model).grad.abs().sum() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loss_of(model, token_ids).backward()
    # Three passes through two blocks.
    assert len(reentrant_backwards) == (6 if checkpointing == "reentrant" else 0)


def test_a_transfer_between_forward_and_backward_changes_no_gradient(tiny_qwen2, token_ids):
    model, untouched = (adapted(tiny_qwen2()).train() for _ in range(2))
    loss_of(untouched, token_ids).backward()
    loss = loss_of(model, token_ids)
    sync(model)
    with torch.inference_mode():
        sync(model)
    loss.backward()
    assert torch.equal(values_of(model).grad, values_of(untouched).grad)


def test_peft_leaves_a_lora_merged_for_good(tiny_qwen2, token_ids):
    # Negative control of the test above.
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_qwen2().bfloat16(), config).train()
    weight = model.get_submodule(QUERY).base_layer.weight
    before = weight.detach().clone()
    with pytest.raises(ConnectionError):
        sync_that_fails(model)

    loss_of(model, token_ids)

    assert not torch.equal(weight, before) and model.get_submodule(QUERY).merged


def test_the_next_transfer_after_one_that_failed_sends_the_present_values(tiny_qwen2):
    model = adapted(tiny_qwen2().bfloat16())
    before = weights_of(model)
    stale = sync(model)
    with pytest.raises(ConnectionError):
        sync_that_fails(model)
    set_values(model, seed=4)
    with pytest.warns(UserWarning, match="default had been merged before and not unmerged: merged afresh") as caught:
        sent = sync(model)
    assert len([w for w in caught if "afresh" in str(w.message)]) == 1
    assert differing(weights_of(model), before) == []
    assert len(differing(sent, stale)) == 14
    assert differing(sent, sync(adapted(tiny_qwen2().bfloat16(), seed=4))) == []


def test_merging_and_unloading_a_merged_model_takes_the_present_values(tiny_qwen2):
    model, other = adapted(tiny_qwen2().bfloat16()), adapted(tiny_qwen2().bfloat16(), seed=4)
    model.merge_adapter()
    set_values(model, seed=4)
    unloaded, expected = model.merge_and_unload().state_dict(), other.merge_and_unload().state_dict()
    assert differing(unloaded, expected) == []


@pytest.mark.parametrize("mode", ["eval", "no_grad", "frozen"])
def test_a_merged_model_that_is_not_trained_stays_merged(tiny_qwen2, token_ids, mode):
    model = adapted(tiny_qwen2())
    model.merge_adapter()
    merged = weights_of(model)
    model.train(mode != "eval")
    if mode == "frozen":
        model.set_requires_grad("default", requires_grad=False)
    with torch.set_grad_enabled(mode != "no_grad"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=token_ids)
        if mode == "no_grad":
            model.generate(input_ids=token_ids, max_new_tokens=2, do_sample=False)
    assert differing(weights_of(model), merged) == [] and model.base_model.bank.merged


@pytest.fixture
def fails_in_the_sixth_layer(monkeypatch):
    """Weights that were merged: the sixth runs out of memory."""
    calls = []

    def failing(*args):
        calls.append(1)
        if len(calls) == 6:
            raise MemoryError
        return merged_weight(*args)

    monkeypatch.setattr(adapted_layer, "merged_weight", failing)


def test_a_merge_that_failed_half_way_leaves_its_layer_alone_and_training_restores_the_others(
    tiny_qwen2, token_ids, fails_in_the_sixth_layer
):
    model, untouched = (adapted(tiny_qwen2().bfloat16()).train() for _ in range(2))
    before = weights_of(model)
    loss_of(untouched, token_ids).backward()

    with pytest.raises(MemoryError):
        model.merge_adapter()

    names = [layer.name for layer in layers_of(model)]
    assert differing(weights_of(model), before) == names[:5]
    assert [layer.merged for layer in layers_of(model)] == [True] * 5 + [False] * 9
    # Its function is the adapted model's all the same.
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model, token_ids), loss_of(untouched, token_ids), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model.eval()(input_ids=token_ids, adapter_names=["default", "__base__"])
    with pytest.warns(UserWarning, match="5 layers were still merged"):
        loss_of(model.train(), token_ids).backward()
    assert differing(weights_of(model), before) == []
    assert torch.equal(values_of(model).grad, values_of(untouched).grad)


def test_a_pass_without_the_adapter_restores_what_a_failed_merge_left(tiny_qwen2, token_ids, fails_in_the_sixth_layer):
    base = tiny_qwen2().bfloat16()
    with torch.no_grad():
        expected = base(input_ids=token_ids).logits
    model = adapted(base)
    before = weights_of(model)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    with torch.no_grad(), model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(model(input_ids=token_ids).logits, expected)
    assert differing(weights_of(model), before) == [] and not model.base_model.bank.merged_layers


class CheckpointedBlocks(nn.Module):
    # As in the first GPTs, the list of blocks is in a dictionary of modules, which has no forward of its own.
    def __init__(self):
        super().__init__()
        blocks = nn.ModuleList([OneLayer(8, 8, torch.float32) for _ in range(2)])
        self.transformer = nn.ModuleDict({"h": blocks})

    def forward(self, x):
        for block in self.transformer["h"]:
            x = checkpoint(block, x, use_reentrant=True)
        return x


@pytest.mark.parametrize("place", ["where blocks are called", "at the first block"])
def test_a_checkpoint_around_every_block_hides_no_training_pass(place):
    model = adapted(CheckpointedBlocks(), target_modules=["linear"]).train()
    before, base = weights_of(model), model.get_base_model()
    if place == "at the first block":
        # Negative control: a reentrant checkpoint calls its block without gradients.
        model.base_model.bank.remove_hooks()
        base.transformer["h"][0].register_forward_pre_hook(model.base_model.bank.before_blocks, prepend=True)
    model.merge_adapter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model(torch.ones(1, 8, requires_grad=True))
    if place == "at the first block":
        assert caught == [] and differing(weights_of(model), before) == list(before)
        return
    assert [str(warning.message)[:50] for warning in caught] == ["2 layers were still merged when a training pass be"]
    assert differing(weights_of(model), before) == []
    output.sum().backward()
    assert values_of(model).grad.abs().sum() > 0


def test_a_weight_that_was_partitioned_again_while_merged_is_left_to_zero(tiny_qwen2):
    # As ZeRO-3 leaves it after `with GatheredParameters(...)`: its parts never saw the merge.
    model = adapted(tiny_qwen2())
    weights = [layer.base_layer.weight for layer in layers_of(model)]
    for weight in weights:
        weight.ds_shape = weight.shape
    model.merge_adapter()
    for weight in weights:
        weight.data = torch.empty(0)
    model.unmerge_adapter()
    assert all(weight.shape == (0,) for weight in weights) and not model.base_model.bank.merged_layers


def test_names_are_a_list(tiny_qwen2):
    with pytest.raises(TypeError, match="adapter_names should be a list of strings, got 'default'"):
        adapted(tiny_qwen2()).merge_adapter("default")


def test_the_bank_lists_every_merged_layer(tiny_qwen2):
    model = adapted(tiny_qwen2())
    bank = model.base_model.bank
    model.merge_adapter()
    assert bank.merged_layers == {layer.name for layer in layers_of(model)} and len(bank.merged_layers) == 14
    model.unmerge_adapter()
    assert bank.merged_layers == set() and bank.merged_adapters == []
