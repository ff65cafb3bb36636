"""
The weight that a quantised linear layer computes with, in floating point, by its library's own function.

Imports no library: a layer of one is there only where somebody has imported it.
"""

from __future__ import annotations

import torch
from torch import nn


def of_bitsandbytes_4bit(linear: nn.Module) -> torch.Tensor:
    """Returns the weight of a `bitsandbytes.nn.Linear4bit`, in the dtype that it was quantised from.

    Raises:
        ValueError: If it is not quantised yet, or repacked for inference.
    """
    from bitsandbytes.functional import dequantize_4bit

    weight = linear.weight
    if getattr(weight, "quant_state", None) is None:
        raise ValueError(_not_yet(linear))
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        # The library's own inverse leaves the scales transposed (bitsandbytes 0.50.2, functional.py:1730-1795).
        raise ValueError(
            "bitsandbytes has repacked its weight for inference on this CPU (AVX512-BF16), which cannot be undone. "
            "Make or load the adapter before the model's first forward pass in evaluation mode"
        )
    return dequantize_4bit(weight.data, weight.quant_state)


def of_bitsandbytes_8bit(linear: nn.Module) -> torch.Tensor:
    """Returns the weight of a `bitsandbytes.nn.Linear8bitLt`, in float32.

    Raises:
        ValueError: If it is not quantised yet, or kept in 16 bits and quantised in every pass.
    """
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight = linear.weight
    # The first forward pass moves the scales from the weight to the layer's state.
    scales = linear.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
    if scales is None or weight.dtype != torch.int8:
        raise ValueError(_not_yet(linear))
    return int8_vectorwise_dequant(weight.data, scales.to(weight.device))


def of_torchao(linear: nn.Module) -> torch.Tensor:
    """Returns the weight of a linear layer with a quantised tensor of torchao's, in the dtype that it stands for.

    Raises:
        ValueError: If the layer quantises its inputs as well, through which torchao passes no gradient.
    """
    weight = linear.weight
    for name in ("act_quant_kwargs", "activation_quantization"):
        if getattr(weight, name, None) is not None:
            raise ValueError(
                f"its torchao weight has {name}={getattr(weight, name)!r}: the inputs are quantised too, and no "
                "gradient passes through that. Load the model with a weight-only configuration, as "
                "`Int8WeightOnlyConfig`"
            )
    return weight.dequantize()


def _not_yet(linear: nn.Module) -> str:
    return (
        f"this {type(linear).__name__} holds {linear.weight.dtype} numbers that are not quantised yet. Load the model "
        "by `from_pretrained` with its `quantization_config` (without `llm_int8_has_fp16_weight`), or move it to its "
        "device first"
    )
