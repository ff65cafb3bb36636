"""
How costs grow with modules, rank, u, adapters and sequence length: measured at several sizes, fitted, drawn.

    python recipes/benchmark.py growth                # measures; about five minutes on one core
    python recipes/benchmark.py growth --report_only  # draws the figure from the record

A Qwen2 with random weights; along each axis one size changes. The exponent of a cost is the slope of its logarithm over
that of the size, fitted to the larger half of the sizes, where what is constant weighs least: 0 does not grow, 1 is
linear, 2 quadratic. Sizes of one axis are timed in turns. PEFT's TinyLoRA is measured along the modules.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from benchmarks.harness import Row, in_turns, parser_of, peak_bytes, random_qwen2, run, tensor_bytes
from comparison.figures import ARM_COLORS, DPI, FAINT
from scipy.stats import linregress

from trl_tinylora import TinyLoraConfig
from trl_tinylora.storage.atomic_write import written_whole


RANK_OF_U = 16  # so that up to 256 values of a module mean different things
AXES = {
    "layers": "layers of seven modules",
    "rank": "rank r",
    "u": f"u, values of a group (r = {RANK_OF_U})",
    "adapters": "adapters on the model",
    "tokens": "tokens of a sequence",
}
COSTS = {
    "build": "seconds to add an adapter",
    "step": "seconds of a forward and backward pass",
    "kept": "bytes that adapters keep",
    "step_bytes": "peak bytes of a step",
    "keys": "keys of the state dict",
}
# A straight line through noisy seconds is not straight to the last digit; a square has exponent 2.
BOUND = 1.2


class Case:
    """
    A model at one size of one axis.

    Args:
        axis (`str`): A key of `AXES`.
        size (`int`): Its size there.
        arguments (`argparse.Namespace`): The sizes along the other axes.
        pefts (`bool`, *optional*, defaults to `False`): Whether PEFT's TinyLoRA takes the place of ours.
    """

    def __init__(self, axis: str, size: int, arguments: argparse.Namespace, pefts: bool = False):
        self.rank = size if axis == "rank" else RANK_OF_U if axis == "u" else 2
        self.u = size if axis == "u" else 1
        self.pefts = pefts
        base = random_qwen2(arguments.hidden, size if axis == "layers" else arguments.layers)
        before = tensor_bytes()
        self.model = peft.get_peft_model(base, self.config())
        for number in range(1, size if axis == "adapters" else 1):
            self.model.add_adapter(f"added{number}", self.config())
        self.kept = tensor_bytes() - before
        self.keys = sum("tinylora" in key for key in self.model.state_dict())
        length = size if axis == "tokens" else arguments.tokens
        ids = torch.randint(3, 2048, (1, length), generator=torch.Generator().manual_seed(1))
        self.ids = ids.to(base.device)

    def config(self) -> peft.PeftConfig:
        """A configuration of the case's rank and u, one group a module."""
        if self.pefts:
            fields = {"weight_tying": 0.0, "target_modules": "all-linear"}
            return peft.TinyLoraConfig(r=self.rank, u=self.u, **fields)
        return TinyLoraConfig(r=self.rank, u=self.u)

    def build(self) -> None:
        """Adds an adapter that shares nothing with those there are, and deletes it."""
        config = self.config()
        config.projection_seed = 1
        self.model.base_model.peft_config["another"] = config
        self.model.base_model.inject_adapter(self.model.base_model.model, "another")
        self.model.delete_adapter("another")

    def step(self) -> None:
        """One forward and backward pass."""
        logits = self.model(input_ids=self.ids, use_cache=False).logits
        logits.square().mean().backward()
        self.model.zero_grad()


def exponent(sizes: list[int], costs: list[float]) -> float:
    """
    Slope of the logarithm of a cost over that of the size, in the larger half of the sizes.

    Args:
        sizes (`list[int]`): In increasing order.
        costs (`list[float]`): At each of them.
    Returns:
        `float`
    """
    half = len(sizes) // 2
    logs = [[math.log(value) for value in values[half:]] for values in (sizes, costs)]
    return float(linregress(*logs).slope)


