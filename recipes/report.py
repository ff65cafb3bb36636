"""Table, figure and summary of a comparison, all from the runs' JSON; and the README's table from the summary."""

import json
import math
import statistics
from datetime import timedelta
from pathlib import Path

from completions import write_text

from trl_tinylora.card import markers, replaced_section


ALGORITHMS = {"rl": "RL", "sft": "SFT"}
MEASURES = [(kind, grading) for kind in ("greedy", "sampled") for grading in ("strict", "flexible")]


def summarize(
    records: list[dict], rates: dict, missing: list[str], allowed_differences: dict[str, str], sweep_seconds: float
) -> dict:
    """
    What the report says, as numbers.

    Args:
        records (`list[dict]`): Of the untrained model and of the final runs, as `compare.py` writes them.
        rates (`dict`): The learning rates, as `compare.choose_learning_rates` returns them.
        missing (`list[str]`): Names of planned runs without a record.
        allowed_differences (`dict[str, str]`): Keys in which the arms' recipes may differ, and why.
        sweep_seconds (`float`): Compute time of the sweep's runs, in seconds; 0 where the rates came from a file.
    Returns:
        `dict`: `untrained`, `cells` (one a size and algorithm, in the order of the number of trained values), and what
        stands around them.
    """
    untrained = next((record for record in records if record["phase"] == "untrained"), None)
    finals = [record for record in records if record["phase"] == "final"]
    groups: dict = {}
    for record in finals:
        groups.setdefault((record["trained_values"], record["size"], record["algorithm"]), []).append(record)
    cells = []
    for (trained_values, size, algorithm), group in sorted(groups.items()):
        group.sort(key=lambda record: record["seed"])
        rate = rates.get(algorithm, {}).get(size, {})
        cells.append(
            {
                "size": size,
                "label": group[0]["label"],
                "adapter": group[0]["config"]["adapter"],
                "algorithm": algorithm,
                "trained_values": trained_values,
                "trained_bytes": group[0]["trained_bytes"],
                "learning_rate": group[0]["learning_rate"],
                "rate_at_edge": bool(rate.get("at_edge")),
                "seeds": [record["seed"] for record in group],
                "accuracy": {
                    f"{kind}_{grading}": _spread([record["metrics"][kind][grading] for record in group])
                    for kind, grading in MEASURES
                    if kind in group[0]["metrics"]
                },
                "mean_tokens": _mean(record["metrics"]["greedy"]["mean_tokens"] for record in group),
                "truncated": _mean(record["metrics"]["greedy"]["truncated"] for record in group),
                "no_marker": _mean(record["metrics"]["greedy"]["no_marker"] for record in group),
                **{
                    name: sorted({record[name] for record in group})
                    for name in ("examples", "optimizer_steps", "generated_tokens")
                },
                "train_seconds": _mean(record["train_seconds"] for record in group),
            }
        )
    _add_recovered(cells, untrained)
    reference = untrained or (finals[0] if finals else None)
    return {
        "untrained": untrained and untrained["metrics"],
        "cells": cells,
        "n_problems": reference and reference["metrics"]["n_problems"],
        "samples": reference and reference["metrics"]["samples"],
        "temperature": reference and reference["metrics"]["temperature"],
        "learning_rates": rates,
        "sweep_seconds": round(sweep_seconds),
        "allowed_differences": allowed_differences,
        "missing": missing,
        "inputs": reference and reference["inputs"],
        **{key: _distinct(record[key] for record in records) for key in ("git", "versions", "machine")},
        "finished": max((record["finished"] for record in records), default=None),
    }


def _spread(measured: list[dict]) -> dict:
    values = [item["accuracy"] for item in measured]
    return {
        "mean": _mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
        "intervals": [item["interval"] for item in measured],
    }


def _add_recovered(cells, untrained) -> None:
    """The share of RL full fine-tuning's gain over the untrained model, which is the paper's measure."""
    full = next((cell for cell in cells if cell["adapter"] == "full" and cell["algorithm"] == "rl"), None)
    for cell in cells:
        cell["recovered"] = None
        if full is not None and untrained is not None:
            start = untrained["metrics"]["greedy"]["strict"]["accuracy"]
            gain = full["accuracy"]["greedy_strict"]["mean"] - start
            if gain > 0:
                cell["recovered"] = (cell["accuracy"]["greedy_strict"]["mean"] - start) / gain


