"""What a comparison found, as numbers, from its runs' records alone: a cell a model, and pairs of models."""

import json
from collections.abc import Iterator

import numpy as np
from evaluation.completions import KINDS
from evaluation.metrics import GRADINGS

from comparison.differences import difference
from comparison.statistics import holm


# "format" is what strict grading misses and flexible grading reads: a gain in it is the strict gain less the flexible.
MEASURES = {"greedy": ("strict", "flexible", "format"), "sampled": ("strict", "flexible")}
ROLES = ("untrained", "control", "arm")
BUDGET = ("examples", "optimizer_steps", "generated_tokens", "trained_tokens", "train_seconds")
CURVE_POINTS = 25


def summarize(
    records: list[dict],
    rates: dict,
    missing: list[str],
    allowed_differences: dict[str, str],
    sweep_seconds: float,
    grading: str = "strict",
) -> dict:
    """
    What the report says, as numbers.

    Args:
        records (`list[dict]`): Of every phase but the sweep, as `compare.py` writes them.
        rates (`dict`): By arm and size: `learning_rate`, `score`, `grid` (score by rate) and `at_edge`.
        missing (`list[str]`): Names of planned runs without a record.
        allowed_differences (`dict[str, str]`): Keys in which the arms' recipes may differ, and why.
        sweep_seconds (`float`): Compute time of the sweep's runs, in seconds; 0 without a sweep.
        grading (`str`, *optional*, defaults to `"strict"`): What counts as right, or `"flexible"`.
    Returns:
        `dict`: All that text and figures need: `grading`, `main_sizes` (those of the first page), `cells` (one a model
        that was evaluated: an arm at a size, over its seeds), `pairs` (RL against the other arms and the controls), and
        what stands around them.
    """
    ordered = _models(records, grading)
    untrained = next((group for group in ordered if _role(group[0], grading) == "untrained"), None)
    cells = [_cell(group, untrained, rates, grading) for group in ordered]
    _place_controls(cells)
    pairs = list(_pairs(ordered, grading))
    _correct_for_many(cells, pairs)
    _add_recovered(cells, grading)
    first = next((group[0] for group in ordered), None)
    metrics = first["metrics"] if first else {}
    summary = {
        "grading": grading,
        "main_sizes": _main_sizes(cells),
        "cells": cells,
        "pairs": pairs,
        "own_samples": [
            {key: record[key] for key in ("examples", "problems_asked", "generated_tokens")}
            for record in records
            if record["phase"] == "samples"
        ],
        **{key: metrics.get(key) for key in ("n_problems", "samples", "temperature")},
        "learning_rates": rates,
        "sweep_seconds": round(sweep_seconds),
        "allowed_differences": allowed_differences,
        "missing": missing,
        "inputs": first and first["inputs"],
        **{key: _distinct(record[key] for record in records) for key in ("git", "versions", "machine")},
        "finished": max((record["finished"] for record in records), default=None),
    }
    return _rounded(summary)


def _models(records, grading) -> list[list[dict]]:
    """The records of each model, a seed each: first the untrained one, then controls, then arms by size."""
    groups: dict = {}
    for record in records:
        if record["phase"] in ("untrained", "control", "final"):
            groups.setdefault((record["arm"], record["size"]), []).append(record)
    for group in groups.values():
        group.sort(key=lambda record: (record["seed"] is not None, record["seed"] or 0))
    arms = list(dict.fromkeys(arm for arm, _ in groups))

    def place(group):
        first = group[0]
        return ROLES.index(_role(first, grading)), _place(first), arms.index(first["arm"])

    return sorted(groups.values(), key=place)


