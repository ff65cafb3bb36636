"""The figures of a comparison, drawn from its summary alone. A figure whose data are not there is left out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trl_tinylora.storage.atomic_write import written_whole


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Paul Tol's high-contrast scheme: apart for the colour-blind, and dark, middle and light in grey.
ARM_COLORS = ("#004488", "#BB5566", "#DDAA33")
ARM_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
FAMILY_MARKERS = {"TinyLoRA": "o", "TinyLoRA, structured": "p", "LoRA-XS": "^", "LoRA": "D", "full fine-tuning": "s"}
# Variants in fewer bits lie on one another; the report's tables have them.
DRAWN_DTYPES = (None, "float32")
CONTROL_MARKERS = ("x", "+", "*", "2", "3", "4")
INK, FAINT = "#222222", "#8a8a8a"
FONT = 9
DPI = 180
NARROWEST = 7.6  # inches that the names below the panels need
# What is drawn of a training, by algorithm.
CURVES = {"rl": ("reward", "mean reward of the samples"), "sft": ("loss", "loss, nats a token")}
CURVES["es"] = CURVES["rl"]


def write(summary: dict, folder: str | Path) -> None:
    """
    Draws the figures that the data give, and removes those that they do not.

    Args:
        summary (`dict`): As [`summarize`] returns.
        folder (`str` or `Path`): Where to.
    """
    for name, draw in FIGURES.items():
        path = Path(folder) / name
        if lacking(name, summary):
            path.unlink(missing_ok=True)
            continue
        with written_whole(path) as scratch:
            # Without a name of the software or a date, equal data give equal bytes.
            draw(summary).savefig(scratch, dpi=DPI, metadata={"Software": None})


def lacking(name: str, summary: dict) -> str | None:
    """
    Why a figure cannot be drawn.

    Args:
        name (`str`): A key of `FIGURES`.
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str` or `None`: The reason; None if it can be drawn.
    """
    trained = _trained(summary)
    if not trained:
        return "nothing was trained"
    if name == "accuracy.png" and not any(cell["kept_dtype"] in DRAWN_DTYPES for cell in trained):
        return "no values were kept in float32"
    if name == "curves.png" and not any(map(_has_curve, trained)):
        return "no run has a training curve"
    return None


def _trained(summary) -> list[dict]:
    return [cell for cell in summary["cells"] if cell["role"] == "arm"]


def _arms(summary) -> dict[str, str]:
    return {cell["arm"]: cell["arm_label"] for cell in _trained(summary)}


def _styles(arms) -> dict[str, dict]:
    return {
        arm: {
            "color": ARM_COLORS[index] if index < len(ARM_COLORS) else str(0.15 * index % 1),
            "linestyle": ARM_LINES[index % len(ARM_LINES)],
        }
        for index, arm in enumerate(arms)
    }


def _drawing(width: float, height: float) -> "Figure":
    # The object interface leaves matplotlib's global state and backend to whoever imports this.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawing)
    return drawing


def _dress(panel: "Axes", title: str = "", x: str = "", y: str = "") -> None:
    panel.set_title(title, fontsize=FONT + 1, color=INK)
    panel.set_xlabel(x, fontsize=FONT)
    panel.set_ylabel(y, fontsize=FONT)
    panel.tick_params(labelsize=FONT - 1, color=FAINT, which="both")
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        panel.spines[side].set_color(FAINT)


def _legend(drawing, groups: list[list]) -> None:
    """Below the panels, a column a group."""
    rows = max(len(group) for group in groups)
    # matplotlib fills column by column: groups as long as the longest keep to theirs.
    entries = [entry for group in groups for entry in group + [_line(" ", linestyle="none")] * (rows - len(group))]
    drawing.legend(
        handles=entries,
        loc="outside lower center",
        ncols=len(groups),
        fontsize=FONT - 1,
        frameon=False,
        handlelength=2.6,
    )


def _line(label: str, **style):
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **style)


def accuracy(summary: dict) -> "Figure":
    """
    Accuracy against the number of trained values: greedy and sampled, a line an arm, a point a seed.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `matplotlib.figure.Figure`
    """
    grading = summary["grading"]
    cells = [cell for cell in summary["cells"] if cell["kept_dtype"] in DRAWN_DTYPES]
    trained = [cell for cell in cells if cell["role"] == "arm"]
    styles, families = _styles(_arms(summary)), [name for name in FAMILY_MARKERS if _of(trained, "family", name)]
    controls = [cell for cell in cells if cell["role"] == "control" and cell["trained_values"]]
    crossed = {cell["arm"]: cell["arm_label"] for cell in controls}
    crosses = {arm: CONTROL_MARKERS[index % len(CONTROL_MARKERS)] for index, arm in enumerate(crossed)}
    kinds = [kind for kind in ("greedy", "sampled") if all(kind in cell["accuracy"] for cell in cells)]
    drawing = _drawing(max(4.6 * len(kinds), NARROWEST), 4.3)
    panels = drawing.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for index, (arm, style) in enumerate(styles.items()):
            # Side by side where the arms have the same number of values.
            aside = 10 ** (0.09 * (index - (len(styles) - 1) / 2))
            for family in families:
                points = _of(_of(trained, "arm", arm), "family", family)
                _draw_series(panel, points, aside, kind, grading, FAMILY_MARKERS[family], style)
        for cell in controls:
            place = cell["trained_values"] * 10 ** (0.09 * (len(styles) + 1) / 2)
            height = 100 * cell["accuracy"][kind][grading]["mean"]
            panel.plot(place, height, crosses[cell["arm"]], color=INK, markersize=7, markeredgewidth=1.2, zorder=4)
        title = kind if kind == "greedy" else f"sampled at temperature {summary['temperature']:g}"
        _dress(panel, title, "trained values")
        _number_axis(panel, [cell["trained_values"] for cell in [*trained, *controls]])
        panel.set_ylim(-2, 103)
        _baselines(panel, [cell for cell in cells if not cell["trained_values"]], kind, grading)
    panels[0].set_ylabel("test problems right, %", fontsize=FONT)
    grey = {"color": "0.35", "linestyle": "none", "markersize": 6}
    black = {"color": INK, "linestyle": "none", "markersize": 7, "markeredgewidth": 1.2}
    groups = [
        [_line(label, linewidth=2, **styles[arm]) for arm, label in _arms(summary).items()],
        [_line(name, marker=FAMILY_MARKERS[name], **grey) for name in families],
        [_line(label, marker=crosses[arm], **black) for arm, label in crossed.items()],
    ]
    _legend(drawing, [group for group in groups if group])
    return drawing


def _of(cells, key, value) -> list[dict]:
    return [cell for cell in cells if cell[key] == value]


def _draw_series(panel, cells, aside, kind, grading, marker, style) -> None:
    cells = sorted(cells, key=lambda cell: cell["trained_values"])
    spreads = [cell["accuracy"][kind][grading] for cell in cells]
    places = [cell["trained_values"] * aside for cell in cells]
    for place, spread in zip(places, spreads, strict=True):
        values = [100 * value for value in spread["values"]]
        panel.plot([place, place], [min(values), max(values)], color=style["color"], linewidth=1.1, zorder=2)
        seeds = {"markersize": 3, "alpha": 0.55, "markeredgewidth": 0}
        panel.plot([place] * len(values), values, "o", color=style["color"], zorder=2, **seeds)
    shape = {"marker": marker, "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.7, "linewidth": 1.8}
    panel.plot(places, [100 * spread["mean"] for spread in spreads], zorder=3, **shape, **style)


def _number_axis(panel, places) -> None:
    """A logarithmic axis in plain numbers, with room at either side; it may hold one place only."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.set_xlim(min(places) / 2.2, max(places) * 2.2)
    panel.xaxis.set_major_locator(LogLocator(numticks=15))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _baselines(panel, cells, kind, grading) -> None:
    """Lines of what has no trained values, each named on it, the names apart where the lines are close."""
    styles = ((0, (4, 2)), (0, (1, 2)), (0, (4, 2, 1, 2)))
    lines = [(100 * cell["accuracy"][kind][grading]["mean"], cell["arm_label"]) for cell in cells]
    place = -math.inf
    for index, (height, label) in enumerate(sorted(lines)):
        panel.axhline(height, color=FAINT, linewidth=1, linestyle=styles[index % len(styles)], zorder=1)
        place = max(height + 1, place + 5.2)
        panel.annotate(
            f"{label} {height:.1f}",
            (1, place),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=FONT - 2,
            color="#444444",
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
            zorder=5,
        )


def _has_curve(cell) -> bool:
    return CURVES[cell["algorithm"]][0] in cell["curve"]


def curves(summary: dict) -> "Figure":
    """
    How training went: RL's reward and SFT's loss, a panel an arm, a line a size, with the range over seeds.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `matplotlib.figure.Figure`
    """
    from matplotlib import colormaps

    cells = [cell for cell in _trained(summary) if cell["size"] in summary["main_sizes"] and _has_curve(cell)]
    arms = {cell["arm"]: cell for cell in cells}
    labels = {cell["size"]: cell["label"] for cell in cells}
    # Dark to light with the number of values, which grey keeps.
    colors = {size: colormaps["cividis"](0.88 * index / max(1, len(labels) - 1)) for index, size in enumerate(labels)}
    drawing = _drawing(max(3.2 * len(arms), NARROWEST), 3.2)
    panels = drawing.subplots(1, len(arms), squeeze=False)[0]
    for panel, arm in zip(panels, arms.values(), strict=True):
        key, label = CURVES[arm["algorithm"]]
        for cell in _of(cells, "arm", arm["arm"]):
            steps, curve, color = cell["curve"]["step"], cell["curve"][key], colors[cell["size"]]
            panel.plot(steps, curve["mean"], color=color, linewidth=1.6)
            panel.fill_between(steps, curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
        _dress(panel, arm["arm_label"], "step", label)
    # As many names side by side as there is room for.
    entries = [_line(labels[size], color=color, linewidth=2) for size, color in colors.items()]
    rows = math.ceil(len(entries) / max(1, int(drawing.get_figwidth() // 2.4)))
    _legend(drawing, [entries[start : start + rows] for start in range(0, len(entries), rows)])
    return drawing


FIGURES: dict[str, Callable[[dict], "Figure"]] = {"accuracy.png": accuracy, "curves.png": curves}
CAPTIONS = {
    "accuracy.png": "Large markers are means over seeds, small ones the seeds, bars their range; arms of one size "
    "stand side by side. {grading} grading. Values kept in fewer bits are in the tables only.",
    "curves.png": "Lines are means over seeds within stretches of steps, bands the range over seeds.",
}
