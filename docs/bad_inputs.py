"""
The table of bad inputs in docs/adapters.md: how many the tests try, by kind.

    python docs/bad_inputs.py            # prints it; `make bad-inputs`
    python docs/bad_inputs.py --update   # writes it into the page
"""

import argparse
import contextlib
import io
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adapters.md"
SECTION = "bad inputs"


def table(items: Iterable) -> str:
    """The table of the tests that pytest has collected, one row for each kind of `@pytest.mark.bad_input(kind)`."""
    kinds = Counter(mark.args[0] for item in items for mark in item.iter_markers("bad_input"))
    rows = [f"| {kind} | {count} |" for kind, count in sorted(kinds.items())]
    return "\n".join(["| what is wrong | inputs tried |", "|---|--:|", *rows, f"| together | {kinds.total()} |"])


class Collected:
    """A pytest plugin that keeps the tests."""

    items = ()

    def pytest_collection_finish(self, session):
        """Called when all tests are known."""
        self.items = session.items


def main() -> None:
    """Collects the tests and prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write it into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    import pytest

    collected = Collected()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main(["--collect-only", "-q", f"--rootdir={ROOT}", str(ROOT / "tests")], [collected])
    if code:
        sys.exit(f"{said.getvalue()}error: pytest ended with {code}")
    print(table(collected.items))
    if options.update:
        sys.path.insert(0, str(ROOT / "recipes"))
        from records.files import update_section

        update_section(PAGE, SECTION, table(collected.items))


if __name__ == "__main__":
    main()
