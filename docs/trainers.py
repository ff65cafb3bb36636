"""
The table of trainers in docs/trainers.md, of the list whose every entry tests/trainers/test_every_trainer.py runs.

    python docs/trainers.py            # prints it
    python docs/trainers.py --update   # writes it into the page
"""

import argparse
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "trainers.md"
SECTION = "trainers"
# Tests and recipes are no packages.
sys.path += [str(ROOT / "recipes"), str(ROOT / "tests")]


def table() -> str:
    """One row for each trainer of `tests/trl_trainers.py`, in its order."""
    from trl_trainers import TRAINERS

    rows = [f"| `{listed.trainer}` | {listed.runs} | {listed.remark} |" for listed in TRAINERS]
    return "\n".join(["| trainer | runs | remark |", "|---|---|---|", *rows])


def renewed(page: str) -> str:
    """
    The page with its table renewed; one that is current comes back as it was.

    Args:
        page (`str`): Text of trainers.md.
    Returns:
        `str`
    Raises:
        ValueError: If a marker is missing.
    """
    from records.files import replace_section

    return replace_section(page, SECTION, table())


def main() -> None:
    """Prints the table, or writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write it into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    print(table())
    if options.update:
        from records.files import write_text

        write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
