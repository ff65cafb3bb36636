"""Intervals and paired tests, against independent computations, by simulation and at their edges. CPU, seconds."""

import itertools
import math

import numpy as np
import pytest
import statistical
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special


def wilson(correct, count, z=1.959963984540054):
    """The formula as in Wilson (1927)."""
    share = correct / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [middle - half, middle + half]


@pytest.mark.parametrize("correct, count", [(8, 10), (0, 10), (10, 10), (1, 1), (0, 1), (1187, 1319)])
def test_wilsons_interval_is_his_formula(correct, count):
    assert statistical.wilson_interval(correct, count) == pytest.approx(wilson(correct, count), abs=1e-9)


def test_wilsons_interval_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(40, 0.85, size=400)
    intervals = {correct: statistical.wilson_interval(correct, 40) for correct in set(draws.tolist())}
    covered = np.mean([intervals[correct][0] <= 0.85 <= intervals[correct][1] for correct in draws.tolist()])
    assert 0.91 <= covered <= 0.99


def test_the_bootstrap_holds_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(statistical, "RESAMPLES", 400)
    generator = np.random.default_rng(1)
    means = generator.binomial(4, generator.beta(2, 1, size=(200, 60))) / 4  # of mean 2/3
    intervals = [statistical.bootstrap_interval(values) for values in means]
    assert 0.88 <= np.mean([low <= 2 / 3 <= high for low, high in intervals]) <= 0.99


def test_the_bootstrap_is_the_normal_interval_for_many_problems():
    values = np.random.default_rng(2).binomial(4, 0.6, size=2000) / 4
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert statistical.bootstrap_interval(values) == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.001
    )
    assert statistical.bootstrap_interval(values) == statistical.bootstrap_interval(values)
    assert statistical.bootstrap_interval(values) != statistical.bootstrap_interval(values, seed=1)


def test_one_problem_says_nothing_about_others_and_equal_ones_leave_no_doubt():
    assert statistical.bootstrap_interval([0.5]) == [0.0, 1.0]
    assert statistical.bootstrap_interval([0.5], bounds=(-1, 1)) == [-1.0, 1.0]
    assert statistical.bootstrap_interval([1.0] * 8) == [1.0, 1.0]
    assert statistical.bootstrap_interval([0.0] * 8) == [0.0, 0.0]


def test_the_interval_over_seeds_is_students():
    values = [0.61, 0.64, 0.59]
    # The quantile of t with two degrees of freedom has a closed form.
    quantile = 2 * 0.475 * math.sqrt(2 / (1 - (2 * 0.475) ** 2))
    half = quantile * np.std(values, ddof=1) / math.sqrt(3)
    mean = np.mean(values)
    assert statistical.seed_interval(values) == pytest.approx([mean - half, mean + half])
    assert statistical.seed_interval([0.6]) is None
    assert statistical.seed_interval([0.5, 0.5, 0.5]) == [0.5, 0.5]


def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(3).normal(0.7, 0.02, size=(500, 3))
    intervals = [statistical.seed_interval(values.tolist()) for values in draws]
    assert 0.92 <= np.mean([low <= 0.7 <= high for low, high in intervals]) <= 0.98


