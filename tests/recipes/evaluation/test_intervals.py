"""Intervals over problems and pass@k, against their formulas and by simulation. CPU, seconds."""

import itertools
import math

import numpy as np
import pytest
from evaluation import intervals


def wilson(correct, count, z=1.959963984540054):
    """The formula as in Wilson (1927)."""
    share = correct / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [middle - half, middle + half]


@pytest.mark.parametrize("correct, count", [(8, 10), (0, 10), (10, 10), (1, 1), (0, 1), (1187, 1319)])
def test_wilsons_interval_is_his_formula(correct, count):
    assert intervals.wilson_interval(correct, count) == pytest.approx(wilson(correct, count), abs=1e-9)


def test_wilsons_interval_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).binomial(40, 0.85, size=400)
    found = {correct: intervals.wilson_interval(correct, 40) for correct in set(draws.tolist())}
    covered = np.mean([found[correct][0] <= 0.85 <= found[correct][1] for correct in draws.tolist()])
    assert 0.91 <= covered <= 0.99


def test_the_bootstrap_holds_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 400)
    generator = np.random.default_rng(1)
    means = generator.binomial(4, generator.beta(2, 1, size=(200, 60))) / 4  # of mean 2/3
    found = [intervals.bootstrap_interval(values) for values in means]
    assert 0.88 <= np.mean([low <= 2 / 3 <= high for low, high in found]) <= 0.99


def test_the_bootstrap_is_the_normal_interval_for_many_problems():
    values = np.random.default_rng(2).binomial(4, 0.6, size=2000) / 4
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert intervals.bootstrap_interval(values) == pytest.approx(
        [values.mean() - half, values.mean() + half], abs=0.001
    )
    assert intervals.bootstrap_interval(values) == intervals.bootstrap_interval(values)
    assert intervals.bootstrap_interval(values) != intervals.bootstrap_interval(values, seed=1)


def test_one_problem_says_nothing_about_others_and_equal_ones_leave_no_doubt():
    assert intervals.bootstrap_interval([0.5]) == [0.0, 1.0]
    assert intervals.bootstrap_interval([0.5], bounds=(-1, 1)) == [-1.0, 1.0]
    assert intervals.bootstrap_interval([1.0] * 8) == [1.0, 1.0]
    assert intervals.bootstrap_interval([0.0] * 8) == [0.0, 0.0]


@pytest.mark.parametrize("samples, correct, k", [(4, 1, 1), (4, 1, 2), (5, 2, 3), (6, 0, 3), (6, 6, 1), (5, 3, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, correct, k):
    draws = list(itertools.combinations([1] * correct + [0] * (samples - correct), k))
    assert intervals.pass_at(k, samples, correct) == pytest.approx(np.mean([any(draw) for draw in draws]))
    assert intervals.pass_at(1, samples, correct) == pytest.approx(correct / samples)


def test_pass_at_k_is_unbiased_where_the_plain_estimate_is_not():
    chance, samples, k = 0.3, 6, 3
    weights = [math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c) for c in range(samples + 1)]
    truth = 1 - (1 - chance) ** k
    estimates = [intervals.pass_at(k, samples, c) for c in range(samples + 1)]
    plain = [1 - (1 - c / samples) ** k for c in range(samples + 1)]
    assert np.dot(weights, estimates) == pytest.approx(truth)
    assert abs(np.dot(weights, plain) - truth) > 0.01


@pytest.mark.parametrize("k, correct", [(0, 1), (5, 1), (1, 5), (1, -1)])
def test_impossible_counts_of_samples_are_refused(k, correct):
    with pytest.raises(ValueError, match="must be from"):
        intervals.pass_at(k, 4, correct)
