"""The recipe scripts, their YAML files, the comparison and its report. CPU, no network, about a minute on one core."""

import json
import subprocess
from concurrent.futures import Future
from pathlib import Path

import compare
import evaluate
import grpo
import provenance
import pytest
import report
import sft
import torch
import trl
import yaml
from arguments import AdapterArguments, build_peft_config, resume_point
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tasks import gsm8k


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TOY = RECIPES / "toy"
SAMPLE = ROOT / "tests" / "data" / "gsm8k_sample.jsonl"

SCRIPTS = {"grpo": grpo, "sft": sft}
RECIPE_FILES = sorted(path for path in RECIPES.glob("*/*.yaml") if path.stem in SCRIPTS)
COMPARISON_FILES = sorted(RECIPES.glob("*/compare*.yaml"))
# Two short steps: four problems each.
SHORT = {
    "grpo": {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 12},
    "sft": {"max_steps": 2, "per_device_train_batch_size": 4},
}


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    # The paths in the YAML files are relative to it.
    monkeypatch.chdir(ROOT)


def parse(name, output_dir, **changes):
    settings = yaml.safe_load((TOY / f"{name}.yaml").read_text()) | changes | {"output_dir": str(output_dir)}
    return trl.TrlParser(SCRIPTS[name].ARGUMENTS).parse_dict(settings)


def comparison(tmp_path, name="compare", **changes):
    """The toy's comparison with two of its sizes, and grids that do not change with the toy's."""
    settings = yaml.safe_load((TOY / f"{name}.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    settings["sizes"] = {size: settings["sizes"][size] for size in ("13", "full")}
    for size, grid in (("13", [0.003, 0.01, 0.03, 0.1]), ("full", [0.0001, 0.0003, 0.001, 0.003])):
        settings["sizes"][size] |= {"rl_learning_rates": grid, "sft_learning_rates": grid}
    settings["seeds"] = [1, 2, 3] if name == "compare" else [1]
    return compare.CompareArguments(**(settings | changes))


UNTRAINED, SWEEP, FINAL = 1, 2 * (4 + 4), 2 * 2 * 3  # runs of that comparison: algorithms x rates, x sizes x seeds


def test_there_are_recipes_and_comparisons_to_test():
    assert {path.stem for path in RECIPE_FILES} == {"grpo", "sft"}
    assert {path.stem for path in COMPARISON_FILES} >= {"compare", "compare_quick"}


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_parses_into_its_trainers_config(path, tmp_path):
    parser = trl.TrlParser(SCRIPTS[path.stem].ARGUMENTS)
    arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--learning_rate", "0.5"]
    _, training_args, model_args, adapter_args = parser.parse_args_and_config(arguments)
    assert training_args.learning_rate == 0.5, "the command line must win over the YAML"
    assert training_args.max_steps == yaml.safe_load(path.read_text())["max_steps"]
    assert not training_args.use_cpu, "a GPU must be used where there is one"
    assert model_args.model_name_or_path and adapter_args.adapter == "tinylora"


def test_an_unknown_key_in_a_recipe_is_refused(tmp_path):
    path = tmp_path / "grpo.yaml"
    path.write_text((TOY / "grpo.yaml").read_text() + "\nlerning_rate: 0.1\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        trl.TrlParser(grpo.ARGUMENTS).parse_args_and_config(["--config", str(path)])


def test_the_two_scripts_are_equal_but_for_trainer_reward_and_columns():
    def body(name):
        text = (RECIPES / f"{name}.py").read_text().split('"""', 2)[2]
        lines = [line for line in text.splitlines() if "reward_funcs=" not in line]
        return [line.replace("GRPO", "SFT").replace("for_rl", "for_sft") for line in lines]

    assert body("grpo") == body("sft")


@pytest.mark.parametrize("path", COMPARISON_FILES, ids=lambda path: path.stem)
def test_the_arms_of_a_comparison_differ_only_where_allowed(path, tmp_path):
    (arguments,) = trl.TrlParser((compare.CompareArguments,)).parse_args_and_config(["--config", str(path)])
    recipes = compare.read_recipes(arguments)
    differing = {
        key
        for key in recipes["rl"].keys() | recipes["sft"].keys()
        if recipes["rl"].get(key) != recipes["sft"].get(key) or (key in recipes["rl"]) != (key in recipes["sft"])
    }
    assert differing and differing <= set(compare.ALLOWED_DIFFERENCES)


def changed_recipe(tmp_path, name, **changes):
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((TOY / f"{name}.yaml").read_text()) | changes))
    return str(path)


def test_arms_that_differ_elsewhere_are_refused(tmp_path):
    other = changed_recipe(tmp_path, "sft", max_steps=12345)
    with pytest.raises(ValueError, match=r"differ in \['max_steps'\]"):
        compare.read_recipes(comparison(tmp_path, sft=other))


def test_a_step_of_either_arm_takes_the_same_problems(tmp_path):
    rl, demonstrations = (parse(name, tmp_path)[1] for name in ("grpo", "sft"))
    problems = rl.per_device_train_batch_size * rl.gradient_accumulation_steps // rl.num_generations
    assert problems == demonstrations.per_device_train_batch_size * demonstrations.gradient_accumulation_steps
    assert rl.max_steps * problems <= 2000, "no problem is seen twice"


def test_the_two_presets_describe_the_same_sizes():
    full, quick = (yaml.safe_load((TOY / f"{name}.yaml").read_text()) for name in ("compare", "compare_quick"))
    kept = ("label", "arguments")
    assert {name: {key: size[key] for key in kept} for name, size in full["sizes"].items()} == quick["sizes"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"n_values": 13, "u": 1}, "n_values=13 finds u and n_tie itself, but u=1 is given too: drop n_values"),
        ({"n_values": 13, "n_tie": "all"}, "n_tie='all' is given too"),
        ({"adapter": "lora", "r": 2}, "r=2 belongs to adapter='tinylora', but adapter is 'lora'"),
        ({"adapter": "full", "n_values": 13}, "n_values=13 belongs to adapter='tinylora', but adapter is 'full'"),
        ({"n_tie": "most"}, "n_tie must be an integer or 'all', got 'most'"),
        ({"adapter": "dora"}, "got 'dora'"),
    ],
)
def test_contradictory_adapter_arguments_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        AdapterArguments(**chosen)


