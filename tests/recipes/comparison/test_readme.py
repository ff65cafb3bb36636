"""A README's part of a comparison."""

import json
from pathlib import Path

import pytest
from comparison import readme, report
from made_up_records import (
    N,
)


pytestmark = pytest.mark.usefixtures("few_resamples_and_small_figures")


def test_a_readme_shows_a_short_table_its_caveat_and_a_figure_and_is_renewed_once(tmp_path, summary):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:toy -->\na former one\n<!-- /results:toy -->\nafter\n")
    readme.update_readme(path, summary)
    text = path.read_text()
    assert text.startswith("before\n<!-- results:toy -->\n| trained | values | arm | greedy | sampled |")
    assert text.endswith("\nafter\n") and "a former one" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6 and rows[0].startswith("| TinyLoRA, 13 values | 13 | RL | ")
    assert rows[-1].startswith("| nothing | 0 | untrained | ")
    assert f"({N}, mean ± standard deviation over 3 seeds)" in text and "](recipes/toy/results/accuracy.png)" in text
    readme.update_readme(path, summary)
    assert path.read_text() == text
    path.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        readme.update_readme(path, summary)


def test_the_committed_report_is_that_of_the_committed_summary():
    for path in Path("recipes").glob("*/results/summary.json"):
        found = json.loads(path.read_text())
        assert path.with_name("report.md").read_text() == report.text(found), "run `make results`"
