"""
What `import trl_tinylora` adds to `import peft`, in fresh processes.

    python recipes/benchmark.py imports  # under a minute on one core

Each process imports PEFT first and then the package, and times the two: what both need is PEFT's part. A first process
that is not counted brings the files into memory, and compiles them, as installing a package does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Row, parser_of, ratio_of, run


ROOT = Path(__file__).resolve().parents[2]
BOUND = 0.05
SCRIPT = """
import json, sys, time
start = time.perf_counter()
import peft
middle, before = time.perf_counter(), set(sys.modules)
import trl_tinylora
end = time.perf_counter()
added = sorted(name for name in set(sys.modules) - before)
print(json.dumps({"peft": middle - start, "trl_tinylora": end - middle, "modules": added}))
"""


def import_once() -> dict:
    """Imports both in a new process."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    answer = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(answer.stdout)


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Measures."""
    import_once()
    found = [import_once() for _ in range(arguments.repeats)]
    seconds = {name: [each[name] for each in found] for name in ("peft", "trl_tinylora")}
    ours = statistics.median(seconds["trl_tinylora"])
    ratio, spread = ratio_of(seconds["peft"], seconds["trl_tinylora"])
    row = Row(
        claim="`import trl_tinylora` after `import peft`",
        ours=ours,
        theirs=statistics.median(seconds["peft"]),
        whose="`import peft`",
        unit="s",
        ratio=ratio,
        spread=spread,
        bound="under 50 ms",
        holds=ours < BOUND,
    )
    return [row], {"seconds": seconds, "modules": found[0]["modules"]}


def main() -> None:
    """Measures and writes the record."""
    parser = parser_of(__doc__, "imports")
    parser.add_argument("--repeats", type=int, default=7, help="processes that are timed")
    run("imports", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
