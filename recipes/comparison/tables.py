"""The tables of a comparison's report, from its summary."""

import json
from collections.abc import Iterable
from datetime import timedelta

from evaluation.metrics import GRADINGS

from comparison import conclusions
from comparison.summary import BUDGET, MEASURES


# Of the budget, where an arm has no optimiser.
SEARCHED = ", and of RL without gradients, which takes none of an optimiser, the number of completions"


def grid(header: str, alignment: str, rows: list[list[str]]) -> str:
    """
    A Markdown table.

    Args:
        header (`str`): Its columns, with " | " between them.
        alignment (`str`): An "l" or an "r" a column.
        rows (`list[list[str]]`): Its cells.
    Returns:
        `str`
    """
    rule = "|".join({"l": "---", "r": "--:"}[side] for side in alignment)
    return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def listed(lines: Iterable[str]) -> str:
    """
    A Markdown list.

    Args:
        lines (`Iterable[str]`): Its items.
    Returns:
        `str`
    """
    return "\n".join(f"- {line}" for line in lines)


def percent(spread: dict | None) -> str:
    """
    A share with its standard deviation over seeds.

    Args:
        spread (`dict`, *optional*): With `mean` and `std`, as a summary's `accuracy` holds it.
    Returns:
        `str`: As `"87.1% ± 1.2"`, or `"-"`.
    """
    if spread is None:
        return "-"
    return f"{spread['mean']:.1%}" + (f" ± {100 * spread['std']:.1f}" if spread["std"] is not None else "")


def _difference(found: dict | None) -> str:
    if found is None:
        return "-"
    low, high = (conclusions.points(bound, signed=False) for bound in found["interval"])
    return f"{conclusions.points(found['difference'])} ({low} to {high}), {_p(found['p_corrected'])}"


def _p(value: float) -> str:
    return f"p = {conclusions.p_value(value)}".replace("= <", "<")


MEASURED = (("greedy", "strict"), ("greedy", "flexible"), ("sampled", "strict"), ("sampled", "flexible"))


def comparisons(summary: dict) -> str:
    """RL against the other arms and the controls, by size."""
    if not summary["pairs"]:
        return "None: no RL arm, or nothing beside it."
    rows = [
        [pair["label"], f"{pair['first_label']} - {pair['other_label']}"]
        + [_difference(pair[kind][measure]) for kind, measure in MEASURED]
        + [
            ", ".join(
                f"{seed['seed']}: {seed['only_first']}:{seed['only_other']} ({_p(seed['p'])})"
                for seed in (pair["greedy"][summary["grading"]] or {}).get("by_seed", [])
            )
            or "-"
        ]
        for pair in summary["pairs"]
    ]
    header = "trained | difference | " + " | ".join(f"{kind}, {measure}" for kind, measure in MEASURED)
    return "\n\n".join(
        [
            "Percentage points, with the interval and p after correction. The last column takes each seed's greedy "
            f"{summary['grading']} answers alone: problems that only the first model got right, to those that only the "
            "second did, and p of McNemar's exact test, uncorrected.",
            grid(f"{header} | by seed", "llrrrrl", rows),
        ]
    )


def gains(summary: dict) -> str:
    """What each model gained over the untrained one; a strict gain in its two parts."""
    is_strict = summary["grading"] == "strict"
    rows = [
        [cell["arm_label"], cell["label"]]
        + [_difference(cell["gains"]["greedy"][measure]) for measure in MEASURES["greedy" if is_strict else "sampled"]]
        + [_difference(cell["gains"].get("sampled", {}).get(measure)) for measure in ("strict", "flexible")]
        for cell in summary["cells"]
        if cell["gains"]
    ]
    header = "arm | trained | strict | flexible | sampled, strict | sampled, flexible"
    if is_strict:
        header = (
            "arm | trained | strict | of it right more often | of it format | sampled, strict | "
            "sampled, right more often"
        )
    return (
        grid(header, "ll" + "r" * (header.count("|") - 1), rows)
        if rows
        else "None: the untrained model was not evaluated."
    )


def every_arm(summary: dict) -> str:
    """Accuracies of every model in every grading, and the form of its answers."""
    rows = []
    for cell in summary["cells"]:
        greedy, sampled = cell["accuracy"]["greedy"], cell["accuracy"].get("sampled", {})
        rows.append(
            [cell["arm_label"], cell["label"], f"{cell['trained_values']:,}", f"{cell['trained_bytes']:,}"]
            + [percent(greedy.get(grading)) for grading in GRADINGS]
            + [percent(sampled.get(grading)) for grading in ("strict", "flexible")]
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
            grid(header, "ll" + 12 * "r", rows),
        ]
    )


def budget(summary: dict) -> str:
    """What a run of each arm cost, and what the arms' recipes differ in."""
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
            f"optimiser steps{SEARCHED if any(cell['algorithm'] == 'es' for cell in trained) else ''}. Trained tokens "
            "are those of forward and backward passes, prompts included.",
            grid(header, "lrrrrr", rows),
            *_own_samples(summary),
            "The arms' recipes agree on every key but these:",
            listed(f"`{key}`: {reason}" for key, reason in summary["allowed_differences"].items()),
        ]
    )


def _own_samples(summary) -> list[str]:
    if not summary["own_samples"]:
        return []
    kept, asked, tokens = (
        _range([drawn[key] for drawn in summary["own_samples"]])
        for key in ("examples", "problems_asked", "generated_tokens")
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


def rates(summary: dict) -> str:
    """The learning rates, and after a sweep their scores."""
    labels = {cell["arm"]: cell["arm_label"] for cell in summary["cells"]}
    rows = []
    for arm, sizes in summary["learning_rates"].items():
        for size, chosen in sizes.items():
            shown = ", ".join(f"{rate}: {score:.1%}" for rate, score in chosen.get("grid", {}).items())
            edge = ", at the edge" if chosen.get("at_edge") else ""
            rows.append([labels.get(arm, arm), size, f"{chosen['learning_rate']:g}{edge}", shown or "-"])
    origin = "Fixed in the comparison's YAML."
    if summary["sweep_seconds"]:
        origin = (
            f"Swept for this comparison, {timedelta(seconds=summary['sweep_seconds'])} of compute: the best mean of "
            f"greedy and sampled {summary['grading']} accuracy on the validation problems, with one seed apart from "
            "the final ones; the smaller rate of equals."
        )
    return "\n\n".join([origin, grid("arm | size | rate | score by rate", "llrl", rows)])


def origin(summary: dict) -> str:
    """Commits, versions and machines."""
    return listed(
        f"{name}: `{json.dumps(value)}`" for name in ("git", "versions", "machine") for value in summary[name]
    )
