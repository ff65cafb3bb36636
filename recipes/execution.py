"""What a run of a comparison does: train and evaluate, evaluate alone, draw samples, or map the reward."""

import hashlib
import json
import math
from dataclasses import fields
from enum import Enum
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from arguments import AdapterArguments, build_peft_config
from callbacks import TrainedPath, trained_values
from completions import read_lines, write_text
from evaluate import evaluate
from generation import GenerationArguments, load_model
from peft import get_peft_model
from plan import SCRIPTS, Run
from tqdm.auto import tqdm

from trl_tinylora.tasks import get_task


MAX_RECORDED_VALUES = 256
# A path of more values cannot be drawn.
MAX_PATH_VALUES = 2
CURVES = (
    "reward",
    "completions/mean_length",
    "entropy",
    "clip_ratio/region_mean",
    "frac_reward_zero_std",
    "loss",
    "mean_token_accuracy",
)


def do(run: Run, folder: Path) -> dict:
    """
    Does a run.

    Args:
        run (`Run`): What to do.
        folder (`Path`): For its model, completions and samples.
    Returns:
        `dict`: What its record says beside the plan.
    """
    if run.phase in ("sweep", "final"):
        return _train(run, folder)
    if run.phase == "samples":
        return _draw_samples(run, folder)
    if run.phase == "landscape":
        return _map_reward(run)
    return _evaluate_untrained(run, folder)


def _load(run: Run):
    """The model as its recipe loads it, with the run's adapter, if it has one."""
    names = ("model_name_or_path", "model_revision", "dtype")
    model_args = trl.ModelConfig(**{key: run.settings[key] for key in names if key in run.settings})
    name, revision = model_args.model_name_or_path, model_args.model_revision
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    model = load_model(model_args, device_map="auto" if torch.cuda.is_available() else None)
    if "adapter" in run.options:
        model = get_peft_model(model, build_peft_config(AdapterArguments(**run.options["adapter"]), model_args))
    return model, tokenizer


def _evaluate_untrained(run: Run, folder: Path) -> dict:
    model, tokenizer = _load(run)
    record = {"seed": run.options.get("seed"), "trained_values": 0, "trained_bytes": 0}
    if run.options.get("kind") == "random-values":
        (values,) = trained_values(model)
        direction = np.random.default_rng(run.options["seed"]).standard_normal(values.numel())
        direction *= run.options["norm"] / np.linalg.norm(direction)
        set_values(model, direction.tolist())
        record["values"] = direction.tolist()
    return record | {"metrics": _metrics(run, model, tokenizer, folder)}


def set_values(model: torch.nn.Module, numbers: list[float]) -> None:
    """
    Sets the trained values of a model's only adapter.

    Args:
        model (`torch.nn.Module`): With a TinyLoRA adapter.
        numbers (`list[float]`): One a value, group by group.
    """
    (values,) = trained_values(model)
    with torch.no_grad():
        values.copy_(torch.tensor(numbers, dtype=values.dtype).reshape(values.shape))


def _rows(run: Run) -> list[dict]:
    evaluation = run.evaluation
    task, config = get_task(evaluation["task"]), run.settings.get("dataset_config")
    return list(task.load_rows(evaluation["dataset_name"], evaluation["split"], config, evaluation["limit"]))


def _generation(run: Run) -> GenerationArguments:
    return GenerationArguments(**{item.name: run.evaluation[item.name] for item in fields(GenerationArguments)})


def _metrics(run: Run, model, tokenizer, folder: Path) -> dict:
    return evaluate(model, tokenizer, _rows(run), _generation(run), folder / "completions.jsonl")


