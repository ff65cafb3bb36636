"""What a comparison does, what it does not do again, and what it prints; no run of it trains."""

import json

import compare
import pytest
from comparison import report, summary, workers
from comparison.plan import Plan
from records.files import write_text
from toy_comparison import (
    ROOT,
    InlinePool,
    changed_recipe,
    comparison,
    with_recipe,
)


UNTRAINED, SAMPLES, SWEEP, FINAL, CONTROLS = 1, 4, 3 * (4 + 4), (3 * 2 + 1) * 3, 1 + 3 + 1


ALL = UNTRAINED + SAMPLES + SWEEP + FINAL + CONTROLS


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    # The paths in the YAML files are relative to it.
    monkeypatch.chdir(ROOT)


def fake_record(run):
    """What a run would write, with an accuracy that grows with the learning rate up to 0.03."""
    rate = run.settings.get("learning_rate", 0.0)
    accuracy = 0.2 + (10 * rate if rate <= 0.03 else 0.0)
    kind = {"strict": {"accuracy": accuracy}}
    kept = {name: getattr(run, name) for name in ("name", "phase", "arm", "size", "algorithm", "digest")}
    return kept | {
        "learning_rate": rate,
        "trained": {"v": [1.0]},
        "wall_seconds": 40.0,
        "metrics": {"greedy": kind, "sampled": kind},
    }


@pytest.fixture
def executed(monkeypatch):
    """Names of the runs that were executed, none of which trains; `stop_after` and `failing` say what goes wrong."""
    names = []
    names_and_faults = type("Faults", (), {"names": names, "stop_after": None, "failing": ()})()

    def execute(run, arguments, provenance):
        if len(names) == names_and_faults.stop_after:
            raise KeyboardInterrupt
        names.append(run.name)
        if run.name in names_and_faults.failing:
            return "RuntimeError: no such luck"
        if run.phase == "samples":
            write_text(arguments.work / run.name / "train.jsonl", "{}\n")
        write_text(arguments.path("runs", f"{run.name}.json"), json.dumps(fake_record(run)))
        return None

    def summarize(records, rates, missing, allowed_differences, sweep_seconds, grading):
        return {"names": sorted(record["name"] for record in records), "missing": missing}

    monkeypatch.setattr(workers, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(workers, "execute", execute)
    monkeypatch.setattr(summary, "summarize", summarize)
    monkeypatch.setattr(report, "table", lambda found: "the table")
    monkeypatch.setattr(report, "write", lambda found, folder: write_text(folder / "summary.json", json.dumps(found)))
    return names_and_faults


def test_an_interrupted_comparison_continues_where_it_stopped(tmp_path, executed):
    arguments = comparison(tmp_path)
    executed.stop_after = 20
    with pytest.raises(KeyboardInterrupt):
        compare.main(arguments)
    executed.stop_after = None
    assert compare.main(arguments) == 0
    assert len(executed.names) == len(set(executed.names)) == ALL
    assert compare.main(arguments) == 0
    assert len(executed.names) == ALL, "nothing was left to do"


def test_a_changed_setting_runs_again_what_it_concerns(tmp_path, executed):
    compare.main(comparison(tmp_path))
    executed.names.clear()
    arguments = with_recipe(comparison(tmp_path), changed_recipe(tmp_path, "sft", max_length=255), "sft", "sft-own")
    compare.main(arguments)
    assert executed.names and all("-sft-" in name for name in executed.names)
    assert len(executed.names) == 2 * (8 + 6)


def test_lost_samples_are_drawn_again_only_if_a_run_has_to_train_on_them(tmp_path, executed):
    compare.main(comparison(tmp_path))
    executed.names.clear()
    (tmp_path / "out" / "work" / "samples-8-seed2" / "train.jsonl").unlink()
    assert compare.main(comparison(tmp_path)) == 0 and not executed.names
    (tmp_path / "out" / "runs" / "final-sft-own-13-seed2.json").unlink()
    assert compare.main(comparison(tmp_path)) == 0
    assert executed.names == ["samples-8-seed2", "final-sft-own-13-seed2"]


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, executed, capsys):
    executed.failing = ("final-rl-13-seed2",)
    assert compare.main(comparison(tmp_path)) == 1
    assert len(executed.names) == ALL - 1, "random values have no norm to be of"
    printed = capsys.readouterr().out
    assert "final-rl-13-seed2: FAILED: RuntimeError: no such luck (log: " in printed
    missing = json.loads((tmp_path / "out" / "summary.json").read_text())["missing"]
    assert missing == ["final-rl-13-seed2", "control-random-values-seed2"]
    executed.failing = ()
    executed.names.clear()
    assert compare.main(comparison(tmp_path)) == 0
    assert executed.names == missing