@pytest.mark.parametrize("adapter", ["tinylora", "full"])
@pytest.mark.parametrize("lora", [{"lora_r": 1}, {"lora_target_modules": ["all-linear"]}, {"use_peft": True}])
def test_arguments_of_lora_are_refused_elsewhere_before_a_model_is_touched(adapter, lora):
    (name,) = lora
    with pytest.raises(ValueError, match=f"{name}=.* belongs to adapter='lora', but adapter is '{adapter}'"):
        build_peft_config(AdapterArguments(adapter=adapter), trl.ModelConfig("no/such-model", **lora))


def test_each_adapter_gives_its_peft_config():
    model = trl.ModelConfig("no/such-model", lora_r=1, lora_target_modules=["all-linear"])
    lora = build_peft_config(AdapterArguments(adapter="lora"), model)
    assert isinstance(lora, LoraConfig) and lora.r == 1 and lora.target_modules == "all-linear"
    assert build_peft_config(AdapterArguments(adapter="full"), trl.ModelConfig("no/such-model")) is None
    tiny = build_peft_config(AdapterArguments(n_tie="4", projection_seed=7), trl.ModelConfig("no/such-model"))
    assert isinstance(tiny, TinyLoraConfig) and (tiny.n_tie, tiny.projection_seed) == (4, 7)
    assert tiny.u == TinyLoraConfig().u, "what is not given keeps the tuner's default"


