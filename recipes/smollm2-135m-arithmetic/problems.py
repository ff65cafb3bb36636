"""The problems: products to 12 x 12, sums and differences below 100, in GSM8K's row format.

    python recipes/smollm2-135m-arithmetic/problems.py  # writes data/ anew, the same bytes

The space: a x b with both from 2 to 12; a + b with both at least 1 and a sum of at most 99; a - b with 1 <= b < a and
a at most 99. All 121 products, and as many sums and differences drawn from theirs. Problems that are one fact in two
orders (a x b and b x a, a + b and b + a, a - b = c and a - c = b) are always in one split, so that no test problem is
trained on turned round. A row:

    {"question": "What is 8 times 7?", "answer": "<<8*7=56>>56\\n#### 56"}
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path


DATA = Path(__file__).parent / "data"
SEED = 0
# Problems of each kind. Those of a kind are 121: every product.
SPLITS = {"test": 40, "validation": 14, "train": 67}
WORDS = {"*": "times", "+": "plus", "-": "minus"}


def space(sign: str) -> list[tuple[int, int]]:
    """All pairs of numbers of one kind of problem, `"*"`, `"+"` or `"-"`."""
    if sign == "*":
        return [(a, b) for a in range(2, 13) for b in range(2, 13)]
    if sign == "+":
        return [(a, b) for a in range(1, 99) for b in range(1, 100 - a)]
    return [(a, b) for a in range(2, 100) for b in range(1, a)]


def result(sign: str, a: int, b: int) -> int:
    """What a calculation gives."""
    return {"*": a * b, "+": a + b, "-": a - b}[sign]


def fact(sign: str, a: int, b: int) -> frozenset[int]:
    """Equal for the two orders of one fact, and for no others of its kind."""
    return frozenset((a, a - b, b)) if sign == "-" else frozenset((a, b))


def row(sign: str, a: int, b: int) -> dict[str, str]:
    """A problem as GSM8K has it: the calculation in its marks, then the answer behind "####"."""
    c = result(sign, a, b)
    return {"question": f"What is {a} {WORDS[sign]} {b}?", "answer": f"<<{a}{sign}{b}={c}>>{c}\n#### {c}"}


def make_splits(seed: int = SEED) -> dict[str, list[dict[str, str]]]:
    """
    The rows of every split, in a random order.

    Args:
        seed (`int`, *optional*, defaults to `SEED`): Of the draw and the order.
    Returns:
        `dict[str, list[dict[str, str]]]`: By split: as many of each kind as `SPLITS` says.
    """
    generator = random.Random(seed)
    splits = {split: [] for split in SPLITS}
    for sign in WORDS:
        room = dict(SPLITS)
        for orders in _shuffled_facts(generator, sign):
            # A fact of two orders leaves the last place of a split to one of a single order.
            split = next((name for name, places in room.items() if places >= len(orders)), None)
            if split is not None:
                room[split] -= len(orders)
                splits[split] += [row(sign, *pair) for pair in orders]
    for rows in splits.values():
        generator.shuffle(rows)
    return splits


def _shuffled_facts(generator, sign) -> list[list[tuple[int, int]]]:
    """The orders of each fact of a kind."""
    facts = defaultdict(list)
    for pair in space(sign):
        facts[fact(sign, *pair)].append(pair)
    shuffled = list(facts.values())
    generator.shuffle(shuffled)
    return shuffled


def rows_as_jsonl(rows: list[dict[str, str]]) -> str:
    """A line a row."""
    return "".join(json.dumps(item) + "\n" for item in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=DATA, help="data/ beside this file by default")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits().items():
        (output_dir / f"{split}.jsonl").write_text(rows_as_jsonl(rows), encoding="utf-8")
        print(f"{output_dir / split}.jsonl: {len(rows)} problems")
