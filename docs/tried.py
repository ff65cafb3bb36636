"""
The tables of what was tried: trainers in docs/trainers.md, bases in docs/bases.md, of lists that a test runs.

    python docs/tried.py            # prints them
    python docs/tried.py --update   # writes them into the pages
"""

import argparse
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# Tests and recipes are no packages.
sys.path += [str(ROOT / "recipes"), str(ROOT / "tests")]


def trainers() -> str:
    """One row for each trainer of `tests/trl_trainers.py`, in its order."""
    from trl_trainers import TRAINERS

    rows = [f"| `{listed.trainer}` | {listed.runs} | {listed.remark} |" for listed in TRAINERS]
    return "\n".join(["| trainer | runs | remark |", "|---|---|---|", *rows])


def bases() -> str:
    """One row for each base of `tests/bases.py`, in its order."""
    from bases import BASES

    rows = [f"| {' | '.join(listed.cells.values())} |" for listed in BASES]
    return "\n".join(["| base | trained | saved, loaded | exported | merged |", "|---|---|---|---|---|", *rows])


# By the section of the page of the same name.
TABLES = {"trainers": trainers, "bases": bases}


def page_of(section: str) -> Path:
    """The page that a table stands in."""
    return ROOT / "docs" / f"{section}.md"


def renewed(section: str) -> str:
    """
    A page with its table renewed; one that is current comes back as it was.

    Args:
        section (`str`): One of [`TABLES`].
    Returns:
        `str`
    Raises:
        ValueError: If a marker is missing.
    """
    from records.files import replace_section

    return replace_section(page_of(section).read_text(encoding="utf-8"), section, TABLES[section]())


def main() -> None:
    """Prints the tables, or writes them into their pages."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write them into docs/")
    options = parser.parse_args()
    for section, table in TABLES.items():
        print(table(), end="\n\n")
        if options.update:
            from records.files import write_text

            write_text(page_of(section), renewed(section))


if __name__ == "__main__":
    main()