def test_a_run_is_never_written_over(tmp_path):
    _, training_args, *_ = parse("sft", tmp_path)
    assert resume_point(training_args) is None
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(FileExistsError, match="interrupted run.*--resume_from_checkpoint true"):
        resume_point(training_args)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileExistsError, match="a finished run: choose another --output_dir"):
        resume_point(training_args)
    training_args.resume_from_checkpoint = "true"
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        resume_point(training_args)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    # Written before it, but not to the end.
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"step')
    assert resume_point(training_args) == str(tmp_path / "checkpoint-10")
    training_args.resume_from_checkpoint = str(tmp_path / "checkpoint-20")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        resume_point(training_args)
    training_args.resume_from_checkpoint = str(tmp_path / "checkpoint-11")
    with pytest.raises(FileNotFoundError, match="checkpoint-11"):
        resume_point(training_args)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    _, training_args, *_ = parse("sft", tmp_path, resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resume_point(training_args)


# Training and evaluation on the toy's base


@pytest.fixture(scope="module")
def base():
    name = str(TOY / "base")
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_training_saves_an_adapter_that_evaluates_as_the_trained_model(name, tmp_path, base):
    trainer = SCRIPTS[name].main(*parse(name, tmp_path / "model", disable_tqdm=True, **SHORT[name]))
    trained = {key: value for key, value in trainer.model.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == 13
    assert trainer.state.global_step == 2

    # Two steps move little, so a reloaded adapter that was in truth untrained would go unnoticed.
    with torch.no_grad():
        for value in trained.values():
            value.add_(3.0)
    trainer.save_model()
    rows = gsm8k.load_rows(str(TOY / "data"), "test", limit=4)
    arguments = evaluate.GenerationArguments(samples=2, max_new_tokens=12)
    lines = [tmp_path / f"{kind}.jsonl" for kind in ("trained", "loaded", "untrained")]
    expected = evaluate.evaluate(trainer.model, trainer.processing_class, rows, arguments, lines[0])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TOY / "base"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert evaluate.evaluate(model, tokenizer, rows, arguments, lines[1]) == expected
    assert lines[1].read_text() == lines[0].read_text()
    evaluate.evaluate(*base, rows, arguments, lines[2])
    assert lines[2].read_text() != lines[0].read_text()

    with pytest.raises(FileExistsError, match="finished run"):
        SCRIPTS[name].main(*parse(name, tmp_path / "model", **SHORT[name]))


def test_an_interrupted_training_continues_from_its_last_checkpoint(tmp_path):
    # A linear decay of one step is not the first half of one of two.
    saved = SHORT["sft"] | {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    saved |= {"disable_tqdm": True}
    whole = sft.main(*parse("sft", tmp_path / "whole", **saved))
    sft.main(*parse("sft", tmp_path / "halves", **(saved | {"max_steps": 1})))
    continued = sft.main(*parse("sft", tmp_path / "halves", **saved, resume_from_checkpoint="true"))
    assert [entry["step"] for entry in continued.state.log_history if "loss" in entry] == [1, 2]
    for name, value in whole.model.named_parameters():
        if value.requires_grad:
            assert value.abs().sum() > 0
            torch.testing.assert_close(continued.model.get_parameter(name), value, rtol=0, atol=0)


def test_real_gsm8k_rows_pass_through_training_and_evaluation(tmp_path):
    changes = SHORT["sft"] | {"max_steps": 1, "limit": 4, "dataset_name": str(SAMPLE), "max_length": 512}
    sft.main(*parse("sft", tmp_path / "model", disable_tqdm=True, **changes))
    command = f"--model_name_or_path {TOY / 'base'} --adapter_path {tmp_path / 'model'} --dataset_name {SAMPLE}"
    command += f" --limit 3 --samples 2 --max_new_tokens 8 --output_dir {tmp_path / 'evaluation'}"
    arguments = trl.TrlParser(evaluate.ARGUMENTS).parse_args_and_config(command.split())
    metrics = evaluate.main(*arguments)
    written = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert written["metrics"] == metrics and metrics["n_problems"] == 3
    lines = [json.loads(line) for line in (tmp_path / "evaluation" / "completions.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["greedy"] * 3 + ["sampled"] * 6
    assert [line["problem"] for line in lines] == [0, 1, 2, 0, 0, 1, 1, 2, 2]
    assert all(line["tokens"] <= 8 for line in lines)
    with pytest.raises(FileExistsError, match="already holds an evaluation"):
        evaluate.main(*arguments)


def test_evaluation_depends_on_neither_batching_nor_what_was_drawn_before(base):
    model, tokenizer = base
    rows = gsm8k.load_rows(str(TOY / "data"), "test", limit=6)
    arguments = {"samples": 2, "max_new_tokens": 16}
    whole = evaluate.evaluate(model, tokenizer, rows, evaluate.GenerationArguments(**arguments))
    single = evaluate.evaluate(model, tokenizer, rows, evaluate.GenerationArguments(**arguments, eval_batch_size=2))
    assert single["greedy"] == whole["greedy"]
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    assert evaluate.evaluate(model, tokenizer, rows, evaluate.GenerationArguments(**arguments)) == whole
    assert torch.equal(torch.get_rng_state(), state), "a training run after it must not see that it ran"


def test_intervals_are_wilsons_and_the_bootstraps():
    greedy = evaluate._accuracy([True] * 8 + [False] * 2, samples=1, seed=0)
    assert greedy == {"accuracy": 0.8, "interval": pytest.approx([0.4901625, 0.9433178])}
    # Problems, not samples, are what is drawn again: all samples of a problem agree here, so each counts once.
    repeated = evaluate._accuracy(([True] * 4) * 8 + ([False] * 4) * 2, samples=4, seed=0)
    assert repeated == {"accuracy": 0.8, "interval": pytest.approx([0.5, 1.0], abs=0.11)}
    assert evaluate._accuracy([True] * 8, samples=4, seed=0)["interval"] == [1.0, 1.0]
    assert evaluate._accuracy([True, False], samples=2, seed=0)["interval"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"eval_batch_size": 2, "samples": 4}, "eval_batch_size must be at least 4, got 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_impossible_generation_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        evaluate.GenerationArguments(**given)


# The comparison


def fake_record(run, accuracy=None):
    """What a run would write, with an accuracy that grows with the learning rate up to 0.03."""
    rate = run.settings.get("learning_rate", 0.0)
    accuracy = accuracy if accuracy is not None else 0.2 + (10 * rate if rate <= 0.03 else 0.0)
    measured = {"accuracy": accuracy, "interval": [accuracy - 0.05, accuracy + 0.05]}
    kind = {"strict": measured, "flexible": measured}
    kind |= {"mean_tokens": 20.0, "truncated": 0.0, "no_marker": 0.1, "tokens": 100}
    counts = {"1": 1, "13": 13, "28": 28, "lora-r1": 9000, "full": 800000}
    return {
        "name": run.name,
        "phase": run.phase,
        "size": run.size,
        "label": run.label,
        "algorithm": run.algorithm,
        "digest": run.digest,
        "seed": run.settings.get("seed"),
        "learning_rate": rate,
        "config": {"adapter": run.settings.get("adapter", "tinylora")},
        "trained_values": counts.get(run.size, 0),
        "trained_bytes": 4 * counts.get(run.size, 0),
        "examples": 1920,
        "optimizer_steps": 60,
        "generated_tokens": 150000 if run.algorithm == "rl" else 0,
        "train_seconds": 30.0,
        "wall_seconds": 40.0,
        "metrics": {"n_problems": 500, "samples": 4, "temperature": 1.0, "greedy": kind, "sampled": kind},
        "git": {"commit": "0123456789abcdef", "is_dirty": False},
        "versions": {"torch": "2"},
        "machine": {"cpu": "a CPU", "cores": 2, "gpu": None},
        "inputs": {},
        "finished": "2026-01-02T03:04:05+00:00",
    }


class InlinePool:
    """Stands in for the process pool: does each task at once, in this process."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False

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
        evaluate.write_text(arguments.path("runs", f"{run.name}.json"), json.dumps(fake_record(run)))
        return None

    monkeypatch.setattr(compare, "ProcessPoolExecutor", InlinePool)
    monkeypatch.setattr(compare, "execute", execute)
    monkeypatch.setattr(report, "figure", lambda summary, path: path.touch())
    return names_and_faults


def test_an_interrupted_comparison_continues_where_it_stopped(tmp_path, executed):
    arguments = comparison(tmp_path)
    executed.stop_after = 20
    with pytest.raises(KeyboardInterrupt):
        compare.main(arguments)
    executed.stop_after = None
    assert compare.main(arguments) == 0
    assert len(executed.names) == len(set(executed.names)) == UNTRAINED + SWEEP + FINAL
    assert compare.main(arguments) == 0
    assert len(executed.names) == UNTRAINED + SWEEP + FINAL, "nothing was left to do"


def test_a_changed_setting_runs_again_what_it_concerns(tmp_path, executed):
    compare.main(comparison(tmp_path))
    executed.names.clear()
    compare.main(comparison(tmp_path, sft=changed_recipe(tmp_path, "sft", max_length=255)))
    assert executed.names and all("-sft-" in name for name in executed.names)
    assert len(executed.names) == (SWEEP + FINAL) / 2


def test_a_changed_dataset_is_another_comparison(tmp_path):
    data = tmp_path / "test.jsonl"
    settings = {"model_name_or_path": str(tmp_path), "dataset_name": str(tmp_path)}
    data.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    before = compare._fingerprints(settings)
    data.write_text('{"question": "1+1?", "answer": "#### 3"}\n')
    assert compare._fingerprints(settings) != before


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path, executed, capsys):
    executed.failing = ("final-rl-13-seed2",)
    assert compare.main(comparison(tmp_path)) == 1
    assert len(executed.names) == UNTRAINED + SWEEP + FINAL
    printed = capsys.readouterr().out
    assert "final-rl-13-seed2: FAILED: RuntimeError: no such luck (log: " in printed
    assert "final-rl-13-seed2" in json.loads((tmp_path / "out" / "summary.json").read_text())["missing"]
    executed.failing = ()
    executed.names.clear()
    assert compare.main(comparison(tmp_path)) == 0
    assert executed.names == ["final-rl-13-seed2"]


def test_progress_tells_result_count_and_remaining_time(tmp_path, executed, capsys):
    compare.main(comparison(tmp_path, jobs=1))
    line = next(line for line in capsys.readouterr().out.splitlines() if " sweep-rl-13-lr0.003:" in line)
    assert line.startswith("[2/29] sweep-rl-13-lr0.003: greedy 23.0%, sampled 23.0% (40 s); elapsed 0:00:0")
    assert line.endswith("about 0:18:00 left")  # 27 runs of 40 s, one at a time


def test_final_runs_have_new_seeds_their_own_projection_and_the_chosen_rate(tmp_path, executed):
    compare.main(comparison(tmp_path))
    rates = json.loads((tmp_path / "out" / "learning_rates.json").read_text())["chosen"]
    assert rates["rl"]["13"]["learning_rate"] == 0.03 and not rates["rl"]["13"]["at_edge"]
    arguments = comparison(tmp_path)
    runs = compare.plan_final(arguments, compare.read_recipes(arguments), rates)
    run = next(run for run in runs if run.name == "final-rl-13-seed2")
    assert (run.settings["seed"], run.settings["projection_seed"], run.settings["learning_rate"]) == (2, 2, 0.03)
    assert run.evaluation["split"] == "test"
    full = next(run for run in runs if run.name == "final-sft-full-seed2")
    assert "n_values" not in full.settings and full.settings["adapter"] == "full"
    sweep = compare.plan_sweep(arguments, compare.read_recipes(arguments))
    assert {run.evaluation["split"] for run in sweep} == {"validation"}
    assert {run.settings["seed"] for run in sweep} == {0}


def test_equal_scores_choose_the_smaller_rate_and_an_edge_is_marked():
    def records(scores):
        for rate, score in scores.items():
            strict = {"strict": {"accuracy": score}}
            metrics = {"greedy": strict, "sampled": strict}
            yield {"algorithm": "rl", "size": "13", "learning_rate": rate, "metrics": metrics}

    chosen = compare.choose_learning_rates(list(records({0.1: 0.5, 0.03: 0.5, 0.01: 0.4})))["rl"]["13"]
    assert (chosen["learning_rate"], chosen["at_edge"]) == (0.03, False)
    chosen = compare.choose_learning_rates(list(records({0.1: 0.6, 0.03: 0.5, 0.01: 0.4})))["rl"]["13"]
    assert (chosen["learning_rate"], chosen["at_edge"]) == (0.1, True)


def test_the_quick_preset_takes_the_rates_of_the_full_one(tmp_path, executed):
    compare.main(comparison(tmp_path))
    executed.names.clear()
    rates = tmp_path / "out" / "learning_rates.json"
    quick = comparison(tmp_path, "compare_quick", output_dir=str(tmp_path / "quick"), learning_rates=str(rates))
    assert compare.main(quick) == 0
    assert len(executed.names) == 1 + 4 and not any(name.startswith("sweep") for name in executed.names)
    record = json.loads((tmp_path / "quick" / "runs" / "final-sft-full-seed1.json").read_text())
    assert record["learning_rate"] == json.loads(rates.read_text())["chosen"]["sft"]["full"]["learning_rate"]


def test_missing_learning_rates_are_refused_with_the_way_out(tmp_path):
    quick = comparison(tmp_path, "compare_quick", learning_rates=str(tmp_path / "none.json"))
    with pytest.raises(FileNotFoundError, match="run a comparison with a sweep first"):
        compare.main(quick)
    (tmp_path / "none.json").write_text('{"chosen": {"rl": {}, "sft": {}}}')
    with pytest.raises(ValueError, match=r"holds no learning rate for \[\('rl', '13'\)"):
        compare.main(quick)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep_seed": None}, "exactly one of sweep_seed"),
        ({"learning_rates": "a.json"}, "exactly one of sweep_seed"),
        ({"seeds": [0, 1]}, "sweep_seed=0 is among seeds"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"sizes": {"13": {"arguments": {"n_value": 13}}}}, "sizes\\['13'\\] must hold"),
        ({"rl": ""}, "rl is missing"),
    ],
)
def test_impossible_comparisons_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **changes)


def test_a_worker_trains_records_and_reports_failures(tmp_path):
    arguments = comparison(tmp_path, jobs=1, eval_limit=2, samples=2, max_new_tokens=8)
    recipes = compare.read_recipes(arguments)
    recipes["rl"] |= SHORT["grpo"] | {"limit": 8}
    rates = {"rl": {size: {"learning_rate": 0.01} for size in arguments.sizes}}
    rates["sft"] = rates["rl"]
    runs = {run.name: run for run in compare.plan_final(arguments, recipes, rates)}
    good, bad = runs["final-rl-13-seed1"], runs["final-sft-13-seed1"]
    bad.settings["dataset_name"] = str(tmp_path / "nothing.jsonl")
    progress = compare.Progress(arguments, {run.name: run.algorithm for run in (bad, good)}, set())
    compare.run_all([bad, good], arguments, provenance.read_provenance(), progress)
    assert progress.failed == [bad.name] and not progress.open
    assert "nothing.jsonl does not exist" in (compare.work_folder(bad, arguments) / "log.txt").read_text()

    record = compare.stored(good, arguments)
    assert record["trained_values"] == 13 and record["trained_bytes"] == 52
    assert sum(len(values) for (values,) in record["trained"].values()) == 13
    assert record["config"]["projection_seed"] == 1 and record["config"]["num_generations"] == 2
    assert record["optimizer_steps"] == 2 and record["examples"] == 8
    assert 0 < record["generated_tokens"] <= 16 * 12
    assert len(record["curve"]["reward"]) == 2
    assert record["versions"]["trl"] and record["machine"]["cores"]
    assert (compare.work_folder(good, arguments) / "completions.jsonl").is_file()


# The report


@pytest.fixture
def summary(tmp_path, executed):
    compare.main(comparison(tmp_path))
    return json.loads((tmp_path / "out" / "summary.json").read_text())


def test_the_report_states_what_makes_it_believable(tmp_path, summary):
    text = (tmp_path / "out" / "report.md").read_text()
    for stated in (
        "500 test problems",
        "1, 2, 3",
        "± standard deviation over seeds",
        "| RL | 1,920 | 60 | 150,000 |",
        "| SFT | 1,920 | 60 | 0 |",
        "Wilson",
        "commit 0123456789ab",
        "- `learning_rate`: chosen for each arm",
        "At the edge of its grid",
    ):
        assert stated in text, stated
    assert all(f"`{key}`" in text for key in compare.ALLOWED_DIFFERENCES)


def test_the_figure_is_drawn_for_many_runs_and_for_one(tmp_path):
    arguments = comparison(tmp_path)
    recipes = compare.read_recipes(arguments)
    rates = {name: {size: {"learning_rate": 0.01} for size in arguments.sizes} for name in compare.RECIPES}
    runs = [compare.plan_untrained(arguments, recipes), *compare.plan_final(arguments, recipes, rates)]
    for chosen in (runs, runs[1:2]):
        report.figure(report.summarize([fake_record(run) for run in chosen], rates, [], {}, 0), tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_holds_mean_spread_and_recovered_share(tmp_path, summary):
    arguments = comparison(tmp_path)
    runs = compare.plan_final(arguments, compare.read_recipes(arguments), summary["learning_rates"])
    kept = [run for run in runs if run.size in ("13", "full") and run.algorithm == "rl"]
    accuracies = {"13": {1: 0.5, 2: 0.6, 3: 0.7}, "full": dict.fromkeys((1, 2, 3), 0.9)}
    records = [fake_record(run, accuracies[run.size][run.settings["seed"]]) for run in kept]
    untrained = compare.plan_untrained(arguments, compare.read_recipes(arguments))
    small = report.summarize([*records, fake_record(untrained, 0.3)], {}, [], {}, 0)
    thirteen, full = small["cells"]
    assert thirteen["accuracy"]["greedy_strict"]["mean"] == pytest.approx(0.6)
    assert thirteen["accuracy"]["greedy_strict"]["std"] == pytest.approx(0.1)
    assert thirteen["recovered"] == pytest.approx(0.5) and full["recovered"] == pytest.approx(1.0)
    assert "| TinyLoRA, 13 values | 13 | 52 | 60.0% ± 10.0 | 60.0% ± 10.0 | - | - | 3 |" in report.table(small)


def test_one_seed_is_called_one_seed(tmp_path, summary):
    first = [cell for cell in summary["cells"] if cell["size"] == "13"]
    for cell in first:
        cell["seeds"] = [1]
    assert "Cells: 1 seed (1)" in report.caption(summary | {"cells": first})


def test_report_only_rebuilds_the_report_and_trains_nothing(tmp_path, summary, executed):
    executed.names.clear()
    before = (tmp_path / "out" / "report.md").read_text()
    for name in ("summary.json", "report.md", "accuracy.png", "learning_rates.json"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "runs" / "final-sft-13-seed3.json").unlink()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:toy -->\nold\n<!-- /results:toy -->\nafter\n")
    assert compare.main(comparison(tmp_path, report_only=True, update_readme=str(readme))) == 1
    assert not executed.names
    assert "**Missing or failed runs:** final-sft-13-seed3." in (tmp_path / "out" / "report.md").read_text() != before
    text = readme.read_text()
    assert text.startswith("before\n<!-- results:toy -->\n| trained |") and text.endswith("\nafter\n")
    assert "old" not in text


def test_renewing_a_current_readme_changes_nothing(summary):
    current = report.renewed_readme("a\n<!-- results:toy -->\n<!-- /results:toy -->\nb\n", "toy", summary)
    assert report.renewed_readme(current, "toy", summary) == current
    with pytest.raises(ValueError, match="lacks the markers"):
        report.renewed_readme("no markers", "toy", summary)


@pytest.mark.skipif(not (TOY / "results" / "summary.json").is_file(), reason="no full comparison is committed yet")
def test_the_readmes_table_is_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    committed = json.loads((TOY / "results" / "summary.json").read_text())
    assert report.renewed_readme(readme, "toy", committed) == readme, "run `make results`"


def test_results_not_yet_committed_do_not_count_as_changes_but_other_files_do(tmp_path, monkeypatch):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "compare.py").write_text("")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "recipes" / "compare.py"))
    assert provenance.read_provenance()["git"]["is_dirty"] is False

    results = tmp_path / "recipes" / "toy" / "results" / "runs"
    results.mkdir(parents=True)
    (results / "run.json").write_text("{}")
    assert provenance.read_provenance()["git"]["is_dirty"] is False

    (tmp_path / "recipes" / "other.py").write_text("")
    assert provenance.read_provenance()["git"]["is_dirty"] is True
