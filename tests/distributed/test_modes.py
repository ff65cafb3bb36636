"""
TRL's trainers under DDP, DeepSpeed ZeRO-1/2/3 and FSDP2, two processes, against one process. CPU and gloo, minutes.

Each mode is launched as users launch it, with its file in recipes/accelerate; "fsdp2 at load" is transformers' own
sharding by `model_init_kwargs`.
"""

import functools
import json
import time

import pytest
import torch
import worker
from cases import NUMERIC, TOLERANCE
from peft import PeftModel, get_peft_model
from runs import run_cases, try_cases
from tiny import ROWS, values_in
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig


# Of all combinations (`make test-distributed` runs them) the ones that went wrong in other implementations.
CASES = [
    case
    for case in NUMERIC
    if case["name"]
    in (
        "sft-all-off-1",
        "sft-tiled-reentrant-4",
        "grpo-structured-reentrant-1",
        "grpo-untied-default-4",
    )
]
SAVING = {"save_strategy": "steps", "save_steps": 2}
SAVED = {"name": "saved", "trainer": "sft", "fields": {"n_tie": 4}, "max_steps": 4, "save": True, "arguments": SAVING}
RESUMED = {**SAVED, "name": "resumed", "save": False}
BEST = {
    **SAVED,
    "name": "best",
    "save": False,
    # The worst loss is the first checkpoint's, and is not the last one's.
    "arguments": {
        **SAVING,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    },
}
# ZeRO-3 loads in the precision it trains in, whatever `dtype` says.
SYNCED = {"name": "synced", "trainer": "grpo", "max_steps": 2, "dtype": "bfloat16", "bf16": True, "transfers": 3}
HALF = {
    "name": "bf16",
    "trainer": "sft",
    "fields": {"n_tie": 4},
    "max_steps": 3,
    "dtype": "bfloat16",
    "bf16": True,
    "arguments": {"learning_rate": 1e-3},
}
FP16 = {**HALF, "name": "fp16", "dtype": "float32", "bf16": False, "arguments": {"learning_rate": 1e-3, "fp16": True}}
# TRL keeps a copy of an adapter that it is given as the reference, and switches between the two.
GIVEN = {**CASES[3], "name": "given", "max_steps": 4}
LOST = {**CASES[0], "name": "control-lost", "control": "lost gradient"}
# What must fail is last: a launch ends with it, unless it strikes all processes before they wait for each other.
PLAIN = {**CASES[1], "name": "control-plain", "control": "plain autograd", "fails": True}
UNGATHERED = {**CASES[1], "name": "control-ungathered", "control": "no gather", "fails": True, "fails_together": True}
ONE_FAILS = {**CASES[0], "name": "control-one-fails", "control": "one rank fails", "fails": True}
CONTROLS = {"ddp": [LOST, PLAIN], "zero3": [UNGATHERED, PLAIN], "fsdp2": [ONE_FAILS]}

MODES = ["ddp", "zero2", "zero3", "fsdp2", "fsdp2 at load"]


def in_group(mode, *values):
    """A parameter of the tests that share a mode's launch, so that one worker of pytest-xdist has them all."""
    return pytest.param(mode, *values, marks=pytest.mark.xdist_group(mode))


@pytest.fixture(scope="module", params=map(in_group, MODES))
def mode(request):
    return request.param


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of a mode's launch."""
    return functools.cache(lambda mode: tmp_path_factory.mktemp(mode))


@pytest.fixture
def folder(mode, folder_of):
    return folder_of(mode)