def measure_axis(axis: str, sizes: list[int], arguments: argparse.Namespace, pefts: bool = False) -> dict:
    """
    Costs and their exponents along one axis.

    Args:
        axis (`str`): A key of `AXES`.
        sizes (`list[int]`): In increasing order.
        arguments (`argparse.Namespace`): `repeats`, and the sizes along the other axes.
        pefts (`bool`, *optional*, defaults to `False`): Whether PEFT's TinyLoRA is measured.
    Returns:
        `dict`: `sizes`; for each cost its values (`costs`) and its exponent (`exponents`).
    """
    cases = {size: Case(axis, size, arguments, pefts) for size in sizes}
    costs = {
        "kept": [case.kept for case in cases.values()],
        "step_bytes": [peak_bytes(case.step) for case in cases.values()],
        "keys": [case.keys for case in cases.values()],
    }
    for cost in ("step",) if pefts else ("build", "step"):
        actions: dict[str, Callable[[], object]] = {str(size): getattr(case, cost) for size, case in cases.items()}
        times = in_turns(actions, arguments.repeats)
        costs[cost] = [statistics.median(times[str(size)]) for size in sizes]
    return {"sizes": sizes, "costs": costs, "exponents": {cost: exponent(sizes, costs[cost]) for cost in costs}}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """
    All axes.

    Args:
        arguments (`argparse.Namespace`): The command line's.
    Returns:
        `tuple[list[Row], dict]`: A row for each axis, and everything measured.
    """
    ours = {axis: measure_axis(axis, getattr(arguments, f"sizes_{axis}"), arguments) for axis in AXES}
    theirs = {"layers": measure_axis("layers", arguments.sizes_layers, arguments, pefts=True)}
    rows = []
    for axis, words in AXES.items():
        cost, largest = _largest(ours[axis])
        other = _largest(theirs[axis]) if axis in theirs else None
        rows.append(
            Row(
                claim=f"cost against {words}, {ours[axis]['sizes'][0]} to {ours[axis]['sizes'][-1]}: the largest "
                f"exponent ({COSTS[cost]})",
                ours=largest,
                theirs=other[1] if other else None,
                whose=f"PEFT's TinyLoRA ({COSTS[other[0]]})" if other else "",
                bound=f"not quadratic: at most {BOUND}",
                holds=largest <= BOUND,
            )
        )
    return rows, {"ours": ours, "peft": theirs}


def _largest(measured):
    return max(measured["exponents"].items(), key=lambda item: item[1])


def draw(record: dict, path: Path) -> None:
    """
    The figure: a panel for each axis, each cost over its value at the smallest size.

    Args:
        record (`dict`): As [`~harness.run`] wrote it.
        path (`Path`): Image to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(AXES), 3.4), layout="constrained")
    panels = figure.subplots(1, len(AXES))
    looks = dict(zip(COSTS, [*ARM_COLORS, *ARM_COLORS[:2]], strict=True))
    for panel, (axis, words) in zip(panels, AXES.items(), strict=True):
        measured = record["details"]["ours"][axis]
        sizes = measured["sizes"]
        for cost, values in measured["costs"].items():
            style = "--" if cost in ("step_bytes", "keys") else "-"
            label = f"{COSTS[cost]}: {measured['exponents'][cost]:.2f}"
            panel.plot(sizes, [value / values[0] for value in values], style, color=looks[cost], label=label)
        for steepness, name in ((1, "linear"), (2, "quadratic")):
            panel.plot(sizes, [(size / sizes[0]) ** steepness for size in sizes], ":", color=FAINT, linewidth=0.8)
            panel.annotate(name, (sizes[-1], (sizes[-1] / sizes[0]) ** steepness), color=FAINT, fontsize=6, ha="right")
        panel.set(xscale="log", yscale="log", xlabel=words)
        panel.set_xticks(sizes, sizes, fontsize=7)
        panel.minorticks_off()
        panel.set_ylim(0.5, 2 * (sizes[-1] / sizes[0]) ** 1.5)
        panel.legend(fontsize=6, loc="upper left", frameon=False)
    panels[0].set_ylabel("over the smallest size")
    with written_whole(path) as scratch:
        figure.savefig(scratch, dpi=DPI, metadata={"Software": None})


def main() -> None:
    """Measures, or draws what was measured."""
    parser = parser_of(__doc__, "growth")
    parser.add_argument("--report_only", action="store_true", help="measure nothing, draw the figure from --output")
    parser.add_argument("--hidden", type=int, default=320, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2, help="layers where another size changes")
    parser.add_argument("--tokens", type=int, default=64, help="tokens where another size changes")
    parser.add_argument("--repeats", type=int, default=7, help="times that each size is timed, in turns")
    for axis, sizes in {
        "layers": [1, 2, 4, 8, 16, 32],
        "rank": [1, 2, 4, 8, 16, 32, 64],
        "u": [1, 4, 16, 64, 256],
        "adapters": [1, 4, 16, 64, 256, 1024],
        "tokens": [32, 64, 128, 256, 512, 1024],
    }.items():
        parser.add_argument(f"--sizes_{axis}", type=int, nargs="+", default=sizes, help=f"sizes of: {AXES[axis]}")
    arguments = parser.parse_args()
    if arguments.report_only:
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    else:
        record = run("growth", arguments, measure)
    draw(record, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
