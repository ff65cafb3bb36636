"""Records of a comparison, made up: drawn from a seeded generator, and like real ones in their form only."""

import copy

import numpy as np
from comparison.summary import summarize
from evaluation.metrics import GRADINGS


N, SAMPLES, SEEDS = 80, 4, (1, 2, 3)


SIZES = {
    "1": ("TinyLoRA, 1 value", 1, {"adapter": "tinylora", "u": 1, "n_tie": 28}),
    "2": ("TinyLoRA, 2 values", 2, {"adapter": "tinylora", "u": 1, "n_tie": 14}),
    "13": ("TinyLoRA, 13 values", 13, {"adapter": "tinylora", "u": 13, "n_tie": 28}),
    "13-bf16": ("TinyLoRA, 13 values in bfloat16", 13, {"adapter": "tinylora", "kept_dtype": "bfloat16"}),
    "28-structured": ("TinyLoRA, structured", 28, {"adapter": "tinylora", "tying": "structured"}),
    "xs": ("LoRA-XS, rank 2", 112, {"adapter": "tinylora", "projection": "basis"}),
    "lora-r1": ("LoRA, rank 1", 9344, {"adapter": "lora"}),
    "full": ("full fine-tuning", 833280, {"adapter": "full"}),
}


ARMS = {
    "rl": (
        "RL",
        "rl",
        {
            "1": 0.3,
            "2": 0.45,
            "13": 0.9,
            "13-bf16": 0.85,
            "28-structured": 0.8,
            "xs": 0.93,
            "lora-r1": 0.97,
            "full": 0.98,
        },
    ),
    "sft": ("SFT on gold answers", "sft", {"1": 0.12, "2": 0.3, "13": 0.4, "lora-r1": 0.94, "full": 0.92}),
    "sft-own": ("SFT on own correct samples", "sft", {"1": 0.2, "2": 0.33, "13": 0.7, "lora-r1": 0.95, "full": 0.9}),
    "rl-format": ("RL, format-only reward", "rl", {"13": 0.35}),
    "rl-random": ("RL, random reward", "rl", {"13": 0.1}),
}


RATES = {
    arm: {
        size: {
            "learning_rate": 0.01,
            "score": share,
            "grid": {"0.003": share - 0.2 * share, "0.01": share, "0.03": share - 0.1 * share},
            "at_edge": False,
        }
        for size, share in shares.items()
    }
    for arm, (_, _, shares) in ARMS.items()
    if arm in ("rl", "sft", "sft-own")
}
RATES["rl"]["1"] |= {"learning_rate": 0.03, "at_edge": True, "grid": {"0.01": 0.2, "0.03": 0.3}}


def measured(generator, strict, flexible):
    """Greedy and sampled metrics: a problem that strict grading counts is counted by the others as well."""
    luck = generator.random(N)
    greedy, sampled = {}, {}
    for grading, share in (("strict", strict), ("last_number", flexible), ("flexible", flexible)):
        right = (luck < share).astype(int).tolist()
        drawn = generator.binomial(SAMPLES, 0.7 * share, N).tolist()
        greedy[grading] = {"accuracy": float(np.mean(right)), "interval": [0.0, 1.0], "correct": right}
        sampled[grading] = {"accuracy": float(np.mean(drawn)) / SAMPLES, "interval": [0.0, 1.0], "correct": drawn}
    around = {"mean_tokens": 20.0, "truncated": 0.01, "no_marker": 0.1, "tokens": 100}
    sampled["strict"]["pass_at"] = {"1": 0.5, "4": 0.8}
    return {
        "n_problems": N,
        "samples": SAMPLES,
        "temperature": 1.0,
        "greedy": greedy | around,
        "sampled": sampled | around,
    }


def made_up(name, phase, arm, arm_label, **given):
    return {
        "name": name,
        "phase": phase,
        "arm": arm,
        "arm_label": arm_label,
        "algorithm": None,
        "size": None,
        "label": "",
        "seed": None,
        "trained_values": 0,
        "trained_bytes": 0,
        "git": {"commit": "0123456789abcdef", "is_dirty": False},
        "versions": {"torch": "2"},
        "machine": {"cpu": "a CPU", "cores": 2, "gpu": None},
        "inputs": {},
        "finished": "2026-01-02T03:04:05+00:00",
    } | given