@pytest.mark.parametrize("samples, correct, k", [(4, 1, 1), (4, 1, 2), (5, 2, 3), (6, 0, 3), (6, 6, 1), (5, 3, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, correct, k):
    draws = list(itertools.combinations([1] * correct + [0] * (samples - correct), k))
    assert statistical.pass_at(k, samples, correct) == pytest.approx(np.mean([any(draw) for draw in draws]))
    assert statistical.pass_at(1, samples, correct) == pytest.approx(correct / samples)


def test_pass_at_k_is_unbiased_where_the_plain_estimate_is_not():
    chance, samples, k = 0.3, 6, 3
    weights = [math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c) for c in range(samples + 1)]
    truth = 1 - (1 - chance) ** k
    estimates = [statistical.pass_at(k, samples, c) for c in range(samples + 1)]
    plain = [1 - (1 - c / samples) ** k for c in range(samples + 1)]
    assert np.dot(weights, estimates) == pytest.approx(truth)
    assert abs(np.dot(weights, plain) - truth) > 0.01


@pytest.mark.parametrize("k, correct", [(0, 1), (5, 1), (1, 5), (1, -1)])
def test_impossible_counts_of_samples_are_refused(k, correct):
    with pytest.raises(ValueError, match="must be from"):
        statistical.pass_at(k, 4, correct)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_mcnemar_is_the_two_sided_binomial_of_the_problems_that_differ(pairs):
    first, second = zip(*pairs, strict=True)
    result = statistical.mcnemar(first, second)
    ups, downs = pairs.count((1, 0)), pairs.count((0, 1))
    # The symmetric binomial's tail, through the incomplete beta function.
    larger, both = max(ups, downs), ups + downs
    expected = min(1.0, 2 * special.betainc(larger, both - larger + 1, 0.5)) if both else 1.0
    assert result["p_value"] == pytest.approx(expected)
    assert (result["only_first"], result["only_second"]) == (ups, downs)
    assert result["difference"] == pytest.approx((ups - downs) / len(pairs))


def test_mcnemar_refuses_shares_and_other_problems():
    with pytest.raises(ValueError, match="needs 0 or 1 a problem"):
        statistical.mcnemar([0.5, 1], [0, 1])
    with pytest.raises(ValueError, match="the same problems, at least one, got 2 and 3"):
        statistical.mcnemar([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        statistical.paired_bootstrap([], [])


def test_the_permutation_test_is_that_of_all_sign_flips():
    first, second = np.array([[1, 1, 0.5, 1, 0, 1, 0.75]]), np.array([[0, 0.5, 0.5, 0, 0.25, 0, 0]])
    differences = (first - second)[0]
    flips = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=7)]
    result = statistical.paired_bootstrap(first, second)
    assert result["p_value"] == pytest.approx(np.mean(np.array(flips) >= abs(differences.sum()) - 1e-12))
    assert result["difference"] == pytest.approx(differences.mean())


def test_pairing_sees_what_two_separate_intervals_do_not():
    """Hard and easy problems, and one arm that solves three more of a hundred: negative control, the same unpaired."""
    solved = np.random.default_rng(4).integers(0, 2, size=200)
    better = solved.copy()
    better[np.flatnonzero(solved == 0)[:10]] = 1
    paired = statistical.paired_bootstrap([better], [solved])
    assert paired["interval"][0] > 0 and paired["p_value"] < 0.01
    shuffled = np.random.default_rng(5).permutation(better)
    unpaired = statistical.paired_bootstrap([shuffled], [solved])
    assert unpaired["difference"] == pytest.approx(paired["difference"])
    assert unpaired["interval"][0] < 0 and unpaired["p_value"] > 0.05


def test_seeds_are_averaged_and_may_differ_in_number():
    first = [[1, 0, 1, 1], [1, 0, 0, 1]]
    second = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    result = statistical.paired_bootstrap(first, second)
    assert result["difference"] == pytest.approx(np.mean(first) - np.mean(second))
    assert result == statistical.paired_bootstrap(np.mean(first, axis=0), np.mean(second, axis=0))


def test_equal_arms_and_a_single_problem_prove_nothing():
    same = statistical.paired_bootstrap([[1, 0, 1]], [[1, 0, 1]])
    assert same == {"difference": 0.0, "interval": [0.0, 0.0], "p_value": 1.0}
    one = statistical.paired_bootstrap([[1]], [[0]])
    assert one["interval"] == [-1.0, 1.0] and one["p_value"] == 1.0
    all_right = statistical.paired_bootstrap([[1] * 20], [[0] * 20])
    assert all_right["interval"] == [1.0, 1.0] and all_right["p_value"] < 0.001


def test_the_paired_test_is_wrong_as_seldom_as_it_says(monkeypatch):
    monkeypatch.setattr(statistical, "RESAMPLES", 200)
    generator = np.random.default_rng(6)
    arms = generator.binomial(1, 0.7, size=(200, 2, 40))
    rejected = [statistical.paired_bootstrap(first, second)["p_value"] <= 0.05 for first, second in arms]
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
    assert statistical.holm(p_values) == pytest.approx(worst)


def test_holm_keeps_the_order_and_refuses_what_is_no_p_value():
    assert statistical.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistical.holm([]) == []
    with pytest.raises(ValueError, match="p-values must be from 0 to 1"):
        statistical.holm([1.5])
