"""What share of an update survives the merge into bfloat16, how well and how fast a part of the entries tells, and what
it means for the samples.

    python recipes/benchmark.py fidelity

A random weight in bfloat16 with two large singular values, of a 7B model's size: share and median over all entries and
over those that `sampling_fidelity` reads, for values of several sizes, and the time of that beside one merge. On the
toy's base in bfloat16: how far the sampler (merged weights) and the base are from the policy (weights in float32), as
divergences, beside the share. A few minutes on one thread.
"""

import argparse
import json
import statistics

import peft
import torch
from benchmarks.harness import Row, in_turns, parser_of, ratio_of, run
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora import TinyLoraConfig, sampling_fidelity
from trl_tinylora.tasks import gsm8k
from trl_tinylora.vllm.fidelity import ENTRIES


SIZES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
# All modules share 13 values, as in the toy's runs; and one value a module.
TYINGS = {"13 values": {"n_tie": "all", "u": 13}, "a value a module": {}}


def one_weight(rows: int, columns: int, seed: int, device: str) -> peft.PeftModel:
    """A linear layer in bfloat16 with an adapter: noise of 0.02 and two singular values far above it."""
    generator = torch.Generator().manual_seed(seed)
    noise, left, right = (
        torch.randn(shape, generator=generator) for shape in ((rows, columns), (rows, 2), (columns, 2))
    )
    largest = 0.02 * (rows**0.5 + columns**0.5)
    singular = torch.tensor([5 * largest, 3 * largest])
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    model[0].weight.data = (0.02 * noise + torch.linalg.qr(left).Q * singular @ torch.linalg.qr(right).Q.mT).bfloat16()
    return peft.get_peft_model(model.to(device), TinyLoraConfig(target_modules=["0"]))


@torch.no_grad()
def set_values(model: peft.PeftModel, size: float, seed: int = 0) -> None:
    """Gives the adapter random values."""
    values_GK = model.base_model.bank.trl_tinylora_v["default"].values_GK
    drawn = torch.randn(values_GK.shape, generator=torch.Generator().manual_seed(seed))
    values_GK.copy_(size * (drawn if drawn.numel() > 1 else torch.ones_like(drawn)))


def measure_estimates(arguments: argparse.Namespace, device: str) -> list[dict]:
    """Share and median over all entries and over a part of them, for every size of the values and several weights."""
    found = []
    for seed in range(arguments.weights):
        model = one_weight(arguments.rows, arguments.columns, seed, device)
        for size in SIZES:
            set_values(model, size)
            whole = sampling_fidelity(model, entries=arguments.rows * arguments.columns).total
            part = sampling_fidelity(model, entries=arguments.entries).total
            found.append(
                {
                    "weight": seed,
                    "size": size,
                    "share": whole.share,
                    "median_ulps": whole.ulps,
                    "share_estimated": part.share,
                    "median_ulps_estimated": part.ulps,
                }
            )
    return found


def measure_times(arguments: argparse.Namespace, device: str) -> dict[str, list[float]]:
    """Seconds of the estimate, and of merging the same weight and putting it back."""
    model = one_weight(arguments.rows, arguments.columns, 0, device)
    set_values(model, 1e-3)

    def merge():
        model.merge_adapter()
        return model.unmerge_adapter()

    actions = {"estimate": lambda: sampling_fidelity(model, entries=arguments.entries), "merge": merge}
    return in_turns(actions, arguments.repeats)


def toy_texts(arguments: argparse.Namespace) -> list[str]:
    """Problems of the toy's test rows with their answers."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.toy)
    with open(arguments.data, encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(arguments.texts), strict=False)]
    return [
        tokenizer.apply_chat_template(
            [*gsm8k.build_prompt(row["question"]), {"role": "assistant", "content": row["answer"]}], tokenize=False
        )
        for row in rows
    ]


def in_float32(model: nn.Module) -> nn.Module:
    """Widens a model's weights, which changes no number."""
    # Not `model.float()` of a model that was cast as a whole: buffers would have been rounded too.
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


