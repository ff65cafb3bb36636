"""
What one more adapter costs, and what a batch costs whose rows have adapters of their own.

    python recipes/benchmarks/many_adapters.py                    # prints the tables
    python recipes/benchmarks/many_adapters.py --output recipes/benchmarks/results/many_adapters.json

Adapters are added to a small Qwen2 with random weights, in turns with PEFT's own TinyLoRA on a copy of it: same rank,
same number of trained values, same modules. Both are asked for through `PeftModel.add_adapter`. CPU, under two minutes.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluate import write_text
from provenance import read_provenance
from report import update_section

from trl_tinylora import TinyLoraConfig


RANK = 2


def make_model(arguments: argparse.Namespace) -> Qwen2ForCausalLM:
    """Returns a Qwen2 with random weights from a fixed seed.

    Args:
        arguments (`argparse.Namespace`): `hidden` and `layers` give its size.

    Returns:
        `Qwen2ForCausalLM`
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=arguments.hidden // 64,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def our_config() -> TinyLoraConfig:
    """Returns a configuration that trains one value a module."""
    return TinyLoraConfig(r=RANK, u=1, n_tie=1)


def pefts_config() -> peft.TinyLoraConfig:
    """Returns PEFT's configuration that trains as many values."""
    return peft.TinyLoraConfig(r=RANK, u=1, weight_tying=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def tensor_bytes() -> int:
    """Returns the bytes of all tensors in the process, each storage once, buffers and plain attributes included."""
    gc.collect()
    # By type: `isinstance` would wake lazy modules that the collector knows of.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def timed(action: Callable[[], object]) -> float:
    """Returns how many milliseconds a call takes.

    Args:
        action (`Callable`): Takes no arguments.

    Returns:
        `float`
    """
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def measure_adding(arguments: argparse.Namespace) -> dict:
    """Returns bytes and milliseconds of each further adapter, ours and PEFT's in turns.

    Args:
        arguments (`argparse.Namespace`): `adapters` is how many are added to each model.

    Returns:
        `dict`: For `"trl_tinylora"` and `"peft"` milliseconds (median of the first and of the last ten), bytes of
        tensors and of Python objects per adapter, and the trained values of one.
    """
    configs = {"trl_tinylora": our_config, "peft": pefts_config}
    models = {name: peft.get_peft_model(make_model(arguments), config()) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in configs}
    for index in range(arguments.adapters):
        for name, model in models.items():
            times[name].append(timed(lambda: model.add_adapter(f"added{index}", configs[name]())))  # noqa: B023
    measured = {}
    for name, model in models.items():
        before = tensor_bytes()
        tracemalloc.start()
        for index in range(10):
            model.add_adapter(f"weighed{index}", configs[name]())
        gc.collect()
        python_bytes = tracemalloc.get_traced_memory()[0] / 10
        tracemalloc.stop()
        measured[name] = {
            "trained_values": model.get_nb_trainable_parameters()[0],
            "tensor_bytes": (tensor_bytes() - before) / 10,
            "python_bytes": python_bytes,
            "ms_first_ten": statistics.median(times[name][:10]),
            "ms_last_ten": statistics.median(times[name][-10:]),
        }
    return measured


def measure_adding_thousands(arguments: argparse.Namespace) -> dict:
    """Returns what the first and the last of many thousand adapters cost; ours alone, PEFT's would take hours.

    Args:
        arguments (`argparse.Namespace`): `thousands` is how many thousand adapters are added.

    Returns:
        `dict`: Milliseconds per adapter in the first and in the last thousand, and milliseconds of a switch then.
    """
    model = peft.get_peft_model(make_model(arguments), our_config())
    per_thousand = []
    for thousand in range(arguments.thousands):

        def add(thousand=thousand):
            for index in range(1000):
                model.add_adapter(f"added{1000 * thousand + index}", our_config())

        per_thousand.append(timed(add) / 1000)
    return {
        "adapters": 1000 * arguments.thousands,
        "ms_per_adapter_first_thousand": per_thousand[0],
        "ms_per_adapter_last_thousand": per_thousand[-1],
        "ms_set_adapter": timed(lambda: model.set_adapter("added7")),
    }


@torch.no_grad()
def measure_mixed_batch(arguments: argparse.Namespace) -> dict:
    """Returns the throughput of a batch with an adapter for each row over that of the same batch with one adapter.

    Args:
        arguments (`argparse.Namespace`): `rows`, `tokens`, `new_tokens` and `repeats`.

    Returns:
        `dict`: For a forward pass and for generation the median milliseconds of both and the median ratio of the
        throughputs; and the largest difference between a row and its adapter alone beside the largest logit.
    """
    model = peft.get_peft_model(make_model(arguments), our_config())
    names = [f"row{row}" for row in range(arguments.rows)]
    for seed, name in enumerate(names):
        model.add_adapter(name, our_config())
        values = model.get_parameter(f"base_model.model.tinylora_bank.trl_tinylora_v.{name}.lora_magnitude_vector")
        values.copy_(0.5 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))
    model.set_adapter(names[0])
    model.eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 2048, (arguments.rows, arguments.tokens), generator=generator)

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
        one, many = make(), make(adapter_names=names)
        one(), many()
        pairs = []
        for repeat in range(arguments.repeats):
            # In turns, and each first every other time.
            if repeat % 2:
                pairs.append((timed(one), timed(many)))
            else:
                pairs.append(tuple(reversed((timed(many), timed(one)))))
        measured[kind] = {
            "ms_one_adapter": statistics.median(pair[0] for pair in pairs),
            "ms_an_adapter_each": statistics.median(pair[1] for pair in pairs),
            "throughput_ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
        }
    return measured | {
        "largest_difference_from_alone": largest_difference,
        "smallest_effect_of_an_adapter": smallest_effect,
        "largest_logit": mixed.abs().max().item(),
    }


