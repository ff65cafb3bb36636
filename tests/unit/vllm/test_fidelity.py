"""How much of an update reaches a sampler of merged weights: the figures against NumPy, the callback under GRPO."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

import trl_tinylora
from trl_tinylora import SamplingFidelityCallback, TinyLoraConfig, sampling_fidelity
from trl_tinylora.maths.decomposition import delta_weight
from trl_tinylora.vllm.fidelity import SHARE_KEY, ULPS_KEY, Fidelity, _positions, _sums, _ulp


KEYS = {SHARE_KEY, ULPS_KEY}
EDGES = [0.0, 1.0, 1.5, 2.0, 0.99609375, 0.02, 255.0, 256.0, 65504.0, 6.1e-5, 6.1035156e-5, 1e-7, 1.2e-38, 9.2e-41]


def numpy_round(numbers, bits):
    """Rounds float64 to numbers of `bits` bits with bfloat16's exponents, ties to even, without torch."""
    exponents = np.maximum(np.frexp(np.where(numbers == 0, 1.0, numbers))[1], -125)
    places = np.ldexp(1.0, exponents - bits)
    return np.rint(numbers / places) * places


def numpy_fidelity(weight, delta):
    """Share and median in float64 for a bfloat16 weight, from the definition."""
    effective = numpy_round((weight.astype(np.float32) + delta.astype(np.float32)).astype(np.float64), 8) - weight
    exponents = np.maximum(np.floor(np.log2(np.maximum(np.abs(weight), 2.0**-126))), -126)
    ulps = np.abs(delta) / 2.0 ** (exponents - 7)
    return (effective * delta).sum() / (delta**2).sum(), np.median(ulps)


@pytest.fixture
def adapted(make_model):
    """`adapted(size, dtype)`: the model with values of about this size."""

    def make(size, dtype=torch.bfloat16):
        model = get_peft_model(make_model(dtype), TinyLoraConfig())
        values_GK = model.base_model.bank.trl_tinylora_v["default"].values_GK
        with torch.no_grad():
            values_GK.copy_(size * torch.randn(values_GK.shape, generator=torch.Generator().manual_seed(3)))
        return model

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_last_place_is_the_distance_to_the_next_number(dtype):
    numbers = torch.tensor([*EDGES, *[-x for x in EDGES]], dtype=torch.float64).to(dtype)
    above = torch.nextafter(numbers.abs(), torch.full_like(numbers, torch.inf)).double()
    assert torch.equal(_ulp(numbers, dtype), above - numbers.abs().double())


def test_the_last_place_of_float16_is_numpys_spacing():
    numbers = torch.tensor([x for x in EDGES if x < 65504], dtype=torch.float64).to(torch.float16)
    expected = torch.from_numpy(np.spacing(numbers.numpy()).astype(np.float64))
    assert torch.equal(_ulp(numbers, torch.float16), expected) and expected[0] == 2.0**-24


def test_the_last_place_of_subnormal_bfloat16_is_the_smallest_number():
    # By its bits: 1 is the smallest number above zero.
    smallest = torch.tensor([1], dtype=torch.int16).view(torch.bfloat16).double()
    for bits in (0, 1, 5, 127, 128):
        number = torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16)
        assert _ulp(number, torch.bfloat16) == smallest


