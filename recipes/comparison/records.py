"""What a training's record says of its settings and of its course."""

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum

import numpy as np
from training.arguments import AdapterArguments


CURVES = (
    "reward",
    "completions/mean_length",
    "entropy",
    "clip_ratio/region_mean",
    "frac_reward_zero_std",
    "loss",
    "mean_token_accuracy",
)


def resolved_settings(parsed: Sequence) -> dict:
    """
    Every argument of ours and TRL's that is not at its default, whatever it was that set it.

    Args:
        parsed (`Sequence`): The dataclasses of a recipe's arguments.
    Returns:
        `dict`: As JSON can hold it; those of the adapter with their defaults.
    """
    resolved = {}
    for item in parsed:
        for described in fields(item):
            value = getattr(item, described.name, None)
            value = value.value if isinstance(value, Enum) else value
            is_plain = value is None or isinstance(value, str | int | float | bool | list | dict)
            is_default = value == described.default and not isinstance(item, AdapterArguments)
            if is_plain and not is_default and described.name not in ("output_dir", "logging_dir", "disable_tqdm"):
                resolved[described.name] = value
    return json.loads(json.dumps(resolved, default=str))


def training_curve(log: Sequence[dict]) -> dict:
    """
    What a trainer logged step by step.

    Args:
        log (`Sequence[dict]`): Its records, each with `step`.
    Returns:
        `dict`: `curve`: `step` and those of `CURVES` that were logged, a list each; None where JSON has no number.
    """
    logs = [entry for entry in log if "loss" in entry or "reward" in entry]
    logged = [key for key in CURVES if any(key in entry for entry in logs)]
    curve = {"step": [entry["step"] for entry in logs]}
    return {"curve": curve | {key: [_number(entry.get(key)) for entry in logs] for key in logged}}


def _number(value) -> float | None:
    """What JSON can hold: it has no infinity and no NaN."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def flat_values(record: dict) -> list[float]:
    """
    The trained values of a record, in one list.

    Args:
        record (`dict`): With `trained`.
    Returns:
        `list[float]`
    """
    return [number for tensor in record["trained"].values() for number in np.ravel(tensor).tolist()]