def as_markdown(record: dict) -> str:
    """Returns the tables of a record.

    Args:
        record (`dict`): What [`main`] measured.

    Returns:
        `str`
    """
    adding, many, mixed = record["adding"], record["thousands"], record["mixed_batch"]
    ours = adding["trl_tinylora"]
    lines = [
        f"| one more adapter, {ours['trained_values']} values | bytes of tensors | bytes of Python | time over ours | "
        f"the same after {record['arguments']['adapters']} adapters |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, title in [("trl_tinylora", "trl_tinylora"), ("peft", "PEFT's TinyLoRA")]:
        row = adding[name]
        first, last = (row[key] / ours[key] for key in ("ms_first_ten", "ms_last_ten"))
        lines.append(
            f"| {title} | {row['tensor_bytes']:,.0f} | {row['python_bytes']:,.0f} | {first:,.0f} | {last:,.0f} |"
        )
    growth = many["ms_per_adapter_last_thousand"] / many["ms_per_adapter_first_thousand"]
    lines += [
        "",
        f"Of {many['adapters']:,} adapters on one model, each of the last thousand took {growth:.2f} of the time of "
        "each of the first.",
        "",
        f"| {mixed['rows']} rows of {mixed['tokens']} tokens | throughput with {mixed['adapters']} adapters over one's "
        "|",
        "|---|--:|",
    ]
    for kind, title in [("forward", "forward"), ("generate", f"generate {record['arguments']['new_tokens']}")]:
        lines.append(f"| {title} | {mixed[kind]['throughput_ratio']:.3f} |")
    lines += [
        "",
        f"Each row differs from its adapter alone by {mixed['largest_difference_from_alone']:.1e} at most; the logits "
        f"reach {mixed['largest_logit']:.1f}, and every adapter changes some of them by "
        f"{mixed['smallest_effect_of_an_adapter']:.1e} or more.",
    ]
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> dict:
    """
    Measures, prints, writes.

    Args:
        arguments (`argparse.Namespace`): The command line's.

    Returns:
        `dict`: The record.
    """
    if arguments.report_only:
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    else:
        record = measure(arguments)
    print(as_markdown(record))
    if arguments.output is not None and not arguments.report_only:
        write_text(arguments.output, json.dumps(record, indent=2) + "\n")
    if arguments.update_readme is not None:
        update_section(arguments.update_readme, "many_adapters", f"{as_markdown(record)}\n\n{origin(record)}")
    return record


def origin(record: dict) -> str:
    """Returns where a record was made, as a line of Markdown.

    Args:
        record (`dict`): As [`measure`] returns.

    Returns:
        `str`
    """
    made, asked = record["provenance"], record["arguments"]
    commit = made["git"]["commit"][:12] if made["git"] else "unknown"
    return (
        f"A Qwen2 of {asked['layers']} layers, hidden size {asked['hidden']}, random weights, {asked['threads']} "
        f"thread of {made['machine']['cores']} CPU cores, in turns in one process; torch {made['versions']['torch']}, "
        f"peft {made['versions']['peft']}; commit {commit}. `python recipes/benchmarks/many_adapters.py` measures it "
        "again."
    )


def measure(arguments: argparse.Namespace) -> dict:
    """
    Runs all measurements.

    Args:
        arguments (`argparse.Namespace`): The command line's.

    Returns:
        `dict`: The record.
    """
    torch.set_num_threads(arguments.threads)
    # PEFT tells of its experimental parts, not of anything measured here.
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    of_files = ("output", "report_only", "update_readme")
    settings = {key: value for key, value in vars(arguments).items() if key not in of_files}
    record = {"arguments": settings, "provenance": read_provenance()}
    record["mixed_batch"] = measure_mixed_batch(arguments)
    record["thousands"] = measure_adding_thousands(arguments)
    record["adding"] = measure_adding(arguments)
    record["seconds"] = time.perf_counter() - start
    return record


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384, help="hidden size of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="its layers, of seven adapted modules each")
    parser.add_argument("--adapters", type=int, default=20, help="adapters added to each of the two models in turns")
    parser.add_argument("--thousands", type=int, default=10, help="thousands of adapters added to one model of ours")
    parser.add_argument("--rows", type=int, default=64, help="rows of the batch, each with an adapter of its own")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each row")
    parser.add_argument("--new_tokens", type=int, default=16, help="tokens generated for each row")
    parser.add_argument("--repeats", type=int, default=11, help="times that each batch runs, in turns")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--report_only", action="store_true", help="measure nothing, report the JSON in --output")
    parser.add_argument("--update_readme", type=Path, help="README whose section `many_adapters` is renewed")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
