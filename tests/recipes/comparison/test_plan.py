"""Which runs a comparison consists of."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import trl
import yaml
from comparison import plan
from comparison.arguments import CompareArguments
from comparison.plan import ALLOWED_DIFFERENCES, Plan
from comparison.rates import fixed_learning_rates
from toy_comparison import COMPARISON_FILES, TOY, changed_recipe, comparison, rates_for, with_recipe


def test_there_are_comparisons_to_test():
    assert {path.stem for path in COMPARISON_FILES} >= {"compare", "compare_quick"}


@pytest.mark.parametrize("path", COMPARISON_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_arms_of_a_comparison_differ_only_where_allowed(path):
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", str(path)])
    # A search has no trainer, and a recipe of its own: see below.
    recipes = [recipe for arm, recipe in Plan(arguments).recipes.items() if arguments.algorithm_of(arm) != "es"]
    differing = {key for recipe in recipes for key in recipe if any(recipe[key] != r.get(key) for r in recipes)}
    assert differing <= set(ALLOWED_DIFFERENCES) and (differing or len(recipes) == 1)


def test_arms_that_differ_elsewhere_are_refused(tmp_path):
    other = changed_recipe(tmp_path, "sft", max_steps=12345)
    with pytest.raises(ValueError, match=r"differ in \['max_steps'\]"):
        Plan(with_recipe(comparison(tmp_path), other, "sft"))


def test_a_search_differs_from_rl_in_its_steps_alone_where_both_have_a_key(tmp_path):
    path = str(TOY / "compare_es.yaml")
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", path])
    rl, search = Plan(arguments).recipes.values()
    differing = {key for key in rl.keys() & search.keys() if rl[key] != search[key]}
    assert differing == {"max_steps", "num_generations", "output_dir"}
    for changes, key in (({"dataset_train_split": "validation"}, "dataset_train_split"), ({"limit": 50}, "limit")):
        other = changed_recipe(tmp_path, "es", temperature=0.5, **changes)
        for order in (("rl", "es"), ("es", "rl")):
            changed = replace(arguments, arms={arm: dict(arguments.arms[arm]) for arm in order})
            with pytest.raises(ValueError, match=rf"differ in \['{key}'\]"):
                Plan(with_recipe(changed, other, "es"))


@pytest.mark.parametrize("steps", [20, 40])
def test_a_search_that_samples_more_or_less_than_rl_is_refused(tmp_path, steps):
    path = str(TOY / "compare_es.yaml")
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", path])
    other = changed_recipe(tmp_path, "es", max_steps=steps)
    with pytest.raises(
        ValueError, match=rf"samples {steps * 11 * 16:,} completions, and .* 5,120: .*Change its max_steps"
    ):
        Plan(with_recipe(arguments, other, "es"))


def test_a_search_of_more_than_values_is_refused(tmp_path):
    path = str(TOY / "compare_es.yaml")
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", path])
    arguments.sizes["full"] = {"label": "", "arguments": {"adapter": "full"}, "learning_rate": {"rl": 0.1, "es": 0.1}}
    with pytest.raises(ValueError, match=r"arms\['es'\] is a search, for which adapter='full' of sizes\['full'\]"):
        Plan(arguments)


def test_steps_of_rl_and_sft_are_compared_whatever_stands_first(tmp_path):
    path = str(TOY / "compare_es.yaml")
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", path])
    sft = {"label": "SFT", "recipe": changed_recipe(tmp_path, "sft", max_steps=10)}
    with pytest.raises(ValueError, match=r"differ in \['max_steps'\]"):
        Plan(
            replace(
                arguments,
                arms={"es": arguments.arms["es"], "rl": arguments.arms["rl"], "sft": sft},
                sizes={
                    size: described | {"learning_rate": described["learning_rate"] | {"sft": 0.1}}
                    for size, described in arguments.sizes.items()
                },
            )
        )


def test_a_search_is_swept_by_its_first_deviation(tmp_path):
    path = str(TOY / "compare_es.yaml")
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", path])
    finals = {run.name: run for run in Plan(arguments).final(fixed_learning_rates(arguments))}
    search, rl = finals["final-es-13-seed2"], finals["final-rl-13-seed2"]
    assert search.settings["sigma"] == 0.1 and "learning_rate" not in search.settings
    assert rl.settings["learning_rate"] == 0.01 and "sigma" not in rl.settings
    assert type(search).__name__ == "Evolution" and type(rl).__name__ == "Training"
    assert search.settings["seed"] == 2 == search.settings["projection_seed"]


def test_an_arm_whose_rates_are_found_has_no_rate_beside_how_far_its_steps_go():
    path = str(TOY / "compare_rates.yaml")
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", path])
    runs = {run.name: run for run in Plan(arguments).final(fixed_learning_rates(arguments))}
    found, given = runs["final-rl-one-13-seed1"].settings, runs["final-rl-13-seed1"].settings
    assert found["relative_kl"] == 0.0003 and "learning_rate" not in found
    assert given["learning_rate"] == 0.01 and "relative_kl" not in given
    assert found.keys() - {"relative_kl"} == given.keys() - {"learning_rate"}


def test_the_quick_preset_is_a_part_of_the_full_one():
    full, quick = (yaml.safe_load((TOY / f"{name}.yaml").read_text()) for name in ("compare", "compare_quick"))
    for name, size in quick["sizes"].items():
        whole = full["sizes"][name]
        assert {key: size[key] for key in ("label", "arguments")} == {key: whole[key] for key in ("label", "arguments")}
        assert size["learning_rate"].items() <= whole["learning_rate"].items()
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


def test_a_control_arm_takes_the_rate_of_the_arm_it_controls_and_changes_one_key(tmp_path):
    arguments = comparison(tmp_path)
    rates = rates_for(arguments) | {"rl": {size: {"learning_rate": 0.05} for size in arguments.sizes}}
    del rates["rl-format"]
    runs = {run.name: run for run in Plan(arguments).final(rates)}
    real, control = runs["final-rl-13-seed1"], runs["final-rl-format-13-seed1"]
    assert control.settings == real.settings | {"reward": "format"}


def test_random_values_are_as_long_as_the_trained_ones_of_their_seed(tmp_path):
    planned = Plan(comparison(tmp_path))
    finals = {f"final-rl-13-seed{seed}": {"trained": {"v": [[3.0, 0.0], [0.0, 4.0 * seed]]}} for seed in (1, 3)}
    runs = {run.name: run for run in planned.controls(finals) if run.arm == "random-values"}
    assert {name: run.norm for name, run in runs.items()} == {
        "control-random-values-seed1": 5.0,
        "control-random-values-seed3": pytest.approx(153**0.5),
    }


@pytest.mark.parametrize(
    ("name", "results"), [("compare", "results"), ("compare_es", "evolution"), ("compare_rates", "rates")]
)
def test_the_committed_records_of_the_toy_are_of_the_runs_that_its_yaml_plans(name, results):
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", str(TOY / f"{name}.yaml")])
    planned, folder = Plan(arguments), TOY / results / "runs"
    finals = planned.final(fixed_learning_rates(arguments))
    trained = {run.name: run.kept(folder) for run in finals}
    runs = [planned.untrained(), *planned.samples(), *finals, *planned.controls(trained)]
    assert len(runs) == len(list(folder.glob("*.json")))
    assert [run.name for run in runs if run.kept(folder) is None] == []


def test_an_instruction_and_a_grading_are_of_the_plan_where_they_are_not_the_defaults(tmp_path):
    before, changed = comparison(tmp_path), comparison(tmp_path, grading="flexible")
    for arm, described in changed.arms.items():
        name = Path(described["recipe"]).stem
        with_recipe(changed, changed_recipe(tmp_path, name, instruction="Be brief."), arm)
    first, second = (Plan(arguments).samples()[0] for arguments in (before, changed))
    assert (second.grading, second.generation.instruction) == ("flexible", "Be brief.")
    assert "grading" not in first.described() and "instruction" not in first.described()["generation"]
    assert second.described()["grading"] == "flexible"
    digests = {first.digest, second.digest, replace(second, grading="strict").digest}
    assert len(digests | {Plan(before).untrained().digest}) == 4


def test_weights_that_are_not_there_count_as_those_of_the_hash_beside_their_folder(tmp_path):
    (tmp_path / "test.jsonl").write_text("{}\n")
    (tmp_path / "base.sha256").write_text("abc  model.safetensors\n")
    settings = {"model_name_or_path": str(tmp_path / "base"), "dataset_name": str(tmp_path)}
    weights = (tmp_path / "base" / "model.safetensors").as_posix()
    assert plan._hashes(settings)[weights] == "abc"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"other weights")
    assert plan._hashes(settings)[weights] == hashlib.sha256(b"other weights").hexdigest()
