"""What the recipes add to TRL's trainers, as callbacks: a line at the start and the end, and a low precision."""

import math
import sys

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from training.arguments import AdapterArguments
from trl_tinylora.tuner.values import Vectors


def trained_values(model: nn.Module) -> list[nn.Parameter]:
    """TinyLoRA's trained values.

    Args:
        model (`torch.nn.Module`): With an adapter.
    Returns:
        `list[torch.nn.Parameter]`: One a set of values that is trained.
    """
    named = model.named_parameters()
    return [value for name, value in named if value.requires_grad and "lora_magnitude_vector" in name]


class KeptDtype(TrainerCallback):
    """
    Keeps the trained values in a low precision: after every step they are rounded to it.

    The optimizer's moments and the forward pass stay in float32, so that only the values' own precision is compared
    (figure 4 of the paper, which does not say which of them it lowers).

    Args:
        dtype (`torch.dtype`): What the values are rounded to.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def on_step_end(self, args, state, control, model, **kwargs):
        for values in trained_values(model):
            values.data.copy_(values.data.to(self.dtype))


class Watch(TrainerCallback):
    """
    Says what is trained and what came of it, and ends a run at the first number that is not finite.

    It ends before the step is saved, so that what was saved earlier stays.

    Args:
        rows (`str`): What it is trained on.
    Raises:
        FloatingPointError: At the end of a step after which a value is not finite, or where such a loss or gradient
            norm is logged.
    """

    def __init__(self, rows: str):
        self.rows = rows
        self.first: torch.Tensor | None = None

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.first = _values_of(model)
        rest = f", from step {state.global_step} on" if state.global_step else ""
        _say(
            state,
            f"Training {_described(model)}: {_counted(state.max_steps, 'step')}{rest}, learning rate "
            f"{args.learning_rate:g}, on {self.rows}",
        )

    def on_step_end(self, args, state, control, model, **kwargs):
        values = _values_of(model)
        if values is not None and not torch.isfinite(values).all():
            self._stop(args, state, f"{int((~torch.isfinite(values)).sum())} of {len(values)} values are")

    def on_log(self, args, state, control, logs, **kwargs):
        # In float16 the gradients overflow until the loss is scaled to them; such steps are skipped.
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0))):
                self._stop(args, state, f"the {name} is")

    def on_train_end(self, args, state, control, model, **kwargs):
        metric = "reward" if any("reward" in entry for entry in state.log_history) else "loss"
        logged = [entry[metric] for entry in state.log_history if metric in entry]
        changes = [f"{metric} {logged[0]:.4g} -> {logged[-1]:.4g}"] if logged else []
        last = _values_of(model)
        if last is not None:
            changes.insert(0, f"norm of v {self.first.norm():.4g} -> {last.norm():.4g}")
        _say(state, f"After {_counted(state.global_step, 'step')}: {', '.join(changes)} (first -> last)")
        if last is not None and torch.equal(self.first, last):
            spreads = [entry["frac_reward_zero_std"] for entry in state.log_history if "frac_reward_zero_std" in entry]
            why = ": no group of completions had two different rewards" if spreads and min(spreads) == 1 else ""
            _say(
                state,
                f"warning: the adapter did not change{why}. Nothing was learned; take problems that the base model "
                "solves sometimes, or a higher --learning_rate",
                sys.stderr,
            )

    def _stop(self, args, state, what: str) -> None:
        kept = get_last_checkpoint(args.output_dir)
        raise FloatingPointError(
            f"step {state.global_step}: {what} not finite. The run ends here and nothing of this step is saved; "
            + (f"{kept} is from before. " if kept else "there is no earlier checkpoint. ")
            + f"Lower --learning_rate (now {args.learning_rate:g})"
        )


def _values_of(model: nn.Module) -> torch.Tensor | None:
    """All trained values in a row, gathered where they are sharded; `None` where there are none."""
    found = [part.whole_values().flatten() for part in model.modules() if isinstance(part, Vectors) and part.is_trained]
    return torch.cat(found) if found else None


def _described(model: nn.Module) -> str:
    """What is trained, of how many parameters."""
    if not isinstance(model, PeftModel):
        return f"all {sum(getattr(part, 'ds_numel', part.numel()) for part in model.parameters()):,} parameters"
    trained, total = model.get_nb_trainable_parameters()
    config = model.peft_config[model.active_adapter]
    how = f"LoRA, r={config.r}"
    for part in model.modules():
        if isinstance(part, Vectors) and part.is_trained:
            how = f"TinyLoRA on {len(part.plan.index)} modules, r={config.r}, u={config.u}, n_tie={config.n_tie}, "
            how += config.tying
    return f"{_counted(trained, 'value')} ({how}) beside {total - trained:,} frozen parameters"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def _say(state, line: str, stream=None) -> None:
    """Prints a line, once for all processes."""
    if state.is_world_process_zero:
        print(line, file=stream or sys.stdout, flush=True)


def callbacks_for(adapter_args: AdapterArguments, training_args: TrainingArguments, rows: str) -> list[TrainerCallback]:
    """
    The callbacks of a recipe: those that the arguments ask for, and [`Watch`].

    Args:
        adapter_args (`AdapterArguments`): Read for `kept_dtype`.
        training_args ([`~transformers.TrainingArguments`]): To refuse launches that keep a copy of the values.
        rows (`str`): As of [`Watch`].
    Returns:
        `list[transformers.TrainerCallback]`
    Raises:
        ValueError: If the launcher's own copy of the values would undo the rounding.
    """
    if adapter_args.kept_dtype in (None, "float32"):
        return [Watch(rows)]
    if training_args.deepspeed_plugin is not None:
        raise ValueError(
            f"kept_dtype={adapter_args.kept_dtype!r} cannot be kept under DeepSpeed, which writes its own float32 copy "
            "over the values at every step: launch with single.yaml, ddp.yaml or fsdp2.yaml"
        )
    return [KeptDtype(getattr(torch, adapter_args.kept_dtype)), Watch(rows)]
