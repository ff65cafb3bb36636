"""The generated tables: memory and the launchers' matrix in docs/launchers.md, what vLLM samples in
docs/merging-and-vllm.md, quantised bases in docs/bases.md, several runs in one batch in docs/many-adapters.md, searches
without gradients in docs/evolution.md, learning rates in docs/learning-rate.md, intruder dimensions in
docs/intruders.md, the real model's comparison and the paper's numbers in the recipes.

python recipes/tables.py           # renews what is not current
python recipes/tables.py --check   # changes nothing; fails if one is not current
"""

import argparse
import json
from pathlib import Path

from benchmarks import intruders, quantised, sampling, shared_batch
from benchmarks.harness import RESULTS
from comparison import readme
from paper import memory, published
from records import launchers
from records.files import replace_section, write_text


RECIPES = Path(__file__).parent


def documents() -> dict[Path, str]:
    """
    The documents with generated tables, as they should be.

    Returns:
        `dict[Path, str]`: Content by path.
    Raises:
        ValueError: If a marker is missing.
    """
    docs, toy, real = RECIPES.parent / "docs", RECIPES / "toy", RECIPES / "smollm2-135m-arithmetic"
    evolution, rates = _summary(toy / "evolution"), _summary(toy / "rates")
    sections = [
        (docs / "launchers.md", "memory", memory.table()),
        (docs / "launchers.md", "distributed", launchers.table(_read(launchers.RECORD))),
        (docs / "merging-and-vllm.md", "sampling", sampling.table(_records("sampling*.json"))),
        (docs / "bases.md", "quantised", quantised.table(*_records("quantised.json"))),
        (docs / "many-adapters.md", "shared", shared_batch.table(_records("shared_batch*.json"))),
        (docs / "intruders.md", "intruders", intruders.table(*_records("intruders.json"))),
        (real / "README.md", "comparison", readme.recipe_content(_summary(real / "results"))),
        (docs / "evolution.md", "evolution", readme.recipe_content(evolution, "../recipes/toy/evolution")),
        (docs / "learning-rate.md", "rates", "**Not run.**" if rates is None else readme.rates_table(rates)),
    ]
    renewed: dict[Path, str] = {}
    for path, name, content in sections:
        page = renewed.get(path) or path.read_text(encoding="utf-8")
        renewed[path] = replace_section(page, name, content)
    numbers = published.read()
    for recipe in sorted({entry["recipe"] for entry in numbers["tables"]}):
        renewed[RECIPES / recipe / "README.md"] = published.renewed(recipe, numbers)
    return renewed


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _records(pattern: str) -> list[dict]:
    """Of benchmarks, in the order of their names."""
    return [_read(path) for path in sorted(RESULTS.glob(pattern))]


def _summary(folder: Path) -> dict | None:
    """Of a comparison's results; None where there are none yet."""
    path = folder / "summary.json"
    return _read(path) if path.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if one is not current")
    check = parser.parse_args().check
    stale = [(path, text) for path, text in documents().items() if path.read_text(encoding="utf-8") != text]
    if check and stale:
        raise SystemExit(f"not current: {', '.join(str(path) for path, _ in stale)}: run python recipes/tables.py")
    for path, text in stale:
        write_text(path, text)
        print(f"Renewed {path}")


if __name__ == "__main__":
    main()
