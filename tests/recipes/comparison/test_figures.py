"""The figures: what is drawn, and that every word can be read."""

import copy

import pytest
from comparison import figures
from made_up_records import (
    cell_of,
)
from matplotlib.text import Text


pytestmark = pytest.mark.usefixtures("few_resamples_and_small_figures")


def ticks_in_view(axis):
    low, high = sorted(axis.get_view_interval())
    shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label for label in shown if label.get_visible() and label.get_text()]


@pytest.mark.parametrize("is_narrow", [False, True], ids=["many panels", "few panels"])
@pytest.mark.parametrize("name", figures.FIGURES)
def test_no_word_of_a_figure_is_cut_off_or_lies_on_another(name, is_narrow, summary):
    if is_narrow:
        summary = copy.deepcopy(summary)
        summary["cells"] = [cell for cell in summary["cells"] if cell["role"] == "control" or cell["arm"] == "rl"]
        for cell in summary["cells"]:
            cell["curve"] = {key: cell["curve"][key] for key in ("step", "reward") if key in cell["curve"]}
            for kind in cell["accuracy"]:
                del cell["accuracy"][kind]["flexible"]
    drawing = figures.FIGURES[name](summary)
    drawing.canvas.draw()
    renderer = drawing.canvas.get_renderer()
    whole = drawing.bbox
    for panel in drawing.axes:
        words = [child for child in panel.get_children() if isinstance(child, Text)]
        words += [panel.xaxis.label, panel.yaxis.label]
        ticks = {axis: ticks_in_view(axis) for axis in (panel.xaxis, panel.yaxis)}
        for word in words + [label for labels in ticks.values() for label in labels]:
            box = word.get_window_extent(renderer)
            is_inside = box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1
            assert is_inside or not word.get_text(), word.get_text()
        boxes = sorted((label.get_window_extent(renderer) for label in ticks[panel.xaxis]), key=lambda box: box.x0)
        assert all(left.x1 <= right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    for part in drawing.legends:
        box = part.get_window_extent(renderer)
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0


def test_variants_of_precision_are_not_drawn(summary):
    summary = copy.deepcopy(summary)
    for size, mean in (("13-bf16", 0.11), ("13", 0.12)):
        cell_of(summary, "rl", size)["accuracy"]["greedy"]["strict"]["mean"] = mean
    heights = {y for line in figures.accuracy(summary).axes[0].get_lines() for y in line.get_ydata()}
    assert 12.0 in heights and 11.0 not in heights
