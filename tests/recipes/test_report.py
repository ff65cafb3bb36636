"""The report of a comparison: its numbers against NumPy and SciPy, its words at their borders, its figures.

Every record here is made up: drawn from a seeded generator, and like a real one in its form only. CPU, seconds.
"""

import copy
import json
import re

import conclusions
import figures
import numpy as np
import pytest
import report
from scipy import stats


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
    sampled["pass_at"] = {"1": 0.5, "4": 0.8}
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
        "label": "nothing",
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
    end = np.array([0.6, 0.4])[:count] if algorithm == "rl" else np.array([-0.3, 0.5])[:count]
    path = (steps[:, None] / 60 * end + generator.normal(0, 0.01, (60, count))).tolist() if count <= 2 else None
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
        learning_rate=0.01,
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
        **({"path": path} if path else {}),
        metrics=measured(generator, share, max(share, 0.25)),
    )


def landscape(size, seed):
    label, count, _ = SIZES[size]
    axis = np.linspace(-1, 1, 21)
    mesh = np.stack(np.meshgrid(*[axis] * count, indexing="ij"), -1)
    heights = np.exp(-2 * ((mesh - 0.5) ** 2).sum(-1))
    return made_up(
        f"landscape-{size}-seed{seed}",
        "landscape",
        "landscape",
        "landscape",
        size=size,
        label=label,
        seed=seed,
        grid=[axis.tolist()] * count,
        reward=(0.8 * heights).tolist(),
        greedy=heights.tolist(),
        n_problems=N,
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
    zero = {"size": "13", "label": SIZES["13"][0], "trained_values": 13, "trained_bytes": 52, "config": SIZES["13"][2]}
    made.append(made_up("zero", "control", "zero", "zero adapter", metrics=copy.deepcopy(untrained), seed=1, **zero))
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
    return made + [landscape("1", 1), landscape("2", 1)]


def summarized(made=None, rates=RATES, missing=()):
    return report.summarize(records() if made is None else made, rates, list(missing), {"beta": "RL only"}, 60.0)
