"""Which modules of a model are adapted, and whether they can be: checked before anything is changed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Union

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..distributed import full_shape, refuse_tensor_parallel


if TYPE_CHECKING:
    from ..config import TinyLoraConfig


# Conv1D keeps its weight as (in_features, out_features).
ADAPTABLE = (nn.Linear, Conv1D)


def skeleton(model_or_config: Union[nn.Module, PretrainedConfig]) -> nn.Module:
    """Returns a model whose module names can be read; a configuration becomes one without weights."""
    if not isinstance(model_or_config, PretrainedConfig):
        return model_or_config
    with torch.device("meta"):
        if type(model_or_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            # `from_config` would build it under zero.Init where a trainer's arguments have turned ZeRO-3 on.
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(model_or_config)](model_or_config)
        return AutoModelForCausalLM.from_config(model_or_config)


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the linear layer itself where an adapter layer is around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def as_OI(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Returns a view of a linear layer's weight as (out_features, in_features)."""
    return weight.T if isinstance(linear, Conv1D) else weight


def resolve_target_modules(model: nn.Module, config: TinyLoraConfig) -> list[str]:
    """
    Returns the names of the modules that a configuration adapts, in depth order, by PEFT's own rules.

    Args:
        model (`torch.nn.Module`): The base model; it may carry adapters already, and needs no weights.
        config ([`TinyLoraConfig`]): Its `target_modules` is left as it is.

    Returns:
        `list[str]`

    Raises:
        ValueError: If nothing matches, a match is not a linear layer, or `r` exceeds a module's dimensions.
        NotImplementedError: If the model is split by tensor parallelism.
    """
    refuse_tensor_parallel(model)
    asked_for = config.target_modules
    # For "all-linear" PEFT finds the output embedding of a `PreTrainedModel` only; other models name their targets.
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    inside_adapters = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer) and name
    )
    names = [
        name
        for name, _ in model.named_modules()
        if name and not name.startswith(inside_adapters) and check_target_module_exists(config, name)
    ]
    if not names:
        linear = [name for name, module in model.named_modules() if isinstance(unwrap(module), ADAPTABLE)]
        raise ValueError(
            f"target_modules={asked_for!r} with exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} matches no module. Linear layers of this model: "
            f"{', '.join(linear[:8]) or 'none'}{', ...' if len(linear) > 8 else ''}."
        )
    for name in names:
        linear = unwrap(model.get_submodule(name))
        if not isinstance(linear, ADAPTABLE):
            raise ValueError(
                f"target_modules={asked_for!r} matches {name}, a {type(linear).__name__}; TinyLoRA adapts "
                "`torch.nn.Linear` and `Conv1D`. Name linear layers only, or put it into `exclude_modules`."
            )
        shape = full_shape(linear.weight)
        if len(shape) != 2:
            raise ValueError(
                f"the weight of {name} has shape {shape}: it is not loaded, or sharded by something other than ZeRO-3 "
                "and FSDP2, and its singular values cannot be computed. Build the adapter on a whole model."
            )
        if config.r > min(shape):
            raise ValueError(
                f"r={config.r} exceeds the rank {min(shape)} that {name} of shape {shape} can have. "
                f"Lower `r` to {min(shape)} or put the module into `exclude_modules`."
            )
    return names
