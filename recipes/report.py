"""What a comparison found, from its runs' JSON alone: numbers, text and the README's part. Nothing is trained here."""

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import conclusions
import figures
import numpy as np
import statistical
from completions import KINDS, write_text
from evaluate import GRADINGS
from scipy import stats

from trl_tinylora.storage.card import markers, replaced_section


# "format" is what strict grading counts and flexible grading does not, negative where it is the other way round.
MEASURES = {"greedy": ("strict", "flexible", "format"), "sampled": ("strict", "flexible")}
ROLES = ("untrained", "control", "arm")
BUDGET = ("examples", "optimizer_steps", "generated_tokens", "trained_tokens", "train_seconds")
CURVE_POINTS = 25
MOST_SHOWN_VALUES = 32


def summarize(
    records: list[dict], rates: dict, missing: list[str], allowed_differences: dict[str, str], sweep_seconds: float
) -> dict:
    """
    What the report says, as numbers.

    Args:
        records (`list[dict]`): Of every phase but the sweep, as `compare.py` writes them.
        rates (`dict`): By arm and size: `learning_rate`, `score`, `grid` (score by rate) and `at_edge`.
        missing (`list[str]`): Names of planned runs without a record.
        allowed_differences (`dict[str, str]`): Keys in which the arms' recipes may differ, and why.
        sweep_seconds (`float`): Compute time of the sweep's runs, in seconds; 0 where the rates came from a file.
    Returns:
        `dict`: All that text and figures need: `main_sizes` (those of the first page), `cells` (one a model that was
        evaluated: an arm at a size, over its seeds), `pairs` (RL against the other arms and the controls),
        `landscapes`, and what stands around them.
    """
    groups: dict = {}
    for record in records:
        if record["phase"] in ("untrained", "control", "final"):
            groups.setdefault((record["arm"], record["size"]), []).append(record)
    for group in groups.values():
        group.sort(key=lambda record: (record["seed"] is not None, record["seed"] or 0))
    arms = list(dict.fromkeys(arm for arm, _ in groups))
    ordered = sorted(
        groups.values(), key=lambda group: (ROLES.index(_role(group[0])), _place(group[0]), arms.index(group[0]["arm"]))
    )
    untrained = next((group for group in ordered if _role(group[0]) == "untrained"), None)
    cells = [_cell(group, untrained, rates) for group in ordered]
    _place_controls(cells)
    pairs = list(_pairs(ordered))
    _correct_for_many(cells, pairs)
    _add_recovered(cells)
    first = next((group[0] for group in ordered), None)
    metrics = first["metrics"] if first else {}
    summary = {
        "main_sizes": _main_sizes(cells),
        "cells": cells,
        "pairs": pairs,
        "landscapes": _landscapes(records),
        "own_samples": [
            {key: record[key] for key in ("examples", "problems", "generated_tokens")}
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


def _rounded(item):
    """Six significant digits: the file stays small, and what is read from it says the same as what was computed."""
    if isinstance(item, dict):
        return {key: _rounded(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_rounded(value) for value in item]
    return float(f"{item:.6g}") if isinstance(item, float) else item


def _role(record) -> str:
    if record["phase"] in ("untrained", "control"):
        return record["phase"]
    return "arm" if record["config"].get("reward", "strict") == "strict" else "control"


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


def _cell(group, untrained, rates) -> dict:
    first = group[0]
    config = first.get("config") or {}
    rate = rates.get(first["arm"], {}).get(first["size"], {})
    greedy = [record["metrics"]["greedy"] for record in group]
    return {
        "role": _role(first),
        **{key: first[key] for key in ("arm", "arm_label", "algorithm", "size")},
        "label": first["label"] or "nothing",
        "family": family(config),
        "kept_dtype": config.get("kept_dtype") or "float32" if config.get("adapter") == "tinylora" else None,
        "trained_values": first["trained_values"],
        "trained_bytes": first["trained_bytes"],
        "learning_rate": first.get("learning_rate"),
        "rate_at_edge": bool(rate.get("at_edge")),
        "seeds": [record["seed"] for record in group],
        "accuracy": {
            kind: {
                grading: _spread([record["metrics"][kind][grading] for record in group])
                for grading in GRADINGS
                if grading in first["metrics"][kind]
            }
            for kind in KINDS
            if kind in first["metrics"]
        },
        "pass_at": {
            k: _mean(record["metrics"]["sampled"]["strict"]["pass_at"][k] for record in group)
            for k in first["metrics"].get("sampled", {}).get("strict", {}).get("pass_at", {})
        },
        **{key: _mean(item[key] for item in greedy) for key in ("mean_tokens", "truncated", "no_marker")},
        "gains": {
            kind: {measure: difference(group, untrained, kind, measure) for measure in MEASURES[kind]}
            for kind in KINDS
            if kind in first["metrics"]
        }
        if untrained not in (None, group)
        else {},
        "budget": {key: sorted({record[key] for record in group}) for key in BUDGET if key in first},
        "curve": _curve([record["curve"] for record in group if record.get("curve")]),
        "trained": [_trained(record) for record in group if record.get("trained")],
    }


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


def _trained(record) -> dict:
    values = [value for tensor in record["trained"].values() for value in np.ravel(tensor).tolist()]
    return {
        "seed": record["seed"],
        "projection_seed": record["config"].get("projection_seed"),
        "norm": float(np.linalg.norm(values)),
        "values": values if len(values) <= MOST_SHOWN_VALUES else None,
    }


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


def _right(record, kind, measure) -> np.ndarray | None:
    """Each problem's share of right answers, shape `(problems,)`; None where it was not kept."""
    if kind not in record["metrics"]:
        return None
    if measure == "format":
        strict, flexible = (_right(record, kind, grading) for grading in ("strict", "flexible"))
        return None if strict is None or flexible is None else strict - flexible
    right = record["metrics"][kind].get(measure, {}).get("correct")
    samples = record["metrics"]["samples"] if kind == "sampled" else 1
    return None if right is None else np.asarray(right, dtype=float) / samples


def _is_fixed(group) -> bool:
    """Whether a model is one and the same whatever the seed: untrained, or with nothing but zeros."""
    return len(group) == 1 and not group[0].get("optimizer_steps")


def difference(group: list[dict], other: list[dict], kind: str, measure: str) -> dict | None:
    """
    Two models' difference on the same problems, with the same seeds.

    Two intervals are computed: over problems (paired bootstrap of each problem's mean over seeds) and over seeds
    (Student's t of each seed's difference). The one given holds both and the p-value is the larger one, so that a claim
    stands only if neither other problems nor other seeds would take it away.

    Args:
        group (`list[dict]`): The records of one model, a seed each.
        other (`list[dict]`): Of the one that is subtracted.
        kind (`str`): `"greedy"` or `"sampled"`.
        measure (`str`): `"strict"`, `"flexible"` or `"format"`.
    Returns:
        `dict` or `None`: `difference`, `interval`, `over_problems`, `over_seeds`, `p`, `n_seeds` (0 where no seed had
        a part in either model), `is_identical` and, for greedy strict answers, `by_seed` (only the one right, only the
        other right, p of McNemar's exact test). None without answers by problem, or without a seed in common.
    """
    if _is_fixed(other):
        matched = [(record, other[0]) for record in group]
    elif _is_fixed(group):
        matched = [(group[0], record) for record in other]
    else:
        by_seed = {record["seed"]: record for record in other}
        matched = [(record, by_seed[record["seed"]]) for record in group if record["seed"] in by_seed]
    answers = [(_right(first, kind, measure), _right(second, kind, measure)) for first, second in matched]
    if not answers or any(first is None or second is None for first, second in answers):
        return None
    first, second = (np.array(side) for side in zip(*answers, strict=True))
    differences = (first - second).mean(1)
    is_identical = bool((first == second).all())
    over_problems, p_problems = ([0.0, 0.0], 1.0) if is_identical else _over_problems(first.mean(0), second.mean(0))
    over_seeds, p_seeds = (None, 0.0) if len(differences) < 2 or is_identical else _over_seeds(differences)
    bounds = [bound for bounds in (over_problems, over_seeds) if bounds is not None for bound in bounds]
    n_seeds = 0 if _is_fixed(group) and _is_fixed(other) else len(matched)
    found = {
        "difference": float(differences.mean()),
        # Student's t does not know that shares end at 0 and 1.
        "interval": [max(-1.0, min(bounds)), min(1.0, max(bounds))],
        "over_problems": over_problems,
        "over_seeds": over_seeds,
        "p": max(p_problems, p_seeds),
        "n_seeds": n_seeds,
        "is_identical": is_identical,
    }
    if kind == "greedy" and measure == "strict":
        found["by_seed"] = [
            {"seed": record["seed"], **_mcnemar(one, two)}
            for (record, _), one, two in zip(matched, first, second, strict=True)
        ]
    return found


def _over_problems(first, second) -> tuple[list[float], float]:
    found = statistical.paired_bootstrap(first, second)
    return found["interval"], found["p_value"]


def _over_seeds(differences) -> tuple[list[float], float]:
    bounds = statistical.seed_interval(differences)
    if np.ptp(differences) == 0:
        # Seeds that agree to the last problem leave the word to the interval over problems.
        return bounds, 0.0 if differences[0] else 1.0
    return bounds, float(stats.ttest_1samp(differences, 0.0).pvalue)


def _mcnemar(first, second) -> dict:
    found = statistical.mcnemar(first, second)
    return {"only_first": found["only_first"], "only_other": found["only_second"], "p": found["p_value"]}


def _pairs(ordered) -> Iterator[dict]:
    """RL against every other arm of its size, and against the controls of its size or of none."""
    arms = [group for group in ordered if _role(group[0]) == "arm"]
    first_arm = next((group[0]["arm"] for group in arms if group[0]["algorithm"] == "rl"), None)
    for group in (group for group in arms if group[0]["arm"] == first_arm):
        first = group[0]
        for other in ordered:
            role, size = _role(other[0]), other[0]["size"]
            if role == "untrained" or other is group or size not in (first["size"], None):
                continue
            yield {
                "question": "control" if role == "control" else "arm",
                **{key: first[key] for key in ("size", "label", "trained_values")},
                **{"first": first["arm"], "first_label": first["arm_label"]},
                **{"other": other[0]["arm"], "other_label": other[0]["arm_label"]},
                **{
                    kind: {grading: difference(group, other, kind, grading) for grading in ("strict", "flexible")}
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
                for item, corrected in zip(found, statistical.holm([item["p"] for item in found]), strict=True):
                    item |= {"p_corrected": corrected, "corrected_for": len(found)}


def _add_recovered(cells) -> None:
    """The share of full fine-tuning's gain by RL over the untrained model, in strict greedy accuracy: the paper's."""
    scores = {(cell["role"], cell["family"], cell["algorithm"]): cell["accuracy"]["greedy"]["strict"] for cell in cells}
    full, start = scores.get(("arm", "full fine-tuning", "rl")), scores.get(("untrained", "nothing", None))
    gain = full["mean"] - start["mean"] if full and start else 0
    for cell in cells:
        is_trained = gain > 0 and cell["algorithm"] is not None
        gained = cell["accuracy"]["greedy"]["strict"]["mean"] - start["mean"] if is_trained else None
        cell["recovered"] = gained / gain if is_trained else None


def _landscapes(records) -> list[dict]:
    """The reward over one or two values, with the paths of the runs that trained in the same directions."""
    drawn = []
    for record in (record for record in records if record["phase"] == "landscape"):
        paths = [
            {
                **{key: run[key] for key in ("arm", "arm_label", "seed")},
                "path": run["path"],
            }
            for run in records
            if run.get("path")
            and run["size"] == record["size"]
            and run["config"].get("projection_seed", run["seed"]) == record["seed"]
            and _role(run) == "arm"
        ]
        kept = ("size", "label", "seed", "grid", "reward", "greedy", "n_problems")
        drawn.append({key: record[key] for key in kept} | {"paths": paths})
    return sorted(drawn, key=lambda item: (len(item["grid"]), item["seed"]))


def _main_sizes(cells) -> list[str]:
    """The sizes that every arm was trained at, which the first page is about; all where there is no such one."""
    arms: dict = {}
    for cell in cells:
        if cell["role"] == "arm":
            arms.setdefault(cell["arm"], []).append(cell["size"])
    every = list(dict.fromkeys(size for sizes in arms.values() for size in sizes))
    return [size for size in every if all(size in sizes for sizes in arms.values())] or every


def table(summary: dict) -> str:
    """
    The first page's table: each arm at the main sizes beside the controls, their gain split in two.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: Markdown; a gain is bold where its interval and its p-value carry it.
    """
    cells = [cell for size in summary["main_sizes"] for cell in summary["cells"] if _is_arm_at(cell, size)]
    cells += [cell for cell in summary["cells"] if cell["role"] != "arm"]
    rows, above = [], None
    for cell in cells:
        named = [cell["label"], f"{cell['trained_values']:,}"] if cell["label"] != above else ["", ""]
        above = cell["label"]
        sampled = cell["accuracy"].get("sampled", {}).get("strict")
        gains = cell["gains"].get("greedy", {})
        rows.append([*named, cell["arm_label"], _percent(cell["accuracy"]["greedy"]["strict"]), _percent(sampled)])
        rows[-1] += [_part(gains.get(measure)) for measure in MEASURES["greedy"]]
    header = "trained | values | arm or control | strict | sampled | gain | = reasoning | + format"
    return _grid(header, "lrlrrrrr", rows)


def _is_arm_at(cell, size) -> bool:
    return cell["role"] == "arm" and cell["size"] == size


def _percent(spread: dict | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['mean']:.1%}" + (f" ± {100 * spread['std']:.1f}" if spread["std"] is not None else "")


def _part(found: dict | None) -> str:
    if found is None:
        return "-"
    shown = conclusions.points(found["difference"])
    return f"**{shown}**" if conclusions.verdict(found) in ("higher", "lower") else shown


SPLIT = (
    "*Strict* grading wants the answer in the form that the prompt asks for; *flexible* grading takes a marked, boxed "
    "or last number. *Reasoning* is the gain in flexible grading and *format* the rest of the strict gain: so what a "
    "model could do all along counts as reasoning where training made it do that more often, and an answer that no "
    "grading can read counts as a wrong one."
)


def caption(summary: dict) -> str:
    """
    What a reader needs to know to read the tables.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: One paragraph.
    """
    if not summary["cells"]:
        return "No run has ended yet."
    seeds = sorted({seed for cell in summary["cells"] if cell["role"] == "arm" for seed in cell["seeds"]})
    commits = [
        "no git commit" if git is None else f"commit {git['commit'][:12]}{' with changes' if git['is_dirty'] else ''}"
        for git in summary["git"]
    ]
    spread = f"Mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    sampled = ""
    if summary["samples"]:
        sampled = f"; sampled: the mean of {summary['samples']} at temperature {summary['temperature']:g}"
    return (
        f"Share of {summary['n_problems']} test problems answered right by greedy decoding{sampled}. {spread} "
        f"({', '.join(map(str, seeds)) or 'none'}). Gains of greedy answers over the untrained model, in percentage "
        f"points, bold where they are claimed. {SPLIT} "
        f"{', '.join(commits)}, {(summary['finished'] or '')[:10]}."
    )


RULES = (
    "In brackets: 95% intervals. Each holds two: over problems (a paired bootstrap of each problem's mean over seeds) "
    "and over seeds (Student's t of the seeds' differences), so that neither other problems nor other seeds would take "
    "a claim away; with few seeds it is wide. p is the larger one of a permutation test over problems and a t-test "
    "over seeds, corrected by Holm for all comparisons that answer the same question. A difference is claimed where "
    f"the interval leaves out zero and p is at most {conclusions.SIGNIFICANCE:g}; equality is claimed only as an "
    f"interval within {100 * conclusions.MARGIN:g} points of zero."
)


def text(summary: dict) -> str:
    """
    The whole report.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `str`: Markdown.
    """
    parts = ["# RL and SFT at matched budgets", table(summary), caption(summary)]
    said = conclusions.headline(summary)
    parts += ["## What the data say", _list(said), RULES] if said else []
    notes = _notes(summary)
    parts += ["## Notes", _list(notes)] if notes else []
    for title, image in FIGURES_BY_SECTION.items():
        lacking = figures.lacking(image, summary)
        shown = [f"![{title}]({image})", figures.CAPTIONS[image]]
        parts += [f"## {title}", *([f"Not drawn: {lacking}."] if lacking else shown)]
        if title == "Learning rates":
            parts.append(_rates(summary))
    for title, section in SECTIONS.items():
        parts += [f"## {title}", section(summary)]
    return "\n\n".join(parts) + "\n"


def _list(lines) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _grid(header: str, alignment: str, rows: list[list[str]]) -> str:
    """A Markdown table; `alignment` has an l or an r a column."""
    rule = "|".join({"l": "---", "r": "--:"}[side] for side in alignment)
    return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def _notes(summary) -> list[str]:
    notes = []
    if summary["missing"]:
        notes.append(f"**Missing or failed runs:** {', '.join(summary['missing'])}.")
    edges = [
        f"{cell['arm_label']}, {cell['label']} ({cell['learning_rate']:g})"
        for cell in summary["cells"]
        if cell["rate_at_edge"]
    ]
    if edges:
        notes.append(f"**At the edge of its grid**, so that a rate outside might be better: {'; '.join(edges)}.")
    single = [cell for cell in summary["cells"] if cell["role"] == "arm" and len(cell["seeds"]) == 1]
    if single:
        notes.append(f"**One seed** for {len(single)} of the models: their intervals cover other problems only.")
    if len(summary["versions"]) > 1 or len(summary["git"]) > 1:
        notes.append("**Mixed origin:** the runs come from several commits or package versions; see below.")
    return notes


def _difference(found: dict | None) -> str:
    if found is None:
        return "-"
    low, high = (conclusions.points(bound, signed=False) for bound in found["interval"])
    return f"{conclusions.points(found['difference'])} ({low} to {high}), {_p(found['p_corrected'])}"


def _p(value: float) -> str:
    return f"p = {conclusions.p_value(value)}".replace("= <", "<")


MEASURED = (("greedy", "strict"), ("greedy", "flexible"), ("sampled", "strict"), ("sampled", "flexible"))


def _comparisons(summary) -> str:
    if not summary["pairs"]:
        return "None: no RL arm, or nothing beside it."
    rows = [
        [pair["label"], f"{pair['first_label']} - {pair['other_label']}"]
        + [_difference(pair[kind][measure]) for kind, measure in MEASURED]
        + [
            ", ".join(
                f"{seed['seed']}: {seed['only_first']}:{seed['only_other']} ({_p(seed['p'])})"
                for seed in (pair["greedy"]["strict"] or {}).get("by_seed", [])
            )
            or "-"
        ]
        for pair in summary["pairs"]
    ]
    header = "trained | difference | " + " | ".join(f"{kind}, {measure}" for kind, measure in MEASURED)
    return "\n\n".join(
        [
            "Percentage points, with the interval and p after correction. The last column takes each seed's greedy "
            "strict answers alone: problems that only the first model got right, to those that only the second did, "
            "and p of McNemar's exact test, uncorrected.",
            _grid(f"{header} | by seed", "llrrrrl", rows),
        ]
    )


def _gains(summary) -> str:
    rows = [
        [cell["arm_label"], cell["label"]]
        + [_difference(cell["gains"]["greedy"][measure]) for measure in MEASURES["greedy"]]
        + [_difference(cell["gains"].get("sampled", {}).get(measure)) for measure in ("strict", "flexible")]
        for cell in summary["cells"]
        if cell["gains"]
    ]
    header = "arm | trained | strict | of it reasoning | of it format | sampled, strict | sampled, reasoning"
    return _grid(header, "llrrrrr", rows) if rows else "None: the untrained model was not evaluated."


def _every_arm(summary) -> str:
    rows = []
    for cell in summary["cells"]:
        greedy, sampled = cell["accuracy"]["greedy"], cell["accuracy"].get("sampled", {})
        rows.append(
            [cell["arm_label"], cell["label"], f"{cell['trained_values']:,}", f"{cell['trained_bytes']:,}"]
            + [_percent(greedy.get(grading)) for grading in GRADINGS]
            + [_percent(sampled.get(grading)) for grading in ("strict", "flexible")]
            + [", ".join(f"{k}: {share:.1%}" for k, share in cell["pass_at"].items()) or "-"]
            + ["-" if cell["recovered"] is None else f"{cell['recovered']:.0%}"]
            + [f"{cell['mean_tokens']:.1f}", f"{cell['truncated']:.1%}", f"{cell['no_marker']:.1%}"]
        )
    header = (
        "arm | trained | values | bytes | strict | last number | flexible | sampled, strict | sampled, flexible | "
        "pass@k | recovered | tokens | truncated | no marker"
    )
    sampled = f"sampled: the mean of {summary['samples']} samples" if summary["samples"] else "nothing sampled"
    temperature = f" at temperature {summary['temperature']:g}" if summary["samples"] else ""
    return "\n\n".join(
        [
            f"Greedy where not said otherwise; {sampled}{temperature}. *Recovered* is the share of the gain of full "
            "fine-tuning by RL over the untrained model; tokens, truncated and no marker are of greedy completions.",
            _grid(header, "ll" + 12 * "r", rows),
        ]
    )


def _every_run(summary) -> str:
    rows = [
        [cell["arm_label"], cell["label"], "-" if seed is None else str(seed)]
        + [
            _with_interval(cell["accuracy"].get(kind, {}).get(grading), index)
            for kind in KINDS
            for grading in ("strict", "flexible")
        ]
        for cell in summary["cells"]
        for index, seed in enumerate(cell["seeds"])
    ]
    header = "arm | trained | seed | greedy, strict | greedy, flexible | sampled, strict | sampled, flexible"
    return "\n\n".join(
        [
            "Each with its 95% interval over problems: Wilson's for greedy, a bootstrap for sampled.",
            _grid(header, "llrrrrr", rows),
        ]
    )


def _with_interval(spread, index) -> str:
    if spread is None:
        return "-"
    low, high = spread["intervals"][index]
    return f"{spread['values'][index]:.1%} ({low:.1%} to {high:.1%})"


def _budget(summary) -> str:
    rows = []
    trained = [cell for cell in summary["cells"] if cell["algorithm"] is not None]
    for arm in dict.fromkeys(cell["arm"] for cell in trained):
        cells = [cell for cell in trained if cell["arm"] == arm]
        ranges = [[value for cell in cells for value in cell["budget"].get(key, [])] for key in BUDGET]
        rows.append([cells[0]["arm_label"], *map(_range, ranges)])
    header = "arm | examples | optimiser steps | generated tokens | trained tokens | seconds of training"
    return "\n\n".join(
        [
            "A run of each arm, from its smallest to its largest. Equal by design: trained values, examples and "
            "optimiser steps. Trained tokens are those of forward and backward passes, prompts included.",
            _grid(header, "lrrrrr", rows),
            *_own_samples(summary),
            "The arms' recipes agree on every key but these:",
            _list(f"`{key}`: {reason}" for key, reason in summary["allowed_differences"].items()),
        ]
    )


def _own_samples(summary) -> list[str]:
    if not summary["own_samples"]:
        return []
    kept, asked, tokens = (
        _range([drawn[key] for drawn in summary["own_samples"]]) for key in ("examples", "problems", "generated_tokens")
    )
    return [
        f"The model's own samples: right ones were found of {kept} of {asked} problems a seed, with {tokens} generated "
        "tokens, which are not in the table."
    ]


def _range(values) -> str:
    if not values:
        return "-"
    low, high = (f"{bound:,.0f}" for bound in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _rates(summary) -> str:
    origin = "Taken from an earlier sweep."
    if summary["sweep_seconds"]:
        origin = f"Swept for this comparison, {timedelta(seconds=summary['sweep_seconds'])} of compute."
    labels = {cell["arm"]: cell["arm_label"] for cell in summary["cells"]}
    rows = []
    for arm, sizes in summary["learning_rates"].items():
        for size, chosen in sizes.items():
            grid = chosen.get("grid", {})
            scores = sorted(grid.values(), reverse=True)
            lost = f"{100 * (scores[0] - scores[1]):.1f}, {100 * (scores[0] - scores[-1]):.1f}" if scores[1:] else "-"
            shown = ", ".join(f"{rate}: {score:.1%}" for rate, score in grid.items())
            edge = ", at the edge" if chosen.get("at_edge") else ""
            rows.append([labels.get(arm, arm), size, f"{chosen['learning_rate']:g}{edge}", lost, shown])
    return "\n\n".join(
        [
            f"{origin} Chosen: best mean of greedy and sampled strict accuracy on the validation problems, with one "
            "seed apart from the final ones; the smaller rate of equals. *Lost* is how many points the second-best and "
            "the worst rate of the grid score below the chosen one.",
            _grid("arm | size | chosen | lost | score by rate", "llrrl", rows),
        ]
    )


def _trained_values(summary) -> str:
    rows = [
        [cell["arm_label"], cell["label"], str(run["seed"])]
        + ["-" if run["projection_seed"] is None else str(run["projection_seed"]), f"{run['norm']:.4g}"]
        + ["in the run's JSON" if run["values"] is None else " ".join(f"{value:.4g}" for value in run["values"])]
        for cell in summary["cells"]
        for run in cell["trained"]
    ]
    if not rows:
        return "None was recorded."
    return "\n\n".join(
        [
            "With the base model, the configuration and the seed of the projections they are the whole adapter.",
            _grid("arm | trained | seed | seed of projections | norm | values", "llrrrl", rows),
        ]
    )


def _origin(summary) -> str:
    return _list(f"{name}: `{json.dumps(value)}`" for name in ("git", "versions", "machine") for value in summary[name])


FIGURES_BY_SECTION = {
    "Accuracy by number of trained values": "accuracy.png",
    "The same, sampled": "accuracy_sampled.png",
    "Accuracy by bytes": "bytes.png",
    "The reward landscape": "landscape.png",
    "Training curves": "curves.png",
    "Learning rates": "rates.png",
}
SECTIONS: dict[str, Callable[[dict], str]] = {
    "RL against the other arms and the controls": _comparisons,
    "Gains over the untrained model": _gains,
    "Every arm": _every_arm,
    "Every run": _every_run,
    "Budgets": _budget,
    "Trained values": _trained_values,
    "Origin": _origin,
}


def write(summary: dict, folder: str | Path) -> None:
    """
    Writes `summary.json`, `report.md` and the figures; a figure that the data no longer give is removed.

    Args:
        summary (`dict`): As [`summarize`] returns.
        folder (`str` or `Path`): Where to.
    """
    folder = Path(folder)
    write_text(folder / "summary.json", _readable_json(summary))
    write_text(folder / "report.md", text(summary))
    figures.write(summary, folder)


def _readable_json(summary) -> str:
    """A line a key, and a line a cell: what changed shows as such, and curves do not fill the file with lines."""
    lines = []
    for key, value in summary.items():
        if isinstance(value, list) and value:
            items = ",\n".join(f"  {json.dumps(item)}" for item in value)
            lines.append(f" {json.dumps(key)}: [\n{items}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def readme_content(summary: dict, image: str = "recipes/toy/results/accuracy.png") -> str:
    """What a README shows of a comparison: the tables, their caption, the figure and the conclusions.

    Args:
        summary (`dict`): As [`summarize`] returns.
        image (`str`, *optional*, defaults to `"recipes/toy/results/accuracy.png"`): The main figure, from the README.
    Returns:
        `str`: Markdown.
    """
    parts = [table(summary), caption(summary)]
    if not figures.lacking("accuracy.png", summary):
        parts.append(f"![Accuracy by number of trained values]({image})")
    said = conclusions.headline(summary)
    if said:
        # Folded: a README is read at a glance.
        parts += ["<details><summary>What the data say, model by model</summary>", _list(said), RULES, "</details>"]
    return "\n\n".join(parts)


def replace_section(document: str, section: str, content: str) -> str:
    """
    A document with the text between two markers renewed; one that is current comes back as it was.

    Args:
        document (`str`): The text, with `<!-- results:section -->` and `<!-- /results:section -->`.
        section (`str`): Name in the markers.
        content (`str`): What goes between them.
    Returns:
        `str`: The new text.
    Raises:
        ValueError: If a marker is missing.
    """
    name = f"results:{section}"
    renewed = replaced_section(document, name, content)
    if renewed is None:
        opening, closing = markers(name)
        raise ValueError(f"the README lacks the markers {opening} and {closing}, between which the table goes")
    return renewed


def renewed_readme(readme: str, section: str, summary: dict) -> str:
    """
    A README with the comparison's table renewed; one that is current comes back as it was.

    Args:
        readme (`str`): The text, with both markers.
        section (`str`): Name in the markers.
        summary (`dict`): As [`summarize`] returns, or the content of a `summary.json`.
    Returns:
        `str`: The new text.
    Raises:
        ValueError: If a marker is missing.
    """
    return replace_section(readme, section, readme_content(summary))


def update_section(path: str | Path, section: str, content: str) -> None:
    """
    Renews the text between two markers of a document in place, as [`replace_section`] does.

    Args:
        path (`str` or `Path`): The document.
        section (`str`): Name in the markers.
        content (`str`): What goes between them.
    Raises:
        ValueError: If a marker is missing.
    """
    write_text(path, replace_section(Path(path).read_text(encoding="utf-8"), section, content))


def update_readme(path: str | Path, section: str, summary: dict) -> None:
    """
    Renews a README's table in place.

    Args:
        path (`str` or `Path`): The README.
        section (`str`): Name in the markers.
        summary (`dict`): As [`summarize`] returns.
    Raises:
        ValueError: If a marker is missing.
    """
    update_section(path, section, readme_content(summary))