def _draw_samples(run: Run, folder: Path) -> dict:
    """
    The untrained model's own right answers, one a problem at most, as rows of the task: `answer` is what it wrote.

    The first right sample of each problem, so that easy problems are not in it more often than hard ones.
    """
    model, tokenizer = _load(run)
    rows = _rows(run)
    # No greedy completion is taken.
    metrics = evaluate(model, tokenizer, rows, _generation(run), folder / "completions.jsonl", kinds=("sampled",))
    kept: dict[int, dict] = {}
    for line in read_lines(folder / "completions.jsonl"):
        if line["strict"] and line["problem"] not in kept:
            # GSM8K's demonstrations are in its answers, MATH's in its solutions.
            own = dict.fromkeys(("answer", "solution"), line["completion"])
            kept[line["problem"]] = {"question": rows[line["problem"]]["question"]} | own
    if not kept:
        raise ValueError(
            f"none of {metrics['samples']} samples of {len(rows)} problems is right: there is nothing of its own to "
            "train on. Raise own_samples, or drop the arm"
        )
    text = "".join(json.dumps(kept[problem]) + "\n" for problem in sorted(kept))
    write_text(folder / f"{run.settings.get('dataset_train_split', 'train')}.jsonl", text)
    sampled = metrics["sampled"]
    return {
        "seed": run.evaluation["eval_seed"],
        "examples": len(kept),
        "problems": len(rows),
        "generated_tokens": sampled["tokens"],
        "accuracy": sampled["strict"]["accuracy"],
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _map_reward(run: Run) -> dict:
    """The mean reward of samples, and greedy accuracy, over a grid of values."""
    model, tokenizer = _load(run)
    rows = _rows(run)
    axes = [np.linspace(-reach, reach, run.options["points"]).tolist() for reach in run.options["reach"]]
    found: dict[str, list[float]] = {"sampled": [], "greedy": []}
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    for point in tqdm(points, desc="reward", unit="point"):
        set_values(model, point.tolist())
        metrics = evaluate(model, tokenizer, rows, _generation(run))
        for kind, values in found.items():
            values.append(metrics[kind]["strict"]["accuracy"])
    shape = [len(axis) for axis in axes]
    reward, greedy = (np.reshape(found[kind], shape).tolist() for kind in ("sampled", "greedy"))
    return {"seed": run.options["seed"], "grid": axes, "reward": reward, "greedy": greedy, "n_problems": len(rows)}


def _train(run: Run, folder: Path) -> dict:
    recipe = SCRIPTS[run.algorithm]
    settings = run.settings | {"output_dir": str(folder / "model"), "disable_tqdm": True}
    if "samples" in run.options:
        # Drawn from the training problems; the test problems stay those of `run.evaluation`.
        settings["dataset_name"] = str(folder.parent / run.options["samples"])
    parsed = trl.TrlParser(recipe.ARGUMENTS).parse_dict(settings)
    path = TrainedPath(MAX_PATH_VALUES)
    trainer = recipe.main(*parsed, callbacks=[path])
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    count = sum(value.numel() for value in trained.values())
    kept_dtype = parsed[-1].kept_dtype
    size_of = getattr(torch, kept_dtype).itemsize if kept_dtype else None

    logs = [entry for entry in state.log_history if "loss" in entry or "reward" in entry]
    rows = state.global_step * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    generated = 0
    if run.algorithm == "rl":
        rows //= args.num_iterations
        lengths = [entry["completions/mean_length"] for entry in logs]
        generated = round(sum(lengths) / len(lengths) * rows)
        rows //= args.num_generations
    record = {
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "config": _resolved(parsed),
        "trained_values": count,
        "trained_bytes": sum(value.numel() * (size_of or value.element_size()) for value in trained.values()),
        "trained": {name: value.tolist() for name, value in trained.items()} if count <= MAX_RECORDED_VALUES else None,
        "optimizer_steps": state.global_step,
        "examples": rows,
        "generated_tokens": generated,
        "trained_tokens": round(max(entry.get("num_tokens", 0) for entry in logs)),
        "train_seconds": round(path.seconds, 1),
        "curve": {"step": [entry["step"] for entry in logs]}
        | {key: [_number(entry.get(key)) for entry in logs] for key in CURVES if any(key in entry for entry in logs)},
    }
    if "samples" in run.options:
        # Of the run that drew them: where they lay says nothing to others.
        record["config"]["dataset_name"] = run.options["samples"]
    if path.points:
        record["path"] = path.points
    return record | {"metrics": _metrics(run, model, trainer.processing_class, folder)}


def _number(value) -> float | None:
    """What JSON can hold: it has no infinity and no NaN."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _resolved(parsed) -> dict:
    """Every argument of ours and TRL's that is not at its default, whatever it was that set it."""
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
