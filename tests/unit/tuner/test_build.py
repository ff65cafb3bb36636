"""Modules are decomposed side by side, and nobody can tell from the factors how many at a time. CPU, seconds."""

import threading

import pytest
import torch
from torch import nn

import trl_tinylora.tuner.build
from trl_tinylora.maths.svd import FULL_SVD_BELOW
from trl_tinylora.tuner.build import compute_factors


SIZES = {"small": (24, 40), "square": (450, 450), "wide": (320, 800), "tall": (800, 320)}
assert all(min(shape) * shape[0] * shape[1] > FULL_SVD_BELOW for name, shape in SIZES.items() if name != "small")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(columns, rows) for name, (rows, columns) in SIZES.items()})


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch):
    """The thread that decomposed each weight and how many threads of torch it had, in the order of the calls."""
    calls, original = [], trl_tinylora.tuner.build.truncated_svd

    def spy(weight, rank):
        calls.append((tuple(weight.shape), threading.current_thread(), torch.get_num_threads()))
        return original(weight, rank)

    monkeypatch.setattr(trl_tinylora.tuner.build, "truncated_svd", spy)
    return calls


def test_factors_and_probes_are_the_same_bits_whatever_the_number_of_threads(model, threads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1)
        expected, expected_measured = compute_factors(model, None, list(SIZES), 2)
    torch.set_num_threads(threads)

    factors, measured = compute_factors(model, None, list(SIZES), 2)

    assert list(factors) == list(SIZES) and measured == expected_measured
    for name in SIZES:
        assert all(map(torch.equal, factors[name], expected[name]))


def test_each_module_has_one_thread_and_the_callers_number_is_restored(model, threads, seen):
    compute_factors(model, None, list(SIZES), 2)

    assert [count for _, _, count in seen] == [1] * 4
    assert torch.get_num_threads() == threads
    # A new Python thread has the caller's number as well.
    found = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [threads]


def test_the_number_is_restored_and_the_first_module_named_where_weights_are_damaged(model, threads):
    for name in ("wide", "square"):
        model[name].weight.data[0, 0] = float("nan")

    with pytest.raises(ValueError, match="square: 1 of 202500 entries are not finite"):
        compute_factors(model, None, list(SIZES), 2)

    assert torch.get_num_threads() == threads


def test_sharded_weights_are_decomposed_in_order_on_the_calling_thread(model, threads, seen, monkeypatch):
    monkeypatch.setattr(trl_tinylora.tuner.build, "is_sharded", lambda weight: weight is model["wide"].weight)
    monkeypatch.setattr(trl_tinylora.tuner.build, "same_on_all", lambda tensors: None)

    compute_factors(model, None, list(SIZES), 2)

    assert [shape for shape, _, _ in seen] == list(SIZES.values())
    assert {thread for _, thread, _ in seen} == {threading.current_thread()}
    # Negative control: whole weights are not.
    monkeypatch.undo()
    started = []
    run = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(self), run(self))[1])
    compute_factors(model, None, list(SIZES), 2)
    assert 1 <= len(started) <= threads
