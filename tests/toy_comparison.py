"""The toy's comparison made small, for the tests of its plan, its runs and its workers."""

from concurrent.futures import Future
from pathlib import Path

import yaml
from comparison.arguments import CompareArguments
from comparison.plan import Plan


ROOT = Path(__file__).parents[1]


TOY = ROOT / "recipes" / "toy"


COMPARISON_FILES = sorted(TOY.glob("compare*.yaml"))


SHORT = {
    "rl": {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 12},
    "sft": {"max_steps": 2, "per_device_train_batch_size": 4},
}


GRIDS = {"13": [0.003, 0.01, 0.03, 0.1], "full": [0.0001, 0.0003, 0.001, 0.003]}


def comparison(tmp_path, name="compare", **changes):
    """The toy's comparison with two of its sizes, and grids that do not change with the toy's; the full one sweeps."""
    settings = yaml.safe_load((TOY / f"{name}.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    settings["sizes"] = {size: settings["sizes"][size] for size in GRIDS}
    settings["arms"].pop("rl-random", None)
    settings["arms"]["rl-format"] |= {"sizes": ["13"], "rates_of": "rl"}
    for size, grid in GRIDS.items():
        settings["sizes"][size]["learning_rates"] = dict.fromkeys(("rl", "sft", "sft-own"), grid)
    settings |= {"seeds": [1, 2, 3], "sweep_seed": 0} if name == "compare" else {"seeds": [1]}
    return CompareArguments(**(settings | changes))


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
    planned = Plan(arguments)
    for arm, described in arguments.arms.items():
        planned.recipes[arm] |= changes.get("rl" if "grpo" in described["recipe"] else "sft", {})
    return {run.name: run for run in planned.final(rates_for(arguments))}


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