@torch.no_grad()
def log_probabilities(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model makes of the next token at every place of the texts."""
    return model(**batch).logits[batch["attention_mask"].bool()].double().log_softmax(-1)


def divergence(logs: torch.Tensor, others: torch.Tensor) -> float:
    """The mean of KL(p || q) over the places."""
    return (logs.exp() * (logs - others)).sum(-1).mean().item()


def measure_samples(arguments: argparse.Namespace, device: str) -> list[dict]:
    """
    Distances of sampler and base from the policy on the toy, for every size of the values.

    All three compute in float32 on numbers of bfloat16, but for the policy's update: the merge is the only difference.
    """
    tokenizer = AutoTokenizer.from_pretrained(arguments.toy)
    batch = dict(tokenizer(toy_texts(arguments), return_tensors="pt", padding=True).to(device))

    def load():
        return AutoModelForCausalLM.from_pretrained(arguments.toy, dtype=torch.bfloat16).to(device).eval()

    base = log_probabilities(in_float32(load()), batch)
    found = []
    for tying, fields in TYINGS.items():
        for size in SIZES:
            merged, policy = (peft.get_peft_model(load(), TinyLoraConfig(**fields)) for _ in range(2))
            for model in (merged, policy):
                set_values(model, size)
            fidelity = sampling_fidelity(merged).total
            sampler = log_probabilities(in_float32(merged.merge_and_unload()), batch)
            trained = log_probabilities(in_float32(policy), batch)
            of_sampler, of_base = divergence(sampler, trained), divergence(base, trained)
            found.append(
                {
                    "tying": tying,
                    "size": size,
                    "share": fidelity.share,
                    "median_ulps": fidelity.ulps,
                    "warns": fidelity.is_base,
                    "divergence_of_sampler": of_sampler,
                    "divergence_of_base": of_base,
                    "ratio": of_sampler / of_base,
                }
            )
    return found


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """All of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = f"a {arguments.rows} x {arguments.columns} weight in bfloat16"
    estimates, samples = measure_estimates(arguments, device), measure_samples(arguments, device)
    times = measure_times(arguments, device)
    over_merge, spread = ratio_of(times["estimate"], times["merge"])
    off = max(abs(found["share_estimated"] - found["share"]) for found in estimates)
    off_median = max(abs(found["median_ulps_estimated"] / found["median_ulps"] - 1) for found in estimates)
    warned = [found["ratio"] for found in samples if found["warns"]]
    silent = [found["ratio"] for found in samples if not found["warns"]]
    rows = [
        Row(
            claim=f"share and median of what survives of the update, from {arguments.entries} entries of {size}",
            ours=statistics.median(times["estimate"]),
            theirs=statistics.median(times["merge"]),
            whose="one merge and unmerge",
            unit="s",
            ratio=over_merge,
            spread=spread,
        ),
        Row("that share: how far from the share over all entries, at most", off, bound="at most 0.1", holds=off <= 0.1),
        Row(
            "that median: how far from the median over all entries, relative, at most",
            off_median,
            bound="at most 0.1",
            holds=off_median <= 0.1,
        ),
        Row(
            claim="toy: divergence of the sampler over the base's, both from the policy, where no warning is given, at "
            "most",
            ours=max(silent),
            theirs=min(warned),
            whose="where one is given, at least",
            ratio=min(warned) / max(silent),
            bound="theirs over ours above 1",
            holds=min(warned) > max(silent),
        ),
    ]
    return rows, {"estimates": estimates, "samples": samples, "seconds": times}


def main() -> None:
    """Measures and writes the record."""
    parser = parser_of(__doc__, "fidelity")
    parser.add_argument("--rows", type=int, default=3584, help="rows of the weight")
    parser.add_argument("--columns", type=int, default=3584, help="its columns")
    parser.add_argument("--weights", type=int, default=3, help="number of random weights")
    parser.add_argument("--entries", type=int, default=ENTRIES, help="entries that the estimate reads")
    parser.add_argument("--repeats", type=int, default=15, help="times that estimate and merge run, in turns")
    parser.add_argument("--toy", default="recipes/toy/base", help="folder of the toy's base")
    parser.add_argument("--data", default="recipes/toy/data/test.jsonl", help="its test rows")
    parser.add_argument("--texts", type=int, default=32, help="how many of them")
    run("fidelity", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
