"""Which modules share a vector of trained values. Pure Python, exact integers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Union


TYINGS = ("tiled", "structured")


def module_type(name: str) -> str:
    """Returns a module's name with its depth taken out: all modules of one type have the same."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:position], "*", *parts[position + 1 :]])
    return name


def assign_groups(names: Sequence[str], n_tie: Union[int, str], tying: str) -> list[int]:
    """
    Assigns every module to the group whose vector v it uses (arXiv:2602.04118, sections 4 and 6.5).

    `"tiled"`: module i is in group floor(i / n_tie). `"structured"`: the same within the modules of each type, and the
    groups of the types follow one another.

    Args:
        names (`Sequence[str]`): Module names in depth order.
        n_tie (`int` or `"all"`): Modules per group; `"all"` for all of them (of a type, where structured).
        tying (`str`): `"tiled"` or `"structured"`.

    Returns:
        `list[int]`: The group of each module, counted from 0, every number below the largest taken.
    """
    types = ["" for _ in names] if tying == "tiled" else [module_type(name) for name in names]
    sizes = Counter(types)
    step = {kind: size if n_tie == "all" else n_tie for kind, size in sizes.items()}
    first_group, groups_so_far = {}, 0
    for kind, size in sizes.items():
        first_group[kind] = groups_so_far
        groups_so_far += -(-size // step[kind])
    seen: Counter[str] = Counter()
    groups = []
    for kind in types:
        groups.append(first_group[kind] + seen[kind] // step[kind])
        seen[kind] += 1
    return groups


def count_groups(names: Sequence[str], n_tie: Union[int, str], tying: str) -> int:
    """Returns the number of groups: ceil(modules / n_tie), summed over the types where structured."""
    return max(assign_groups(names, n_tie, tying)) + 1
