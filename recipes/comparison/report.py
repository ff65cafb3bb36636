"""A comparison's report: its first table, what the data say, figures and further tables, from its summary alone."""

import json
from collections.abc import Callable
from pathlib import Path

from records.files import write_text

from comparison import conclusions, figures, tables
from comparison.tables import grid, listed, percent


FIGURES = {"Accuracy by number of trained values": "accuracy.png", "Training curves": "curves.png"}
SECTIONS: dict[str, Callable[[dict], str]] = {
    "RL against the other arms and the controls": tables.comparisons,
    "Gains over the untrained model": tables.gains,
    "Every arm": tables.every_arm,
    "Budgets": tables.budget,
    "Learning rates": tables.rates,
    "Origin": tables.origin,
}
SPLIT = (
    "*Strict* grading wants the answer in the form that the prompt asks for; *flexible* grading takes a marked, boxed "
    "or last number. *Format* is what strict grading misses and flexible grading reads; the rest of a gain is *right "
    "more often*: more answers are right, whether the model reasons better or only does more often what it could do "
    "all along. An answer that no grading can read counts as a wrong one."
)
FORM = (
    "Right is what *flexible* grading finds right: it takes a marked, boxed or last number. *In the asked-for form* is "
    "the part of it that *strict* grading reads as well. An answer that no grading can read counts as a wrong one."
)
RULES = (
    "In brackets: 95% intervals. Each holds two: over problems (a paired bootstrap of each problem's mean over seeds) "
    "and over seeds (Student's t of the seeds' differences), so that neither other problems nor other seeds would take "
    "a claim away; with few seeds it is wide. p is the larger one of a permutation test over problems and a t-test "
    "over seeds, corrected by Holm for all comparisons that answer the same question. A difference is claimed where "
    f"the interval leaves out zero and p is at most {conclusions.SIGNIFICANCE:g}; equality is claimed only as an "
    f"interval within {100 * conclusions.MARGIN:g} points of zero."
)


def table(summary: dict) -> str:
    """
    The first page's table: each arm at the main sizes beside the controls.

    A strict gain is split in two; where grading is flexible there is one gain, and the form has a column.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: Markdown; a gain is bold where its interval and its p-value carry it.
    """
    grading = summary["grading"]
    trained = [cell for cell in summary["cells"] if cell["role"] == "arm"]
    cells = [cell for size in summary["main_sizes"] for cell in trained if cell["size"] == size]
    cells += [cell for cell in summary["cells"] if cell["role"] != "arm"]
    rows, above = [], None
    for cell in cells:
        named = [cell["label"], f"{cell['trained_values']:,}"] if cell["label"] != above else ["", ""]
        above = cell["label"]
        greedy, sampled = cell["accuracy"]["greedy"], cell["accuracy"].get("sampled", {}).get(grading)
        gains = cell["gains"].get("greedy", {})
        rows.append([*named, cell["arm_label"], percent(greedy[grading]), percent(sampled), _part(gains.get(grading))])
        if grading == "strict":
            rows[-1] += [_part(gains.get(measure)) for measure in ("flexible", "format")]
        else:
            rows[-1] += [percent(greedy["strict"])]
    if grading == "strict":
        header = "trained | values | arm or control | strict | sampled | gain | = right more often | + format"
        return grid(header, "lrlrrrrr", rows)
    header = "trained | values | arm or control | right | sampled | gain | in the asked-for form"
    return grid(header, "lrlrrrr", rows)


def _part(found: dict | None) -> str:
    if found is None:
        return "-"
    shown = conclusions.points(found["difference"])
    return f"**{shown}**" if conclusions.verdict(found) in ("higher", "lower") else shown


def caption(summary: dict) -> str:
    """
    What a reader needs to know to read the tables.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: One paragraph.
    """
    if not summary["cells"]:
        return "No run has ended yet."
    seeds = sorted({seed for cell in summary["cells"] if cell["role"] == "arm" for seed in cell["seeds"]})
    commits = [
        "no git commit" if git is None else f"commit {git['commit'][:12]}{' with changes' if git['is_dirty'] else ''}"
        for git in summary["git"]
    ]
    spread = f"Mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    sampled = ""
    if summary["samples"]:
        sampled = f"; sampled: the mean of {summary['samples']} at temperature {summary['temperature']:g}"
    return (
        f"Share of {summary['n_problems']} test problems answered right by greedy decoding{sampled}. {spread} "
        f"({', '.join(map(str, seeds)) or 'none'}). Gains of greedy answers over the untrained model, in percentage "
        f"points, bold where they are claimed. {SPLIT if summary['grading'] == 'strict' else FORM} "
        f"{', '.join(commits)}, {(summary['finished'] or '')[:10]}."
    )


def text(summary: dict) -> str:
    """
    The whole report.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: Markdown.
    """
    parts = ["# RL and SFT at matched budgets", table(summary), caption(summary)]
    said = conclusions.headline(summary)
    parts += ["## What the data say", listed(said), RULES] if said else []
    notes = _notes(summary)
    parts += ["## Notes", listed(notes)] if notes else []
    for title, image in FIGURES.items():
        lacking = figures.lacking(image, summary)
        shown = [f"![{title}]({image})", figures.CAPTIONS[image].format(grading=summary["grading"].capitalize())]
        parts += [f"## {title}", *([f"Not drawn: {lacking}."] if lacking else shown)]
    for title, section in SECTIONS.items():
        parts += [f"## {title}", section(summary)]
    return "\n\n".join(parts) + "\n"


def _notes(summary) -> list[str]:
    notes = []
    if summary["missing"]:
        notes.append(f"**Missing or failed runs:** {', '.join(summary['missing'])}.")
    edges = [
        f"{cell['arm_label']}, {cell['label']} ({cell['learning_rate']:g})"
        for cell in summary["cells"]
        if cell["rate_at_edge"]
    ]
    if edges:
        notes.append(f"**At the edge of its grid**, so that a rate outside might be better: {'; '.join(edges)}.")
    single = [cell for cell in summary["cells"] if cell["role"] == "arm" and len(cell["seeds"]) == 1]
    if single:
        notes.append(f"**One seed** for {len(single)} of the models: their intervals cover other problems only.")
    if len(summary["versions"]) > 1 or len(summary["git"]) > 1:
        notes.append("**Mixed origin:** the runs come from several commits or package versions; see below.")
    return notes


def write(summary: dict, folder: str | Path) -> None:
    """
    Writes `summary.json`, `report.md` and the figures; a figure that the data no longer give is removed.

    Args:
        summary (`dict`): As [`summarize`] returns.
        folder (`str` or `Path`): Where to.
    """
    folder = Path(folder)
    write_text(folder / "summary.json", _readable_json(summary))
    write_text(folder / "report.md", text(summary))
    figures.write(summary, folder)


def _readable_json(summary) -> str:
    """A line a key, and a line a cell: what changed shows as such, and curves do not fill the file with lines."""
    lines = []
    for key, value in summary.items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"  {json.dumps(item)}" for item in value)
            lines.append(f" {json.dumps(key)}: [\n{items}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