@pytest.fixture(scope="session")
def trained_before(base_folder, tmp_path_factory):
    """The folder of an adapter whose values are 0.05."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder, dtype="float32"), TinyLoraConfig(n_tie=4))
    with torch.no_grad():
        worker.values_of(model).fill_(0.05)
    saved = str(tmp_path_factory.mktemp("trained-before"))
    model.save_pretrained(saved)
    return saved


@pytest.fixture(scope="session")
def launch(folder_of, base_folder, trained_before):
    """Runs every case of a mode in one launch; what each found on every rank, and when the launch ended."""

    @functools.cache
    def run(mode):
        cases = [*CASES, SAVED]
        if mode == "fsdp2 at load":
            # transformers 5.23 saves no optimiser state of models sharded at load time, and says so.
            cases[-1] = {**SAVED, "arguments": {**SAVING, "save_only_model": True}}
        else:
            resume = {"resume_from_checkpoint": str(folder_of(mode) / "saved" / "checkpoint-2")}
            cases += [{**RESUMED, "arguments": {**SAVING, **resume}}, BEST]
        cases += [SYNCED, HALF, {**GIVEN, "given": trained_before}]
        if mode.startswith("zero"):
            cases.append(FP16)
        return run_cases(mode, cases + CONTROLS.get(mode, []), base_folder, ROWS, folder_of(mode)), time.time()

    return run


@pytest.fixture
def found(mode, launch):
    return launch(mode)[0]


@pytest.fixture
def trained(found):
    """What the cases found that were to train."""
    return {name: ranks for name, ranks in found.items() if not any("error" in rank for rank in ranks)}


@pytest.fixture(scope="session")
def alone(base_folder, tmp_path_factory):
    """Runs a case in this one process; a case that was run before is not run again."""
    known = {}

    def run(case, folder=None):
        key = json.dumps(case, sort_keys=True)
        if key not in known:
            output_dir = folder or tmp_path_factory.mktemp("alone")
            known[key] = worker.observe({**case, "mode": "single"}, base_folder, ROWS, output_dir)
            worker.forget_the_last_case()
        return known[key]

    return run


def difference(first, second):
    return max(abs(a - b) for a, b in zip(first["values"], second["values"], strict=True))


def adapter_of(base_folder, checkpoint):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder, dtype="float32"), checkpoint)


@pytest.mark.parametrize("case", [*CASES, GIVEN], ids=lambda case: case["name"])
def test_two_processes_train_the_values_of_one(found, mode, alone, case, trained_before):
    expected = alone(case | ({"given": trained_before} if case is GIVEN else {}))
    ranks = found[case["name"]]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["processes"] == 2 and rank["dtypes_in_forward"] == ["torch.float32"]
        assert difference(rank, expected) <= TOLERANCE
        # The factors are the same bits on each rank.
        assert rank["factors"] == expected["factors"]
    assert max(map(abs, expected["values"])) > 100 * TOLERANCE
    assert difference(*ranks) == 0


def test_the_mode_is_the_one_that_was_asked_for(trained, mode):
    engine = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModel", "fsdp2 at load": "PeftModel"}.get(
        mode, "DeepSpeedEngine"
    )
    stage = {"zero2": 2, "zero3": 3}.get(mode)
    for case, ranks in trained.items():
        for rank in ranks:
            assert (rank["engine"], rank["zero_stage"]) == (engine, stage), case
            # 26 base weights; DeepSpeed and accelerate shard the values of every adapter as well.
            adapters = (1 if case != "given" else 2) if mode in ("zero3", "fsdp2") else 0
            base_weights = 26 if mode in ("zero3", "fsdp2", "fsdp2 at load") else 0
            assert rank["sharded_parameters"] == base_weights + adapters, case


def test_reentrant_cases_run_reentrant_backward_passes(found, mode):
    blocks, steps = 2, worker.STEPS
    assert found["sft-all-off-1"][0]["reentrant_backwards"] == 0
    assert found["sft-tiled-reentrant-4"][0]["reentrant_backwards"] == blocks * steps * 4
    # GRPO generates without a graph; its reference pass has none either.
    assert found["grpo-structured-reentrant-1"][0]["reentrant_backwards"] == blocks * steps
    # TRL makes it reentrant under ZeRO-3 only.
    expected = blocks * steps * 4 if mode == "zero3" else 0
    assert found["grpo-untied-default-4"][0]["reentrant_backwards"] == expected


def test_no_more_than_one_weight_is_whole_while_building(trained, mode):
    for ranks in trained.values():
        assert {rank["most_whole_weights_while_building"] for rank in ranks} == {1 if mode == "zero3" else 0}


def test_a_checkpoint_is_the_small_adapter_and_loads_anywhere(found, folder, base_folder):
    last = found["saved"][0]["values"]
    for checkpoint in (folder / "saved", folder / "saved" / "checkpoint-2", folder / "saved" / "checkpoint-4"):
        assert (checkpoint / "adapter_model.safetensors").stat().st_size < 1024
        assert (values_in(checkpoint).dtype, values_in(checkpoint).shape) == (torch.float32, (4, 1))
        loaded = worker.values_of(adapter_of(base_folder, checkpoint)).flatten().tolist()
        assert (loaded == last) == (checkpoint.name != "checkpoint-2")


NO_RESUMING = "transformers 5.23 keeps no optimiser state of a model sharded at load time, and says so before training"


def test_a_resumed_run_ends_with_the_values_of_the_uninterrupted_one(found, mode):
    if mode == "fsdp2 at load":
        pytest.skip(NO_RESUMING)
    assert difference(found["resumed"][0], found["saved"][0]) == 0
    # It began where the other one was.
    assert found["resumed"][0]["losses"] == found["saved"][0]["losses"]


def test_the_best_model_is_loaded_at_the_end(found, mode, folder):
    if mode == "fsdp2 at load":
        pytest.skip(NO_RESUMING)
    first, last = (values_in(folder / "best" / f"checkpoint-{step}") for step in (2, 4))
    assert found["best"][0]["values"] == first.flatten().tolist() != last.flatten().tolist()


def test_vllm_gets_the_merged_model_and_the_base_is_left_as_it_was(found, base_folder):
    ranks = found["synced"]
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype="bfloat16")
    untouched = {name: worker.digest(parameter) for name, parameter in base.named_parameters()}
    merged = get_peft_model(base, TinyLoraConfig())
    with torch.no_grad():
        values = worker.values_of(merged)
        values.copy_(torch.tensor(ranks[0]["values"]).reshape(values.shape))
    merged = merged.merge_and_unload()
    expected = {name: worker.digest(parameter) for name, parameter in merged.named_parameters()}
    assert sum(expected[name] != untouched[name] for name in expected) == 14
    for rank in ranks:
        assert rank["yielded"] == rank["yielded_last"] == expected
        assert rank["base_kept"]


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_values_in_half_precision_are_float32_or_have_a_float32_master(found, mode, name, dtype):
    if name == "fp16" and not mode.startswith("zero"):
        pytest.skip("fp16 on a CPU is DeepSpeed's alone: accelerate's needs a GPU")
    rank = found[name][0]
    # DeepSpeed casts every parameter of a model that is not partitioned from the start.
    rounded = mode == "zero2"
    assert rank["dtypes_in_forward"] == [str(dtype if rounded else torch.float32)]
    exact = torch.tensor(rank.get("master", rank["values"]))
    assert not torch.equal(exact, exact.to(dtype).float())
    expected = exact.to(dtype).float() if rounded else exact
    torch.testing.assert_close(torch.tensor(rank["values"]), expected, rtol=0, atol=0)
    # Steps of 1e-3 from zero, none of them lost to rounding.
    torch.testing.assert_close(exact.abs(), torch.full_like(exact, 3e-3), rtol=0.01, atol=0)


@pytest.mark.parametrize("mode", [in_group("ddp")], indirect=True)
def test_the_comparison_notices_a_lost_gradient(found, alone):
    assert difference(found["control-lost"][0], alone(CASES[0])) > 1000 * TOLERANCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="it compiles this without a GPU only")
@pytest.mark.parametrize("mode", [in_group("zero2")], indirect=True)
def test_deepspeed_compiles_in_a_folder_of_this_test_run(found, extensions_folder, tmp_path_factory):
    assert tmp_path_factory.getbasetemp().parent in extensions_folder.parents
    assert (extensions_folder / "deepspeed_shm_comm").is_dir()


@pytest.mark.parametrize(
    "mode, control, message",
    [
        in_group("ddp", "control-plain", "marked as ready twice"),
        in_group("zero3", "control-plain", "AssertionError"),
        in_group("zero3", "control-ungathered", "rank 2 is not within"),
    ],
    indirect=["mode"],
)
def test_without_the_sink_or_the_gathering_a_run_fails(found, control, message):
    assert PLAIN["checkpointing"] == UNGATHERED["checkpointing"] == "reentrant"
    assert message in found[control][0]["error"]


def test_plain_autograd_is_right_in_one_process(alone):
    # So what fails in the test above is how the processes' gradients meet.
    assert difference(alone({**CASES[1], "control": "plain autograd"}), alone(CASES[1])) <= TOLERANCE


@pytest.mark.parametrize("mode", [in_group("fsdp2")], indirect=True)
def test_a_process_that_fails_takes_the_other_down_within_a_minute(mode, launch):
    found, ended = launch(mode)
    (failed,) = [rank for rank in found["control-one-fails"] if "told to fail" in rank.get("error", "")]
    assert ended - failed["ended"] < 60


@pytest.mark.xdist_group("zero2")
def test_a_run_killed_while_it_wrote_a_checkpoint_resumes_from_the_one_before(base_folder, tmp_path, alone):
    killed = {**RESUMED, "kill_while_writing": ["optimizer.pt", 2]}
    found, completed = try_cases("single", [killed], base_folder, ROWS, tmp_path)
    assert found == {} and completed.returncode != 0
    assert (tmp_path / "resumed" / "checkpoint-4").exists()
    assert not (tmp_path / "resumed" / "checkpoint-4" / "trainer_state.json").exists()
    again = {**RESUMED, "arguments": {**SAVING, "resume_from_checkpoint": "true"}}
    assert alone(again, tmp_path)["values"] == alone({**RESUMED, "arguments": {}})["values"]
