"""The figures of a comparison, drawn from its summary alone. A figure whose data are not there is left out."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trl_tinylora.storage.atomic_write import written_whole


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Paul Tol's high-contrast scheme: apart for the colour-blind, and dark, middle and light in grey.
ARM_COLORS = ("#004488", "#BB5566", "#DDAA33")
ARM_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
FAMILY_MARKERS = {"TinyLoRA": "o", "TinyLoRA, structured": "p", "LoRA-XS": "^", "LoRA": "D", "full fine-tuning": "s"}
# By bytes, each precision of a family is a series of its own.
PRECISION_MARKERS = {
    "TinyLoRA": {"float32": "o", "bfloat16": "v", "float16": "P"},
    "TinyLoRA, structured": {"float32": "p", "bfloat16": "<", "float16": "X"},
    "LoRA-XS": {"float32": "^", "bfloat16": ">", "float16": "d"},
}
WHOLE = (None, "float32")
CONTROL_MARKERS = ("x", "+", "*", "2", "3", "4")
INK, FAINT = "#222222", "#8a8a8a"
FONT = 9
DPI = 180
NARROWEST = 7.6  # inches that the names below the panels need
RL_CURVES = {
    "reward": "reward",
    "completions/mean_length": "tokens of a sample",
    "entropy": "entropy, nats a token",
    "clip_ratio/region_mean": "share of tokens clipped",
}
SFT_CURVES = {
    "loss": "loss, nats a token",
    "mean_token_accuracy": "token accuracy",
    "entropy": "entropy, nats a token",
}


def write(summary: dict, folder: str | Path) -> None:
    """
    Draws the figures that the data give, and removes those that they do not.

    Args:
        summary (`dict`): As `report.summarize` returns.
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
        summary (`dict`): As `report.summarize` returns.
    Returns:
        `str` or `None`: The reason; None if it can be drawn.
    """
    trained = _trained(summary)
    if name == "landscape.png":
        return None if summary["landscapes"] else "no landscape of one or two values was computed"
    if name == "rates.png":
        return None if _swept(summary) else "no learning rates with a score each are on record"
    if not trained:
        return "nothing was trained"
    if name.startswith("accuracy") and not any(cell["kept_dtype"] in WHOLE for cell in trained):
        return "no values were kept in float32; see the figure by bytes"
    if name == "accuracy_sampled.png" and not any("sampled" in cell["accuracy"] for cell in trained):
        return "nothing was sampled"
    if name == "curves.png" and not any(_curves(cell) for cell in trained):
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


def accuracy(summary: dict, kind: str = "greedy") -> "Figure":
    """
    Accuracy against the number of trained values: a panel a grading, a line an arm, a point a seed.

    Args:
        summary (`dict`): As `report.summarize` returns.
        kind (`str`, *optional*, defaults to `"greedy"`): `"greedy"` or `"sampled"`.
    Returns:
        `matplotlib.figure.Figure`
    """
    kept = [cell for cell in summary["cells"] if cell["kept_dtype"] in WHOLE]
    # Variants of precision have their own figure, by bytes; here they would lie on one another.
    return _by_size(summary, kept, kind, "trained_values", "trained values", lambda cell: None)


def by_bytes(summary: dict) -> "Figure":
    """
    Greedy accuracy against the bytes of the trained values, the dtypes that they are kept in apart.

    Args:
        summary (`dict`): As `report.summarize` returns.
    Returns:
        `matplotlib.figure.Figure`
    """

    return _by_size(
        summary, summary["cells"], "greedy", "trained_bytes", "bytes of trained values", lambda cell: cell["kept_dtype"]
    )


def _by_size(summary, cells, kind, x, x_label, precision: Callable[[dict], str | None]) -> "Figure":
    def series(cell):
        return (cell["family"], precision(cell))

    cells = [cell for cell in cells if kind in cell["accuracy"]]
    arms = _arms(summary)
    styles = _styles(arms)
    trained = [cell for cell in cells if cell["role"] == "arm"]
    gradings = [name for name in ("strict", "flexible") if all(name in cell["accuracy"][kind] for cell in trained)]
    drawing = _drawing(max(4.6 * len(gradings), NARROWEST), 4.3)
    panels = drawing.subplots(1, len(gradings), sharey=True, squeeze=False)[0]
    place_of = list(FAMILY_MARKERS).index
    names = list(dict.fromkeys(series(cell) for cell in sorted(trained, key=lambda cell: place_of(cell["family"]))))
    markers = {name: PRECISION_MARKERS[name[0]][name[1]] if name[1] else FAMILY_MARKERS[name[0]] for name in names}
    controls = [cell for cell in cells if cell["role"] == "control" and cell[x]]
    crossed = {arm: CONTROL_MARKERS[index % 6] for index, arm in enumerate(dict.fromkeys(c["arm"] for c in controls))}
    sort = "" if kind == "greedy" else f", sampled at temperature {summary['temperature']:g}"
    for panel, grading in zip(panels, gradings, strict=True):
        for arm in arms:
            for name in names:
                points = [cell for cell in trained if cell["arm"] == arm and series(cell) == name]
                # Side by side where the arms have the same number of values.
                aside = 10 ** (0.09 * (list(arms).index(arm) - (len(arms) - 1) / 2))
                _draw_series(panel, points, x, aside, kind, grading, markers[name], styles[arm], "TinyLoRA" in name[0])
        for cell in controls:
            place, mean = cell[x] * 10 ** (0.09 * (len(arms) + 1) / 2), 100 * cell["accuracy"][kind][grading]["mean"]
            panel.plot(place, mean, crossed[cell["arm"]], color=INK, markersize=7, markeredgewidth=1.2, zorder=4)
        panel.set_xscale("log")
        _dress(panel, f"{grading} grading{sort}", x_label)
        _number_axis(panel, [cell[x] for cell in [*trained, *controls]], (1,))
        panel.set_ylim(-2, 103)
        _baselines(panel, cells, kind, grading)
    panels[0].set_ylabel("test problems right, %", fontsize=FONT)
    groups = [[_line(label, linewidth=2, **styles[arm]) for arm, label in arms.items()]]
    grey = {"color": "0.35", "linestyle": "none", "markersize": 6}
    groups += [[_line(", ".join(filter(None, name)), marker=markers[name], **grey) for name in names]]
    labels = {cell["arm"]: cell["arm_label"] for cell in controls}
    crosses = {"color": INK, "linestyle": "none", "markersize": 7, "markeredgewidth": 1.2}
    groups += [[_line(labels[arm], marker=marker, **crosses) for arm, marker in crossed.items()]] if labels else []
    _legend(drawing, groups)
    return drawing


def _draw_series(panel, cells, x, aside, kind, grading, marker, style, is_joined) -> None:
    cells = sorted(cells, key=lambda cell: cell[x])
    if not cells:
        return
    spreads = [cell["accuracy"][kind][grading] for cell in cells]
    places = [cell[x] * aside for cell in cells]
    for place, spread in zip(places, spreads, strict=True):
        values = [100 * value for value in spread["values"]]
        panel.plot([place, place], [min(values), max(values)], color=style["color"], linewidth=1.1, zorder=2)
        seeds = {"markersize": 3, "alpha": 0.55, "markeredgewidth": 0}
        panel.plot([place] * len(values), values, "o", color=style["color"], zorder=2, **seeds)
    panel.plot(
        places,
        [100 * spread["mean"] for spread in spreads],
        marker=marker,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.7,
        linewidth=1.8,
        zorder=3,
        **(style if is_joined else style | {"linestyle": "none"}),
    )


def _number_axis(panel, places, steps: tuple[int, ...]) -> None:
    """A logarithmic axis in plain numbers, with room at either side; it may hold one place only."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_xlim(min(places) / 2.2, max(places) * 2.2)
    panel.xaxis.set_major_locator(LogLocator(subs=steps, numticks=15))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _baselines(panel, cells, kind, grading) -> None:
    """Lines of what has no trained values, each named on it, the names apart where the lines are close."""
    bare = [cell for cell in cells if not cell["trained_values"] and grading in cell["accuracy"][kind]]
    styles = ((0, (4, 2)), (0, (1, 2)), (0, (4, 2, 1, 2)))
    lines = [
        (100 * cell["accuracy"][kind][grading]["mean"], cell["arm_label"], styles[index % len(styles)])
        for index, cell in enumerate(bare)
    ]
    taken: list[float] = []
    for height, label, style in sorted(lines, key=lambda line: line[:2]):
        panel.axhline(height, color=FAINT, linewidth=1, linestyle=style, zorder=1)
        place = max([height + 1, *(other + 5.2 for other in taken)])
        taken.append(place)
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