def _rounded(item):
    """Six significant digits: the file stays small, and what is read from it says the same as what was computed."""
    if isinstance(item, dict):
        return {key: _rounded(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_rounded(value) for value in item]
    return float(f"{item:.6g}") if isinstance(item, float) else item


def _role(record, grading) -> str:
    if record["phase"] in ("untrained", "control"):
        return record["phase"]
    # SFT has none, and a record from before rewards were a list has a name, or nothing where it is the default.
    reward = record["config"].get("reward", grading if record["algorithm"] == "sft" else "strict")
    return "arm" if reward in (grading, [grading]) else "control"


def _place(record) -> tuple:
    """Fewer values first; of equal numbers, the size as the paper has it before its variants."""
    is_variant = (record.get("config") or {}).get("tying") == "structured"
    bare = record["size"] is not None, record["trained_values"], -record["trained_bytes"]
    return *bare, is_variant, str(record["size"])


def family(config: dict) -> str:
    """
    The kind of an update, for people.

    Args:
        config (`dict`): A record's `config`.
    Returns:
        `str`: TinyLoRA as in the paper's main runs is just "TinyLoRA".
    """
    adapter = config.get("adapter")
    if adapter != "tinylora":
        return {"lora": "LoRA", "full": "full fine-tuning"}.get(adapter, "nothing")
    # What a recipe leaves open is None in its record: the config's default.
    if config.get("projection") == "basis":
        return "LoRA-XS"
    return "TinyLoRA, structured" if config.get("tying") == "structured" else "TinyLoRA"


def _cell(group, untrained, rates, grading) -> dict:
    first = group[0]
    config = first.get("config") or {}
    rate = rates.get(first["arm"], {}).get(first["size"], {})
    greedy = [record["metrics"]["greedy"] for record in group]
    return {
        "role": _role(first, grading),
        **{key: first[key] for key in ("arm", "arm_label", "algorithm", "size")},
        "label": first["label"] or "nothing",
        "family": family(config),
        "kept_dtype": config.get("kept_dtype") or "float32" if config.get("adapter") == "tinylora" else None,
        "trained_values": first["trained_values"],
        "trained_bytes": first["trained_bytes"],
        "learning_rate": first.get("learning_rate"),
        "rate_at_edge": bool(rate.get("at_edge")),
        # Where an arm's rates say how far a step shall go.
        **({"found_rates": [record["config"]["learning_rate"] for record in group]} if "relative_kl" in config else {}),
        "seeds": [record["seed"] for record in group],
        "accuracy": {
            kind: {
                name: _spread([record["metrics"][kind][name] for record in group])
                for name in GRADINGS
                if name in first["metrics"][kind]
            }
            for kind in KINDS
            if kind in first["metrics"]
        },
        "pass_at": {
            k: _mean(record["metrics"]["sampled"][grading]["pass_at"][k] for record in group)
            for k in first["metrics"].get("sampled", {}).get(grading, {}).get("pass_at", {})
        },
        **{key: _mean(item[key] for item in greedy) for key in ("mean_tokens", "truncated", "no_marker")},
        "gains": {
            kind: {
                measure: difference(group, untrained, kind, measure, _is_by_seed(kind, measure, grading))
                for measure in MEASURES[kind]
            }
            for kind in KINDS
            if kind in first["metrics"]
        }
        if untrained not in (None, group)
        else {},
        "budget": {key: sorted({record[key] for record in group}) for key in BUDGET if key in first},
        "curve": _curve([record["curve"] for record in group if record.get("curve")]),
    }


def _is_by_seed(kind, measure, grading) -> bool:
    """Seeds alone are shown of greedy answers, in the comparison's grading."""
    return kind == "greedy" and measure == grading


def _place_controls(cells) -> None:
    """A control that trains nothing has the values of its size all the same: they are zero, or random."""
    counts = {cell["size"]: (cell["trained_values"], cell["trained_bytes"]) for cell in cells if cell["role"] == "arm"}
    for cell in cells:
        if cell["role"] == "control" and cell["size"] in counts:
            cell["trained_values"], cell["trained_bytes"] = counts[cell["size"]]


def _spread(measured: list[dict]) -> dict:
    values = [item["accuracy"] for item in measured]
    return {
        "mean": _mean(values),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "values": values,
        "intervals": [item["interval"] for item in measured],
    }


def _mean(values) -> float:
    return float(np.mean(list(values)))


def _distinct(values) -> list:
    return [json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})]


