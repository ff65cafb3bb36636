"""The report's text, and what it says where data are missing."""

import copy
import json
import re

import pytest
from comparison import conclusions, figures, report
from made_up_records import (
    ARMS,
    N,
    cell_of,
    stripped,
    summarized,
    without,
)


pytestmark = pytest.mark.usefixtures("few_resamples_and_small_figures")


def test_the_table_has_arms_and_controls_with_the_gain_in_two_parts(summary):
    lines = report.table(summary).splitlines()
    assert lines[0] == "| trained | values | arm or control | strict | sampled | gain | = right more often | + format |"
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]
    assert len(cells) == 3 * 5 + 6 and len({len(row) for row in cells}) == 1
    for row in (row for row in cells if row[5] != "-"):
        total, more, form = (float(part.strip("*")) for part in row[5:])
        assert total == pytest.approx(more + form, abs=0.11)
    bold = cell_of(summary, "rl", "13")["gains"]["greedy"]["strict"]
    assert conclusions.verdict(bold) == "higher" and f"**{conclusions.points(bold['difference'])}**" in lines[8]
    assert lines[-6].startswith("| nothing | 0 | untrained |") and lines[-4].endswith(
        "| zero adapter | 8.8% | 7.8% | 0.0 | 0.0 | 0.0 |"
    )


def test_the_report_states_what_makes_it_believable(made):
    text = report.text(summarized(made, missing=["final-sft-1-seed3"]))
    for stated in (
        f"{N} test problems",
        "over 3 seeds (1, 2, 3)",
        "**Missing or failed runs:** final-sft-1-seed3.",
        "so that a rate outside might be better: RL, TinyLoRA, 1 value (0.03).",
        "| RL | 1,600 | 60 | 70,000 | 90,000 | 31 to 33 |",
        "| SFT on gold answers | 1,600 | 60 | 0 |",
        "- `beta`: RL only",
        "| RL | 2 | 0.01 | 0.003: 36.0%, 0.01: 45.0%, 0.03: 40.5% |",
        "commit 0123456789ab",
        "right ones were found of 900 of 1,000 problems a seed, with 5,000 generated tokens",
        "| TinyLoRA, 13 values | 13 | zero adapter |",
        "1: 50.0%, 4: 80.0%",
    ):
        assert stated in text, stated
    for label in [label for label, _, _ in ARMS.values()] + ["zero adapter", "random values of the trained norm"]:
        assert text.count(label) > 3, label


def test_every_table_is_as_wide_as_its_header(summary):
    tables = re.findall(r"(?:^\|.*\n)+", report.text(summary), flags=re.MULTILINE)
    assert len(tables) >= 6
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table.splitlines()[0]


def test_rebuilding_gives_the_same_bytes_from_the_summary_alone(tmp_path, summary):
    report.write(summary, tmp_path / "first")
    report.write(json.loads((tmp_path / "first" / "summary.json").read_text()), tmp_path / "second")
    names = {"summary.json", "report.md", *figures.FIGURES}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    for name in names:
        first = (tmp_path / "first" / name).read_bytes()
        assert first == (tmp_path / "second" / name).read_bytes(), name
        if name.endswith(".png"):
            assert first.startswith(b"\x89PNG") and b"tIME" not in first and b"Software" not in first


def lacking_figures(folder):
    return set(figures.FIGURES) - {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "change, left_out, said",
    [
        (lambda r: r["arm"] == "sft-own", set(), "| RL |"),
        (lambda r: r["seed"] in (2, 3), set(), "**One seed** for"),
        (lambda r: r["phase"] == "untrained", set(), "not compared with the untrained model"),
        (
            lambda r: r["size"] not in (None, "13-bf16"),
            {"accuracy.png"},
            "Not drawn: no values were kept in float32",
        ),
        (lambda r: r["arm"] == "rl", set(), "None: no RL arm, or nothing beside it."),
        (lambda r: r["phase"] != "untrained", set(figures.FIGURES), "Not drawn: nothing was trained."),
        (lambda r: True, set(figures.FIGURES), "No run has ended yet."),
    ],
    ids=[
        "an arm",
        "all but one seed",
        "untrained",
        "all but a precision",
        "RL",
        "all but untrained",
        "everything",
    ],
)
def test_what_is_missing_is_left_out_and_said(tmp_path, few, change, left_out, said):
    report.write(summarized(without(few, change)), tmp_path)
    assert lacking_figures(tmp_path) == left_out
    assert said in (tmp_path / "report.md").read_text()


def test_without_samples_the_report_speaks_of_greedy_answers_only(tmp_path, few):
    report.write(summarized(stripped(few, kinds=("greedy",))), tmp_path)
    assert lacking_figures(tmp_path) == set()
    assert "at temperature" not in (tmp_path / "report.md").read_text()


def test_without_flexible_grading_nothing_is_split(tmp_path, few):
    report.write(summarized(stripped(few, gradings=("strict",))), tmp_path)
    assert lacking_figures(tmp_path) == set()
    text = (tmp_path / "report.md").read_text()
    assert "format cannot be told from answers right more often" in text and "for answers right" not in text


def test_without_curves_their_figure_is_left_out_and_a_former_one_removed(tmp_path, few):
    report.write(summarized(few), tmp_path)
    bare = copy.deepcopy(few)
    for record in bare:
        record.pop("curve", None)
    report.write(summarized(bare), tmp_path)
    assert lacking_figures(tmp_path) == {"curves.png"}
    assert "Not drawn: no run has a training curve." in (tmp_path / "report.md").read_text()
