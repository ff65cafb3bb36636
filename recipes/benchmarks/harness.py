"""What the benchmarks share: timing in turns, peak bytes, records that say where they come from, and their table.

Times are not comparable between machines, nor between minutes of one. So two ways of doing something run in turns in
one process, and the ratio of each pair is what counts.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from records.files import update_section, write_text
from records.provenance import read_provenance
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM


RESULTS = Path(__file__).parent / "results"
# The README's rows: name of the record, a part of the claim, and who the other one is ("" for anyone).
IN_README = (
    ("step", "time added to the frozen base's", "LoRA r=1"),
    ("step", "bytes kept for the backward pass", "LoRA r=1"),
    ("build", "build a whole model", ""),
    ("many_adapters", "one more adapter of 28 values: bytes of tensors", ""),
    ("merge", "merge and unmerge", ""),
)


@dataclass(frozen=True)
class Row:
    """
    One line of the table of benchmarks.

    Args:
        claim (`str`): What was compared, with sizes.
        ours (`float`): Our figure, a median where it is a time.
        theirs (`float` or `None`): The other one's; `None` where there is nothing to compare with.
        whose (`str`): Who the other one is.
        unit (`str`): `"s"`, `"bytes"` or `""`.
        ratio (`float` or `None`): What the bound is about: theirs over ours, or ours over theirs, as `bound` says.
        spread (`list[float]`): Smallest and largest ratio of the pairs, or a 95% interval; empty where it is of no
            times.
        bound (`str`): What is asked of the figure, in words; empty where nothing is.
        holds (`bool` or `None`): Whether that holds.
    """

    claim: str
    ours: float
    theirs: float | None = None
    whose: str = ""
    unit: str = ""
    ratio: float | None = None
    spread: list[float] = field(default_factory=list)
    bound: str = ""
    holds: bool | None = None


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def in_turns(actions: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of several actions, each once a round, in an order that turns by one place from round to round."""
    names = list(actions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(-warmup, repeats):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            taken = seconds(actions[name])
            if round_number >= 0:
                times[name].append(taken)
    return times


def ratio_of(over: list[float], under: list[float]) -> tuple[float, list[float]]:
    """Median and range of the ratios of two actions' times, round by round."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return statistics.median(ratios), [min(ratios), max(ratios)]


def peak_bytes(action: Callable[[], object]) -> int:
    """
    The most bytes of tensors that exist at one time during a call, beyond those there were before.

    Args:
        action (`Callable`): Takes no arguments.
    Returns:
        `int`: On the GPU, where there is one, as its allocator counts; otherwise on the CPU, as torch's profiler does.
            What libraries below torch allocate for themselves (LAPACK's workspace) is not in it.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
        del result
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        (event["ts"], position, event["args"]["Bytes"])
        for position, event in enumerate(events)
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    present = largest = 0
    for _, _, change in changes:
        present += change
        largest = max(largest, present)
    return largest


def tensor_storages() -> dict[int, torch.UntypedStorage]:
    """The storages of all tensors in the process by address, buffers and plain attributes included."""
    gc.collect()
    # By type: `isinstance` would wake lazy modules that the collector knows of.
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {storage.data_ptr(): storage for storage in storages}


def bytes_added(before: dict[int, torch.UntypedStorage]) -> int:
    """Bytes of the tensors that are there now and are not in `before`, whatever else has ended meanwhile."""
    # `before` holds its storages, so none of their addresses is a new tensor's.
    return sum(storage.nbytes() for address, storage in tensor_storages().items() if address not in before)


def random_qwen2(hidden: int, layers: int) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights from a fixed seed, on the GPU where there is one."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


def parser_of(document: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="JSON file to write")
    return parser


def run(name: str, arguments: argparse.Namespace, measure: Callable[[argparse.Namespace], tuple[list[Row], dict]]):
    """Measures, prints the rows, and writes the record whole or not at all."""
    torch.set_num_threads(arguments.threads)
    provenance, start = read_provenance(), time.perf_counter()
    rows, details = measure(arguments)
    record = {
        "name": name,
        "arguments": {key: value for key, value in vars(arguments).items() if key != "output"},
        "provenance": provenance,
        "seconds": time.perf_counter() - start,
        "rows": [asdict(row) for row in rows],
        "details": details,
    }
    print("\n".join([table([record]), *missed(record)]))
    write_text(arguments.output, json.dumps(record, indent=2) + "\n")
    return record


def table(records: list[dict]) -> str:
    """The rows of records as Markdown."""
    lines = ["| what | ours | other | ratio (range) | machine | script |", "|---|--:|--:|--:|---|---|"]
    for record in records:
        for row in record["rows"]:
            cells = [*_cells(row), _machine(record), f"{record['name']}.py"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(records: list[dict]) -> str:
    """
    A row for each of `IN_README`: of several that match, the one whose ratio is largest.

    Args:
        records (`list[dict]`): As [`run`] writes them.
    Returns:
        `str`: Markdown.
    Raises:
        ValueError: If no row of the records matches one of `IN_README`.
    """
    lines = ["| what | ours | other | ratio (range) |", "|---|--:|--:|--:|"]
    for script, part, whose in IN_README:
        rows = [row for record in records if record["name"] == script for row in record["rows"]]
        matching = [row for row in rows if part in row["claim"] and (not whose or row["whose"] == whose)]
        if not matching:
            raise ValueError(f"{script}.json has no row of {part!r} beside {whose or 'anyone'!r}: change IN_README")
        lines.append(f"| {' | '.join(_cells(max(matching, key=lambda row: row['ratio'] or 0)))} |")
    return "\n".join(lines)


def missed(record: dict) -> list[str]:
    """What a record says of the bounds that were asked of it and do not hold."""
    return [f"not within its bound ({row['bound']}): {row['claim']}" for row in record["rows"] if row["holds"] is False]


def _cells(row):
    other = "" if row["theirs"] is None else f"{amount(row['theirs'], row['unit'])}, {row['whose']}"
    ratio = ""
    if row["ratio"] is not None:
        ratio = f"{row['ratio']:,.0f}" if row["ratio"] >= 1000 else f"{row['ratio']:.3g}"
        if row["spread"]:
            low, high = row["spread"]
            ratio += f" ({low:.3g} to {high:.3g})"
    return [row["claim"], amount(row["ours"], row["unit"]), other, ratio]


def _machine(record):
    made, threads = record["provenance"]["machine"], record["arguments"]["threads"]
    return made["gpu"] or f"{threads} thread{'s' * (threads > 1)}, {made['cpu']}"


def amount(value: float, unit: str) -> str:
    """A figure with its unit, for people."""
    if unit == "bytes":
        for size, prefix in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if abs(value) >= size:
                return f"{value / size:.3g} {prefix}"
        return f"{value:.0f} bytes"
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    return f"{value:.3g}"


def read_records() -> list[dict]:
    """The committed records, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def committed() -> str:
    """The table of the committed records, and what made them."""
    records = read_records()
    versions = sorted({f"torch {made['torch']}, peft {made['peft']}" for made in _of_each(records, "versions")})
    commits = sorted({git["commit"][:12] for git in _of_each(records, "git")})
    return f"{table(records)}\n\n{'; '.join(versions)}; measured at {', '.join(commits)}."


def committed_short() -> str:
    """The README's rows of the committed records, and the machine that they were measured on."""
    records = read_records()
    scripts = {script for script, _, _ in IN_README}
    machines = sorted({_machine(record) for record in records if record["name"] in scripts})
    return f"{short_table(records)}\n\nMeasured on: {'; '.join(machines)}."


def _of_each(records, key):
    return [record["provenance"][key] for record in records]


def main() -> None:
    """Prints the table of the committed records, and renews it in the documents."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--update_docs", type=Path, help="document whose section `benchmarks` is renewed")
    parser.add_argument("--update_readme", type=Path, help="README whose section `costs` is renewed")
    arguments = parser.parse_args()
    print(committed())
    if arguments.update_docs is not None:
        update_section(arguments.update_docs, "benchmarks", committed())
    if arguments.update_readme is not None:
        update_section(arguments.update_readme, "costs", committed_short())


if __name__ == "__main__":
    main()
