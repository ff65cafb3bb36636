"""What each kind of run does and records, on the toy's base. CPU, a minute."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import trl
from comparison import workers
from comparison.arguments import CompareArguments
from comparison.plan import Plan
from comparison.rates import fixed_learning_rates
from comparison.records import flat_values
from evaluation.completions import read_lines
from records import provenance
from toy_comparison import (
    ROOT,
    SHORT,
    TOY,
    comparison,
    final_runs,
)


in_one_worker = pytest.mark.xdist_group("comparison")  # of those that run the tests: `done` takes long


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Records of one short run of every kind, by name, and the comparison; one of them was bound to fail."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        tmp_path, rates = tmp_path_factory.mktemp("comparison"), dict.fromkeys(("rl", "sft", "sft-own"), 0.01)
        arguments = comparison(
            tmp_path,
            jobs=1,
            eval_limit=3,
            samples=2,
            max_new_tokens=12,
            sizes={
                "1": {"label": "", "arguments": {"n_values": 1}, "learning_rate": rates},
                "13": {"label": "", "arguments": {"n_values": 13, "kept_dtype": "bfloat16"}, "learning_rate": rates},
                "full": {"label": "", "arguments": {"adapter": "full"}, "learning_rate": rates},
            },
            sweep_seed=None,
        )
        limited = {"limit": 16}
        runs = final_runs(arguments, rl=SHORT["rl"] | limited, sft=SHORT["sft"] | limited)
        planned = Plan(arguments)
        for recipe in planned.recipes.values():
            recipe |= limited
        samples = next(run for run in planned.samples() if run.name == "samples-8-seed1")
        chosen = [samples]
        chosen += [runs[f"final-{name}-seed1"] for name in ("rl-1", "rl-13", "rl-format-13", "sft-own-13", "sft-full")]
        # As the paper's recipes name it; the model's own answers are to be taken whole.
        chosen[-2].settings["dataset_train_split"] = "train[500:]"
        chosen[-1].settings["dataset_name"] = str(tmp_path / "nothing.jsonl")
        names = [run.name for run in chosen] + planned.control_names() + ["untrained"]
        progress = workers.Progress(arguments, dict.fromkeys(names), set())
        with workers.Workers(arguments, provenance.read_provenance(), progress) as team:
            team.do(chosen)
            finals = {run.name: run.kept(arguments.path("runs")) for run in chosen[1:-1]}
            others = [planned.untrained(), *planned.controls(finals)]
            team.do(others)
        return {run.name: run.kept(arguments.path("runs")) for run in [*chosen, *others]}, arguments


@in_one_worker
def test_a_run_that_fails_leaves_its_log_and_no_record(done):
    records, arguments = done
    assert [name for name, record in records.items() if record is None] == ["final-sft-full-seed1"]
    assert "nothing.jsonl does not exist" in (arguments.work / "final-sft-full-seed1" / "log.txt").read_text()


@in_one_worker
def test_a_training_run_records_what_it_saw_and_cost(done):
    records, arguments = done
    record = records["final-rl-13-seed1"]
    assert (record["trained_values"], record["optimizer_steps"], record["examples"]) == (13, 2, 8)
    assert record["trained_bytes"] == 26, "kept in bfloat16"
    assert record["config"]["projection_seed"] == 1 and record["config"]["num_generations"] == 2
    assert 0 < record["generated_tokens"] <= 16 * 12 < record["trained_tokens"], "prompts are passed through, too"
    assert record["versions"]["trl"] and record["machine"]["cores"]
    for key in ("step", "reward", "entropy", "clip_ratio/region_mean", "completions/mean_length"):
        assert len(record["curve"][key]) == 2
    assert len(record["metrics"]["greedy"]["strict"]["correct"]) == 3
    assert (arguments.work / "final-rl-13-seed1" / "completions.jsonl").is_file()


@in_one_worker
def test_values_kept_in_bfloat16_are_bfloat16_numbers_and_others_are_not(done):
    records, _ = done
    kept = torch.tensor(flat_values(records["final-rl-13-seed1"]))
    assert kept.abs().sum() > 0 and torch.equal(kept, kept.bfloat16().float())
    free = torch.tensor(flat_values(records["final-rl-1-seed1"]))
    assert not torch.equal(free, free.bfloat16().float())


@in_one_worker
def test_own_samples_are_right_answers_of_the_untrained_model_one_a_problem(done):
    records, arguments = done
    lines = (arguments.work / "samples-8-seed1" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    given = [json.loads(line) for line in (TOY / "data" / "train.jsonl").read_text().splitlines()[:16]]
    gold = {row["question"]: row["answer"].rpartition("####")[2].strip() for row in given}
    assert 0 < len(rows) == len({row["question"] for row in rows}) == records["samples-8-seed1"]["examples"]
    for row in rows:
        assert row["demonstration"].rpartition("####")[2].strip() == gold[row["question"]]
    assert {row["demonstration"] for row in rows}.isdisjoint(row["answer"] for row in given)
    trained = records["final-sft-own-13-seed1"]
    assert trained["metrics"]["n_problems"] == 3, "evaluated on the test problems"
    assert trained["config"]["dataset_name"] == "samples-8-seed1", "no path of the machine"


@in_one_worker
def test_the_zero_adapter_is_the_untrained_model_and_random_values_are_not(done):
    records, _ = done
    assert records["control-zero"]["metrics"] == records["untrained"]["metrics"]
    random = records["control-random-values-seed1"]
    norm = np.linalg.norm(flat_values(records["final-rl-13-seed1"]))
    assert np.linalg.norm(random["values"]) == pytest.approx(norm) and len(set(random["values"])) == 13


@in_one_worker
def test_the_prompted_model_is_asked_in_other_words(done):
    records, arguments = done
    texts = [
        [line["completion"] for line in read_lines(arguments.work / name / "completions.jsonl")]
        for name in ("untrained", "control-prompted")
    ]
    assert texts[0] != texts[1]


def test_a_search_without_gradients_is_recorded_as_a_training_is(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = str(TOY / "compare_es.yaml")
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", path])
    run = next(run for run in Plan(arguments).final(fixed_learning_rates(arguments)) if run.name == "final-es-4-seed2")
    run.settings.update({"max_steps": 2, "population": 4, "problems_per_step": 3, "max_completion_length": 12})
    few = replace(run.generation, samples=1, max_new_tokens=12)
    record = replace(run, problems=replace(run.problems, limit=3), generation=few).run(tmp_path)
    assert record["seed"] == 2 and record["learning_rate"] == 0.1 and record["config"]["population"] == 4
    assert (record["optimizer_steps"], record["examples"], record["trained_tokens"]) == (2, 6, 0)
    assert 24 <= record["generated_tokens"] <= 24 * 12 and record["train_seconds"] > 0
    assert record["trained_values"] == 4 and any(flat_values(record)) and len(record["curve"]["reward"]) == 2
    assert record["metrics"]["n_problems"] == 3 and json.dumps(record)
