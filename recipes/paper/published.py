"""The published numbers of `published.json` beside our own, as the tables in the READMEs of the paper's recipes.

A cell of ours says "not run" until the recipe's `results/` holds the `summary.json` that `compare.py` wrote.
"""

import functools
import json
import math
from collections import Counter
from pathlib import Path

import yaml
from comparison.arguments import CompareArguments
from comparison.plan import Plan
from comparison.tables import grid
from records.files import replace_section
from training.arguments import AdapterArguments
from trl import TrlParser

from paper.memory import SHAPES, TOKENS, config_of, count
from trl_tinylora import TinyLoraConfig
from trl_tinylora.maths.tying import count_groups
from trl_tinylora.tuner.targets import resolve_target_modules, skeleton


PUBLISHED = Path(__file__).with_name("published.json")
RECIPES = Path(__file__).parents[1]
NOT_RUN = "not run"
# Shapes by name on the Hub. Llama has Qwen2's modules without their biases, which count nowhere here.
MODEL_SHAPES = {f"Qwen/Qwen2.5-{name}-Instruct": shape for name, shape in SHAPES.items()} | {
    # config.json of Qwen/Qwen2.5-Math-7B and of meta-llama/Llama-3.2-3B-Instruct.
    "Qwen/Qwen2.5-Math-7B": SHAPES["7B"],
    "meta-llama/Llama-3.2-3B-Instruct": (3072, 28, 24, 8, 8192, 128256, True),
}
# float32 weights, gradients and Adam's two moments.
BYTES_FULL = 16


def read() -> dict:
    """The published numbers: `sources`, by key, and `tables`, each of one recipe."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def _settings_of(recipe: str) -> dict:
    """The settings of a recipe's RL arm: the keys of its `grpo.yaml`."""
    return yaml.safe_load((RECIPES / recipe / "grpo.yaml").read_text(encoding="utf-8"))


def read_comparison(path: Path) -> CompareArguments:
    """
    A comparison, as `compare.py` reads it.

    Args:
        path (`Path`): Its YAML.
    Returns:
        `CompareArguments`
    """
    (arguments,) = TrlParser(CompareArguments).parse_args_and_config(["--config", str(path)])
    return arguments


def _read_summary(recipe: str, comparison: str) -> dict | None:
    """What `compare.py` found, where it was run and its results were committed."""
    # Of compare.yaml in results/, of compare_rank.yaml in results/rank/.
    folder = RECIPES / recipe / "results" / Path(comparison).stem.removeprefix("compare").removeprefix("_")
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def count_values(model: str, arguments: dict) -> int:
    """
    The number of trained values of a size, from the model's shapes.

    Args:
        model (`str`): A key of `MODEL_SHAPES`.
        arguments (`dict`): Of the adapter, as in a comparison's `sizes`.
    Returns:
        `int`
    """
    parameters, modules = _shapes(model)
    if arguments.get("adapter") == "full":
        return parameters
    if arguments.get("adapter") == "lora":
        return arguments["lora_r"] * sum(modules.values())
    adapter = AdapterArguments(**arguments)
    return adapter.u * count_groups(list(modules), adapter.n_tie, adapter.tying or TinyLoraConfig.tying)


@functools.cache
def _shapes(model: str) -> tuple[int, dict[str, int]]:
    """Number of parameters, and rows plus columns of each adapted module, by name in depth order."""
    skeletal = skeleton(config_of(MODEL_SHAPES[model]))
    names = resolve_target_modules(skeletal, TinyLoraConfig())
    parameters = sum(parameter.numel() for parameter in skeletal.parameters())
    return parameters, {name: sum(skeletal.get_submodule(name).weight.shape) for name in names}


def _ours(summary: dict | None, arm: str, size: str | None) -> str:
    """Our own greedy accuracies of one row, strict and flexible; "not run" where there are none."""
    cells = [] if summary is None else summary["cells"]
    cell = next((cell for cell in cells if (cell["arm"], cell["size"]) == (arm, size)), None)
    if cell is None:
        return NOT_RUN
    spreads = [cell["accuracy"]["greedy"][grading] for grading in ("strict", "flexible")]
    return " / ".join(
        f"{100 * spread['mean']:.1f}" + ("" if spread["std"] is None else f" ± {100 * spread['std']:.1f}")
        for spread in spreads
    )


def table(published: dict, entry: dict, comparison: CompareArguments, summary: dict | None) -> str:
    """
    One table: every arm and size of a comparison, ours beside the paper's and the replications'.

    Args:
        published (`dict`): As [`read`] returns.
        entry (`dict`): One of its `tables`.
        comparison (`CompareArguments`): That the table is of.
        summary (`dict` or `None`): As [`~comparison.summary.summarize`] returns, if there is one.
    Returns:
        `str`: Markdown: table, sources with their caveats, notes.
    Raises:
        ValueError: If a published row names an arm or a size that the comparison does not have.
    """
    lines, empty = _rows(entry, comparison, summary)
    lines += ["", "In percent. This repository's: greedy, strict / flexible, on the recipe's test problems."]
    if empty:
        rest = [label + (f" ({number} sizes)" if number > 1 else "") for label, number in empty.items()]
        lines.append(f"In the comparison too, {NOT_RUN}, and no published number: {'; '.join(rest)}.")
    lines.append("")
    for number, key in enumerate(entry["sources"]):
        source = published["sources"][key]
        name = "The paper's column" if number == 0 else f"[{key}]"
        lines.append(f"* {name}: {source['citation']}. {source['caveat']}")
    lines += [f"* {note}" for note in entry["notes"]]
    return "\n".join(lines)


