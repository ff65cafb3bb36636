"""Where a number comes from: the commit, the versions and the machine that every committed JSON names."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from transformers import Trainer

import trl_tinylora


def read_provenance() -> dict:
    """
    Commit, versions and machine, for the records.

    Returns:
        `dict`: `git` is `None` outside of a checkout; its `is_dirty` leaves out the results, which are this script's
        own work.
    """

    def git(*command):
        answer = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else None

    def version(package):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)

    commit = git("rev-parse", "HEAD") if shutil.which("git") else None
    status = git("status", "--porcelain", "--", ":/", ":(exclude,top)recipes/*/results/**") if commit else None
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "math-verify", "vllm")
    own = {"trl-tinylora": trl_tinylora.__version__}
    return {
        "git": {"commit": commit, "is_dirty": bool(status)} if commit else None,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages} | own,
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
    }


def describe_training(trainer: Trainer, dataset_name: str) -> str:
    """Returns how an adapter was trained, for its model card.

    Args:
        trainer ([`~transformers.Trainer`]): After training.
        dataset_name (`str`): Name or path of the rows.
    Returns:
        `str`: Markdown.
    """
    args, last = trainer.args, (trainer.state.log_history or [{}])[-1]
    made = read_provenance()
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    commit = f", commit {made['git']['commit'][:12]}" if made["git"] else ""
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers", "trl", "peft"))
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, (int, float)))
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return (
        f"## Training\n\n{type(trainer).__name__} on `{dataset_name}`: {trainer.state.global_step} steps of {batch} "
        f"rows (of completions in RL), {args.world_size} process{'es' if args.world_size > 1 else ''}, learning rate "
        f"{args.learning_rate:g} ({schedule}), seed {args.seed}. {versions}{commit}.\n\nLast record: {metrics}."
    )
