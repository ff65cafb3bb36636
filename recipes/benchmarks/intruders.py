"""
Intruder dimensions: singular vectors of trained weights that are none of the base's.

    python recipes/compare.py --config recipes/toy/compare_rates.yaml
    python recipes/benchmark.py intruders

Of the first ten left singular vectors of a trained weight, those whose cosine with every one of the base's is below a
threshold (Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence", arXiv:2410.21228, algorithm 1).
Reads the models that a comparison left in its work folder; the mean is over the weights of all blocks and over seeds.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from benchmarks.harness import Row, parser_of, run
from comparison.tables import grid
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_tinylora.sources import ADAPTER_FILE


# Of each weight, the singular vectors with the largest singular values.
VECTORS = 10
THRESHOLDS = (0.5, 0.7, 0.9)


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of the linear layers in the blocks, in float64 by name."""
    return {
        name: module.weight.detach().double()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def load(base: str, folder: Path) -> PreTrainedModel:
    """A trained model: an adapter merged into its base, or the folder's own weights."""
    if (folder / ADAPTER_FILE).is_file():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def left_vectors(weight_OI: torch.Tensor) -> torch.Tensor:
    """A weight's left singular vectors, as columns by falling singular value."""
    return torch.linalg.svd(weight_OI, full_matrices=False).U


def best_cosines(trained_OI: torch.Tensor, base_OS: torch.Tensor, count: int = VECTORS) -> torch.Tensor:
    """
    Of each of the first left singular vectors of a trained weight, the largest |cosine| with any of the base's.

    Args:
        trained_OI (`torch.Tensor`): The weight, shape `(out_features, in_features)`.
        base_OS (`torch.Tensor`): The base's left singular vectors, shape `(out_features, vectors)`.
        count (`int`, *optional*, defaults to `10`): How many vectors.
    Returns:
        `torch.Tensor` of shape `(count,)`, from 0 to 1.
    """
    return (base_OS.mT @ left_vectors(trained_OI)[:, :count]).abs().amax(dim=0)


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Every final run of the comparison whose model is there."""
    base = weights_of(AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32))
    vectors = {name: left_vectors(weight) for name, weight in base.items()}
    cells: dict[tuple[str, str], dict] = {}
    results = Path(arguments.results)
    for path in sorted((results / "runs").glob("final-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        folder = results / "work" / record["name"] / "model"
        if not folder.is_dir():
            continue
        trained = weights_of(load(arguments.base, folder))
        cosines = torch.stack([best_cosines(trained[name], vectors[name]) for name in base])
        moved = [float((trained[name] - base[name]).norm() / base[name].norm()) for name in base]
        cell = cells.setdefault(
            (record["size"], record["arm"]),
            {
                **{key: record[key] for key in ("arm", "arm_label", "size", "label", "trained_values")},
                "seeds": [],
                "accuracy": [],
                "moved": [],
                "intruders": {f"{threshold:g}": [] for threshold in THRESHOLDS},
            },
        )
        cell["seeds"].append(record["seed"])
        cell["accuracy"].append(record["metrics"]["greedy"]["strict"]["accuracy"])
        cell["moved"].append(statistics.mean(moved))
        for threshold in THRESHOLDS:
            cell["intruders"][f"{threshold:g}"].append(float((cosines < threshold).sum(1).double().mean()))
    if not cells:
        raise SystemExit(f"error: {results / 'work'} holds no model of a final run: run the comparison here first")
    found = sorted(cells.values(), key=lambda cell: (cell["trained_values"], cell["arm"]))
    means = {(cell["size"], cell["arm"]): statistics.mean(cell["intruders"]["0.5"]) for cell in found}
    claim = f"intruder dimensions among the first {VECTORS} singular vectors of a weight, cosine below 0.5: 13 values, "
    rows = [
        Row(claim + cell["arm_label"], means["13", cell["arm"]], means["lora-r1", cell["arm"]], "LoRA r=1")
        for cell in found
        if cell["size"] == "13" and ("lora-r1", cell["arm"]) in means
    ]
    return rows, {"cells": found}


def table(record: dict) -> str:
    """The record as a table in Markdown."""
    rows = []
    for cell in record["details"]["cells"]:
        counts = [f"{statistics.mean(found):.2f}" for found in cell["intruders"].values()]
        rows.append(
            [
                cell["label"],
                f"{cell['trained_values']:,}",
                cell["arm_label"],
                f"{statistics.mean(cell['accuracy']):.1%}",
            ]
            + [f"{statistics.mean(cell['moved']):.1%}", *counts]
        )
    heads = " | ".join(f"cosine < {threshold:g}" for threshold in THRESHOLDS)
    seeds = max(len(cell["seeds"]) for cell in record["details"]["cells"])
    return grid(f"trained | values | arm | greedy | moved | {heads}", "lrlrrrrr", rows) + (
        f"\n\nIntruder dimensions among the first {VECTORS} left singular vectors of a weight, by threshold: the mean "
        f"over all weights of the blocks and {seeds} seed{'s' * (seeds > 1)}. *Moved* is the norm of the update over "
        "that of the weight."
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = parser_of(__doc__, "intruders")
    parser.add_argument("--results", default="results/toy-rates", help="a comparison's output folder")
    parser.add_argument("--base", default="recipes/toy/base", help="the base model")
    run("intruders", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
