"""How a recipe starts and fails: its command line, what is refused before anything is loaded, where it continues."""

import difflib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import trl
import yaml
from torch import nn
from transformers import AutoConfig, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from training.arguments import AdapterArguments, RecipeArguments
from training.rate import refuse_unfit_optimizer
from trl_tinylora import TinyLoraModel
from trl_tinylora.sources import ADAPTER_FILE, MODEL_FILE, refuse_unfit_base
from trl_tinylora.storage.checkpoint import read_fields


DEBUG = "TRL_TINYLORA_DEBUG"
# What wrong arguments and files raise. Anything else (a bug, memory that ran out) is shown with its traceback.
EXPECTED = (ValueError, TypeError, OSError, ImportError, NotImplementedError, FloatingPointError, yaml.YAMLError)
# What trainers take whatever it is, or refuse once the model is loaded.
COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "max_completion_length")
TEXTS = ("model_name_or_path", "dataset_name", "output_dir", "adapter_path")
# Of TinyLoRA. GRPOConfig's default, 1e-6, is meant for whole models.
LOWEST_LEARNING_RATE = 1e-5
KINDS = {"TRL_TINYLORA": "tinylora", "LORA": "lora"}


class _Parser(trl.TrlParser):
    """TRL's parser, with errors of one line."""

    def error(self, message: str):
        raise ValueError(message)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        self._refuse(unknown)
        _refuse_out_of_bounds(vars(namespace))
        return namespace, unknown

    def set_defaults_with_config(self, **settings):
        # Of those that take one value, and no list of them.
        types = {action.dest: action.type for action in self._actions if action.nargs not in ("+", "*")}
        for name, value in settings.items():
            # argparse converts texts.
            if value is None or isinstance(value, str):
                continue
            if name in TEXTS:
                raise ValueError(f"{name} must be a text, got {value!r}")
            if types.get(name) in (int, float) and not isinstance(value, (int, types[name])):
                raise ValueError(f"{name} must be a number of type {types[name].__name__}, got {value!r}")
        unknown = super().set_defaults_with_config(**settings)
        self._refuse(unknown)
        return unknown

    def _refuse(self, unknown: list[str]) -> None:
        if unknown:
            name = unknown[0].partition("=")[0]
            alike = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.8)
            meant = f": did you mean {alike[0]}?" if alike else ""
            raise ValueError(f"there is no argument {name}{meant} (--help lists all)")


