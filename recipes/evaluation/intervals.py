"""How sure a model's accuracy is: intervals over problems, and pass@k.

Both intervals speak of other problems of the same kind, with the trained model as it is.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


CONFIDENCE = 0.95
RESAMPLES = 9999


def wilson_interval(correct: int, count: int) -> list[float]:
    """
    Wilson's 95% interval of a share, for one greedy completion a problem.

    Args:
        correct (`int`): Problems solved.
        count (`int`): Problems in all, at least 1.
    Returns:
        `list[float]`: Low and high, in [0, 1].
    """
    interval = stats.binomtest(int(correct), int(count)).proportion_ci(CONFIDENCE, method="wilson")
    return [float(interval.low), float(interval.high)]


def bootstrap_interval(
    values: Sequence[float],
    seed: int = 0,
    *,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> list[float]:
    """
    95% percentile bootstrap over problems of a mean of one value a problem.

    Args:
        values (`Sequence[float]`): One a problem: its share of right samples, or a difference of two such shares.
        seed (`int`, *optional*, defaults to `0`): Of the resampling.
        bounds (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): What one problem alone can say.
    Returns:
        `list[float]`: Low and high.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return [float(bound) for bound in bounds]
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [float(interval.low), float(interval.high)]


def pass_at(k: int, samples: int, correct: int) -> float:
    """
    Unbiased estimate of the chance that one of k samples is right.

    `1 - C(n - c, k) / C(n, k)` (Chen et al., arXiv:2107.03374, Eq. 1)

    Args:
        k (`int`): Samples that one may draw, `1 <= k <= samples`.
        samples (`int`): Samples that were drawn, n.
        correct (`int`): Of which were right, c.
    Returns:
        `float`: In [0, 1].
    Raises:
        ValueError: If k or `correct` is out of its bounds.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to samples={samples}, got {k}")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be from 0 to samples={samples}, got {correct}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)
