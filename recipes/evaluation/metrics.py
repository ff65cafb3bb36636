"""Graded completions and what they add up to: accuracies with their intervals, lengths, and what went wrong in form."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from records.files import write_text

from evaluation.completions import KINDS, read_lines, read_settings, stamp
from evaluation.intervals import bootstrap_interval, pass_at, wilson_interval
from trl_tinylora.tasks import get_task


GRADINGS = ("strict", "last_number", "flexible")


def graded(task: ModuleType, completion: str, gold: str) -> dict:
    """
    What a task says of a completion.

    Args:
        task (`ModuleType`): One of `trl_tinylora.tasks`.
        completion (`str`): What the model wrote.
        gold (`str`): The right answer.
    Returns:
        `dict`: 0 or 1 for each of [`GRADINGS`], and `marker` (whether the answer's marker is there).
    """
    return {**task.grade(completion, gold), "marker": task.has_marker(completion)}


def summarize(records: Sequence[dict], temperature: float, seed: int) -> dict:
    """
    The metrics of graded completions.

    Args:
        records (`Sequence[dict]`): As of [`complete`], all of them.
        temperature (`float`): At which they were sampled, for the record.
        seed (`int`): Of the bootstrap.
    Returns:
        `dict`: `n_problems`, `samples`, `temperature`, and `greedy` and `sampled` with, for each of "strict",
        "last_number" and "flexible", `accuracy` (pass@1, or mean@k of the samples), its `interval`, `correct` (right
        completions a problem) and, of the samples, `pass_at` by k; `mean_tokens`, `truncated` and `no_marker` (shares
        of completions) and `tokens` (generated in all).
    """
    metrics = {"n_problems": 1 + max(record["problem"] for record in records), "samples": 0, "temperature": temperature}
    for kind in KINDS:
        graded = [record for record in records if record["kind"] == kind]
        if not graded:
            continue
        samples = 1 + max(record["sample"] for record in graded)
        if kind == "sampled":
            metrics["samples"] = samples
        correct = {grading: np.zeros(metrics["n_problems"], dtype=int) for grading in GRADINGS}
        for record in graded:
            for grading in GRADINGS:
                correct[grading][record["problem"]] += record[grading]
        metrics[kind] = {
            grading: _accuracy(counts.tolist(), samples, kind == "sampled", seed) for grading, counts in correct.items()
        }
        metrics[kind] |= {
            "mean_tokens": float(np.mean([record["tokens"] for record in graded])),
            "truncated": float(np.mean([record["truncated"] for record in graded])),
            "no_marker": float(np.mean([not record["marker"] for record in graded])),
            "tokens": sum(record["tokens"] for record in graded),
        }
    return metrics


def regrade(folder: Path, task: str | None = None) -> dict:
    """
    Grades the completions of an evaluation anew, and writes them and the metrics in place of the earlier ones.

    Args:
        folder (`Path`): Holds `completions.jsonl` and `completions.settings.json`.
        task (`str`, *optional*): Whose grading; by default that of the evaluation.
    Returns:
        `dict`: As [`evaluate`].
    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the evaluation was interrupted.
    """
    path = folder / "completions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the output_dir of an evaluation")
    made = read_settings(path)
    settings = made["settings"]
    records = read_lines(path)
    expected = settings["n_problems"] * (1 + settings["samples"])
    if len(records) != expected:
        raise ValueError(f"{path} holds {len(records)} of {expected} completions: continue the evaluation first")
    task = get_task(task or settings["task"])
    records = [record | graded(task, record["completion"], record["gold"]) for record in records]
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    metrics = summarize(records, settings["temperature"], settings["eval_seed"])
    write_metrics(folder, metrics)
    return metrics


def write_metrics(folder: Path, metrics: dict, arguments: dict | None = None) -> None:
    """
    Writes `metrics.json`: what was asked, what the completions follow from, what generated and what graded them.

    Args:
        folder (`Path`): That of `completions.jsonl`.
        metrics (`dict`): As of [`summarize`].
        arguments (`dict`, *optional*): What was asked; by default what the file there says.
    """
    path = folder / "metrics.json"
    if arguments is None and path.is_file():
        arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
    record = {"arguments": arguments, **read_settings(folder / "completions.jsonl"), "graded": stamp()}
    write_text(path, json.dumps(record | {"metrics": metrics}, indent=2) + "\n")


def _accuracy(correct: list[int], samples: int, is_sampled: bool, seed: int) -> dict:
    """Mean, 95% interval over problems, right completions a problem, and pass@k for k = 1, 2, 4, ... and all."""
    shares = np.array(correct) / samples
    result = {"accuracy": float(shares.mean())}
    if not is_sampled:
        return result | {"interval": wilson_interval(sum(correct), len(correct)), "correct": correct}
    powers = {2**power for power in range(samples.bit_length())} | {samples}
    result |= {"interval": bootstrap_interval(shares, seed), "correct": correct}
    return result | {
        "pass_at": {str(k): float(np.mean([pass_at(k, samples, count) for count in correct])) for k in sorted(powers)}
    }