def _ramp(sizes: list[str]) -> dict[str, tuple]:
    """A colour a size, dark to light with its number of values, which grey keeps."""
    from matplotlib import colormaps

    return {size: colormaps["cividis"](0.88 * index / max(1, len(sizes) - 1)) for index, size in enumerate(sizes)}


def _curves(cell) -> dict[str, str]:
    named = RL_CURVES if cell["algorithm"] == "rl" else SFT_CURVES
    return {key: label for key, label in named.items() if key in cell["curve"]}


def curves(summary: dict) -> "Figure":
    """
    What training logged: a row an arm, a line a size, with the range over seeds.

    Args:
        summary (`dict`): As `report.summarize` returns.
    Returns:
        `matplotlib.figure.Figure`
    """
    cells = [cell for cell in _trained(summary) if cell["size"] in summary["main_sizes"] and _curves(cell)]
    arms = {arm: label for arm, label in _arms(summary).items() if any(cell["arm"] == arm for cell in cells)}
    labels = {cell["size"]: cell["label"] for cell in cells}
    colors = _ramp(list(labels))
    rows = {
        arm: {key: label for cell in cells if cell["arm"] == arm for key, label in _curves(cell).items()}
        for arm in arms
    }
    columns = max(len(row) for row in rows.values())
    drawing = _drawing(2.9 * columns, 2.5 * len(rows) + 0.5)
    for index, (arm, row) in enumerate(rows.items()):
        for place, (key, label) in enumerate(row.items()):
            panel = drawing.add_subplot(len(rows), columns, index * columns + place + 1)
            for cell in (cell for cell in cells if cell["arm"] == arm and key in cell["curve"]):
                curve, color = cell["curve"][key], colors[cell["size"]]
                panel.plot(cell["curve"]["step"], curve["mean"], color=color, linewidth=1.6)
                panel.fill_between(
                    cell["curve"]["step"], curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0
                )
            _dress(panel, "", "step" if index == len(rows) - 1 else "", label)
            if place == 0:
                panel.set_title(arms[arm], fontsize=FONT + 1, color=INK, loc="left", fontweight="bold")
    # As many names side by side as there is room for.
    entries = [_line(labels[size], color=color, linewidth=2) for size, color in colors.items()]
    rows_of_names = math.ceil(len(entries) / max(1, int(drawing.get_figwidth() // 2.4)))
    _legend(drawing, [entries[start : start + rows_of_names] for start in range(0, len(entries), rows_of_names)])
    return drawing


def _swept(summary) -> dict[str, dict]:
    """The arms and sizes whose learning rate was swept."""
    swept = {
        arm: {size: chosen for size, chosen in sizes.items() if chosen.get("grid")}
        for arm, sizes in summary["learning_rates"].items()
        if arm in _arms(summary)
    }
    return {arm: sizes for arm, sizes in swept.items() if sizes}


def rates(summary: dict) -> "Figure":
    """
    The score on the validation problems by learning rate: a panel an arm, a line a size, the chosen rate ringed.

    Args:
        summary (`dict`): As `report.summarize` returns.
    Returns:
        `matplotlib.figure.Figure`
    """
    swept = _swept(summary)
    labels = {cell["size"]: cell["label"] for cell in _trained(summary)}
    sizes = [size for size in labels if any(size in chosen for chosen in swept.values())]
    sizes += [size for chosen in swept.values() for size in chosen if size not in sizes]
    sizes = list(dict.fromkeys(sizes))
    # What is not on the first page is dashed.
    main = summary["main_sizes"] or sizes
    styles = {size: {"color": color, "linestyle": _dashes(size in main)} for size, color in _ramp(sizes).items()}
    drawing = _drawing(max(3.2 * len(swept), NARROWEST), 3.6 + 0.17 * math.ceil(len(sizes) / 3))
    panels = drawing.subplots(1, len(swept), sharey=True, squeeze=False)[0]
    for panel, (arm, by_size) in zip(panels, swept.items(), strict=True):
        for size, chosen in by_size.items():
            tried = sorted((float(rate), 100 * score) for rate, score in chosen["grid"].items())
            panel.plot(*zip(*tried, strict=True), marker=".", linewidth=1.6, markersize=6, **styles[size])
            best = (chosen["learning_rate"], 100 * chosen["score"])
            _mark_chosen(panel, best, styles[size]["color"], bool(chosen.get("at_edge")))
        panel.set_xscale("log")
        tried = [float(rate) for chosen in by_size.values() for rate in chosen["grid"]]
        _number_axis(panel, tried, (1, 3) if max(tried) <= 1000 * min(tried) else (1,))
        panel.set_ylim(-2, 105)
        _dress(panel, _arms(summary).get(arm, arm), "learning rate")
    panels[0].set_ylabel("validation problems right, %", fontsize=FONT)
    ring = {"linestyle": "none", "markerfacecolor": "none", "color": INK, "markersize": 9}
    entries = [_line(labels.get(size, size), linewidth=2, **styles[size]) for size in sizes]
    half = math.ceil(len(entries) / 2)
    rings = [_line("chosen", marker="o", **ring), _line("chosen, at the edge of its grid", marker="s", **ring)]
    _legend(drawing, [group for group in (entries[:half], entries[half:], rings) if group])
    return drawing


def _dashes(is_solid: bool):
    return "-" if is_solid else (0, (3, 1.5))


def _mark_chosen(panel, place, color, is_at_edge) -> None:
    marker = "s" if is_at_edge else "o"
    panel.plot(*place, marker, markersize=10, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.6)


def landscape(summary: dict) -> "Figure":
    """
    The reward over one or two trained values, and the path that training took through it.

    Args:
        summary (`dict`): As `report.summarize` returns.
    Returns:
        `matplotlib.figure.Figure`
    """
    styles = _styles(_arms(summary))
    drawing = _drawing(8.6, 3.9 * len(summary["landscapes"]) + 0.4)
    parts = drawing.subfigures(len(summary["landscapes"]), 1, squeeze=False)[:, 0]
    for part, item in zip(parts, summary["landscapes"], strict=True):
        (_draw_line if len(item["grid"]) == 1 else _draw_map)(part, item, styles)
    seen = {path["arm"]: path["arm_label"] for item in summary["landscapes"] for path in item["paths"]}
    entries = [_line(label, linewidth=2, **styles[arm]) for arm, label in seen.items()]
    if seen:
        mark = {"linestyle": "none", "color": INK, "markersize": 6}
        entries.append(_line("start", marker="o", markerfacecolor="white", **mark))
        entries.append(_line("end of training", marker="o", **mark))
        _legend(drawing, [[entry] for entry in entries])
    return drawing


def _draw_line(part, item, styles) -> None:
    """One value: reward above; below, the same axis, the value after each step, from top to bottom."""
    part.suptitle(f"{item['label']}, projections of seed {item['seed']}", fontsize=FONT + 1, color=INK)
    panels = part.subplots(2, 1, sharex=True, height_ratios=[1.7, 1]) if item["paths"] else [part.subplots(1, 1)]
    (values,) = item["grid"]
    for key, label, style in (("reward", "sampled", "-"), ("greedy", "greedy", (0, (4, 1.5)))):
        heights = [100 * value for value in item[key]]
        panels[0].plot(values, heights, color=INK, linestyle=style, linewidth=1.6, label=label)
    panels[0].axvline(0, color=FAINT, linewidth=0.8)
    panels[0].set_ylim(-2, 103)
    _dress(panels[0], y=f"% of {item['n_problems']} problems right")
    panels[0].legend(fontsize=FONT - 1, frameon=False, loc="best")
    for path in item["paths"]:
        taken = [point[0] for point in path["path"]]
        panels[1].plot(taken, range(len(taken)), linewidth=1.6, **styles[path["arm"]])
        _mark_ends(panels[1], (taken[0], 0), (taken[-1], len(taken) - 1), styles[path["arm"]]["color"])
    if item["paths"]:
        panels[1].invert_yaxis()
        panels[1].axvline(0, color=FAINT, linewidth=0.8)
        _dress(panels[1], y="step")
    panels[-1].set_xlabel("the trained value", fontsize=FONT)


def _draw_map(part, item, styles) -> None:
    """Two values: sampled reward and greedy accuracy as maps, each with the paths."""
    part.suptitle(f"{item['label']}, projections of seed {item['seed']}", fontsize=FONT + 1, color=INK)
    panels = part.subplots(1, 2, sharex=True, sharey=True)
    first, second = item["grid"]
    both = [100 * np.asarray(item[key]) for key in ("reward", "greedy")]
    lowest, highest = min(map(np.min, both)), max(map(np.max, both))
    for panel, key, title in zip(panels, ("reward", "greedy"), ("sampled", "greedy"), strict=True):
        heights = 100 * np.asarray(item[key]).T
        drawn = panel.pcolormesh(first, second, heights, cmap="Greys_r", shading="nearest", vmin=lowest, vmax=highest)
        _dress(panel, title, "first value", "second value" if panel is panels[0] else "")
        panel.grid(False)
        for path in item["paths"]:
            xs, ys = zip(*path["path"], strict=True)
            style = styles[path["arm"]]
            panel.plot(xs, ys, color="white", linewidth=3.4, solid_capstyle="round")
            panel.plot(xs, ys, linewidth=1.8, **style)
            _mark_ends(panel, (xs[0], ys[0]), (xs[-1], ys[-1]), style["color"])
        for values, limits in ((first, panel.set_xlim), (second, panel.set_ylim)):
            limits(min(values), max(values))
    bar = part.colorbar(drawn, ax=panels, shrink=0.9)
    bar.set_label(f"% of {item['n_problems']} problems right", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 1)


def _mark_ends(panel, start, end, color) -> None:
    panel.plot(*start, "o", markersize=6, markerfacecolor="white", markeredgecolor=color, markeredgewidth=1.4, zorder=5)
    panel.plot(*end, "o", markersize=7, markerfacecolor=color, markeredgecolor="white", markeredgewidth=1, zorder=5)


def _sampled(summary) -> "Figure":
    return accuracy(summary, "sampled")


FIGURES: dict[str, Callable[[dict], "Figure"]] = {
    "accuracy.png": accuracy,
    "accuracy_sampled.png": _sampled,
    "bytes.png": by_bytes,
    "landscape.png": landscape,
    "curves.png": curves,
    "rates.png": rates,
}
CAPTIONS = {
    "accuracy.png": "Large markers are means over seeds, small ones the seeds, bars their range; arms of one size "
    "stand side by side. Values kept in fewer bits have their own figure.",
    "accuracy_sampled.png": "As above, for samples.",
    "bytes.png": "As above, by the bytes of what was trained.",
    "landscape.png": "Share of problems that the model with these values answers right, in strict grading, and where "
    "training went, in the directions of the same seed. A path that leaves the map left the grid.",
    "curves.png": "Lines are means over seeds within stretches of steps, bands the range over seeds.",
    "rates.png": "One seed, apart from the final ones. A square: the best rate is the grid's first or last.",
}
