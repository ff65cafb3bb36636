"""The comparison: its plan, what is done again and what is not, its workers, and what each kind of run records."""

import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import compare
import completions
import numpy as np
import plan
import provenance
import pytest
import report
import torch
import trl
import workers
import yaml


ROOT = Path(__file__).parents[2]
TOY = ROOT / "recipes" / "toy"
COMPARISON_FILES = sorted(TOY.glob("compare*.yaml"))
# Two short steps: four problems each.
SHORT = {
    "rl": {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 12},
    "sft": {"max_steps": 2, "per_device_train_batch_size": 4},
}
GRIDS = {"13": [0.003, 0.01, 0.03, 0.1], "full": [0.0001, 0.0003, 0.001, 0.003]}
UNTRAINED, SAMPLES, SWEEP, FINAL, CONTROLS = 1, 4, 3 * (4 + 4), (3 * 2 + 1) * 3, 1 + 3 + 1


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    # The paths in the YAML files are relative to it.
    monkeypatch.chdir(ROOT)


def comparison(tmp_path, name="compare", **changes):
    """The toy's comparison with two of its sizes, and grids that do not change with the toy's."""
    settings = yaml.safe_load((TOY / f"{name}.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    settings["sizes"] = {size: settings["sizes"][size] for size in GRIDS}
    settings["arms"].pop("rl-random", None)
    settings["arms"]["rl-format"] |= {"sizes": ["13"], "rates_of": "rl"}
    for arm in ("rl", "sft", "sft-own"):
        settings["arms"][arm].pop("sizes", None)
        for size, grid in GRIDS.items():
            settings["sizes"][size].setdefault("learning_rates", {})[arm] = grid
    settings["seeds"] = [1, 2, 3] if name == "compare" else [1]
    settings.pop("landscape", None)
    return plan.CompareArguments(**(settings | changes))


def changed_recipe(tmp_path, name, **changes):
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((TOY / f"{name}.yaml").read_text()) | changes))
    return str(path)


def with_recipe(arguments, recipe, *arms):
    for arm in arms:
        arguments.arms[arm]["recipe"] = recipe
    return arguments


def rates_for(arguments, rate=0.01):
    return {arm: {size: {"learning_rate": rate} for size in arguments.sizes} for arm in arguments.arms}


def final_runs(arguments, **changes):
    """The final runs by name, with the recipes' keys changed by algorithm."""
    planned = plan.Plan(arguments)
    for arm, described in arguments.arms.items():
        planned.recipes[arm] |= changes.get("rl" if "grpo" in described["recipe"] else "sft", {})
    return {run.name: run for run in planned.final(rates_for(arguments))}


# The plan


def test_there_are_comparisons_to_test():
    assert {path.stem for path in COMPARISON_FILES} >= {"compare", "compare_quick"}


