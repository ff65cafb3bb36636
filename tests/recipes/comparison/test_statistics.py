"""Paired tests, the interval over seeds and Holm's correction, against their definitions and by simulation. CPU."""

import itertools
import math

import numpy as np
import pytest
from comparison import statistics
from evaluation import intervals
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special


def test_the_interval_over_seeds_is_students():
    values = [0.61, 0.64, 0.59]
    # The quantile of t with two degrees of freedom has a closed form.
    quantile = 2 * 0.475 * math.sqrt(2 / (1 - (2 * 0.475) ** 2))
    half = quantile * np.std(values, ddof=1) / math.sqrt(3)
    mean = np.mean(values)
    assert statistics.seed_interval(values) == pytest.approx([mean - half, mean + half])
    assert statistics.seed_interval([0.6]) is None
    assert statistics.seed_interval([0.5, 0.5, 0.5]) == [0.5, 0.5]


def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(3).normal(0.7, 0.02, size=(500, 3))
    intervals = [statistics.seed_interval(values.tolist()) for values in draws]
    assert 0.92 <= np.mean([low <= 0.7 <= high for low, high in intervals]) <= 0.98


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_mcnemar_is_the_two_sided_binomial_of_the_problems_that_differ(pairs):
    first, second = zip(*pairs, strict=True)
    result = statistics.mcnemar(first, second)
    ups, downs = pairs.count((1, 0)), pairs.count((0, 1))
    # The symmetric binomial's tail, through the incomplete beta function.
    larger, both = max(ups, downs), ups + downs
    expected = min(1.0, 2 * special.betainc(larger, both - larger + 1, 0.5)) if both else 1.0
    assert result["p_value"] == pytest.approx(expected)
    assert (result["only_first"], result["only_second"]) == (ups, downs)
    assert result["difference"] == pytest.approx((ups - downs) / len(pairs))


def test_mcnemar_refuses_shares_and_other_problems():
    with pytest.raises(ValueError, match="needs 0 or 1 a problem"):
        statistics.mcnemar([0.5, 1], [0, 1])
    with pytest.raises(ValueError, match="the same problems, at least one, got 2 and 3"):
        statistics.mcnemar([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        statistics.paired_bootstrap([], [])


def test_the_permutation_test_is_that_of_all_sign_flips():
    first, second = np.array([[1, 1, 0.5, 1, 0, 1, 0.75]]), np.array([[0, 0.5, 0.5, 0, 0.25, 0, 0]])
    differences = (first - second)[0]
    flips = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=7)]
    result = statistics.paired_bootstrap(first, second)
    assert result["p_value"] == pytest.approx(np.mean(np.array(flips) >= abs(differences.sum()) - 1e-12))
    assert result["difference"] == pytest.approx(differences.mean())


def test_pairing_sees_what_two_separate_intervals_do_not():
    """Hard and easy problems, and one arm that solves three more of a hundred: negative control, the same unpaired."""
    solved = np.random.default_rng(4).integers(0, 2, size=200)
    better = solved.copy()
    better[np.flatnonzero(solved == 0)[:10]] = 1
    paired = statistics.paired_bootstrap([better], [solved])
    assert paired["interval"][0] > 0 and paired["p_value"] < 0.01
    shuffled = np.random.default_rng(5).permutation(better)
    unpaired = statistics.paired_bootstrap([shuffled], [solved])
    assert unpaired["difference"] == pytest.approx(paired["difference"])
    assert unpaired["interval"][0] < 0 and unpaired["p_value"] > 0.05


def test_seeds_are_averaged_and_may_differ_in_number():
    first = [[1, 0, 1, 1], [1, 0, 0, 1]]
    second = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    result = statistics.paired_bootstrap(first, second)
    assert result["difference"] == pytest.approx(np.mean(first) - np.mean(second))
    assert result == statistics.paired_bootstrap(np.mean(first, axis=0), np.mean(second, axis=0))


def test_equal_arms_and_a_single_problem_prove_nothing():
    same = statistics.paired_bootstrap([[1, 0, 1]], [[1, 0, 1]])
    assert same == {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}
    one = statistics.paired_bootstrap([[1]], [[0]])
    assert one["interval"] == [-1.0, 1.0] and one["p_value"] == 1.0
    all_right = statistics.paired_bootstrap([[1] * 20], [[0] * 20])
    assert all_right["interval"] == [1.0, 1.0] and all_right["p_value"] < 0.001


def test_the_paired_test_is_wrong_as_seldom_as_it_says(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    generator = np.random.default_rng(6)
    arms = generator.binomial(1, 0.7, size=(200, 2, 40))
    rejected = [statistics.paired_bootstrap(first, second)["p_value"] <= 0.05 for first, second in arms]
    assert np.mean(rejected) <= 0.09


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values):
    """A test's adjusted p-value is the largest Bonferroni p-value of the families that hold it (Marcus et al. 1976)."""
    count = len(p_values)
    families = [family for size in range(1, count + 1) for family in itertools.combinations(range(count), size)]
    worst = [
        max(min(1.0, len(family) * min(p_values[j] for j in family)) for family in families if i in family)
        for i in range(count)
    ]
    assert statistics.holm(p_values) == pytest.approx(worst)


def test_holm_keeps_the_order_and_refuses_what_is_no_p_value():
    assert statistics.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([]) == []
    with pytest.raises(ValueError, match="p-values must be from 0 to 1"):
        statistics.holm([1.5])
