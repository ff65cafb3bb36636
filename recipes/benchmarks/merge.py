"""
What merging an adapter and taking it back costs, and what is left of the weights afterwards.

    python recipes/benchmark.py merge

One linear layer with a bfloat16 weight whose spectrum has large directions, as those of trained weights have. A pair is
`merge_adapter` and `unmerge_adapter`, ours in both ways (`merge_restore`) in turns with PEFT's own TinyLoRA and with
LoRA of the same rank. About five minutes on one CPU core.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import peft
import torch
from benchmarks.harness import Row, in_turns, parser_of, peak_bytes, ratio_of, run
from torch import nn

from trl_tinylora import TinyLoraConfig


WAYS = ("keep", "sparse")


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


def pairs(models: dict[str, peft.PeftModel]) -> dict[str, Callable[[], None]]:
    """A merge and the way back, as a call without arguments: ours in both ways, PEFT's and LoRA's."""

    def pair(model, way=None):
        if way is not None:
            model.peft_config["default"].merge_restore = way
        model.merge_adapter()
        model.unmerge_adapter()

    others = {name: partial(pair, model) for name, model in models.items() if name != "ours"}
    return {way: partial(pair, models["ours"], way) for way in WAYS} | others


def weight_of(model: peft.PeftModel) -> torch.Tensor:
    """The base weight as it is now."""
    return model.base_model.model.linear.base_layer.weight.data


def tensors_in(holder: object) -> Iterator[torch.Tensor]:
    """The tensors that an object holds, in its attributes and in lists and tuples there."""
    if isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, (list, tuple)):
        for item in holder:
            yield from tensors_in(item)
    elif hasattr(holder, "__dict__"):
        for item in vars(holder).values():
            yield from tensors_in(item)


def measure_held(model: peft.PeftModel, way: str) -> dict:
    """What is held while an adapter of ours is merged.

    Args:
        model (`peft.PeftModel`): Unmerged.
        way (`str`): A way back.
    Returns:
        `dict`: `bytes` of all that is needed for the way back and was not there before; and `share`, listed entries
            over all.
    """
    model.peft_config["default"].merge_restore = way
    layer, weight = model.base_model.model.linear, weight_of(model)
    model.merge_adapter()
    shared = {factor.data_ptr() for factor in layer.factors(model.peft_config["default"].r)}
    held = sum(tensor.nbytes for tensor in tensors_in(layer._way_back) if tensor.data_ptr() not in shared)
    listed = sum(len(entries) for _, _, entries in getattr(layer._way_back, "parts", ()))
    model.unmerge_adapter()
    return {"bytes": held, "share": listed / weight.numel()}


def measure_drift(models: dict[str, peft.PeftModel], value: float, cycles: dict[str, int]) -> dict[str, float]:
    """The share of a weight's entries that are not what they were after cycles with changing values.

    Args:
        models (`dict[str, peft.PeftModel]`): As [`adapted`] returns.
        value (`float`): Every cycle has a value within plus or minus this one.
        cycles (`dict[str, int]`): How many, by name, as [`pairs`] has them.
    Returns:
        `dict[str, float]`
    """
    changed = {}
    for name, pair in pairs(models).items():
        model = models.get(name, models["ours"])
        before, generator = weight_of(model).clone(), torch.Generator().manual_seed(1)
        for drawn in (2 * torch.rand(cycles[name], generator=generator) - 1).tolist():
            set_value(model, value * drawn)
            pair()
        changed[name] = (weight_of(model).view(torch.int16) != before.view(torch.int16)).double().mean().item()
    return changed


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """All figures and their rows."""
    models, rows = adapted(OneLayer(arguments.size), arguments.rank), []
    details = {"seconds": {}, "held": {}, "peak_bytes": {}, "drift": {}}
    shape, n_bytes = f"{arguments.size}x{arguments.size} bf16", weight_of(models["ours"]).nbytes

    for value in arguments.values:
        for model in models.values():
            set_value(model, value)
        details["seconds"][value] = times = in_turns(pairs(models), arguments.repeats)
        details["held"][value] = {way: measure_held(models["ours"], way) for way in WAYS}
        for way, most in zip(WAYS, (0.5, 1.6), strict=True):
            for whose in ("PEFT TinyLoRA", "LoRA"):
                ratio, spread = ratio_of(times[way], times[whose])
                ours, theirs = (statistics.median(times[name]) for name in (way, whose))
                claim, bound = f"merge and unmerge {shape}, {way}, v = {value:g}", f"at most {most} of theirs"
                # The largest value lists the most entries: the hardest case stands for all, which are in the details.
                if value == arguments.values[-1]:
                    rows.append(Row(claim, ours, theirs, whose, "s", ratio, spread, bound, ratio <= most))
    for name, pair in pairs(models).items():
        details["peak_bytes"][name] = peak_bytes(pair)
    # The indices are int32 beside entries of two bytes.
    for way, held_at_most, peak_at_most in zip(WAYS, (1.01, 0.25), (1.25, 0.5), strict=True):
        for value in (arguments.values[0], arguments.values[-1]) if way == "sparse" else arguments.values[-1:]:
            held = details["held"][value][way]
            ratio, claim = held["bytes"] / n_bytes, f"held while merged, {way}, v = {value:g}"
            bound = f"at most {held_at_most:g} of the weight"
            fits = ratio <= held_at_most
            rows.append(Row(claim, held["bytes"], n_bytes, "the weight", "bytes", ratio, [], bound, fits))
            if way == "sparse":
                claim, share = f"share of entries listed, v = {value:g}", held["share"]
                rows.append(Row(claim, share, bound="at most 0.08", holds=share <= 0.08))
        ours, theirs = details["peak_bytes"][way], details["peak_bytes"]["PEFT TinyLoRA"]
        claim, bound = f"peak of the pair over the weight, {way}", f"at most {peak_at_most:g}"
        ratio, whose = ours / n_bytes, "PEFT TinyLoRA"
        rows.append(Row(claim, ours, theirs, whose, "bytes", ratio, [], bound, ratio <= peak_at_most))
    drifting = adapted(OneLayer(arguments.drift_size), arguments.rank)
    cycles = {name: arguments.our_cycles if name in WAYS else arguments.cycles for name in pairs(drifting)}
    for value in arguments.values:
        details["drift"][value] = drift = measure_drift(drifting, value, cycles)
        ours, whose = max(drift[way] for way in WAYS), f"PEFT TinyLoRA after {arguments.cycles}"
        if value != arguments.values[-1]:
            continue
        claim = f"share of entries changed after {arguments.our_cycles} cycles in each way, v within {value:g}"
        rows.append(Row(claim, ours, drift["PEFT TinyLoRA"], whose, "", None, [], "0", ours == 0))
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
