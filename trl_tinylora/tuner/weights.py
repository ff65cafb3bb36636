"""What can be adapted in a model: linear layers, quantised ones and fused experts, and the weights that they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed import full_shape
from .quantised import of_bitsandbytes_4bit, of_bitsandbytes_8bit, of_torchao


# The base layers that are known: what they compute is a product with their weight, in a dtype that has an SVD. A class
# derived from them that computes something else (a quantised layer) is none of them. Conv1D keeps its weight as
# (in_features, out_features).
KNOWN_LAYERS = (nn.Linear, Conv1D)
# Derived from `nn.Linear`, and the same product: Falcon adds its bias after a rounding of its own.
KNOWN_DERIVED = {"transformers.models.falcon.modeling_falcon.FalconLinear"}
KNOWN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The quantised ones, by the class of the layer or, in a `nn.Linear`, of its weight, and what gives the weight that they
# compute with. Each was tried: its products, and the gradient of its input, are those of that weight.
KNOWN_QUANTISED = {
    "bitsandbytes.nn.modules.Linear4bit": of_bitsandbytes_4bit,
    "bitsandbytes.nn.modules.Linear8bitLt": of_bitsandbytes_8bit,
    "torchao.quantization.Int8Tensor": of_torchao,
    "torchao.quantization.IntxUnpackedToInt8Tensor": of_torchao,
    "torchao.quantization.Float8Tensor": of_torchao,
}


class Holder(NamedTuple):
    """
    A parameter that holds adapted matrices: the weight of a linear layer, or fused experts.

    Args:
        module (`str`): Name of the module that has it.
        parameter (`str`): Its name there.
        names (`tuple[str, ...]`): The matrices' names, in order: the module's, or one for each expert.
    """

    module: str
    parameter: str
    names: tuple[str, ...]


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the linear layer itself where an adapter layer is around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_known(linear: nn.Module) -> bool:
    """Returns whether a layer computes the product with its weight, in floating point or not."""
    return any(type(linear).forward is known.forward for known in KNOWN_LAYERS) or _computes_as(linear) in KNOWN_DERIVED


def dequantisation_of(linear: nn.Module) -> Optional[Callable[[nn.Module], torch.Tensor]]:
    """Returns what gives the weight of a quantised layer that is known, or None for any other one."""
    if type(linear).forward is not nn.Linear.forward:
        return KNOWN_QUANTISED.get(_computes_as(linear))
    weight = type(getattr(linear, "weight", None))
    return KNOWN_QUANTISED.get(f"{weight.__module__}.{weight.__qualname__}")


def _computes_as(linear: nn.Module) -> str:
    """The class whose forward pass a layer has: one that is derived from a known one may compute something else."""
    forward = type(linear).forward
    return f"{forward.__module__}.{forward.__qualname__}".removesuffix(".forward")


def is_quantised(linear: nn.Module) -> bool:
    """Returns whether a layer's weight is one of [`KNOWN_QUANTISED`], into which no update can be merged."""
    return dequantisation_of(linear) is not None


def shape_of(linear: nn.Module) -> tuple[int, ...]:
    """Returns the shape of the weight that a linear layer computes with, whatever it is packed into."""
    if is_quantised(linear) or not hasattr(linear, "weight"):
        return linear.out_features, linear.in_features
    return full_shape(linear.weight)


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Returns the weight that a linear layer computes with: its own, or what a quantised one stands for.

    Raises:
        ValueError: If a quantised layer has none; the message says why.
    """
    dequantised = dequantisation_of(linear)
    return linear.weight.data if dequantised is None else dequantised(linear).detach()


def as_OI(linear: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Returns a view of a linear layer's weight as (out_features, in_features)."""
    return weight.T if isinstance(linear, Conv1D) else weight


def expert_names(module: str, experts: nn.Module) -> dict[str, tuple[str, ...]]:
    """Returns the names of fused experts' matrices, `module.parameter.expert`, by parameter, in the order of use."""
    parameters = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    return {
        parameter: tuple(f"{module}.{parameter}.{expert}" for expert in range(experts.num_experts))
        for parameter in parameters
    }


def is_fused_experts(module: nn.Module) -> bool:
    """Returns whether a module's experts are of a class that transformers' `use_experts_implementation` made."""
    return all(
        hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "_apply_gate", "num_experts")
    )


def holders(model: nn.Module, names: Sequence[str]) -> list[Holder]:
    """Returns the parameters that hold matrices, by the matrices' names, in their order."""
    modules, found = {name for name, _ in model.named_modules()}, {}
    for name in names:
        module, parameter = (name, "weight") if name in modules else name.rsplit(".", 2)[:2]
        found.setdefault((module, parameter), []).append(name)
    return [Holder(*place, tuple(matrices)) for place, matrices in found.items()]


def matrices(layer: nn.Module, parameter: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields views of the matrices in a parameter of a base layer, each as (out_features, in_features)."""
    if weight.ndim == 3:
        yield from (weight.mT if layer.is_transposed else weight)
    else:
        yield as_OI(layer, weight)


def each_matrix(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the adapted matrices of a model that carries no adapter and is whole, by name, in their order."""
    for place in holders(model, names):
        layer = model.get_submodule(place.module)
        weight = weight_of(layer) if place.parameter == "weight" else getattr(layer, place.parameter).data
        yield from zip(place.names, matrices(layer, place.parameter, weight), strict=True)
