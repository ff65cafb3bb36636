"""What the recipes add to TRL's trainers, as a callback: values kept in a low precision."""

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from training.arguments import AdapterArguments


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


def callbacks_for(adapter_args: AdapterArguments, training_args: TrainingArguments) -> list[TrainerCallback]:
    """
    The callbacks that the arguments ask for.

    Args:
        adapter_args (`AdapterArguments`): Read for `kept_dtype`.
        training_args ([`~transformers.TrainingArguments`]): To refuse launches that keep a copy of the values.
    Returns:
        `list[transformers.TrainerCallback]`
    Raises:
        ValueError: If the launcher's own copy of the values would undo the rounding.
    """
    if adapter_args.kept_dtype in (None, "float32"):
        return []
    if training_args.deepspeed_plugin is not None:
        raise ValueError(
            f"kept_dtype={adapter_args.kept_dtype!r} cannot be kept under DeepSpeed, which writes its own float32 copy "
            "over the values at every step: launch with single.yaml, ddp.yaml or fsdp2.yaml"
        )
    return [KeptDtype(getattr(torch, adapter_args.kept_dtype))]
