"""The learning rates of a comparison: those that its YAML fixes, or the best of each grid after a sweep."""

from comparison.arguments import CompareArguments


def rule(grading: str) -> str:
    """How a learning rate is chosen, for people; `grading` is `"strict"` or `"flexible"`."""
    return f"best mean of greedy and sampled {grading} accuracy on the validation problems; the smaller rate of equals"


def fixed_learning_rates(arguments: CompareArguments) -> dict:
    """
    The rates that the YAML fixes.

    Args:
        arguments (`CompareArguments`): Without a `sweep_seed`.
    Returns:
        `dict`: `learning_rate` by arm and size.
    """
    rates: dict = {}
    for arm, size in arguments.cells():
        arm = arguments.rates_from(arm)
        rates.setdefault(arm, {})[size] = {"learning_rate": float(arguments.sizes[size]["learning_rate"][arm])}
    return rates


def choose_learning_rates(records: list[dict], grading: str = "strict") -> dict:
    """
    For each arm and size the rate with the best mean of greedy and sampled accuracy.

    The smaller one of equals.

    Args:
        records (`list[dict]`): Of the sweep.
        grading (`str`, *optional*, defaults to `"strict"`): Or `"flexible"`.
    Returns:
        `dict`: By arm and size: `learning_rate`, `score`, `grid` (scores by rate) and `at_edge` (whether a rate outside
        of the grid might have been better).
    """
    scores: dict = {}
    for record in records:
        metrics = record["metrics"]
        parts = [metrics[kind][grading]["accuracy"] for kind in ("greedy", "sampled") if kind in metrics]
        by_size = scores.setdefault(record["arm"], {}).setdefault(record["size"], {})
        by_size[record["learning_rate"]] = sum(parts) / len(parts)
    chosen: dict = {}
    for arm, by_size in scores.items():
        for size, grid in by_size.items():
            best = max(sorted(grid), key=grid.get)
            chosen.setdefault(arm, {})[size] = {
                "learning_rate": best,
                "score": grid[best],
                "grid": {f"{rate:g}": grid[rate] for rate in sorted(grid)},
                "at_edge": best in (min(grid), max(grid)),
            }
    return chosen


def lacking_rates(arguments: CompareArguments, rates: dict) -> list[tuple[str, str]]:
    """
    Arm and size of what cannot be trained because every run of its sweep is missing or failed.

    Args:
        arguments (`CompareArguments`): Read for `arms` and `sizes`.
        rates (`dict`): As [`choose_learning_rates`] returns.
    Returns:
        `list[tuple[str, str]]`: Empty where nothing is lacking.
    """
    wanted = {(arguments.rates_from(arm), size) for arm, size in arguments.cells()}
    return sorted((arm, size) for arm, size in wanted if size not in rates.get(arm, {}))
