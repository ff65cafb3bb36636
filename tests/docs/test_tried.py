"""The tables of what was tried stand in their pages as the lists have them."""

import importlib.util
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "docs" / "tried.py"
spec = importlib.util.spec_from_file_location("docs_tried", SCRIPT)
tried = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tried)


@pytest.mark.parametrize("section", tried.TABLES)
def test_a_page_is_that_of_its_list(section):
    page = tried.page_of(section).read_text(encoding="utf-8")
    assert tried.renewed(section) == page, "run `make results`, or `python docs/tried.py --update`"
