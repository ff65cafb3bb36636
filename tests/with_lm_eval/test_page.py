"""docs/lm-eval.md agrees with the list of differences, the task file and the Makefile. CPU, without lm_eval."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from trl_tinylora.tasks import gsm8k


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "lm-eval.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def gradings():
    """The script that writes the page's table."""
    spec = importlib.util.spec_from_file_location("docs_gradings", ROOT / "docs" / "gradings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_table_is_that_of_the_list(gradings):
    opening, closing = f"<!-- results:{gradings.SECTION} -->", f"<!-- /results:{gradings.SECTION} -->"
    assert f"{opening}\n{gradings.table()}\n{closing}" in PAGE, (
        "run `make results`, or `python docs/gradings.py --update`"
    )


def test_every_listed_difference_is_of_a_known_kind_and_every_kind_is_listed(gradings):
    kinds, listed = gradings.read_kinds(), {}
    for row in gradings.read_completions():
        for grading, gold, kind in row["differences"]:
            assert gold in row["golds"]
            listed.setdefault(kind, set()).add(grading)
    assert listed == {name: set(kind["gradings"]) for name, kind in kinds.items()}
    assert {kind["ours"] for kind in kinds.values()} == {"right", "wrong"}


def test_the_list_holds_no_completion_twice(gradings):
    rows = [json.dumps(row["completion"]) for row in gradings.read_completions()]
    assert len(rows) == len(set(rows))


def test_the_task_asks_as_the_recipes_do():
    (task,) = yaml.safe_load((ROOT / "recipes" / "lm-eval" / "gsm8k.yaml").read_text(encoding="utf-8"))["task"]
    (asked,) = gsm8k.build_prompt("{{question}}")
    assert task["doc_to_text"] == asked["content"]
    assert task["task"] == "gsm8k" and not {"filter_list", "metric_list", "doc_to_target"} & set(task)


def test_the_page_names_the_version_that_the_tests_run_with():
    versions = re.compile(r"lm_eval(?:\[hf\])?==([\d.]+)")
    assert set(versions.findall(PAGE)) == set(versions.findall((ROOT / "Makefile").read_text())) != set()
    assert len(PAGE.splitlines()) <= 60
