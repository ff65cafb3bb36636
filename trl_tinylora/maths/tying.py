"""Which modules share a vector of trained values. Pure Python, exact integers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Union


TYINGS = ("tiled", "structured")
# Of modules, in a message.
MOST_NAMED = 8


def module_type(name: str) -> str:
    """Returns a module's name with its depth taken out: all modules of one type have the same."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:position], "*", *parts[position + 1 :]])
    return name


def kinds_of(names: Sequence[str], tying: Union[str, Mapping[str, str]]) -> list[str]:
    """
    Returns the kind of every module: only modules of one kind share values.

    Args:
        names (`Sequence[str]`): Module names in depth order.
        tying (`str` or `Mapping[str, str]`): `"tiled"`, all of one kind; `"structured"`, the [`module_type`]; or
            regular expressions by the kind's name, of which exactly one is found in each module's name.

    Raises:
        ValueError: If none or several of the expressions are found in a module's name; the message lists such modules.
    """
    if tying == "tiled":
        return ["" for _ in names]
    if tying == "structured":
        return [module_type(name) for name in names]
    found = {name: [kind for kind, pattern in tying.items() if re.search(pattern, name)] for name in names}
    wrong = [f"{name} ({' and '.join(kinds) or 'none'})" for name, kinds in found.items() if len(kinds) != 1]
    if wrong:
        more = ", ..." if len(wrong) > MOST_NAMED else ""
        raise ValueError(
            f"`tying={dict(tying)!r}` must find each of the {len(names)} adapted modules by exactly one expression, "
            f"and does not for {len(wrong)}: {', '.join(wrong[:MOST_NAMED])}{more}. Change the expressions, or name "
            "fewer modules in `target_modules`."
        )
    return [found[name][0] for name in names]


def assign_groups(names: Sequence[str], n_tie: Union[int, str], tying: Union[str, Mapping[str, str]]) -> list[int]:
    """
    Assigns every module to the group whose vector v it uses (arXiv:2602.04118, sections 4 and 6.5).

    `"tiled"`: module i is in group floor(i / n_tie). Else the same within the modules of each kind, and the groups of
    the kinds follow one another, in the order of their first modules.

    Args:
        names (`Sequence[str]`): Module names in depth order.
        n_tie (`int` or `"all"`): Modules per group; `"all"` for all of them (of a kind, unless tiled).
        tying (`str` or `Mapping[str, str]`): As of [`kinds_of`].

    Returns:
        `list[int]`: The group of each module, counted from 0, every number below the largest taken.

    Raises:
        ValueError: As of [`kinds_of`].
    """
    types = kinds_of(names, tying)
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


def count_groups(names: Sequence[str], n_tie: Union[int, str], tying: Union[str, Mapping[str, str]]) -> int:
    """Returns the number of groups: ceil(modules / n_tie), summed over the kinds."""
    return max(assign_groups(names, n_tie, tying)) + 1
