"""Two models on the same problems: paired tests, an interval over training seeds, and the correction for many tests.

The paired tests speak of other problems of the same kind, with the trained models as they are; the t interval of other
training seeds, with the problems as they are. None speaks of both.
"""

from collections.abc import Sequence

import numpy as np
from evaluation import intervals
from evaluation.intervals import CONFIDENCE, bootstrap_interval
from scipy import stats


def seed_interval(values: Sequence[float]) -> list[float] | None:
    """
    Student's 95% t interval of a mean over training seeds.

    Args:
        values (`Sequence[float]`): One a seed.
    Returns:
        `list[float]` or `None`: Low and high; `None` for one seed, which says nothing about others.
    """
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(stats.sem(values))
    if error == 0:
        return [mean, mean]
    return [float(bound) for bound in stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)]


def mcnemar(first: Sequence[int], second: Sequence[int]) -> dict:
    """
    Exact McNemar test of one run against another on the same problems: do they differ in how many they solve?

    Args:
        first (`Sequence[int]`): 0 or 1 a problem.
        second (`Sequence[int]`): The same problems in the same order.
    Returns:
        `dict`: `only_first` and `only_second` (problems that only this one solves), `difference` (accuracy of the first
        minus that of the second) and the two-sided `p_value`; 1 where the runs agree on every problem.
    Raises:
        ValueError: If the lengths differ or a value is neither 0 nor 1.
    """
    first, second = _paired(first, second)
    if not set(np.unique([first, second])) <= {0.0, 1.0}:
        raise ValueError("McNemar's test needs 0 or 1 a problem: compare samples or several seeds by paired_bootstrap")
    only_first, only_second = int(np.sum(first > second)), int(np.sum(first < second))
    differing = only_first + only_second
    return {
        "only_first": only_first,
        "only_second": only_second,
        "difference": float(np.mean(first - second)),
        "p_value": float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0,
    }


def paired_bootstrap(first: Sequence, second: Sequence, seed: int = 0) -> dict:
    """
    Two arms of several seeds each on the same problems: the difference of their means, over problems drawn again.

    The p-value is that of the sign-flip permutation test on the differences of the problems, whose null hypothesis is
    that the arms' names could be swapped on every problem. Both hold for the seeds at hand.

    Args:
        first (`Sequence`): Shape `(problems,)` or `(seeds, problems)`: right or not, or the share of right samples.
        second (`Sequence`): The same problems in the same order; the number of seeds may be another.
        seed (`int`, *optional*, defaults to `0`): Of the resampling.
    Returns:
        `dict`: `difference` (mean of the first minus that of the second), its `interval` and the two-sided `p_value`.
    Raises:
        ValueError: If the numbers of problems differ.
    """
    first, second = _paired(*(np.atleast_2d(np.asarray(arm, dtype=float)).mean(axis=0) for arm in (first, second)))
    differences = first - second
    result = {
        "difference": float(differences.mean()),
        "interval": bootstrap_interval(differences, seed, bounds=(-1.0, 1.0)),
        "p_value": 1.0,
    }
    if len(differences) > 1 and np.any(differences):
        # Swapping the arms on a problem turns its difference around.
        result["p_value"] = float(
            stats.permutation_test(
                (first, second),
                lambda x, y, axis: np.mean(x - y, axis=axis),
                permutation_type="samples",
                n_resamples=intervals.RESAMPLES,
                batch=500,
                vectorized=True,
                rng=np.random.default_rng(seed),
            ).pvalue
        )
    return result


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Holm's adjustment of a family of tests: rejecting those up to alpha makes any false one with a chance up to alpha.

    `max over the j-th smallest with j <= i of min(1, (m - j + 1) p_(j))` (Holm, Scand. J. Statist. 6, 1979). SciPy has
    the Benjamini-Hochberg procedure only, which bounds another error.

    Args:
        p_values (`Sequence[float]`): One a test.
    Returns:
        `list[float]`: Adjusted, in the given order.
    Raises:
        ValueError: If one is outside of [0, 1].
    """
    p_values = np.asarray(p_values, dtype=float)
    if not np.all((p_values >= 0) & (p_values <= 1)):
        raise ValueError(f"p-values must be from 0 to 1, got {p_values.tolist()}")
    order = np.argsort(p_values, kind="stable")
    remaining = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(remaining * p_values[order]))
    return adjusted.tolist()


def _paired(first, second) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of floats, of the same problems."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"both arms need the same problems, at least one, got {first.size} and {second.size}")
    return first, second
