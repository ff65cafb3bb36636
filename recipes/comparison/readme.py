"""A README's part of a comparison: a short table, its caveat and one figure, between two markers."""

from pathlib import Path

from records.files import replace_section, write_text

from comparison import figures, report
from comparison.tables import grid, percent


# Arm and size of its rows, at most six; what a comparison lacks is left out.
ROWS = (("rl", "13"), ("sft", "13"), ("sft-own", "13"), ("rl", "lora-r1"), ("rl", "full"), ("untrained", None))
SECTION = "toy"
# Of the toy, from the root of the repository.
IMAGE = "recipes/toy/results/accuracy.png"
REPORT = "recipes/toy/results/report.md"
CAVEAT = (
    "on a 0.8M-parameter toy whose base can solve nearly every problem and usually does not, so that a few values may "
    "suffice ([what it cannot show](recipes/toy/README.md))"
)


def readme_content(summary: dict) -> str:
    """
    What a README shows of the toy's comparison.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: Markdown: table, caveat, figure.
    """
    by_cell = {(cell["arm"], cell["size"]): cell for cell in summary["cells"]}
    cells = [by_cell[key] for key in ROWS if key in by_cell]
    rows = [
        [cell["label"], f"{cell['trained_values']:,}", cell["arm_label"]]
        + [percent(cell["accuracy"].get(kind, {}).get("strict")) for kind in ("greedy", "sampled")]
        for cell in cells
    ]
    seeds = max((len(cell["seeds"]) for cell in cells), default=0)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "1 seed"
    parts = [
        grid("trained | values | arm | greedy | sampled", "lrlrr", rows),
        f"Test problems answered right ({summary['n_problems']}, {spread}) {CAVEAT}; every arm, size and control: "
        f"[report]({REPORT}).",
    ]
    if not figures.lacking("accuracy.png", summary):
        parts.append(f"![Accuracy by number of trained values]({IMAGE})")
    return "\n\n".join(parts)


def recipe_content(summary: dict | None, folder: str = "results") -> str:
    """
    What a page shows of a comparison, from its table to its figure.

    Args:
        summary (`dict`, *optional*): As [`summarize`] returns; None where nothing is committed yet.
        folder (`str`, *optional*, defaults to `"results"`): Where report and figures lie, from the page.
    Returns:
        `str`: Markdown: whether it is complete, table, caption, figure.
    """
    if summary is None:
        return "**Running: not complete.** No result is committed yet."
    missing = summary["missing"]
    parts = [f"**Running: not complete.** {len(missing)} of its runs are still to be done."] if missing else []
    parts += [report.table(summary), f"{report.caption(summary)} [Report]({folder}/report.md)."]
    if not figures.lacking("accuracy.png", summary):
        parts.append(f"![Accuracy by number of trained values]({folder}/accuracy.png)")
    return "\n\n".join(parts)


def rates_table(summary: dict) -> str:
    """
    Learning rates that a sweep chose beside those that were found by how far a step goes, and what both led to.

    Args:
        summary (`dict`): As [`summarize`] returns; of its arms, those with `found_rates` stand beside the first one of
            the same algorithm.
    Returns:
        `str`: Markdown.
    """
    rows = []
    for found in (cell for cell in summary["cells"] if "found_rates" in cell):
        alike = [cell for cell in summary["cells"] if all(cell[key] == found[key] for key in ("size", "algorithm"))]
        swept = next((cell for cell in alike if cell["role"] == "arm" and "found_rates" not in cell), None)
        low, high = (f"{bound:.2g}" for bound in (min(found["found_rates"]), max(found["found_rates"])))
        rows.append(
            [found["label"], f"{found['trained_values']:,}", swept["arm_label"] if swept else found["arm_label"]]
            + [f"{swept['learning_rate']:g}" if swept else "", low if low == high else f"{low} to {high}"]
            + [
                percent(cell["accuracy"].get(kind, {}).get("strict")) if cell else ""
                for cell in (swept, found)
                for kind in ("greedy", "sampled")
            ]
        )
    return grid(
        "trained | values | arm | swept | found | greedy, swept | sampled | greedy, found | sampled", "lrlrrrrrr", rows
    )


def update_readme(path: str | Path, summary: dict) -> None:
    """
    Renews a README's table in place.

    Args:
        path (`str` or `Path`): The README, with the markers `<!-- results:toy -->` and `<!-- /results:toy -->`.
        summary (`dict`): As [`summarize`] returns.
    Raises:
        ValueError: If a marker is missing.
    """
    document = Path(path).read_text(encoding="utf-8")
    write_text(path, replace_section(document, SECTION, readme_content(summary)))
