"""
What merging an adapter and restoring the weight costs, and what is left of the weight after many cycles.

    python recipes/benchmark.py merge

One linear layer with a bfloat16 weight whose spectrum has large directions, as those of trained weights have. A pair is
`merge_adapter` and `unmerge_adapter`, ours in turns with PEFT's own TinyLoRA and with LoRA of the same rank. About a
minute on one CPU core.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import peft
import torch
from benchmarks.harness import Row, bytes_added, in_turns, parser_of, peak_bytes, ratio_of, run, tensor_storages
from torch import nn

from trl_tinylora import TinyLoraConfig


class OneLayer(nn.Module):
    """
    A model of one linear layer.

    Args:
        size (`int`): Rows and columns of its weight: entries from N(0, 0.02^2) and eight large directions, from a fixed
            seed. The largest singular value is 24 at size 3584, a third of the weight's Frobenius norm.
    """

    def __init__(self, size: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(size, 8, generator=generator) / size**0.5 for _ in range(2))
        sigma = 24 * size / 3584 / torch.arange(1, 9) ** 0.5
        bulk = 0.02 * torch.randn(size, size, generator=generator)
        self.linear = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
        self.linear.weight.data = (bulk + (left * sigma) @ right.mT).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        return self.linear(x)


def adapted(base: nn.Module, rank: int) -> dict[str, peft.PeftModel]:
    """Copies of a model with an adapter each, on the GPU where there is one: our TinyLoRA, PEFT's, and LoRA."""
    base = base.to("cuda" if torch.cuda.is_available() else "cpu")
    fields = {"r": rank, "target_modules": ["linear"]}
    configs = {
        "ours": TinyLoraConfig(**fields),
        "PEFT TinyLoRA": peft.TinyLoraConfig(u=1, **fields),
        "LoRA": peft.LoraConfig(init_lora_weights=False, **fields),
    }
    return {name: peft.get_peft_model(copy.deepcopy(base), config) for name, config in configs.items()}


def set_value(model: peft.PeftModel, value: float) -> None:
    """Sets the trained value of a TinyLoRA; a LoRA keeps its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(trained) == 1:
        with torch.no_grad():
            trained[0].fill_(value)


def cycle(model: peft.PeftModel) -> None:
    """Merges and unmerges."""
    model.merge_adapter()
    model.unmerge_adapter()


def cycles_of(models: dict[str, peft.PeftModel]) -> dict[str, Callable[[], None]]:
    """A merge and unmerge of each model, as a call without arguments."""
    return {name: partial(cycle, model) for name, model in models.items()}


def weight_of(model: peft.PeftModel) -> torch.Tensor:
    """The base weight as it is now."""
    return model.base_model.model.linear.base_layer.weight.data


def measure_held(model: peft.PeftModel) -> int:
    """Bytes of the tensors that there are while the adapter is merged, and were not there before."""
    before = tensor_storages()
    model.merge_adapter()
    held = bytes_added(before)
    model.unmerge_adapter()
    return held


def measure_drift(models: dict[str, peft.PeftModel], value: float, cycles: dict[str, int]) -> dict[str, float]:
    """The share of a weight's entries that are not what they were after cycles with changing values."""
    changed = {}
    for name, model in models.items():
        before, generator = weight_of(model).clone(), torch.Generator().manual_seed(1)
        for drawn in (2 * torch.rand(cycles[name], generator=generator) - 1).tolist():
            set_value(model, value * drawn)
            cycle(model)
        changed[name] = (weight_of(model).view(torch.int16) != before.view(torch.int16)).double().mean().item()
    return changed


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """All figures and their rows."""
    models, rows = adapted(OneLayer(arguments.size), arguments.rank), []
    details = {"seconds": {}, "held": measure_held(models["ours"])}
    shape, n_bytes = f"{arguments.size}x{arguments.size} bf16", weight_of(models["ours"]).nbytes

    for value in arguments.values:
        for model in models.values():
            set_value(model, value)
        details["seconds"][value] = in_turns(cycles_of(models), arguments.repeats)
    # Rows of the largest value; the others' figures are in the details.
    value = arguments.values[-1]
    times = details["seconds"][value]
    for whose in ("PEFT TinyLoRA", "LoRA"):
        ratio, spread = ratio_of(times["ours"], times[whose])
        ours, theirs = (statistics.median(times[name]) for name in ("ours", whose))
        claim = f"merge and unmerge {shape}, v = {value:g}"
        rows.append(Row(claim, ours, theirs, whose, "s", ratio, spread, "at most 0.5 of theirs", ratio <= 0.5))

    held, bound = details["held"], "at most 1.01 of the weight"
    ratio = held / n_bytes
    rows.append(Row("held while merged", held, n_bytes, "the weight", "bytes", ratio, [], bound, ratio <= 1.01))

    details["peak_bytes"] = {name: peak_bytes(action) for name, action in cycles_of(models).items()}
    ours, theirs = (details["peak_bytes"][name] for name in ("ours", "PEFT TinyLoRA"))
    ratio, claim = ours / n_bytes, "peak of merge and unmerge over the weight"
    rows.append(Row(claim, ours, theirs, "PEFT TinyLoRA", "bytes", ratio, [], "at most 1.25", ratio <= 1.25))

    drifting = adapted(OneLayer(arguments.drift_size), arguments.rank)
    cycles = {name: arguments.our_cycles if name == "ours" else arguments.cycles for name in drifting}
    details["drift"] = {each: measure_drift(drifting, each, cycles) for each in arguments.values}
    ours, theirs = (details["drift"][value][name] for name in ("ours", "PEFT TinyLoRA"))
    claim = f"share of entries changed after {arguments.our_cycles} cycles, v within {value:g}"
    whose = f"PEFT TinyLoRA after {arguments.cycles}"
    rows.append(Row(claim, ours, theirs, whose, "", None, [], "0", ours == 0))
    return rows, details


def main() -> None:
    """Measures and writes the record."""
    parser = parser_of(__doc__, "merge")
    parser.add_argument("--size", type=int, default=3584, help="rows and columns of the weight")
    parser.add_argument("--rank", type=int, default=2, help="rank of every adapter")
    parser.add_argument("--values", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 1e-1], help="trained value")
    parser.add_argument("--repeats", type=int, default=11, help="rounds in turns")
    parser.add_argument(
        "--drift_size", type=int, default=128, help="rows and columns of the weight that is merged often"
    )
    parser.add_argument("--cycles", type=int, default=300, help="cycles of PEFT's")
    parser.add_argument("--our_cycles", type=int, default=10_000, help="cycles of ours")
    run("merge", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
