"""
Values trained on a quantised base and used on the full-precision one, and the other way round: accuracy on the toy.

    python recipes/benchmark.py quantised

The toy's RL recipe is run on its base in full precision, in 8 bits (`load_in_8bit`) and in 4 (nf4, `load_in_4bit`).
What is trained on one is used on the other two in two ways: its values on the singular vectors of those weights
(`other_base=True`), and its update as it is (`export_lora`, loaded as a LoRA). Needs bitsandbytes.
"""

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import grpo
import trl
import yaml
from benchmarks.harness import Row, parser_of, run
from evaluation.arguments import GenerationArguments
from evaluation.generation import load_model
from evaluation.run import evaluate
from peft import PeftModel
from transformers import AutoTokenizer

from trl_tinylora import export_lora
from trl_tinylora.tasks import gsm8k


TOY = Path(__file__).parents[1] / "toy"
FULL = "full precision"
# TRL's keys.
BASES = {FULL: {}, "8 bits": {"load_in_8bit": True}, "4 bits": {"load_in_4bit": True}}


def load(base: str):
    """The toy's model, quantised."""
    return load_model(trl.ModelConfig(model_name_or_path=str(TOY / "base"), dtype="float32", **BASES[base]), None)


def train(base: str, seed: int, folder: Path, arguments: argparse.Namespace) -> None:
    """The toy's RL recipe on a base; the adapter is saved in `folder / "values"`, as a LoRA in `folder / "lora"`."""
    settings = yaml.safe_load((TOY / "grpo.yaml").read_text()) | BASES[base]
    settings |= {"model_name_or_path": str(TOY / "base"), "dataset_name": str(TOY / "data"), "seed": seed}
    settings |= {"max_steps": arguments.steps, "disable_tqdm": True, "output_dir": str(folder / "values")}
    settings["per_device_train_batch_size"] = arguments.completions
    trainer = grpo.main(*trl.TrlParser(grpo.ARGUMENTS).parse_dict(settings))
    export_lora(trainer.model, folder / "lora")


def accuracy(model, arguments: argparse.Namespace) -> float:
    """Share of right greedy completions, strictly graded."""
    rows = gsm8k.load_rows(str(TOY / "data"), "test", limit=arguments.problems)
    how = GenerationArguments(samples=1, max_new_tokens=arguments.tokens, eval_batch_size=250)
    found = evaluate(model, AutoTokenizer.from_pretrained(TOY / "base"), rows, how, kinds=["greedy"])
    return found["greedy"]["strict"]["accuracy"]


def used_on(base: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Accuracy of what was trained, by way of its values and of its update."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the adapter 'default' is used on another base")
        values = PeftModel.from_pretrained(load(base), folder / "values", other_base=True)
    lora = PeftModel.from_pretrained(load(base), folder / "lora")
    return {"values": accuracy(values, arguments), "update": accuracy(lora, arguments)}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Every base it is trained on, on every base."""
    untrained = {base: accuracy(load(base), arguments) for base in BASES}
    found: dict[str, dict] = {}
    for trained_on in BASES:
        runs = []
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                train(trained_on, seed, Path(folder), arguments)
                runs.append({base: used_on(base, Path(folder), arguments) for base in BASES})
        found[trained_on] = {
            base: {way: [run[base][way] for run in runs] for way in ("values", "update")} for base in BASES
        }
    rows = []
    for trained_on, base in [("8 bits", FULL), ("4 bits", FULL), (FULL, "8 bits"), (FULL, "4 bits")]:
        values, update = (statistics.mean(found[trained_on][base][way]) for way in ("values", "update"))
        claim = f"greedy accuracy on the toy, 13 values trained in {trained_on} and used in {base}"
        rows.append(Row(claim, values, update, "the update as a LoRA"))
    return rows, {"untrained": untrained, "trained": found}


def table(record: dict) -> str:
    """The record as a table in Markdown: a row for what it was trained on, a column for what it is used on."""
    details, seeds = record["details"], record["arguments"]["seeds"]
    lines = [f"| trained on | {' | '.join(f'used on {base}' for base in BASES)} |", f"|---|{'--:|' * len(BASES)}"]
    for trained_on, bases in details["trained"].items():
        cells = []
        for found in bases.values():
            values, update = (statistics.mean(found[way]) for way in ("values", "update"))
            cells.append(f"{values:.1%} / {update:.1%}")
        lines.append(f"| {trained_on} | {' | '.join(cells)} |")
    lines.append(f"| untrained | {' | '.join(f'{share:.1%}' for share in details['untrained'].values())} |")
    ending = "one seed" if len(seeds) == 1 else f"the mean of {len(seeds)} seeds"
    return "\n".join(lines) + (
        f"\n\nGreedy accuracy on {record['arguments']['problems']} problems, {ending}: the values on the singular "
        "vectors of those weights (`other_base=True`) / the update as it is (`export_lora`)."
    )


def main() -> None:
    """Measures, prints, writes."""
    parser = parser_of(__doc__, "quantised")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="training seeds")
    parser.add_argument("--steps", type=int, default=80, help="training steps")
    parser.add_argument("--completions", type=int, default=64, help="completions a step")
    parser.add_argument("--problems", type=int, default=500, help="problems of the test set")
    parser.add_argument("--tokens", type=int, default=64, help="limit of a completion")
    run("quantised", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
