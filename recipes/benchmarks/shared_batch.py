"""
What runs would gain by sharing the base's passes: a training step on the rows of several in one batch, or one by one.

    python recipes/benchmark.py shared_batch --model FOLDER --data FOLDER

Eight runs of SFT that differ in a learning rate or a seed read the same base. Their rows in one batch, with an adapter
for each run, would need its passes once a step, at eight times the rows. Here all rows have one adapter, which leaves
out what telling them apart would cost: the gain is at most the one measured. Memory is the peak of a step beyond the
model.
"""

import argparse
import statistics

import torch
from benchmarks.harness import Row, in_turns, parser_of, peak_bytes, ratio_of, run
from comparison.tables import grid
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tasks import gsm8k


def rows_of(arguments: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """The batch of each run: its demonstrations with their prompts, padded to the longest of all runs."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    count = arguments.runs * arguments.rows
    rows = gsm8k.for_sft(gsm8k.load_rows(arguments.data, "train", limit=count))
    texts = [tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False) for row in rows]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return [
        {name: value[start : start + arguments.rows] for name, value in inputs.items()}
        for start in range(0, count, arguments.rows)
    ]


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Both ways in turns."""
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = get_peft_model(model, TinyLoraConfig(u=1, n_tie="all"))
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in rows_of(arguments)]
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()

    def one_by_one() -> None:
        for batch in batches:
            step(batch)

    times = in_turns({"together": lambda: step(whole), "one by one": one_by_one}, arguments.repeats)
    memory = {"together": peak_bytes(lambda: step(whole)), "one by one": peak_bytes(one_by_one)}
    ratio, spread = ratio_of(times["together"], times["one by one"])
    what = f"{arguments.name}: a step of {arguments.runs} runs of {arguments.rows} rows, all in one batch"
    together, alone = (statistics.median(times[way]) for way in ("together", "one by one"))
    rows = [
        Row(f"{what}: time", together, alone, "a run at a time", "s", ratio, spread),
        Row(
            f"{what}: peak memory beyond the model",
            memory["together"],
            memory["one by one"],
            "a run at a time",
            "bytes",
            memory["together"] / memory["one by one"],
        ),
    ]
    # Where it lay says nothing to others.
    arguments.model = arguments.name
    return rows, {"tokens": int(whole["input_ids"].numel()), "seconds": times, "bytes": memory}


def table(records: list[dict]) -> str:
    """The records as a table in Markdown."""
    rows = []
    for record in records:
        time, memory = record["rows"]
        spread = f" ({time['spread'][0]:.2f} to {time['spread'][1]:.2f})"
        shares = [f"{time['ratio']:.2f}{spread}", f"{memory['ratio']:.1f}"]
        name = record["arguments"]["name"]
        rows.append([name, f"{record['arguments']['runs']} x {record['arguments']['rows']}"])
        rows[-1] += [f"{record['details']['tokens']:,}", *shares]
    return grid(
        "model | runs x rows | tokens | time, over a run at a time | peak memory, over a run at a time", "lrrrr", rows
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = parser_of(__doc__, "shared_batch")
    parser.add_argument("--model", default="recipes/toy/base", help="folder of the base model")
    parser.add_argument("--data", default="recipes/toy/data", help="folder of its training rows")
    parser.add_argument("--name", default="the toy", help="of the model, in the table")
    parser.add_argument("--runs", type=int, default=8, help="runs")
    parser.add_argument("--rows", type=int, default=8, help="rows of each in a step")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    run("shared_batch", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
