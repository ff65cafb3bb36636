"""
TRL's trainers under DDP, DeepSpeed ZeRO-1/2/3 and FSDP2, two processes, against one process. CPU and gloo, minutes.

Each mode is launched as users launch it, with its file in recipes/accelerate; "fsdp2 at load" is transformers' own
sharding by `model_init_kwargs`.
"""

import json

import pytest
import torch
import worker
from cases import NUMERIC, TOLERANCE
from peft import PeftModel, get_peft_model
from runs import run_cases, try_cases
from tiny import values_in
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
# What large modules do: the gradient is taken from the base layer's own.
CASES += [{**case, "name": f"{case['name']}-large", "large": True} for case in CASES if "reentrant" in case["name"]]
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
SYNCED = {"name": "synced", "trainer": "grpo", "max_steps": 2, "dtype": "bfloat16", "bf16": True, "transfers": 20}
HALF = {
    "name": "bf16",
    "trainer": "sft",
    "fields": {"n_tie": 4},
    "max_steps": 6,
    "dtype": "bfloat16",
    "bf16": True,
    "arguments": {"learning_rate": 1e-3},
}
FP16 = {**HALF, "name": "fp16", "dtype": "float32", "bf16": False, "arguments": {"learning_rate": 1e-3, "fp16": True}}
# TRL keeps a copy of an adapter that it is given as the reference, and switches between the two.
GIVEN = {**CASES[3], "name": "given", "max_steps": 4}
LOST = {**CASES[0], "name": "control-lost", "control": "lost gradient"}

MODES = ["ddp", "zero2", "zero3", "fsdp2", "fsdp2 at load"]


@pytest.fixture(scope="module", params=[pytest.param(mode, marks=pytest.mark.xdist_group(mode)) for mode in MODES])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def folder(mode, tmp_path_factory):
    return tmp_path_factory.mktemp(mode)


