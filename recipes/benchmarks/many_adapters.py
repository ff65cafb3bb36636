"""
What one more adapter costs, and what a batch costs whose rows have adapters of their own.

    python recipes/benchmark.py many_adapters

Adapters are added to a small Qwen2 with random weights, in turns with PEFT's own TinyLoRA on a copy of it: same rank,
same number of trained values, same modules. Both are asked for through `PeftModel.add_adapter`. CPU, under two minutes.
"""

import argparse
import gc
import statistics
import tracemalloc
import warnings

import peft
import torch
from benchmarks.harness import (
    Row,
    bytes_added,
    in_turns,
    parser_of,
    random_qwen2,
    ratio_of,
    run,
    seconds,
    tensor_storages,
)

from trl_tinylora import TinyLoraConfig


RANK = 2


def our_config() -> TinyLoraConfig:
    """Returns a configuration that trains one value a module."""
    return TinyLoraConfig(r=RANK, u=1, n_tie=1)


def pefts_config() -> peft.TinyLoraConfig:
    """Returns PEFT's configuration that trains as many values."""
    return peft.TinyLoraConfig(r=RANK, u=1, weight_tying=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def measure_adding(arguments: argparse.Namespace) -> dict:
    """Returns bytes and milliseconds of each further adapter, ours and PEFT's in turns."""
    configs = {"trl_tinylora": our_config, "peft": pefts_config}
    models = {
        name: peft.get_peft_model(random_qwen2(arguments.hidden, arguments.layers).eval(), config())
        for name, config in configs.items()
    }
    times: dict[str, list[float]] = {name: [] for name in configs}
    for index in range(arguments.adapters):
        for name, model in models.items():
            times[name].append(1e3 * seconds(lambda: model.add_adapter(f"added{index}", configs[name]())))  # noqa: B023
    measured = {}
    for name, model in models.items():
        before = tensor_storages()
        tracemalloc.start()
        for index in range(10):
            model.add_adapter(f"weighed{index}", configs[name]())
        gc.collect()
        python_bytes = tracemalloc.get_traced_memory()[0] / 10
        tracemalloc.stop()
        measured[name] = {
            "trained_values": model.get_nb_trainable_parameters()[0],
            "tensor_bytes": bytes_added(before) / 10,
            "python_bytes": python_bytes,
            "ms_first_ten": statistics.median(times[name][:10]),
            "ms_last_ten": statistics.median(times[name][-10:]),
        }
    return measured


def measure_adding_thousands(arguments: argparse.Namespace) -> dict:
    """Returns what the first and the last of many thousand adapters cost; ours alone, PEFT's would take hours."""
    model = peft.get_peft_model(random_qwen2(arguments.hidden, arguments.layers).eval(), our_config())
    per_thousand = []
    for thousand in range(arguments.thousands):

        def add(thousand=thousand):
            for index in range(1000):
                model.add_adapter(f"added{1000 * thousand + index}", our_config())

        per_thousand.append(seconds(add))
    return {
        "adapters": 1000 * arguments.thousands,
        "ms_per_adapter_first_thousand": per_thousand[0],
        "ms_per_adapter_last_thousand": per_thousand[-1],
        "ms_set_adapter": 1e3 * seconds(lambda: model.set_adapter("added7")),
    }


@torch.no_grad()
def measure_mixed_batch(arguments: argparse.Namespace) -> dict:
    """Returns the throughput of a batch with an adapter for each row over that of the same batch with one adapter."""
    model = peft.get_peft_model(random_qwen2(arguments.hidden, arguments.layers).eval(), our_config())
    names = [f"row{row}" for row in range(arguments.rows)]
    for seed, name in enumerate(names):
        model.add_adapter(name, our_config())
        values = model.get_parameter(f"base_model.model.tinylora_bank.trl_tinylora_v.{name}.lora_magnitude_vector")
        values.copy_(0.5 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))
    model.set_adapter(names[0])
    model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 2048, (arguments.rows, arguments.tokens), generator=generator).to(model.device)

    mixed = model(input_ids=ids, adapter_names=names).logits
    largest_difference, smallest_effect = 0.0, float("inf")
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model(input_ids=ids[row : row + 1]).logits[0]
        largest_difference = max(largest_difference, (mixed[row] - alone).abs().max().item())
        smallest_effect = min(smallest_effect, (alone - base[row]).abs().max().item())
    model.set_adapter(names[0])

    def forward(**kwargs):
        return lambda: model(input_ids=ids, logits_to_keep=1, **kwargs)

    def generate(**kwargs):
        length = arguments.new_tokens
        settings = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length, "pad_token_id": 0}
        return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **kwargs)

    measured = {"rows": arguments.rows, "adapters": len(names), "tokens": arguments.tokens}
    for kind, make in [("forward", forward), ("generate", generate)]:
        times = in_turns({"one": make(), "each": make(adapter_names=names)}, arguments.repeats)
        ratio, spread = ratio_of(times["one"], times["each"])
        measured[kind] = {
            "seconds_one_adapter": statistics.median(times["one"]),
            "seconds_an_adapter_each": statistics.median(times["each"]),
            "throughput_ratio": ratio,
            "spread": spread,
        }
    return measured | {
        "largest_difference_from_alone": largest_difference,
        "smallest_effect_of_an_adapter": smallest_effect,
        "largest_logit": mixed.abs().max().item(),
    }


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Runs all measurements."""
    # PEFT tells of its experimental parts, not of anything measured here.
    warnings.simplefilter("ignore")
    details = {
        "mixed_batch": measure_mixed_batch(arguments),
        "thousands": measure_adding_thousands(arguments),
        "adding": measure_adding(arguments),
    }
    return rows_of(details), details


def rows_of(details: dict) -> list[Row]:
    """The claims."""
    adding, many, mixed = details["adding"], details["thousands"], details["mixed_batch"]
    ours, theirs = adding["trl_tinylora"], adding["peft"]
    name = "PEFT's TinyLoRA"
    rows = []
    for key, unit, scale, what in (
        ("tensor_bytes", "bytes", 1, "bytes of tensors"),
        ("python_bytes", "bytes", 1, "bytes of Python objects"),
        ("ms_last_ten", "s", 1e-3, "time"),
    ):
        ratio = theirs[key] / ours[key]
        claim = f"one more adapter of {ours['trained_values']} values: {what}"
        figures = (scale * ours[key], scale * theirs[key])
        rows.append(Row(claim, *figures, name, unit, ratio, [], "fewer" if scale == 1 else "less", ratio > 1))
    first, last = (1e-3 * many[f"ms_per_adapter_{which}_thousand"] for which in ("first", "last"))
    growth = last / first
    claim = f"adding the last thousand of {many['adapters']:,} adapters, each"
    rows.append(Row(claim, last, first, "each of the first", "s", growth, [], "at most 1.5", growth <= 1.5))
    for kind in ("forward", "generate"):
        part = mixed[kind]
        rows.append(
            Row(
                claim=f"{kind} of {mixed['rows']} rows with an adapter each: throughput over one adapter's",
                ours=part["seconds_an_adapter_each"],
                theirs=part["seconds_one_adapter"],
                whose="one adapter",
                unit="s",
                ratio=part["throughput_ratio"],
                spread=part["spread"],
                bound="at least 0.8",
                holds=part["throughput_ratio"] >= 0.8,
            )
        )
    return rows


def main() -> None:
    """Measures, prints, writes."""
    parser = parser_of(__doc__, "many_adapters")
    parser.add_argument("--hidden", type=int, default=384, help="hidden size of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="its layers, of seven adapted modules each")
    parser.add_argument("--adapters", type=int, default=20, help="adapters added to each of the two models in turns")
    parser.add_argument("--thousands", type=int, default=10, help="thousands of adapters added to one model of ours")
    parser.add_argument("--rows", type=int, default=64, help="rows of the batch, each with an adapter of its own")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each row")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens generated for each row")
    parser.add_argument("--repeats", type=int, default=11, help="times that each batch runs, in turns")
    run("many_adapters", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
