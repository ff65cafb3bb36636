"""One benchmark, by its name.

python recipes/benchmark.py build [arguments]  # runs recipes/benchmarks/build.py; --help lists the arguments
python recipes/benchmark.py harness            # prints the table of the committed records
"""

import importlib
import sys
from pathlib import Path


BENCHMARKS = sorted(path.stem for path in Path(__file__).with_name("benchmarks").glob("*.py"))


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else None
    if name not in BENCHMARKS:
        raise SystemExit(f"name a benchmark, one of {', '.join(BENCHMARKS)}; got {name!r}")
    importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