def test_progress_tells_result_count_and_remaining_time(tmp_path, executed, capsys):
    compare.main(comparison(tmp_path, jobs=1))
    line = next(line for line in capsys.readouterr().out.splitlines() if " sweep-rl-13-lr0.003:" in line)
    assert line.startswith(f"[6/{ALL}] sweep-rl-13-lr0.003: greedy 23.0%, sampled 23.0% (40 s); elapsed 0:00:0")
    assert line.endswith("about 0:32:40 left")  # 49 runs of 40 s, one at a time


def test_without_a_sweep_the_final_runs_take_the_rates_of_the_yaml(tmp_path, executed):
    assert compare.main(comparison(tmp_path, "compare_quick")) == 0
    assert not any(name.startswith("sweep") for name in executed.names)
    assert len(executed.names) == 1 + 1 + 7 + 2
    record = json.loads((tmp_path / "out" / "runs" / "final-sft-full-seed1.json").read_text())
    assert record["learning_rate"] == 0.0001 and not (tmp_path / "out" / "learning_rates.json").exists()


def test_report_only_rebuilds_the_report_and_runs_nothing(tmp_path, executed):
    compare.main(comparison(tmp_path))
    executed.names.clear()
    (tmp_path / "out" / "summary.json").unlink()
    (tmp_path / "out" / "runs" / "final-sft-13-seed3.json").unlink()
    assert compare.main(comparison(tmp_path, report_only=True)) == 1
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not executed.names and found["missing"] == ["final-sft-13-seed3"]
    assert len(found["names"]) == ALL - SWEEP - 1


def test_final_runs_have_new_seeds_their_own_projection_and_the_chosen_rate(tmp_path, executed):
    compare.main(comparison(tmp_path))
    rates = json.loads((tmp_path / "out" / "learning_rates.json").read_text())["chosen"]
    assert rates["rl"]["13"]["learning_rate"] == 0.03 and not rates["rl"]["13"]["at_edge"]
    planned = Plan(comparison(tmp_path))
    runs = {run.name: run for run in planned.final(rates)}
    run = runs["final-rl-13-seed2"]
    assert (run.settings["seed"], run.settings["projection_seed"], run.settings["learning_rate"]) == (2, 2, 0.03)
    assert run.problems.split == "test"
    full = runs["final-sft-full-seed2"]
    assert "n_values" not in full.settings and full.settings["adapter"] == "full"
    sweep = planned.sweep()
    assert {run.problems.split for run in sweep} == {"validation"}
    assert {run.settings["seed"] for run in sweep} == {0}


def test_a_base_model_that_is_none_is_refused_before_the_first_run(tmp_path, executed):
    arguments = comparison(tmp_path)
    for arm, described in arguments.arms.items():
        name = "sft" if "sft" in described["recipe"] else "grpo"
        with_recipe(arguments, changed_recipe(tmp_path, name, model_name_or_path="./nothing"), arm)
    with pytest.raises(ValueError, match="'./nothing' is no folder, and no Hub id"):
        compare.main(arguments)
    assert executed.names == [] and not (tmp_path / "out").exists()