@pytest.mark.parametrize("path", COMPARISON_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_arms_of_a_comparison_differ_only_where_allowed(path):
    (arguments,) = trl.TrlParser((plan.CompareArguments,)).parse_args_and_config(["--config", str(path)])
    recipes = list(plan.Plan(arguments).recipes.values())
    differing = {key for recipe in recipes for key in recipe if any(recipe[key] != r.get(key) for r in recipes)}
    assert differing and differing <= set(plan.ALLOWED_DIFFERENCES)


def test_arms_that_differ_elsewhere_are_refused(tmp_path):
    other = changed_recipe(tmp_path, "sft", max_steps=12345)
    with pytest.raises(ValueError, match=r"differ in \['max_steps'\]"):
        plan.Plan(with_recipe(comparison(tmp_path), other, "sft"))


def test_the_quick_preset_is_a_part_of_the_full_one():
    full, quick = (yaml.safe_load((TOY / f"{name}.yaml").read_text()) for name in ("compare", "compare_quick"))
    for name, size in quick["sizes"].items():
        assert size == {key: full["sizes"][name][key] for key in ("label", "arguments")}
    for name, arm in quick["arms"].items():
        assert {key: arm[key] for key in arm if key != "sizes"} == {
            key: value for key, value in full["arms"][name].items() if key != "sizes"
        }
    assert all(full["controls"][name] == control for name, control in quick["controls"].items())


def test_a_changed_dataset_is_another_comparison(tmp_path):
    data = tmp_path / "test.jsonl"
    settings = {"model_name_or_path": str(tmp_path), "dataset_name": str(tmp_path)}
    data.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    before = plan._hashes(settings)
    data.write_text('{"question": "1+1?", "answer": "#### 3"}\n')
    assert plan._hashes(settings) != before


def test_final_runs_have_new_seeds_their_own_projection_and_the_chosen_rate(tmp_path, executed):
    compare.main(comparison(tmp_path))
    rates = json.loads((tmp_path / "out" / "learning_rates.json").read_text())["chosen"]
    assert rates["rl"]["13"]["learning_rate"] == 0.03 and not rates["rl"]["13"]["at_edge"]
    planned = plan.Plan(comparison(tmp_path))
    runs = {run.name: run for run in planned.final(rates)}
    run = runs["final-rl-13-seed2"]
    assert (run.settings["seed"], run.settings["projection_seed"], run.settings["learning_rate"]) == (2, 2, 0.03)
    assert run.evaluation["split"] == "test"
    full = runs["final-sft-full-seed2"]
    assert "n_values" not in full.settings and full.settings["adapter"] == "full"
    sweep = planned.sweep()
    assert {run.evaluation["split"] for run in sweep} == {"validation"}
    assert {run.settings["seed"] for run in sweep} == {0}


def test_a_control_arm_takes_the_rate_of_the_arm_it_controls_and_changes_one_key(tmp_path):
    arguments = comparison(tmp_path)
    rates = rates_for(arguments) | {"rl": {size: {"learning_rate": 0.05} for size in arguments.sizes}}
    del rates["rl-format"]
    runs = {run.name: run for run in plan.Plan(arguments).final(rates)}
    real, control = runs["final-rl-13-seed1"], runs["final-rl-format-13-seed1"]
    assert control.settings == real.settings | {"reward": "format"}


def test_random_values_are_as_long_as_the_trained_ones_of_their_seed(tmp_path):
    planned = plan.Plan(comparison(tmp_path))
    finals = {f"final-rl-13-seed{seed}": {"trained": {"v": [[3.0, 0.0], [0.0, 4.0 * seed]]}} for seed in (1, 3)}
    runs = {run.name: run for run in planned.controls(finals) if run.arm == "random-values"}
    assert {name: run.options["norm"] for name, run in runs.items()} == {
        "control-random-values-seed1": 5.0,
        "control-random-values-seed3": pytest.approx(153**0.5),
    }


def test_a_landscape_holds_the_paths_it_is_drawn_with(tmp_path):
    arguments = comparison(tmp_path, landscape={"sizes": ["13"], "of": ["rl"], "points": 5, "limit": 10})
    path = [[0.0, 0.0], [0.2, -1.1], [0.1, -3.9]]
    (run,) = plan.Plan(arguments)._landscapes({"final-rl-13-seed1": {"path": path}})
    assert np.all(np.array(run.options["reach"]) >= np.abs(path).max(axis=0))
    assert (run.evaluation["split"], run.options["seed"]) == ("validation", 1)
    assert not list(plan.Plan(arguments)._landscapes({})), "without a path there is nothing to draw"


def scored(scores):
    for rate, score in scores.items():
        strict = {"strict": {"accuracy": score}}
        yield {"arm": "rl", "size": "13", "learning_rate": rate, "metrics": {"greedy": strict, "sampled": strict}}


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [({0.1: 0.5, 0.03: 0.5, 0.01: 0.4}, (0.03, False)), ({0.1: 0.6, 0.03: 0.5, 0.01: 0.4}, (0.1, True))],
)
def test_equal_scores_choose_the_smaller_rate_and_an_edge_is_marked(scores, chosen):
    found = plan.choose_learning_rates(list(scored(scores)))["rl"]["13"]
    assert (found["learning_rate"], found["at_edge"]) == chosen