def _rows(entry, comparison, summary) -> tuple[list[str], Counter]:
    """The table's lines, and how many cells of each arm have no number at all."""
    controls = {name: (control["label"], control.get("size")) for name, control in (comparison.controls or {}).items()}
    cells = [("untrained", None), *((name, size) for name, (_, size) in controls.items())]
    cells += [(arm, size) for arm in comparison.arms for size in comparison.sizes_of(arm)]
    labels = {"untrained": "untrained"} | {name: label for name, (label, _) in controls.items()}
    labels |= {name: arm["label"] for name, arm in comparison.arms.items()}
    rows = {(row["arm"], row["size"]): row for row in entry["rows"]}
    model = _settings_of(entry["recipe"])["model_name_or_path"]
    if unknown := [cell for cell in rows if cell not in cells]:
        raise ValueError(f"published.json has {unknown} for {entry['recipe']}, which its {entry['comparison']} has not")
    columns = [f"paper: {name}" if index == 0 else name for index, name in enumerate(entry["columns"])]
    header = ["arm", "trained", "values", "this repository", *columns, "replications"]
    lines, empty = [], Counter()
    for arm, size in cells:
        row, found = rows.get((arm, size)), _ours(summary, arm, size)
        if row is None and found == NOT_RUN:
            empty[labels[arm]] += 1
            continue
        row = row or {"paper": [None] * len(columns), "replications": []}
        # A control holds an adapter of that size without having trained it.
        trained = comparison.sizes[size] if arm in comparison.arms else {"label": "nothing"}
        values = count_values(model, trained["arguments"]) if arm in comparison.arms else 0
        numbers = ["-" if number is None else f"{number:.1f}" for number in row["paper"]]
        others = "; ".join(f"{item['result']} [{item['source']}]" for item in row["replications"]) or "-"
        lines.append([labels[arm], trained["label"], f"{values:,}", found, *numbers, others])
    return [grid(" | ".join(header), "llrr" + "r" * len(columns) + "l", lines)], empty


def _needs(recipe: str) -> str:
    """What a recipe needs: memory by arithmetic, and the runs of its comparisons."""
    settings = _settings_of(recipe)
    sizes = count(MODEL_SHAPES[settings["model_name_or_path"]])
    whole = sizes.weights + sizes.factors + sizes.values + sizes.activations
    parameters = sizes.weights // 2
    problems = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    problems //= settings["num_generations"]
    full = parameters * BYTES_FULL / 1e9
    lines = [
        f"A GPU that trains few values holds, in GB: weights {sizes.weights / 1e9:.1f}, factors "
        f"{sizes.factors / 1e9:.2f}, one micro-batch of {TOKENS:,} tokens {sizes.activations / 1e9:.1f}: "
        f"**{whole / 1e9:.0f}** in all. vLLM comes on top: its own weights, {sizes.weights / 1e9:.1f}, and a cache "
        f"(`vllm_gpu_memory_utilization`). Full fine-tuning in float32 with Adam takes {full:.0f} and the "
        f"activations: {math.ceil(full / 70)} or more GPUs of 80 GB under ZeRO-3. By arithmetic "
        "(`recipes/paper/memory.py`), not measured.",
        "",
        "| comparison | sizes | runs that choose rates | final runs | of them RL |",
        "|---|--:|--:|--:|--:|",
    ]
    for path in sorted((RECIPES / recipe).glob("compare*.yaml")):
        arguments = read_comparison(path)
        plan = Plan(arguments)
        sweep, final = plan.sweep(), plan.final_names()
        of_rl = sum(run.algorithm == "rl" for run in sweep) + sum(kind == "rl" for kind in final.values())
        lines.append(f"| `{path.name}` | {len(arguments.sizes)} | {len(sweep)} | {len(final)} | {of_rl} |")
    lines += [
        "",
        f"A run of `grpo.yaml` draws {settings['num_generations']} samples of {problems} problems a step, for "
        f"{settings['num_train_epochs']} passes over the training problems.",
    ]
    return "\n".join(lines)


def renewed(recipe: str, published: dict) -> str:
    """
    A recipe's README with all its sections current.

    Args:
        recipe (`str`): Name of the recipe's folder.
        published (`dict`): As [`read`] returns.
    Returns:
        `str`: The document.
    Raises:
        ValueError: If a marker is missing.
    """
    document = (RECIPES / recipe / "README.md").read_text(encoding="utf-8")
    document = replace_section(document, "needs", _needs(recipe))
    for entry in (entry for entry in published["tables"] if entry["recipe"] == recipe):
        comparison = read_comparison(RECIPES / recipe / entry["comparison"])
        content = table(published, entry, comparison, _read_summary(recipe, entry["comparison"]))
        document = replace_section(document, entry["section"], content)
    return document