def trained(generator, arm, size, seed):
    label, algorithm, shares = ARMS[arm]
    size_label, count, config = SIZES[size]
    share = float(np.clip(shares[size] + generator.normal(0, 0.03), 0, 1))
    steps = np.arange(1, 61)
    rising = (0.3 + (share - 0.3) * steps / 60 + generator.normal(0, 0.02, 60)).tolist()
    curve = {"loss": rising, "mean_token_accuracy": rising, "entropy": rising}
    if algorithm == "rl":
        curve = {key: rising for key in ("reward", "completions/mean_length", "entropy", "clip_ratio/region_mean")}
        curve["entropy"] = [None] + rising[1:]  # as a trainer that had nothing to log yet
    reward = {"rl-format": "format", "rl-random": "random"}.get(arm)
    item_bytes = 2 if config.get("kept_dtype") == "bfloat16" else 4
    return made_up(
        f"final-{arm}-{size}-seed{seed}",
        "final",
        arm,
        label,
        algorithm=algorithm,
        size=size,
        label=size_label,
        seed=seed,
        learning_rate=RATES.get(arm, RATES["rl"])[size]["learning_rate"],
        config=config | {"projection_seed": seed} | ({"reward": reward} if reward else {}),
        trained_values=count,
        trained_bytes=count * item_bytes,
        trained={"v": [[0.5] * count]} if count <= 256 else None,
        examples=1600,
        optimizer_steps=60,
        generated_tokens=70000 if algorithm == "rl" else 0,
        trained_tokens=90000,
        train_seconds=30.0 + seed,
        wall_seconds=40.0,
        curve={"step": steps.tolist()} | curve,
        metrics=measured(generator, share, max(share, 0.25)),
    )


def records(seeds=SEEDS):
    generator = np.random.default_rng(0)
    untrained = measured(generator, 0.08, 0.2)
    made = [made_up("untrained", "untrained", "untrained", "untrained", metrics=untrained)]
    made.append(
        made_up(
            "prompted",
            "control",
            "prompted",
            "untrained, format in the prompt",
            metrics=measured(generator, 0.22, 0.24),
        )
    )
    zero = {"size": "13", "label": SIZES["13"][0]}
    made.append(made_up("zero", "control", "zero", "zero adapter", metrics=copy.deepcopy(untrained), seed=1, **zero))
    drawn = {"examples": 900, "problems_asked": 1000, "generated_tokens": 5000, "accuracy": 0.3, "seed": 1}
    made.append(made_up("samples", "samples", "samples", "own samples", **drawn))
    for seed in seeds:
        metrics = measured(generator, 0.1, 0.2)
        made.append(
            made_up(
                f"random-{seed}",
                "control",
                "random-values",
                "random values of the trained norm",
                metrics=metrics,
                seed=seed,
                **zero,
            )
        )
    made += [
        trained(generator, arm, size, seed) for arm, (_, _, shares) in ARMS.items() for size in shares for seed in seeds
    ]
    return made


def summarized(made=None, rates=RATES, missing=()):
    return summarize(records() if made is None else made, rates, list(missing), {"beta": "RL only"}, 60.0)


def cell_of(summary, arm, size=None):
    return next(cell for cell in summary["cells"] if cell["arm"] == arm and cell["size"] == size)


def pair_of(summary, other, size):
    return next(pair for pair in summary["pairs"] if pair["other"] == other and pair["size"] == size)


def answers(made, arm, size, kind="greedy", grading="strict"):
    """Shape `(seeds, problems)`."""
    chosen = [record for record in made if (record["arm"], record["size"], record["phase"]) == (arm, size, "final")]
    return np.array([record["metrics"][kind][grading]["correct"] for record in chosen], dtype=float)


def without(made, is_left_out):
    return [record for record in copy.deepcopy(made) if not is_left_out(record)]


def stripped(made, kinds=("greedy", "sampled"), gradings=GRADINGS):
    """The records as an evaluation with fewer kinds of decoding, or of grading, would have left them."""
    made = copy.deepcopy(made)
    for metrics in (record["metrics"] for record in made if "metrics" in record):
        for kind in ("greedy", "sampled"):
            for grading in GRADINGS:
                if grading not in gradings:
                    del metrics[kind][grading]
            if kind not in kinds:
                del metrics[kind]
        metrics["samples"] = SAMPLES if "sampled" in kinds else 0
    return made