def test_missing_learning_rates_are_refused_with_the_way_out_before_anything_runs(tmp_path, executed):
    quick = comparison(tmp_path, "compare_quick", learning_rates=str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match="run a comparison with a sweep first"):
        compare.main(quick)
    (tmp_path / "none.json").write_text('{"chosen": {"rl": {}, "sft": {}}}')
    with pytest.raises(ValueError, match=r"holds no learning rate for \[\('rl', '13'\)"):
        compare.main(quick)
    assert not executed.names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep_seed": None}, "exactly one of sweep_seed"),
        ({"learning_rates": "a.json"}, "exactly one of sweep_seed"),
        ({"seeds": [0, 1]}, "sweep_seed=0 is among seeds"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"sizes": {"13": {"arguments": {"n_value": 13}}}}, "sizes\\['13'\\] must hold"),
        ({"arms": {}}, "arms is missing"),
        ({"arms": {"rl": {"label": "RL", "recipe": "rl.yaml"}}}, "must be a grpo.yaml or an sft.yaml, got 'rl.yaml'"),
        ({"arms": {"rl": {"recipe": "grpo.yaml", "reward": "format"}}}, r"arms\['rl'\] may hold"),
        ({"arms": {"rl": {"label": "", "recipe": "grpo.yaml", "sizes": ["14"]}}}, r"arms\['rl'\].sizes names \['14'\]"),
        (
            {"arms": {"rl": {"label": "", "recipe": "grpo.yaml", "rates_of": "r"}}},
            r"arms\['rl'\].rates_of names \['r'\]",
        ),
        ({"controls": {"a": {"kind": "none"}}}, r"controls\['a'\].kind must be one of .*, got 'none'"),
        ({"controls": {"a": {"kind": "zero"}}}, r"controls\['a'\] may hold .* and needs .*'size'"),
        ({"controls": {"a": {"label": "", "kind": "zero", "size": "5"}}}, r"controls\['a'\].size names \['5'\]"),
        ({"landscape": {"sizes": ["13"]}}, "landscape may hold"),
    ],
)
def test_impossible_comparisons_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **changes)


# What is done, and what is not done again


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


