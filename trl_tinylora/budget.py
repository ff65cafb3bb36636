"""Which configuration trains a wanted number of values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Optional, Union

from .maths.tying import assign_groups, kinds_of


def nearest_budget(
    names: Sequence[str],
    n_values: int,
    *,
    r: int,
    tying: Union[str, Mapping[str, str]],
    modules_add_freedom: bool,
    u: Optional[int] = None,
    n_tie: Optional[Union[int, str]] = None,
) -> tuple[int, Union[int, str], int]:
    """
    Finds `u` and `n_tie` whose number of values comes nearest to `n_values`, with as little tying as possible.

    Args:
        names (`Sequence[str]`): Names of the adapted modules in depth order.
        n_values (`int`): Wanted number of trained values.
        r (`int`): Rank of the adapter; a group has at most r*r degrees of freedom per module.
        tying (`str` or `Mapping[str, str]`): As of [`~trl_tinylora.maths.tying.kinds_of`].
        modules_add_freedom (`bool`): Whether each module of a group has matrices P of its own, so that every further
            module adds r*r degrees of freedom to the group.
        u (`int`, *optional*): Values per group, where it is fixed.
        n_tie (`int` or `"all"`, *optional*): Modules per group, where it is fixed.

    Returns:
        `tuple[int, int | str, int]`: `u`, `n_tie` and the number of values they make.
    """
    largest = max(Counter(kinds_of(names, tying)).values())
    best = None
    for tied in [n_tie] if n_tie is not None else range(1, largest + 1):
        sizes = Counter(assign_groups(names, tied, tying)).values()
        n_groups = len(sizes)
        # No value is wasted on the smaller last group, unless `n_tie` is as asked for.
        modules = min(sizes) if n_tie is None else max(sizes)
        freedom = r * r * (modules if modules_add_freedom else 1)
        below = min(max(n_values // n_groups, 1), freedom)
        for values in [u] if u is not None else (below, min(below + 1, freedom)):
            distance = abs(values * n_groups - n_values)
            if best is None or distance < best[0]:
                best = (distance, values, tied, values * n_groups)
    _, values, tied, count = best
    return values, "all" if n_tie is None and tied == largest and largest > 1 else tied, count
