"""A comparison's numbers, against NumPy."""

import copy

import numpy as np
import pytest
from comparison import conclusions, readme, report
from comparison.summary import CURVE_POINTS, family, summarize
from comparison.tables import percent
from made_up_records import RATES, SAMPLES, answers, cell_of, pair_of, summarized


pytestmark = pytest.mark.usefixtures("few_resamples_and_small_figures")


def test_a_cell_holds_mean_and_spread_over_seeds(made, summary):
    for kind, samples in (("greedy", 1), ("sampled", SAMPLES)):
        shares = answers(made, "rl", "13", kind).mean(1) / samples
        spread = cell_of(summary, "rl", "13")["accuracy"][kind]["strict"]
        np.testing.assert_allclose(spread["values"], shares, rtol=1e-5)
        assert spread["mean"] == pytest.approx(shares.sum() / 3, rel=1e-5)
        assert spread["std"] == pytest.approx(np.sqrt(((shares - shares.mean()) ** 2).sum() / 2), rel=1e-5)


def test_a_gain_is_answers_right_more_often_plus_format(made, summary):
    (untrained,) = (record["metrics"]["greedy"] for record in made if record["phase"] == "untrained")
    for cell in summary["cells"]:
        if cell["role"] != "arm":
            continue
        gains = {measure: found["difference"] for measure, found in cell["gains"]["greedy"].items()}
        for grading in ("strict", "flexible"):
            right = answers(made, cell["arm"], cell["size"], grading=grading)
            assert gains[grading] == pytest.approx(right.mean() - np.mean(untrained[grading]["correct"]), abs=1e-6)
        assert gains["format"] == pytest.approx(gains["strict"] - gains["flexible"], abs=1e-6)


def test_what_a_recipe_leaves_open_is_the_configs_default():
    config = {"adapter": "tinylora", "tying": None, "projection": None}
    assert family(config) == "TinyLoRA"
    assert family(config | {"tying": "structured"}) == "TinyLoRA, structured"
    assert family(config | {"projection": "basis"}) == "LoRA-XS"
    assert family({"adapter": "lora"}) == "LoRA" and family({"adapter": "full"}) == "full fine-tuning"


def test_p_values_are_corrected_over_the_comparisons_of_their_question(summary):
    family = [pair["greedy"]["strict"] for pair in summary["pairs"] if pair["question"] == "arm"]
    assert len(family) == 10 and all(item["corrected_for"] == 10 for item in family)
    order = sorted(family, key=lambda item: item["p"])
    highest = 0.0
    for rank, item in enumerate(order):
        highest = max(highest, min(1.0, (10 - rank) * item["p"]))
        assert item["p_corrected"] == pytest.approx(highest, rel=1e-4)
    assert {cell_of(summary, "zero", "13")["gains"]["greedy"]["strict"]["corrected_for"]} == {5}


def test_the_share_of_full_fine_tunings_gain_is_the_papers_measure(made, summary):
    start = np.mean(next(r for r in made if r["phase"] == "untrained")["metrics"]["greedy"]["strict"]["correct"])
    gain = answers(made, "sft", "13").mean() - start
    expected = gain / (answers(made, "rl", "full").mean() - start)
    assert cell_of(summary, "sft", "13")["recovered"] == pytest.approx(expected, rel=1e-4)
    assert cell_of(summary, "zero", "13")["recovered"] is None


def test_the_first_page_is_about_the_sizes_that_every_arm_has(summary):
    assert summary["main_sizes"] == ["1", "2", "13", "lora-r1", "full"]


def test_a_curve_is_the_mean_and_range_over_seeds_of_stretches_of_steps(made, summary):
    logged = [r["curve"] for r in made if (r["arm"], r["size"], r["phase"]) == ("rl", "13", "final")]
    drawn = cell_of(summary, "rl", "13")["curve"]
    assert len(drawn["step"]) == CURVE_POINTS
    first = np.array([np.mean(curve["reward"][:2]) for curve in logged])
    assert drawn["step"][0] == pytest.approx(1.5)
    assert drawn["reward"]["mean"][0] == pytest.approx(first.mean(), rel=1e-4)
    assert drawn["entropy"]["mean"][0] == pytest.approx(np.mean([curve["reward"][1] for curve in logged]), rel=1e-4)
    assert [drawn["reward"][side][0] for side in ("low", "high")] == pytest.approx([first.min(), first.max()], rel=1e-4)


def as_flexible(made):
    """The records as RL with the flexible reward would have left them; a reward is a list now."""
    made = copy.deepcopy(made)
    for record in made:
        if record["algorithm"] == "rl":
            reward = record["config"].get("reward", "flexible")
            record["config"]["reward"] = [reward]
    return made


def test_rewards_are_lists_or_names_and_pay_an_arm_where_they_are_the_gradings(made):
    flexible = as_flexible(made)
    found = summarize(flexible, RATES, [], {}, 60.0, "flexible")
    roles = {cell["arm"]: cell["role"] for cell in found["cells"]}
    assert roles["rl"] == roles["sft"] == "arm" and roles["rl-format"] == roles["rl-random"] == "control"
    strict = summarized(flexible)
    assert {cell["arm"]: cell["role"] for cell in strict["cells"]}["rl"] == "control"
    for record in flexible:
        if record["arm"] == "rl":
            record["config"]["reward"] = ["strict"]
    assert {cell["arm"]: cell["role"] for cell in summarized(flexible)["cells"]}["rl"] == "arm"


def test_a_flexible_comparison_is_about_flexible_answers(made):
    found = summarize(as_flexible(made), RATES, [], {}, 60.0, "flexible")
    pair = pair_of(found, "sft", "13")["greedy"]
    assert "by_seed" in pair["flexible"] and "by_seed" not in pair["strict"]
    cell = cell_of(found, "rl", "13")
    table = report.table(found).splitlines()
    assert table[0] == "| trained | values | arm or control | right | sampled | gain | in the asked-for form |"
    greedy = cell["accuracy"]["greedy"]
    assert percent(greedy["flexible"]) in table[8] and table[8].endswith(f"| {percent(greedy['strict'])} |")
    text = report.text(found)
    assert "right more often" not in text and "Flexible grading." in text
    assert "greedy and sampled flexible accuracy" in text and "each seed's greedy flexible answers" in text
    gained = conclusions.points(cell["gains"]["greedy"]["flexible"]["difference"])
    assert f"RL: a gain of {gained.removeprefix('+')} points" in text
    content = readme.recipe_content(found | {"missing": ["final-rl-1-seed1"]})
    assert content.startswith("**Running: not complete.** 1 of its runs") and report.table(found) in content