def _mean(values) -> float:
    return statistics.fmean(values)


def _distinct(values) -> list:
    return [json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})]


def table(summary: dict) -> str:
    """
    The table of strict accuracies: a row a size, RL beside SFT.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: Markdown.
    """
    lines = [
        "| trained | values | bytes | RL greedy | RL sampled | SFT greedy | SFT sampled | seeds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    if summary["untrained"] is not None:
        greedy, sampled = (
            f"{summary['untrained'][kind]['strict']['accuracy']:.1%}" if kind in summary["untrained"] else "-"
            for kind in ("greedy", "sampled")
        )
        lines.append(f"| nothing | 0 | 0 | {greedy} | {sampled} | {greedy} | {sampled} | - |")
    rows: dict = {}
    for cell in summary["cells"]:
        rows.setdefault(cell["size"], {})[cell["algorithm"]] = cell
    for row in rows.values():
        any_cell = next(iter(row.values()))
        shown = [
            _percent(row[algorithm]["accuracy"].get(f"{kind}_strict")) if algorithm in row else "-"
            for algorithm in ALGORITHMS
            for kind in ("greedy", "sampled")
        ]
        seeds = " / ".join(str(count) for count in sorted({len(cell["seeds"]) for cell in row.values()}))
        lines.append(
            f"| {any_cell['label']} | {any_cell['trained_values']:,} | {any_cell['trained_bytes']:,} | "
            f"{' | '.join(shown)} | {seeds} |"
        )
    return "\n".join(lines)


def _percent(spread: dict | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['mean']:.1%}" + (f" ± {100 * spread['std']:.1f}" if spread["std"] is not None else "")


def caption(summary: dict) -> str:
    """
    What a reader needs to know to read the table.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: One paragraph.
    """
    seeds = sorted({seed for cell in summary["cells"] for seed in cell["seeds"]})
    commits = [
        "no git commit" if git is None else f"commit {git['commit'][:12]}{' with changes' if git['is_dirty'] else ''}"
        for git in summary["git"]
    ]
    n_problems = summary["n_problems"]
    half_width = 1.96 * math.sqrt(0.25 / n_problems) if n_problems else 0
    spread = "mean ± standard deviation over seeds" if len(seeds) > 1 else "1 seed"
    return (
        f'Share of {n_problems} test problems with the right number after "####": greedy, and the mean of '
        f"{summary['samples']} samples at temperature {summary['temperature']:g}. Cells: {spread} "
        f"({', '.join(map(str, seeds))}); "
        f"a single run's 95% interval is at most ± {100 * half_width:.1f} points. "
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
    parts = ["# RL and SFT at matched budgets", table(summary), caption(summary), "![](accuracy.png)"]
    notes = []
    if summary["missing"]:
        notes.append(f"**Missing or failed runs:** {', '.join(summary['missing'])}.")
    edges = [cell for cell in summary["cells"] if cell["rate_at_edge"]]
    for cell in edges:
        notes.append(
            f"**At the edge of its grid:** the learning rate {cell['learning_rate']:g} of "
            f"{ALGORITHMS[cell['algorithm']]}, "
            f"{cell['label']}; a rate outside might be better."
        )
    if len(summary["versions"]) > 1 or len(summary["git"]) > 1:
        notes.append("**Mixed origin:** the runs come from several commits or package versions; see below.")
    parts += ["## Notes", "\n".join(f"- {note}" for note in notes)] if notes else []

    parts += [
        "## Every arm",
        "Greedy completions. *Flexible* also takes a boxed or the last number; *recovered* is the share of the "
        "gain of full "
        "fine-tuning by RL over the untrained model, in strict greedy accuracy.",
    ]
    header = [
        "| arm | trained | strict | flexible | recovered | tokens | truncated | no marker | learning rate | s of "
        "training |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    body = []
    if summary["untrained"] is not None:
        greedy = summary["untrained"]["greedy"]
        body.append(
            f"| - | nothing | {greedy['strict']['accuracy']:.1%} | {greedy['flexible']['accuracy']:.1%} | - | "
            f"{greedy['mean_tokens']:.1f} | {greedy['truncated']:.1%} | {greedy['no_marker']:.1%} | - | - |"
        )
    for cell in summary["cells"]:
        recovered = "-" if cell["recovered"] is None else f"{cell['recovered']:.0%}"
        body.append(
            f"| {ALGORITHMS[cell['algorithm']]} | {cell['label']} | {_percent(cell['accuracy']['greedy_strict'])} | "
            f"{_percent(cell['accuracy']['greedy_flexible'])} | {recovered} | {cell['mean_tokens']:.1f} | "
            f"{cell['truncated']:.1%} | {cell['no_marker']:.1%} | {cell['learning_rate']:g} | "
            f"{cell['train_seconds']:.0f} |"
        )
    parts.append("\n".join(header + body))

    parts += [
        "## Every run",
        "Strict accuracy with its 95% interval: Wilson's for greedy, a bootstrap over problems for sampled.",
    ]
    body = ["| arm | trained | seed | greedy | sampled |", "|---|---|--:|--:|--:|"]
    for cell in summary["cells"]:
        for index, seed in enumerate(cell["seeds"]):
            shown = [_with_interval(cell["accuracy"].get(f"{kind}_strict"), index) for kind in ("greedy", "sampled")]
            body.append(f"| {ALGORITHMS[cell['algorithm']]} | {cell['label']} | {seed} | {' | '.join(shown)} |")
    parts.append("\n".join(body))

    parts += ["## Matched budget", _budget(summary), "The arms' recipes agree on every key but these:"]
    parts.append("\n".join(f"- `{key}`: {reason}" for key, reason in summary["allowed_differences"].items()))
    parts += ["## Learning rates", _rates(summary), "## Origin"]
    parts.append(
        "\n".join(
            f"- {name}: `{json.dumps(value)}`" for name in ("git", "versions", "machine") for value in summary[name]
        )
    )
    return "\n\n".join(parts) + "\n"


def _with_interval(spread, index) -> str:
    if spread is None:
        return "-"
    low, high = spread["intervals"][index]
    return f"{spread['values'][index]:.1%} ({low:.1%} to {high:.1%})"


def _budget(summary) -> str:
    lines = ["| arm | examples | optimizer steps | generated tokens |", "|---|--:|--:|--:|"]
    for algorithm, name in ALGORITHMS.items():
        cells = [cell for cell in summary["cells"] if cell["algorithm"] == algorithm]
        ranges = [
            sorted({value for cell in cells for value in cell[key]})
            for key in ("examples", "optimizer_steps", "generated_tokens")
        ]
        shown = [
            "-" if not values else f"{values[0]:,}" + (f" to {values[-1]:,}" if len(values) > 1 else "")
            for values in ranges
        ]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _rates(summary) -> str:
    origin = "Taken from an earlier sweep."
    if summary["sweep_seconds"]:
        origin = f"Swept for this comparison, {timedelta(seconds=summary['sweep_seconds'])} of compute."
    rule = (
        "Chosen: best mean of greedy and sampled strict accuracy on the validation problems, with one seed apart from "
        "the final ones; the smaller rate of equals."
    )
    lines = [
        f"{origin} {rule}",
        "",
        "| arm | size | chosen | score by rate |",
        "|---|---|--:|---|",
    ]
    for algorithm, sizes in summary["learning_rates"].items():
        for size, chosen in sizes.items():
            grid = ", ".join(f"{rate}: {score:.1%}" for rate, score in chosen.get("grid", {}).items())
            lines.append(f"| {ALGORITHMS[algorithm]} | {size} | {chosen['learning_rate']:g} | {grid} |")
    return "\n".join(lines)


def figure(summary: dict, path: str | Path) -> None:
    """
    Accuracy against the number of trained values, greedy and sampled.

    Args:
        summary (`dict`): As [`summarize`] returns.
        path (`str` or `Path`): The image to write.
    """
    # The object interface leaves matplotlib's global state and backend to whoever imports this.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("greedy", "sampled") if summary["untrained"] is None or kind in summary["untrained"]]
    drawing = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    colors = {"rl": "#0b5fa5", "sft": "#c4511d"}
    markers = {"tinylora": "o", "lora": "D", "full": "s"}
    for panel, kind in zip(panels, kinds, strict=True):
        for algorithm, name in ALGORITHMS.items():
            cells = [
                cell
                for cell in summary["cells"]
                if cell["algorithm"] == algorithm and f"{kind}_strict" in cell["accuracy"]
            ]
            for cell in cells:
                values = cell["accuracy"][f"{kind}_strict"]["values"]
                panel.plot(
                    [cell["trained_values"]] * len(values),
                    [100 * value for value in values],
                    markers[cell["adapter"]],
                    color=colors[algorithm],
                    alpha=0.5,
                    markersize=5,
                )
            tiny = [cell for cell in cells if cell["adapter"] == "tinylora"]
            spreads = [cell["accuracy"][f"{kind}_strict"] for cell in tiny]
            counts = [cell["trained_values"] for cell in tiny]
            means = [100 * spread["mean"] for spread in spreads]
            deviations = [100 * (spread["std"] or 0) for spread in spreads]
            panel.plot(counts, means, color=colors[algorithm], label=f"{name}, TinyLoRA")
            panel.fill_between(
                counts,
                [mean - deviation for mean, deviation in zip(means, deviations, strict=True)],
                [mean + deviation for mean, deviation in zip(means, deviations, strict=True)],
                color=colors[algorithm],
                alpha=0.15,
                linewidth=0,
            )
            for cell in (cell for cell in cells if cell["adapter"] != "tinylora"):
                mean = 100 * cell["accuracy"][f"{kind}_strict"]["mean"]
                style = {"color": colors[algorithm], "markersize": 8, "label": f"{name}, {cell['label']}"}
                panel.plot(cell["trained_values"], mean, markers[cell["adapter"]], **style)
        if summary["untrained"] is not None:
            accuracy = summary["untrained"][kind]["strict"]["accuracy"]
            panel.axhline(100 * accuracy, color="0.4", linestyle="--", linewidth=1, label="untrained")
        panel.set_xscale("log")
        panel.set_ylim(0, 101)
        panel.set_xlabel("trained values")
        panel.set_title(kind if kind == "greedy" else f"sampled, temperature {summary['temperature']:g}", fontsize=10)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("test problems answered right, %")
    drawing.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    drawing.savefig(path, dpi=150, metadata={"Software": None})


def write(summary: dict, folder: str | Path) -> None:
    """
    Writes `summary.json`, `report.md` and `accuracy.png`.

    Args:
        summary (`dict`): As [`summarize`] returns.
        folder (`str` or `Path`): Where to.
    """
    folder = Path(folder)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "report.md", text(summary))
    figure(summary, folder / "accuracy.png")


def replace_section(document: str, section: str, content: str) -> str:
    """
    A document with the text between two markers renewed; one that is current comes back as it was.

    Args:
        document (`str`): The text, with `<!-- results:section -->` and `<!-- /results:section -->`.
        section (`str`): Name in the markers.
        content (`str`): What goes between them.
    Returns:
        `str`: The new text.
    Raises:
        ValueError: If a marker is missing.
    """
    name = f"results:{section}"
    renewed = replaced_section(document, name, content)
    if renewed is None:
        opening, closing = markers(name)
        raise ValueError(f"the README lacks the markers {opening} and {closing}, between which the table goes")
    return renewed


def readme_content(summary: dict) -> str:
    """What a README shows of a comparison: the table and its caption.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: Markdown.
    """
    return f"{table(summary)}\n\n{caption(summary)}"


def renewed_readme(readme: str, section: str, summary: dict) -> str:
    """
    A README with the comparison's table renewed; one that is current comes back as it was.

    Args:
        readme (`str`): The text, with both markers.
        section (`str`): Name in the markers.
        summary (`dict`): As [`summarize`] returns, or the content of a `summary.json`.
    Returns:
        `str`: The new text.
    Raises:
        ValueError: If a marker is missing.
    """
    return replace_section(readme, section, readme_content(summary))


def update_section(path: str | Path, section: str, content: str) -> None:
    """
    Renews the text between two markers of a document in place, as [`replace_section`] does.

    Args:
        path (`str` or `Path`): The document.
        section (`str`): Name in the markers.
        content (`str`): What goes between them.
    Raises:
        ValueError: If a marker is missing.
    """
    write_text(path, replace_section(Path(path).read_text(encoding="utf-8"), section, content))


def update_readme(path: str | Path, section: str, summary: dict) -> None:
    """
    Renews a README's table in place.

    Args:
        path (`str` or `Path`): The README.
        section (`str`): Name in the markers.
        summary (`dict`): As [`summarize`] returns.
    Raises:
        ValueError: If a marker is missing.
    """
    update_section(path, section, readme_content(summary))
