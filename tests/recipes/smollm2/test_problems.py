"""The real model's problems: the committed files, and that no test problem is trained on. CPU, seconds."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from trl_tinylora.tasks import gsm8k


RECIPE = Path(__file__).parents[3] / "recipes" / "smollm2-135m-arithmetic"
SIGNS = {"times": "*", "plus": "+", "minus": "-"}


@pytest.fixture(scope="module")
def problems():
    specification = importlib.util.spec_from_file_location("problems", RECIPE / "problems.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits(problems):
    return problems.make_splits()


def read(row):
    """Sign and numbers of a question."""
    a, word, b = re.fullmatch(r"What is (\d+) (\w+) (\d+)\?", row["question"]).groups()
    return SIGNS[word], int(a), int(b)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_committed_data_equals_the_regenerated_bytes(problems, splits, split):
    committed = (RECIPE / "data" / f"{split}.jsonl").read_bytes()
    assert committed == problems.rows_as_jsonl(splits[split]).encode("utf-8")


def test_other_seeds_give_other_problems(problems, splits):
    assert problems.make_splits(seed=problems.SEED + 1)["test"] != splits["test"]


@pytest.mark.parametrize(("split", "count"), [("train", 67), ("validation", 14), ("test", 40)])
def test_a_split_has_as_many_problems_of_each_kind_all_in_the_stated_space_and_right(splits, split, count):
    assert Counter(read(row)[0] for row in splits[split]) == dict.fromkeys("*+-", count)
    for row in splits[split]:
        sign, a, b = read(row)
        assert {"*": 2 <= a <= 12 and 2 <= b <= 12, "+": a > 0 < b and a + b <= 99, "-": 1 <= b < a <= 99}[sign]
        right = {"*": a * b, "+": a + b, "-": a - b}[sign]
        assert row["answer"] == f"<<{a}{sign}{b}={right}>>{right}\n#### {right}"
        assert gsm8k.grade(row["answer"], str(right))["strict"]


def test_no_problem_and_no_other_order_of_one_is_in_two_splits(splits):
    seen = {}
    for split, rows in splits.items():
        for row in rows:
            sign, a, b = read(row)
            for other in ((a, b), (b, a) if sign != "-" else (a, a - b)):
                assert seen.setdefault((sign, *other), split) == split
    assert len({row["question"] for rows in splits.values() for row in rows}) == 3 * 121