def _refuse_out_of_bounds(given: dict) -> None:
    """Raises `ValueError` where a number is out of its bounds, of the arguments by name."""
    for name in COUNTS:
        if given.get(name) is not None and given[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {given[name]}")
    steps, rate, temperature = given.get("max_steps"), given.get("learning_rate"), given.get("temperature")
    if steps is not None and steps < 1 and steps != -1:
        raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {steps}")
    if rate is not None and not 0 <= rate < math.inf:
        raise ValueError(f"learning_rate must be finite and at least 0, got {rate}")
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")


def refuse_unfit_folder(output_dir: str) -> None:
    """
    Raises where no folder can be written.

    Args:
        output_dir (`str`): The folder, there or not.
    Raises:
        FileExistsError: If it is a file, or would lie in one.
        ValueError: If it is empty.
    """
    if not output_dir:
        raise ValueError("output_dir is empty: name a folder by --output_dir")
    for path in (Path(output_dir), *Path(output_dir).parents):
        if path.is_file():
            which = "is a file" if path == Path(output_dir) else f"lies in {str(path)!r}, a file"
            raise FileExistsError(f"output_dir={output_dir!r} {which}: name a folder by --output_dir")


def run(main: Callable, arguments: Iterable[type]) -> Any:
    """
    Runs a recipe on the process's command line; what the user can mend ends it in one line, with exit status 1.

    With `TRL_TINYLORA_DEBUG=1` in the environment it ends in its traceback.

    Args:
        main (`Callable`): The recipe.
        arguments (`Iterable[type]`): The dataclasses that it takes.
    Returns:
        `Any`: What the recipe returns.
    Raises:
        SystemExit: With status 1.
    """
    try:
        if len(sys.argv) == 1 or sys.argv[-1] == "--config":
            raise ValueError("no recipe is named: give --config FILE, as recipes/toy/sft.yaml, or see --help")
        return main(*_Parser(arguments).parse_args_and_config())
    except EXPECTED as error:
        if os.environ.get(DEBUG):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def prepare(
    script_args: RecipeArguments,
    training_args: TrainingArguments,
    model_args: trl.ModelConfig,
    adapter_args: AdapterArguments,
) -> str | None:
    """
    Refuses what cannot be trained, before anything is loaded, and finds the checkpoint that the training continues.

    Args:
        script_args (`RecipeArguments`): The rows.
        training_args ([`~transformers.TrainingArguments`]): The trainer's own arguments.
        model_args ([`~trl.ModelConfig`]): The model.
        adapter_args (`AdapterArguments`): What is trained.
    Returns:
        `str` or `None`: As of [`resume_point`].
    Raises:
        ValueError: If an argument is missing, or names no base model, the checkpoint's adapter is of another kind,
            vLLM is to sample from a quantised base, or the optimiser is none that `relative_kl` is for.
        FileExistsError, FileNotFoundError: As of [`resume_point`].
    """
    refuse_missing(script_args, model_args)
    refuse_miscounted_processes(training_args)
    checkpoint = resume_point(training_args)
    if checkpoint is not None:
        _refuse_another_kind(Path(checkpoint), adapter_args.adapter)
    refuse_unfit_base(model_args.model_name_or_path, model_args.model_revision)
    _refuse_vllm_of_quantised(training_args, model_args, adapter_args)
    refuse_unfit_optimizer(script_args, training_args)
    rate = training_args.learning_rate
    if adapter_args.adapter == "tinylora" and script_args.relative_kl is None and rate < LOWEST_LEARNING_RATE:
        warnings.warn(
            f"learning_rate={rate:g} moves TinyLoRA's values by about that much a step, which changes the model hardly "
            f"at all. Take {LOWEST_LEARNING_RATE:g} or more; the recipes take 1e-4 for 13 values.",
            stacklevel=2,
        )
    return checkpoint


def refuse_missing(script_args: RecipeArguments, model_args: trl.ModelConfig) -> None:
    """
    Raises where a recipe names no model or no rows.

    Args:
        script_args (`RecipeArguments`): The rows.
        model_args ([`~trl.ModelConfig`]): The model.
    Raises:
        ValueError: With the argument to give.
    """
    for name, given in (
        ("model_name_or_path", model_args.model_name_or_path),
        ("dataset_name", script_args.dataset_name),
    ):
        if given is None:
            raise ValueError(f"{name} is missing: give --{name}, or a recipe that names it by --config")


def _refuse_vllm_of_quantised(
    training_args: TrainingArguments, model_args: trl.ModelConfig, adapter_args: AdapterArguments
) -> None:
    """Raises `ValueError` where TRL would merge TinyLoRA into quantised weights for vLLM, or vLLM load others."""
    if not getattr(training_args, "use_vllm", False) or adapter_args.adapter != "tinylora":
        return
    given = trl.get_quantization_config(model_args) or (training_args.model_init_kwargs or {}).get(
        "quantization_config"
    )
    if given is None:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
        given = getattr(config, "quantization_config", None)
    if given is not None:
        raise ValueError(
            "use_vllm with a quantised base: merged into its weights, the update would be rounded away, and vLLM would "
            "load other weights than these. Set use_vllm to false, or drop the quantisation; docs/bases.md has what a "
            "trainer of your own can do"
        )


def refuse_another_adapter(model: nn.Module, checkpoint: str | None) -> None:
    """
    Raises where the values in a checkpoint would mean something else to the adapter that is to be trained on.

    Args:
        model (`torch.nn.Module`): The trainer's.
        checkpoint (`str` or `None`): As of [`resume_point`].
    Raises:
        ValueError: If r, tying, projection, its seed or the modules differ; the message names both.
    """
    tuner = getattr(model, "base_model", None)
    if checkpoint is not None and isinstance(tuner, TinyLoraModel):
        tuner.refuse_checkpoint(checkpoint)


def refuse_miscounted_processes(training_args: TrainingArguments) -> None:
    """
    Raises where the processes of a launch do not see each other: each would train on all rows by itself.

    Args:
        training_args ([`~transformers.TrainingArguments`]): Read for `world_size`.
    Raises:
        ValueError: If the launcher started another number of processes than the trainer counts.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != training_args.world_size:
        raise ValueError(
            f"the launcher started {started} processes, but the trainer counts {training_args.world_size}. Without a "
            "GPU, DeepSpeed needs `use_cpu: true` in the YAML (or --use_cpu true)."
        )


def resume_point(training_args: TrainingArguments) -> str | None:
    """
    The checkpoint where the trainer continues, and the refusal to write over what is already in the output folder.

    Args:
        training_args ([`~transformers.TrainingArguments`]): Read for `output_dir`, `resume_from_checkpoint`,
            `max_steps` and `num_train_epochs`.
    Returns:
        `str` or `None`: For `trainer.train(resume_from_checkpoint=...)`: a checkpoint (for "true" the last complete one
        in the output folder), or `None` for a new run.
    Raises:
        FileExistsError: If a new run would write over a finished or an interrupted one, or the folder is a file.
        FileNotFoundError: If there is no checkpoint to continue from.
        ValueError: If the checkpoint has all the steps that were asked for.
    """
    refuse_unfit_folder(training_args.output_dir)
    output_dir = Path(training_args.output_dir)
    # The trainer's own; somebody's "checkpoint-best" has no place in their order.
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    checkpoints = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in checkpoints if _state_of(path) is not None]
    wanted = str(training_args.resume_from_checkpoint or "false")
    # The trainer takes the text "true", all that a command line can give, for the name of a folder.
    if wanted.lower() == "true":
        if not complete:
            raise FileNotFoundError(
                f"resume_from_checkpoint is true, but output_dir={training_args.output_dir!r} holds no "
                f"{'complete ' if checkpoints else ''}checkpoint: start anew without it, in another folder if this one "
                "is not empty (checkpoints are written where save_strategy is 'steps' or 'epoch')"
            )
        wanted = str(complete[-1])
    elif wanted.lower() != "false":
        if not Path(wanted).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint={wanted!r} is no folder")
        if _state_of(Path(wanted)) is None:
            raise FileNotFoundError(
                f"resume_from_checkpoint={wanted!r} is no complete checkpoint: its writing was interrupted. Take an "
                "earlier one; 'true' takes the last complete one in output_dir"
            )
    if wanted.lower() != "false":
        if _is_at_the_end(Path(wanted), training_args):
            raise ValueError(
                f"{wanted} is at the last step of this run (max_steps={training_args.max_steps}, num_train_epochs="
                f"{training_args.num_train_epochs:g}): nothing is left to train, and it holds what was trained. Raise "
                "one of the two to train on"
            )
        return wanted
    is_finished = any((output_dir / name).exists() for name in (ADAPTER_FILE, MODEL_FILE))
    if is_finished or checkpoints:
        state = "a finished run" if is_finished else "the checkpoints of an interrupted run"
        can_continue = complete and not _is_at_the_end(complete[-1], training_args)
        raise FileExistsError(
            f"output_dir={training_args.output_dir!r} already holds {state}: choose another --output_dir, delete "
            "the folder" + (", or continue with --resume_from_checkpoint true" if can_continue else "")
        )
    return None


def _state_of(checkpoint: Path) -> dict | None:
    """The trainer's state, the last file that it writes (transformers 5.23, trainer.py:3409); `None` without it."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(state, dict) and isinstance(state.get("global_step", 0), int)
    return state if is_whole and isinstance(state.get("epoch") or 0, (int, float)) else None


def _is_at_the_end(checkpoint: Path, training_args: TrainingArguments) -> bool:
    """Whether a trainer would have no step left: it makes one more all the same."""
    state = _state_of(checkpoint)
    if training_args.max_steps > 0:
        return state.get("global_step", 0) >= training_args.max_steps
    return (state.get("epoch") or 0) >= training_args.num_train_epochs


def _refuse_another_kind(checkpoint: Path, adapter: str) -> None:
    """Raises `ValueError` where a checkpoint's adapter is of another kind than the one to be trained."""
    path = checkpoint / ADAPTER_FILE
    kind = read_fields(path).get("peft_type") if path.is_file() else "full"
    if KINDS.get(kind, kind) != adapter:
        raise ValueError(
            f"{checkpoint} was made with adapter={KINDS.get(kind, kind)!r}, but adapter is {adapter!r}: give --adapter "
            f"{KINDS.get(kind, kind)}, or start anew in another --output_dir"
        )