def _curve(curves) -> dict:
    """Mean and range over seeds of what was logged, averaged within at most `CURVE_POINTS` stretches of steps."""
    if not curves:
        return {}
    length = min(len(curve["step"]) for curve in curves)
    edges = np.unique(np.linspace(0, length, min(CURVE_POINTS, length) + 1).astype(int))

    def stretches(values):
        parts = (values[start:end] for start, end in zip(edges, edges[1:], strict=False))
        logged = [[value for value in part if value is not None] for part in parts]
        return [float(np.mean(part)) for part in logged] if all(logged) else None

    drawn = {"step": stretches(curves[0]["step"])}
    for key in curves[0]:
        seeds = [stretches(curve[key]) if key in curve else None for curve in curves]
        if key != "step" and None not in seeds:
            named = {"mean": np.mean(seeds, 0), "low": np.min(seeds, 0), "high": np.max(seeds, 0)}
            drawn[key] = {name: values.tolist() for name, values in named.items()}
    return drawn


def _pairs(ordered, grading) -> Iterator[dict]:
    """RL against every other arm of its size, and against the controls of its size or of none."""
    arms = [group for group in ordered if _role(group[0], grading) == "arm"]
    first_arm = next((group[0]["arm"] for group in arms if group[0]["algorithm"] == "rl"), None)
    for group in (group for group in arms if group[0]["arm"] == first_arm):
        first = group[0]
        for other in ordered:
            role, size = _role(other[0], grading), other[0]["size"]
            if role == "untrained" or other is group or size not in (first["size"], None):
                continue
            yield {
                "question": "control" if role == "control" else "arm",
                **{key: first[key] for key in ("size", "label", "trained_values")},
                **{"first": first["arm"], "first_label": first["arm_label"]},
                **{"other": other[0]["arm"], "other_label": other[0]["arm_label"]},
                **{
                    kind: {
                        measure: difference(group, other, kind, measure, _is_by_seed(kind, measure, grading))
                        for measure in ("strict", "flexible")
                    }
                    for kind in KINDS
                },
            }


def _correct_for_many(cells, pairs) -> None:
    """Adds `p_corrected` and `corrected_for`: Holm's, over all differences that answer the same question."""
    questions = [[cell["gains"] for cell in cells if cell["role"] == role] for role in ROLES]
    questions += [[pair for pair in pairs if pair["question"] == question] for question in ("arm", "control")]
    for asked in questions:
        for kind, measures in MEASURES.items():
            for measure in measures:
                found = [item[kind][measure] for item in asked if item.get(kind, {}).get(measure)]
                for item, corrected in zip(found, holm([item["p"] for item in found]), strict=True):
                    item |= {"p_corrected": corrected, "corrected_for": len(found)}


def _add_recovered(cells, grading) -> None:
    """The share of full fine-tuning's gain by RL over the untrained model, in greedy accuracy: the paper's."""
    scores = {(cell["role"], cell["family"], cell["algorithm"]): cell["accuracy"]["greedy"][grading] for cell in cells}
    full, start = scores.get(("arm", "full fine-tuning", "rl")), scores.get(("untrained", "nothing", None))
    gain = full["mean"] - start["mean"] if full and start else 0
    for cell in cells:
        is_trained = gain > 0 and cell["algorithm"] is not None
        gained = cell["accuracy"]["greedy"][grading]["mean"] - start["mean"] if is_trained else None
        cell["recovered"] = gained / gain if is_trained else None


def _main_sizes(cells) -> list[str]:
    """The sizes that every arm was trained at, which the first page is about; all where there is no such one."""
    arms: dict = {}
    for cell in cells:
        if cell["role"] == "arm":
            arms.setdefault(cell["arm"], []).append(cell["size"])
    every = list(dict.fromkeys(size for sizes in arms.values() for size in sizes))
    return [size for size in every if all(size in sizes for sizes in arms.values())] or every