@pytest.fixture(scope="session")
def trained_before(base_folder, tmp_path_factory):
    """The folder of an adapter whose values are 0.05."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder, dtype="float32"), TinyLoraConfig(n_tie=4))
    with torch.no_grad():
        worker.values_of(model).fill_(0.05)
    saved = str(tmp_path_factory.mktemp("trained-before"))
    model.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def found(mode, folder, base_folder, rows, trained_before):
    """What every case found on every rank, in one launch."""
    cases = [*CASES, SAVED]
    if mode == "fsdp2 at load":
        # transformers 5.23 saves no optimiser state of models sharded at load time, and says so.
        cases[-1] = {**SAVED, "arguments": {**SAVING, "save_only_model": True}}
    else:
        resume = {"resume_from_checkpoint": str(folder / "saved" / "checkpoint-2")}
        cases += [{**RESUMED, "arguments": {**SAVING, **resume}}, BEST]
    cases += [SYNCED, HALF, {**GIVEN, "given": trained_before}]
    if mode.startswith("zero"):
        cases.append(FP16)
    if mode == "ddp":
        cases.append(LOST)
    return run_cases(mode, cases, base_folder, rows.to_list(), folder)


@pytest.fixture
def alone(base_folder, rows, tmp_path):
    """Runs a case in this one process."""

    def run(case):
        result = worker.observe({**case, "mode": "single"}, base_folder, rows.to_list(), tmp_path)
        worker.forget_the_last_case()
        return result

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


def test_the_mode_is_the_one_that_was_asked_for(found, mode):
    engine = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModel", "fsdp2 at load": "PeftModel"}.get(
        mode, "DeepSpeedEngine"
    )
    stage = {"zero2": 2, "zero3": 3}.get(mode)
    for case, ranks in found.items():
        for rank in ranks:
            assert (rank["engine"], rank["zero_stage"]) == (engine, stage), case
            # 26 base weights; DeepSpeed and accelerate spread the values of every adapter as well.
            adapters = (1 if case != "given" else 2) if mode in ("zero3", "fsdp2") else 0
            base_weights = 26 if mode in ("zero3", "fsdp2", "fsdp2 at load") else 0
            assert rank["spread_parameters"] == base_weights + adapters, case


def test_reentrant_cases_run_reentrant_backward_passes(found, mode):
    blocks, steps = 2, worker.STEPS
    assert found["sft-all-off-1"][0]["reentrant_backwards"] == 0
    assert found["sft-tiled-reentrant-4"][0]["reentrant_backwards"] == blocks * steps * 4
    # GRPO generates without a graph; its reference pass has none either.
    assert found["grpo-structured-reentrant-1"][0]["reentrant_backwards"] == blocks * steps
    # TRL makes it reentrant under ZeRO-3 only.
    expected = blocks * steps * 4 if mode == "zero3" else 0
    assert found["grpo-untied-default-4"][0]["reentrant_backwards"] == expected


def test_no_more_than_one_weight_is_whole_while_building(found, mode):
    for ranks in found.values():
        assert {rank["most_whole_weights_while_building"] for rank in ranks} == {1 if mode == "zero3" else 0}


def test_a_checkpoint_is_the_small_adapter_and_loads_anywhere(found, folder, base_folder):
    trained = found["saved"][0]["values"]
    for checkpoint in (folder / "saved", folder / "saved" / "checkpoint-2", folder / "saved" / "checkpoint-4"):
        assert (checkpoint / "adapter_model.safetensors").stat().st_size < 1024
        assert (values_in(checkpoint).dtype, values_in(checkpoint).shape) == (torch.float32, (4, 1))
        loaded = worker.values_of(adapter_of(base_folder, checkpoint)).flatten().tolist()
        assert (loaded == trained) == (checkpoint.name != "checkpoint-2")


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
    torch.testing.assert_close(exact.abs(), torch.full_like(exact, 6e-3), rtol=0.01, atol=0)


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=pytest.mark.xdist_group("ddp"))], indirect=True)
def test_the_comparison_notices_a_lost_gradient(found, mode, alone):
    assert difference(found["control-lost"][0], alone(CASES[0])) > 1000 * TOLERANCE


@pytest.mark.skipif(torch.cuda.is_available(), reason="it compiles this without a GPU only")
@pytest.mark.parametrize("mode", [pytest.param("zero2", marks=pytest.mark.xdist_group("zero2"))], indirect=True)
def test_deepspeed_compiles_in_a_folder_of_this_test_run(found, extensions_folder, tmp_path_factory):
    assert tmp_path_factory.getbasetemp().parent in extensions_folder.parents
    assert (extensions_folder / "deepspeed_shm_comm").is_dir()


@pytest.mark.parametrize(
    "mode, control, message",
    [
        pytest.param("ddp", "plain autograd", "marked as ready twice", marks=pytest.mark.xdist_group("ddp")),
        pytest.param("zero3", "plain autograd", "AssertionError", marks=pytest.mark.xdist_group("zero3")),
        pytest.param("zero3", "no gather", "rank 2 is not within", marks=pytest.mark.xdist_group("zero2")),
    ],
)
def test_without_the_sink_or_the_gathering_a_run_fails(base_folder, rows, tmp_path, mode, control, message):
    case = {**CASES[1], "control": control}
    assert case["checkpointing"] == "reentrant"
    found, completed = try_cases(mode, [case], base_folder, rows.to_list(), tmp_path)
    assert completed.returncode != 0
    assert message in found[case["name"]][0]["error"]


def test_plain_autograd_is_right_in_one_process(alone):
    # So what fails in the test above is how the processes' gradients meet.
    assert difference(alone({**CASES[1], "control": "plain autograd"}), alone(CASES[1])) <= TOLERANCE


@pytest.mark.xdist_group("fsdp2 at load")
def test_a_process_that_fails_takes_the_other_down_within_a_minute(base_folder, rows, tmp_path):
    case = {**CASES[0], "control": "one rank fails"}
    found, completed = try_cases("ddp", [case], base_folder, rows.to_list(), tmp_path, timeout=90)
    assert completed.returncode != 0
    (only,) = [json.loads(path.read_text()) for path in tmp_path.glob(f"{case['name']}.1.json")]
    assert "told to fail" in only["error"]


@pytest.mark.xdist_group("zero2")
@pytest.mark.parametrize(
    "killed", [{"kill_after": 3}, {"kill_while_writing": ["optimizer.pt", 2]}], ids=["between", "while writing"]
)
def test_a_killed_run_resumes_to_the_values_of_the_uninterrupted_one(base_folder, rows, tmp_path, alone, killed):
    case = {**RESUMED, "max_steps": 6}
    expected = alone({**case, "arguments": {}})
    found, completed = try_cases("single", [{**case, **killed}], base_folder, rows.to_list(), tmp_path)
    assert found == {} and completed.returncode != 0
    half_written = "kill_while_writing" in killed
    assert (tmp_path / "resumed" / "checkpoint-4").exists() == half_written
    assert not (tmp_path / "resumed" / "checkpoint-4" / "trainer_state.json").exists()
    again = {**case, "arguments": {**SAVING, "resume_from_checkpoint": "true"}}
    found = run_cases("single", [again], base_folder, rows.to_list(), tmp_path)
    assert found["resumed"][0]["values"] == expected["values"]
