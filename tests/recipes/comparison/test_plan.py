"""Which runs a comparison consists of."""

import pytest
import trl
import yaml
from comparison import plan
from comparison.arguments import CompareArguments
from comparison.plan import ALLOWED_DIFFERENCES, Plan
from toy_comparison import COMPARISON_FILES, TOY, changed_recipe, comparison, rates_for, with_recipe


def test_there_are_comparisons_to_test():
    assert {path.stem for path in COMPARISON_FILES} >= {"compare", "compare_quick"}


@pytest.mark.parametrize("path", COMPARISON_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_arms_of_a_comparison_differ_only_where_allowed(path):
    (arguments,) = trl.TrlParser((CompareArguments,)).parse_args_and_config(["--config", str(path)])
    recipes = list(Plan(arguments).recipes.values())
    differing = {key for recipe in recipes for key in recipe if any(recipe[key] != r.get(key) for r in recipes)}
    assert differing and differing <= set(ALLOWED_DIFFERENCES)


def test_arms_that_differ_elsewhere_are_refused(tmp_path):
    other = changed_recipe(tmp_path, "sft", max_steps=12345)
    with pytest.raises(ValueError, match=r"differ in \['max_steps'\]"):
        Plan(with_recipe(comparison(tmp_path), other, "sft"))


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