@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
def test_share_and_median_are_those_of_the_definition_in_numpy(size):
    generator = torch.Generator().manual_seed(0)
    left_OR, right_RI = torch.randn(40, 2, generator=generator), torch.randn(2, 31, generator=generator)
    weight_OI = (0.05 * torch.randn(40, 31, generator=generator)).bfloat16()
    weight_OI[0, :3] = torch.tensor([0.0, 0.5, -0.25])
    mixing_RR = size * torch.randn(2, 2, generator=generator)
    delta_OI = delta_weight(left_OR, mixing_RR, right_RI)
    found = _sums(weight_OI, delta_OI, weight_OI.dtype)
    share, median = numpy_fidelity(weight_OI.double().numpy(), delta_OI.double().numpy())
    assert (found.inner / found.square).item() == pytest.approx(share, rel=1e-9, abs=1e-12)
    assert np.median(found.ulps_N.numpy()) == pytest.approx(median, rel=1e-12)
    assert found.n_inexact == 0
    # The sizes go from where all is lost to where nothing is.
    assert share < 0.3 if size == 1e-5 else share > 0.8 if size == 1e-4 else share > 0.99


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_the_figures_of_a_model_are_those_of_what_merging_does_to_it(tiny_model, kind):
    model = get_peft_model(tiny_model(kind).bfloat16(), TinyLoraConfig(n_tie=3, u=2))
    values_GK = model.base_model.bank.trl_tinylora_v["default"].values_GK
    with torch.no_grad():
        values_GK.copy_(2e-3 * torch.randn(values_GK.shape, generator=torch.Generator().manual_seed(3)))
    layers = {module.name: module for module in model.modules() if isinstance(module, trl_tinylora.tuner.layer.Linear)}
    before = {name: layer.get_base_layer().weight.double().clone() for name, layer in layers.items()}
    deltas = {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}
    found = sampling_fidelity(model)
    model.merge_adapter()
    assert sampling_fidelity(model) == found, "a merged model has another original weight"
    inner, square = {}, {}
    for name, layer in layers.items():
        effective = layer.get_base_layer().weight.double() - before[name]
        inner[name], square[name] = (effective * deltas[name]).sum().item(), deltas[name].square().sum().item()
        assert found.modules[name].share == pytest.approx(inner[name] / square[name], rel=1e-4)
    assert found.modules.keys() == layers.keys()
    assert found.total.share == pytest.approx(sum(inner.values()) / sum(square.values()), rel=1e-4)
    assert 0.1 < found.total.share < 0.9 and found.total.is_exact
    ulps = torch.cat([(deltas[name].abs() / _ulp(before[name], torch.bfloat16)).flatten() for name in layers])
    assert found.total.ulps == pytest.approx(ulps.median().item(), rel=1e-4)


def test_the_active_adapters_count_together_and_one_by_name_alone(adapted):
    model = adapted(1e-3)
    alone = sampling_fidelity(model)
    model.add_adapter("other", TinyLoraConfig())
    with torch.no_grad():
        ours, other = (model.base_model.bank.trl_tinylora_v[name].values_GK for name in ("default", "other"))
        other.copy_(-ours)
    assert sampling_fidelity(model, "default") == sampling_fidelity(model) == alone
    model.base_model.set_adapter(["default", "other"])
    # They cancel.
    assert sampling_fidelity(model).total.share is None
    assert sampling_fidelity(model, "other").total.ulps == alone.total.ulps


def test_values_of_zero_have_no_share(adapted):
    found = sampling_fidelity(adapted(0.0))
    assert found.total == Fidelity(None, 0.0, True) and not found.total.is_base
    assert set(found.modules.values()) == {found.total}


def test_a_part_of_the_entries_stands_for_all(tiny_qwen2):
    model = get_peft_model(tiny_qwen2(hidden_size=128, intermediate_size=192).bfloat16(), TinyLoraConfig())
    with torch.no_grad():
        model.base_model.bank.trl_tinylora_v["default"].values_GK.fill_(2e-3)
    whole, part = (sampling_fidelity(model, entries=entries).total for entries in (10**9, 2048))
    assert 0.2 < whole.share < 0.9
    assert part.share != whole.share and abs(part.share - whole.share) < 0.03
    assert part.ulps == pytest.approx(whole.ulps, rel=0.1)


