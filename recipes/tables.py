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
    path = RECIPES.parent / "docs" / "launchers.md"
    page = replace_section(path.read_text(encoding="utf-8"), "memory", memory.table())
    matrix = json.loads(launchers.RECORD.read_text(encoding="utf-8"))
    renewed = {path: replace_section(page, "distributed", launchers.table(matrix))}
    path = RECIPES.parent / "docs" / "merging-and-vllm.md"
    records = [json.loads(found.read_text(encoding="utf-8")) for found in sorted(RESULTS.glob("sampling*.json"))]
    renewed[path] = replace_section(path.read_text(encoding="utf-8"), "sampling", sampling.table(records))
    path = RECIPES.parent / "docs" / "bases.md"
    record = json.loads((RESULTS / "quantised.json").read_text(encoding="utf-8"))
    renewed[path] = replace_section(path.read_text(encoding="utf-8"), "quantised", quantised.table(record))
    path = RECIPES.parent / "docs" / "many-adapters.md"
    records = [json.loads(found.read_text(encoding="utf-8")) for found in sorted(RESULTS.glob("shared_batch*.json"))]
    renewed[path] = replace_section(path.read_text(encoding="utf-8"), "shared", shared_batch.table(records))
    path = RECIPES.parent / "docs" / "intruders.md"
    record = json.loads((RESULTS / "intruders.json").read_text(encoding="utf-8"))
    renewed[path] = replace_section(path.read_text(encoding="utf-8"), "intruders", intruders.table(record))
    path = RECIPES / "smollm2-135m-arithmetic" / "README.md"
    content = readme.recipe_content(_summary(path.parent / "results"))
    renewed[path] = replace_section(path.read_text(encoding="utf-8"), "comparison", content)
    path = RECIPES.parent / "docs" / "evolution.md"
    content = readme.recipe_content(_summary(RECIPES / "toy" / "evolution"), "../recipes/toy/evolution")
    renewed[path] = replace_section(path.read_text(encoding="utf-8"), "evolution", content)
    path = RECIPES.parent / "docs" / "learning-rate.md"
    summary = _summary(RECIPES / "toy" / "rates")
    content = "**Not run.**" if summary is None else readme.rates_table(summary)
    renewed[path] = replace_section(path.read_text(encoding="utf-8"), "rates", content)
    numbers = published.read()
    for recipe in sorted({entry["recipe"] for entry in numbers["tables"]}):
        renewed[RECIPES / recipe / "README.md"] = published.renewed(recipe, numbers)
    return renewed


def _summary(folder: Path) -> dict | None:
    """Of a comparison's results; None where there are none yet."""
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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
