"""The learning rates, fixed or chosen."""

import pytest
from comparison.rates import choose_learning_rates, fixed_learning_rates
from toy_comparison import comparison


def scored(scores, grading="strict"):
    for rate, score in scores.items():
        graded = {"strict": {"accuracy": 0.0}} | {grading: {"accuracy": score}}
        yield {"arm": "rl", "size": "13", "learning_rate": rate, "metrics": {"greedy": graded, "sampled": graded}}


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [({0.1: 0.5, 0.03: 0.5, 0.01: 0.4}, (0.03, False)), ({0.1: 0.6, 0.03: 0.5, 0.01: 0.4}, (0.1, True))],
)
def test_equal_scores_choose_the_smaller_rate_and_an_edge_is_marked(scores, chosen):
    found = choose_learning_rates(list(scored(scores)))["rl"]["13"]
    assert (found["learning_rate"], found["at_edge"]) == chosen


def test_a_flexible_grading_chooses_where_no_answer_has_the_marker():
    found = choose_learning_rates(list(scored({0.1: 0.1, 0.03: 0.5, 0.01: 0.4}, "flexible")), "flexible")["rl"]["13"]
    assert (found["learning_rate"], found["score"]) == (0.03, 0.5)


def test_without_a_sweep_the_rates_are_those_of_the_yaml(tmp_path):
    rates = fixed_learning_rates(comparison(tmp_path, "compare_quick"))
    assert rates["sft"] == {"13": {"learning_rate": 0.1}, "full": {"learning_rate": 0.0001}}
    assert "rl-format" not in rates, "it takes those of RL"
