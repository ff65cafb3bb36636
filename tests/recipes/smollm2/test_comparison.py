"""The real model's comparison: what its YAML files plan. CPU, seconds, without its weights."""

from collections import Counter
from pathlib import Path

import grpo
import pytest
import sft
import trl
from comparison.arguments import CompareArguments
from comparison.plan import ALLOWED_DIFFERENCES, Plan


ROOT = Path(__file__).parents[3]
RECIPE = "recipes/smollm2-135m-arithmetic"


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    # The paths in the YAML files are relative to it.
    monkeypatch.chdir(ROOT)


def comparison(*options):
    command = ["--config", f"{RECIPE}/compare.yaml", *options]
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(command)
    return arguments


def test_the_arms_take_the_same_problems_and_differ_only_where_allowed():
    parsed = {
        script.__name__: trl.TrlParser(script.ARGUMENTS).parse_args_and_config(
            ["--config", f"{RECIPE}/{script.__name__}.yaml"]
        )
        for script in (grpo, sft)
    }
    rl, demonstrations = parsed["grpo"][1], parsed["sft"][1]
    problems = rl.per_device_train_batch_size * rl.gradient_accumulation_steps // rl.num_generations
    assert problems == demonstrations.per_device_train_batch_size * demonstrations.gradient_accumulation_steps == 8
    assert rl.max_steps == demonstrations.max_steps
    assert parsed["grpo"][0].instruction == parsed["sft"][0].instruction == 'Give the answer after "####".'
    assert parsed["grpo"][0].reward == ["flexible"] and comparison().grading == "flexible"
    recipes = list(Plan(comparison()).recipes.values())
    differing = {key for recipe in recipes for key in recipe if any(recipe[key] != r.get(key) for r in recipes)}
    assert differing and differing <= set(ALLOWED_DIFFERENCES)


def test_the_runs_are_those_that_the_yaml_adds_up():
    planned = Plan(comparison())
    kinds = Counter([run.algorithm for run in planned.sweep()] + list(planned.final_names().values()))
    assert kinds == {"rl": 27, "sft": 48} and len(planned.samples()) == 4
    assert len(planned.control_names()) == 1 + 3 + 1 + 1


def test_every_run_asks_with_the_instruction_and_names_no_path_of_the_machine():
    planned = Plan(comparison())
    for run in [planned.untrained(), *planned.samples(), *planned.sweep()]:
        assert run.generation.instruction == 'Give the answer after "####".'
        assert run.settings["model_name_or_path"] == f"{RECIPE}/base"
        assert all(path.startswith(RECIPE) for path in run.inputs) and f"{RECIPE}/base/model.safetensors" in run.inputs


def test_a_size_done_first_is_the_same_runs():
    whole = {run.name: run.digest for run in Plan(comparison()).sweep()}
    first = {run.name: run.digest for run in Plan(comparison("--only_sizes", "13")).sweep()}
    assert len(first) == 9 and first.items() <= whole.items()