@pytest.mark.parametrize("shape", [(4096, 4096), (512, 3584), (18944, 3584)])
def test_the_entries_lie_evenly_and_at_all_places_of_a_head(shape):
    places = _positions(shape, 4096)
    assert len({*zip(*(place.tolist() for place in places), strict=True)}) == 4096
    for place, size in zip(places, shape, strict=True):
        assert 0 <= place.min() and place.max() < size
        for period in (size // 16, 64, 128):
            counts = torch.bincount(place % period * 16 // period, minlength=16)
            assert counts.min() > 0.8 * 256 and counts.max() < 1.2 * 256
    row, column = _positions((3, 2), 6)
    assert row.tolist() == [0, 0, 1, 1, 2, 2] and column.tolist() == [0, 1, 0, 1, 0, 1]


def test_what_cannot_be_measured_is_refused(adapted, make_model):
    model = adapted(1e-3)
    with pytest.raises(ValueError, match="no TinyLoRA adapter 'absent'"):
        sampling_fidelity(model, "absent")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sampling_fidelity(model, entries=0)
    lora = get_peft_model(make_model(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="no TinyLoRA adapter"):
        SamplingFidelityCallback(SimpleNamespace(model=lora))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match="q_proj is quantised .torch.int8."):
        sampling_fidelity(model)


def test_a_name_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(AttributeError, match="has no attribute 'sampling_infidelity'"):
        trl_tinylora.sampling_infidelity  # noqa: B018


class Reporter(TrainerCallback):
    """As those of wandb or TensorBoard: it writes down what it is told when it is told."""

    def __init__(self):
        self.told = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append(dict(logs))


def test_grpo_logs_both_figures_to_the_history_and_to_reporters_that_came_before(grpo, values):
    reporter = Reporter()
    trainer = grpo(TinyLoraConfig(), train=False, max_steps=3)
    trainer.add_callback(reporter)
    trainer.add_callback(SamplingFidelityCallback(trainer))
    others = set(trainer.callback_handler.callbacks)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3 and all(entry.keys() >= KEYS for entry in steps)
    # TRL's own figures stand in the same entries, and the summary at the end has none of ours.
    assert all("reward" in entry for entry in steps)
    assert not KEYS & trainer.state.log_history[-1].keys() and "train_loss" in trainer.state.log_history[-1]
    assert [{key: told[key] for key in KEYS} for told in reporter.told[:3]] == [{k: e[k] for k in KEYS} for e in steps]
    found = sampling_fidelity(trainer.model, dtype=torch.bfloat16).total
    assert (steps[-1][SHARE_KEY], steps[-1][ULPS_KEY]) == (found.share, found.ulps)
    # It changes its place and nobody else's, and the run is the one without it.
    assert set(trainer.callback_handler.callbacks) == others
    assert isinstance(trainer.callback_handler.callbacks[1], DefaultFlowCallback)
    plain = grpo(TinyLoraConfig(), max_steps=3)
    assert torch.equal(values(plain.model), values(trainer.model)) and plain.seen == trainer.seen


def test_a_reporter_before_a_callback_that_does_not_move_is_told_nothing(grpo):
    reporter = Reporter()
    trainer = grpo(TinyLoraConfig(), train=False, max_steps=1)
    callback = SamplingFidelityCallback(trainer)
    callback.on_train_begin = lambda *args, **kwargs: None
    trainer.add_callback(reporter)
    trainer.add_callback(callback)
    trainer.train()
    assert KEYS <= trainer.state.log_history[0].keys() and not KEYS & reporter.told[0].keys()


def test_the_first_steps_without_values_log_neither(grpo):
    trainer = grpo(TinyLoraConfig(), train=False, max_steps=2, learning_rate=0.0)
    trainer.add_callback(SamplingFidelityCallback(trainer))
    trainer.train()
    assert not any(KEYS & entry.keys() for entry in trainer.state.log_history)


class Run:
    """What a trainer tells its callbacks, of a run whose values are set by hand."""

    def __init__(self, model, use_vllm=True, is_first=True, **fields):
        self.model, self.args = model, SimpleNamespace(use_vllm=use_vllm)
        self.state = TrainerState(is_world_process_zero=is_first)
        self.callback_handler = CallbackHandler([DefaultFlowCallback()], model, None, None, None)
        self.callback_handler.add_callback(SamplingFidelityCallback(self, **fields))
        self.values_GK = model.base_model.bank.trl_tinylora_v["default"].values_GK
        self.direction = self.values_GK.detach().clone()
        self.tell("on_train_begin")

    def tell(self, event, *logs):
        """The warnings at an event."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(self.callback_handler, event)(self.args, self.state, TrainerControl(), *logs)
        return [str(warning.message) for warning in caught]

    def log(self, size):
        """The warnings at a logging step whose values have a size, and what was logged."""
        with torch.no_grad():
            self.values_GK.copy_(size * self.direction)
        self.state.global_step += 1
        self.state.log_history.append({"loss": 0.0})
        said = self.tell("on_log", {"loss": 0.0})
        return said, self.state.log_history[-1]


SMALL, LARGE = 1e-5, 0.1


def test_small_values_in_bfloat16_warn_once_and_once_more_at_the_end(adapted):
    run = Run(adapted(1.0))
    (first,), logged = run.log(SMALL)
    assert logged[SHARE_KEY] < 0.1 and logged[ULPS_KEY] < 0.01
    for part in ("At step 1 ", "effectively those of the base model", "use_vllm=False", "raise the learning rate"):
        assert part in first
    assert [run.log(SMALL)[0] for _ in range(3)] == [[], [], []]
    said, logged = run.log(LARGE)
    assert said == [] and logged[SHARE_KEY] > 0.99 and run.tell("on_train_end") == []
    assert [run.log(size)[0] for size in (SMALL, LARGE, SMALL)] == [[], [], []]
    (last,) = run.tell("on_train_end")
    assert last.startswith("To the end, at 6 of 8 logged steps")


@pytest.mark.parametrize(
    ("size", "dtype", "fields"),
    [
        (LARGE, torch.bfloat16, {}),
        (SMALL, torch.float32, {"dtype": torch.float32}),
        (SMALL, torch.bfloat16, {"use_vllm": False}),
        (SMALL, torch.bfloat16, {"is_first": False}),
        (0.0, torch.bfloat16, {}),
    ],
    ids=["large values", "a sampler in float32", "no vLLM", "another process", "zeros"],
)
def test_nothing_is_said_where_nothing_is_wrong(adapted, size, dtype, fields):
    run = Run(adapted(1.0, dtype), **fields)
    said, logged = run.log(size)
    assert said == [] and run.tell("on_train_end") == []
    assert (KEYS <= logged.keys()) == (size > 0)


def test_a_model_in_float32_is_measured_as_vllm_holds_it(adapted):
    # As TRL loads a checkpoint in bfloat16 by default: float32 numbers that bfloat16 holds exactly.
    model = adapted(1.0, torch.float32)
    for layer in (module for module in model.modules() if isinstance(module, trl_tinylora.tuner.layer.Linear)):
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.bfloat16().float()
    (said,), logged = Run(model).log(SMALL)
    assert logged[SHARE_KEY] < 0.1 and "effectively those of the base model" in said
    assert sampling_fidelity(model).total.share == pytest.approx(1.0, abs=1e-3)


def test_an_update_below_the_rounding_of_the_weights_themselves_is_told_by_the_median(adapted):
    model = adapted(5e-4, torch.float32)
    found = sampling_fidelity(model, dtype=torch.bfloat16).total
    # Rounding of numbers that lie anywhere is right on average.
    assert not found.is_exact and found.share > 0.7 and found.ulps < 0.1
    assert found.is_base and not found._replace(is_exact=True).is_base


def test_evaluations_and_the_summary_are_left_alone(adapted):
    run = Run(adapted(SMALL))
    for logs in ({"eval_loss": 0.1}, {"train_loss": 0.1}):
        run.state.log_history.append(dict(logs))
        assert run.tell("on_log", logs) == []
        assert not KEYS & run.state.log_history[-1].keys() and not KEYS & logs.keys()