class InlinePool:
    """Stands in for the process pool: does each task at once, in this process."""

    def __init__(self, *args, **kwargs):
        pass

    def shutdown(self):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


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
            completions.write_text(arguments.work / run.name / "train.jsonl", "{}\n")
        completions.write_text(arguments.path("runs", f"{run.name}.json"), json.dumps(fake_record(run)))
        return None

    def summarize(records, rates, missing, allowed_differences, sweep_seconds):
        return {"names": sorted(record["name"] for record in records), "missing": missing}

    monkeypatch.setattr(workers, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(workers, "execute", execute)
    monkeypatch.setattr(report, "summarize", summarize)
    monkeypatch.setattr(report, "table", lambda summary: "the table")
    monkeypatch.setattr(
        report, "write", lambda summary, folder: completions.write_text(folder / "summary.json", json.dumps(summary))
    )
    return names_and_faults


ALL = UNTRAINED + SAMPLES + SWEEP + FINAL + CONTROLS


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


def team(tmp_path, monkeypatch, outcome, jobs=2):
    """Workers whose pools answer with `outcome(run)`, the names in the order of their start, and the pools made."""
    started, pools = [], []

    class Pool(InlinePool):
        def __init__(self, *args, **kwargs):
            pools.append(self)

        def submit(self, function, run, *args):
            started.append(run.name)
            return outcome(run)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    arguments = comparison(tmp_path, jobs=jobs)
    runs = [*plan.Plan(arguments).samples(), *final_runs(arguments).values()]
    progress = workers.Progress(arguments, dict.fromkeys(run.name for run in runs), set())
    monkeypatch.setattr(progress, "ended", lambda run, error: progress.seconds.setdefault(run.name, error))
    return workers.Workers(arguments, {}, progress), runs, started, pools


def answered(value=None, error=None):
    future = Future()
    future.set_result(value) if error is None else future.set_exception(error)
    return future


def test_a_run_waits_for_the_samples_it_trains_on_and_others_go_ahead(tmp_path, monkeypatch):
    drawing = Future()
    outcome = {"samples-8-seed1": drawing}

    def start(run):
        if run.name == "final-sft-13-seed1":
            drawing.set_result(None)
        return outcome.get(run.name, answered())

    group, runs, started, pools = team(tmp_path, monkeypatch, start)
    by_name = {run.name: run for run in runs}
    names = ["samples-8-seed1", "final-sft-own-13-seed1", "final-sft-full-seed1", "final-sft-13-seed1"]
    with group:
        group.do([by_name[name] for name in names])
        group.do([by_name["final-rl-13-seed1"]])
    assert started == [names[0], names[2], names[3], names[1], "final-rl-13-seed1"]
    assert len(pools) == 1, "the workers stay from one list of runs to the next"


def test_a_run_whose_worker_is_killed_is_tried_once_more_and_the_others_go_on(tmp_path, monkeypatch):
    def start(run):
        return answered(error=BrokenProcessPool()) if run.name == "final-rl-13-seed1" else answered()

    group, runs, started, pools = team(tmp_path, monkeypatch, start, jobs=1)
    with group:
        group.do(runs[4:])
    assert len(pools) == 2 and started.count("final-rl-13-seed1") == 2
    ended = group.progress.seconds
    assert {name for name, error in ended.items() if error} == {"final-rl-13-seed1"}
    assert "killed, twice" in ended["final-rl-13-seed1"] and set(ended) == {run.name for run in runs[4:]}


def test_an_interrupt_ends_the_processes_at_once(tmp_path, monkeypatch):
    class Child:
        is_ended = False

        def terminate(self):
            self.is_ended = True

    children = [Child(), Child()]
    monkeypatch.setattr(workers.multiprocessing, "active_children", lambda: children)
    group, runs, started, pools = team(tmp_path, monkeypatch, lambda run: answered(error=KeyboardInterrupt()), jobs=1)
    with pytest.raises(KeyboardInterrupt), group:
        group.do(runs)
    assert all(child.is_ended for child in children) and len(started) == 1
    # The negative control: where nothing happens, they end by themselves.
    quiet = [Child()]
    monkeypatch.setattr(workers.multiprocessing, "active_children", lambda: quiet)
    with team(tmp_path, monkeypatch, lambda run: answered())[0]:
        pass
    assert not quiet[0].is_ended


def test_progress_tells_result_count_and_remaining_time(tmp_path, executed, capsys):
    compare.main(comparison(tmp_path, jobs=1))
    line = next(line for line in capsys.readouterr().out.splitlines() if " sweep-rl-13-lr0.003:" in line)
    assert line.startswith(f"[6/{ALL}] sweep-rl-13-lr0.003: greedy 23.0%, sampled 23.0% (40 s); elapsed 0:00:0")
    assert line.endswith("about 0:32:40 left")  # 49 runs of 40 s, one at a time


def test_the_quick_preset_takes_the_rates_of_the_full_one(tmp_path, executed):
    compare.main(comparison(tmp_path))
    executed.names.clear()
    rates = tmp_path / "out" / "learning_rates.json"
    quick = comparison(tmp_path, "compare_quick", output_dir=str(tmp_path / "quick"), learning_rates=str(rates))
    assert compare.main(quick) == 0
    assert not any(name.startswith("sweep") for name in executed.names)
    assert len(executed.names) == 1 + 1 + 7 + 2
    record = json.loads((tmp_path / "quick" / "runs" / "final-sft-full-seed1.json").read_text())
    assert record["learning_rate"] == json.loads(rates.read_text())["chosen"]["sft"]["full"]["learning_rate"]


def test_report_only_rebuilds_the_report_and_runs_nothing(tmp_path, executed):
    compare.main(comparison(tmp_path))
    executed.names.clear()
    (tmp_path / "out" / "summary.json").unlink()
    (tmp_path / "out" / "runs" / "final-sft-13-seed3.json").unlink()
    assert compare.main(comparison(tmp_path, report_only=True)) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not executed.names and summary["missing"] == ["final-sft-13-seed3"]
    assert len(summary["names"]) == ALL - SWEEP - 1


# What runs do, on the toy's base


in_one_worker = pytest.mark.xdist_group("comparison")  # of those that run the tests: `done` takes long


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Records of one short run of every kind, by name, and where they were written; one of them was bound to fail."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        tmp_path = tmp_path_factory.mktemp("comparison")
        arguments = comparison(
            tmp_path,
            jobs=1,
            eval_limit=3,
            samples=2,
            max_new_tokens=12,
            landscape={"sizes": ["1"], "of": ["rl"], "points": 3, "limit": 3},
            sizes={
                "1": {"arguments": {"n_values": 1}},
                "13": {"arguments": {"n_values": 13, "kept_dtype": "bfloat16"}},
                "full": {"arguments": {"adapter": "full"}},
            },
        )
        limited = {"limit": 16}
        runs = final_runs(arguments, rl=SHORT["rl"] | limited, sft=SHORT["sft"] | limited)
        planned = plan.Plan(arguments)
        for recipe in planned.recipes.values():
            recipe |= limited
        samples = next(run for run in planned.samples() if run.name == "samples-8-seed1")
        chosen = [samples]
        chosen += [runs[f"final-{name}-seed1"] for name in ("rl-1", "rl-13", "rl-format-13", "sft-own-13", "sft-full")]
        chosen[-1].settings["dataset_name"] = str(tmp_path / "nothing.jsonl")
        names = [run.name for run in chosen] + planned.control_names() + ["untrained"]
        progress = workers.Progress(arguments, dict.fromkeys(names), set())
        with workers.Workers(arguments, provenance.read_provenance(), progress) as team:
            team.do(chosen)
            others = [planned.untrained(), *planned.controls({run.name: run.kept(arguments) for run in chosen[1:-1]})]
            team.do(others)
        records = {run.name: run.kept(arguments) for run in [*chosen, *others]}
        return records, arguments


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
    kept = torch.tensor(plan._flat(records["final-rl-13-seed1"]["trained"]))
    assert kept.abs().sum() > 0 and torch.equal(kept, kept.bfloat16().float())
    free = torch.tensor(plan._flat(records["final-rl-1-seed1"]["trained"]))
    assert not torch.equal(free, free.bfloat16().float())


@in_one_worker
def test_the_path_of_one_value_leads_from_zero_to_the_trained_value(done):
    record = done[0]["final-rl-1-seed1"]
    assert len(record["path"]) == 1 + 2 and record["path"][0] == [0.0]
    assert record["path"][-1] == plan._flat(record["trained"])
    assert "path" not in done[0]["final-rl-13-seed1"]


@in_one_worker
def test_own_samples_are_right_answers_of_the_untrained_model_one_a_problem(done):
    records, arguments = done
    lines = (arguments.work / "samples-8-seed1" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    given = [json.loads(line) for line in (TOY / "data" / "train.jsonl").read_text().splitlines()[:16]]
    gold = {row["question"]: row["answer"].rpartition("####")[2].strip() for row in given}
    assert 0 < len(rows) == len({row["question"] for row in rows}) == records["samples-8-seed1"]["examples"]
    for row in rows:
        assert row["answer"].rpartition("####")[2].strip() == gold[row["question"]]
    assert {row["answer"] for row in rows}.isdisjoint(row["answer"] for row in given)
    trained = records["final-sft-own-13-seed1"]
    assert trained["metrics"]["n_problems"] == 3, "evaluated on the test problems"
    assert trained["config"]["dataset_name"] == "samples-8-seed1", "no path of the machine"


@in_one_worker
def test_the_zero_adapter_is_the_untrained_model_and_random_values_are_not(done):
    records, _ = done
    assert records["control-zero"]["metrics"] == records["untrained"]["metrics"]
    random = records["control-random-values-seed1"]
    norm = np.linalg.norm(plan._flat(records["final-rl-13-seed1"]["trained"]))
    assert np.linalg.norm(random["values"]) == pytest.approx(norm) and len(set(random["values"])) == 13


@in_one_worker
def test_the_prompted_model_is_asked_in_other_words(done):
    records, arguments = done
    texts = [
        [line["completion"] for line in completions.read_lines(arguments.work / name / "completions.jsonl")]
        for name in ("untrained", "control-prompted")
    ]
    assert texts[0] != texts[1]


@in_one_worker
def test_a_landscape_is_the_reward_at_every_point_and_at_zero_the_untrained_models(done):
    record = done[0]["landscape-1"]
    (axis,) = record["grid"]
    assert axis[1] == 0.0 and len(record["reward"]) == len(axis) == 3
    assert all(0 <= reward <= 1 for reward in record["reward"] + record["greedy"])
