"""The difference of two models on the same problems, with the same seeds, and how sure it is."""

import numpy as np
from scipy import stats

from comparison import statistics


def _right(record, kind, measure) -> np.ndarray | None:
    """Each problem's share of right answers, shape `(problems,)`; None where it was not kept."""
    if kind not in record["metrics"]:
        return None
    if measure == "format":
        strict, flexible = (_right(record, kind, grading) for grading in ("strict", "flexible"))
        return None if strict is None or flexible is None else strict - flexible
    right = record["metrics"][kind].get(measure, {}).get("correct")
    samples = record["metrics"]["samples"] if kind == "sampled" else 1
    return None if right is None else np.asarray(right, dtype=float) / samples


def _is_fixed(group) -> bool:
    """Whether a model is one and the same whatever the seed: untrained, or with nothing but zeros."""
    return len(group) == 1 and not group[0].get("optimizer_steps")


def difference(group: list[dict], other: list[dict], kind: str, measure: str, is_by_seed: bool = False) -> dict | None:
    """
    Two models' difference on the same problems, with the same seeds.

    Two intervals are computed: over problems (paired bootstrap of each problem's mean over seeds) and over seeds
    (Student's t of each seed's difference). The one given holds both and the p-value is the larger one, so that a claim
    stands only if neither other problems nor other seeds would take it away.

    Args:
        group (`list[dict]`): The records of one model, a seed each.
        other (`list[dict]`): Of the one that is subtracted.
        kind (`str`): `"greedy"` or `"sampled"`.
        measure (`str`): `"strict"`, `"flexible"` or `"format"`.
        is_by_seed (`bool`, *optional*, defaults to `False`): Whether to add `by_seed`, of greedy answers.
    Returns:
        `dict` or `None`: `difference`, `interval`, `over_problems`, `over_seeds`, `p`, `n_seeds` (0 where no seed had
        a part in either model), `is_identical` and, where asked for, `by_seed` (only the one right, only the
        other right, p of McNemar's exact test). None without answers by problem, or without a seed in common.
    """
    matched = _matched(group, other)
    answers = [(_right(first, kind, measure), _right(second, kind, measure)) for first, second in matched]
    if not answers or any(first is None or second is None for first, second in answers):
        return None
    first, second = (np.array(side) for side in zip(*answers, strict=True))
    differences = (first - second).mean(1)
    is_identical = bool((first == second).all())
    over_problems, p_problems = ([0.0, 0.0], 1.0) if is_identical else _over_problems(first.mean(0), second.mean(0))
    over_seeds, p_seeds = (None, 0.0) if len(differences) < 2 or is_identical else _over_seeds(differences)
    bounds = [bound for bounds in (over_problems, over_seeds) if bounds is not None for bound in bounds]
    n_seeds = 0 if _is_fixed(group) and _is_fixed(other) else len(matched)
    found = {
        "difference": float(differences.mean()),
        # Student's t does not know that shares end at 0 and 1.
        "interval": [max(-1.0, min(bounds)), min(1.0, max(bounds))],
        "over_problems": over_problems,
        "over_seeds": over_seeds,
        "p": max(p_problems, p_seeds),
        "n_seeds": n_seeds,
        "is_identical": is_identical,
    }
    if is_by_seed:
        found["by_seed"] = [
            {"seed": record["seed"], **_mcnemar(one, two)}
            for (record, _), one, two in zip(matched, first, second, strict=True)
        ]
    return found


def _matched(group, other) -> list[tuple[dict, dict]]:
    """The records that are compared: those of a seed, and a model without one beside each."""
    if _is_fixed(other):
        return [(record, other[0]) for record in group]
    if _is_fixed(group):
        return [(group[0], record) for record in other]
    by_seed = {record["seed"]: record for record in other}
    return [(record, by_seed[record["seed"]]) for record in group if record["seed"] in by_seed]


def _over_problems(first, second) -> tuple[list[float], float]:
    found = statistics.paired_bootstrap(first, second)
    return found["interval"], found["p_value"]


def _over_seeds(differences) -> tuple[list[float], float]:
    bounds = statistics.seed_interval(differences)
    if np.ptp(differences) == 0:
        # Seeds that agree to the last problem leave the word to the interval over problems.
        return bounds, 0.0 if differences[0] else 1.0
    return bounds, float(stats.ttest_1samp(differences, 0.0).pvalue)


def _mcnemar(first, second) -> dict:
    found = statistics.mcnemar(first, second)
    return {"only_first": found["only_first"], "only_other": found["only_second"], "p": found["p_value"]}
