"""What is said of a difference, at the borders of what its interval and its p-value carry."""

import re

import pytest
from comparison import conclusions


pytestmark = pytest.mark.usefixtures("few_resamples_and_small_figures")


def difference(low, high, p=0.01, n_seeds=3, **more):
    found = {"difference": (low + high) / 2, "interval": [low, high], "p_corrected": p, "corrected_for": 7}
    return found | {"n_seeds": n_seeds, "is_identical": False} | more


@pytest.mark.parametrize(
    "low, high, p, expected",
    [
        (0.0001, 0.2, 0.05, "higher"),
        (0.0001, 0.2, 0.0501, "suggested"),
        (0.0, 0.2, 0.0001, "open"),
        (-0.2, -0.0001, 0.05, "lower"),
        (-0.2, 0.0, 0.0001, "open"),
        (-0.2, -0.0001, 0.06, "suggested"),
        (-0.05, 0.05, 1.0, "level"),
        (-0.0501, 0.05, 1.0, "open"),
        (-0.05, 0.0501, 1.0, "open"),
        (0.0, 0.0, 1.0, "level"),
    ],
)
def test_a_claim_ends_where_its_interval_or_its_p_value_ends(low, high, p, expected):
    assert conclusions.verdict(difference(low, high, p)) == expected


def test_two_models_are_told_apart_in_the_words_that_the_interval_carries():
    numbers = "difference +1.2 points, 95% interval -2.0 to 4.4"
    found = difference(-0.02, 0.044)
    assert conclusions.compared("RL", "SFT", found) == f"RL and SFT do not differ by more than 5.0 points: {numbers}."
    wide = conclusions.compared("RL", "SFT", difference(-0.2, 0.224))
    assert wide == "The data do not tell RL from SFT: difference +1.2 points, 95% interval -20.0 to 22.4."
    assert conclusions.compared("RL", "SFT", difference(0.1, 0.2)).startswith("RL scores higher than SFT: ")
    assert conclusions.compared("RL", "SFT", difference(-0.2, -0.1)).startswith("RL scores lower than SFT: ")
    assert conclusions.compared("RL", "SFT", difference(-0.2, -0.1, p=0.2)).startswith(
        "Before correction only, RL scores lower than SFT (p = 0.2 when corrected for 7 comparisons): "
    )
    assert conclusions.compared("RL", "SFT", difference(0.1, 0.2, n_seeds=1)).endswith(
        "(one seed: nothing is known of others)."
    )
    assert "cannot be compared" in conclusions.compared("RL", "SFT", None)


@pytest.mark.parametrize(
    "value, shown",
    [
        (0.012, "+1.2"),
        (-0.02, "-2.0"),
        (0.0004, "+0.04"),
        (-0.00004, "-0.004"),
        (-0.0, "0.0"),
        (0.0, "0.0"),
        (1.0, "+100.0"),
    ],
)
def test_points_never_show_a_difference_as_none(value, shown):
    assert conclusions.points(value) == shown


def gains(strict, flexible, form=None):
    return {"strict": strict, "flexible": flexible, "format": form or difference(0.1, 0.2)}


def test_a_gain_in_format_alone_is_called_that():
    said = conclusions.gained(gains(difference(0.1, 0.2), difference(-0.1, 0.1)))
    parts = "a gain of 15.0 points (10.0 to 20.0): 0.0 (-10.0 to 10.0) for answers right more often, +15.0 for format"
    assert said == f"{parts}; answers are not shown to be right more often."
    assert "not shown" not in conclusions.gained(gains(difference(0.1, 0.2), difference(0.1, 0.2)))
    assert conclusions.gained(gains(difference(0.1, 0.2), difference(-0.2, -0.1))).endswith(
        "; answers are right less often."
    )


def test_gains_and_losses_are_claimed_as_far_as_they_are_shown():
    unsplit = {"flexible": None, "format": None}
    for found, words in (
        (difference(-0.2, -0.1), "a loss of 15.0 points (-20.0 to -10.0)"),
        (difference(0.1, 0.2, p=0.3), "before correction only, a gain of 15.0 points (10.0 to 20.0; p = 0.3"),
        (difference(-0.1, 0.2), "neither a gain nor a loss is shown (+5.0, -10.0 to 20.0)"),
        (difference(-0.02, 0.04), "no change of more than 5.0 points (+1.0, -2.0 to 4.0)"),
    ):
        assert conclusions.gained({"strict": found} | unsplit).startswith(words)
    assert "format cannot be told from" in conclusions.gained({"strict": found} | unsplit)
    assert conclusions.gained(None) == "not compared with the untrained model."
    same = difference(0.0, 0.0, is_identical=True)
    assert conclusions.gained(gains(same, same)) == "graded as the untrained model on every problem."


def test_parts_that_cancel_are_told_though_their_sum_is_nothing():
    said = conclusions.gained(gains(difference(-0.02, 0.02), difference(-0.3, -0.2), difference(0.2, 0.3)))
    assert "no change of more than 5.0 points" in said and "answers are right less often" in said


def test_no_sentence_of_a_report_claims_more_than_its_interval(summary):
    said = " ".join(conclusions.headline(summary))
    for pair in summary["pairs"]:
        sentence = conclusions.compared(pair["first_label"], pair["other_label"], pair["greedy"]["strict"])
        if pair["size"] in summary["main_sizes"] and (pair["question"] == "arm" or pair["other"] != "prompted"):
            assert sentence in said
        low, high = pair["greedy"]["strict"]["interval"]
        claimed = re.match(r"(\S+) scores (higher|lower)", sentence)
        if claimed:
            assert low > 0 if claimed[2] == "higher" else high < 0
    assert {"higher", "suggested", "open"} <= {
        conclusions.verdict(pair["greedy"]["strict"]) for pair in summary["pairs"]
    }
