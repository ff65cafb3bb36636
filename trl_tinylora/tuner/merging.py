"""
Merging adapters into a weight, and restoring it bit for bit: `W' = W + D` in float32, rounded once, `D = U S R V^T`.

Rounding loses bits of W which subtracting D does not bring back. So the original tensor is set aside, and restoring
puts it back in place of the merged one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..distributed import is_partitioned, set_local_data, shard_like, whole
from ..maths.decomposition import sum_of_outer_products


# Entries at a time: 1 MiB in float32 in a CPU's cache; on an accelerator, enough to be worth a launch.
CHUNK_ON_CPU = 2**18
CHUNK_ELSEWHERE = 2**22
# The part of a GPU's memory that must stay free for original weights to be set aside there.
HEADROOM = 1 / 16


def merged_weight(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """
    Returns `W' = W + left @ right`, computed in the factors' dtype and rounded once to the weight's.

    The bits do not depend on the chunks of rows that it is computed in, on the number of threads or on the device.

    Args:
        weight (`torch.Tensor`): W, shape `(rows, columns)`, or of several experts `(experts, rows, columns)`; an
            ordinary tensor on any device or a `DTensor`.
        left (`torch.Tensor`): `U S R`, shape `(rows, r)`, float32 or float64; of several adapters, side by side. For a
            transposed weight `V`. Of experts with their number in front.
        right (`torch.Tensor`): `V^T`, shape `(r, columns)`, of the same dtype and device. For a transposed weight
            `(U S R)^T`. Of experts with their number in front.

    Returns:
        `torch.Tensor` of W's shape, strides and dtype, sharded as it is, on the factors' device.
    """
    if isinstance(weight, DTensor):
        wide = weight.to(left.dtype)
        return (wide + shard_like(sum_of_outer_products(left, right), wide)).to(weight.dtype)
    merged = torch.empty_like(weight, device=left.device)
    if weight.ndim == 3:
        for expert, parts in enumerate(zip(weight, left, right, strict=True)):
            merged[expert] = merged_weight(*parts)
        return merged
    chunk = CHUNK_ON_CPU if left.device.type == "cpu" else CHUNK_ELSEWHERE
    step = max(chunk // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        merged[rows] = sum_of_outer_products(left[rows], right).add_(weight[rows].to(left.device))
    return merged


def set_aside(original: torch.Tensor) -> torch.Tensor:
    """Returns what a weight is restored from: the original, or a copy in host memory where a GPU is nearly full."""
    return original if isinstance(original, DTensor) or has_room(original.device) else original.cpu()


def has_room(device: torch.device) -> bool:
    """Returns whether a sixteenth of a GPU's memory is free or reserved by torch and not used; elsewhere, True."""
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused >= HEADROOM * total


def restore(weight: nn.Parameter, original: torch.Tensor) -> None:
    """Puts the original in the merged weight's place, bit for bit."""
    # Partitioned again, a weight of ZeRO-3 has lost what was merged into it: its parts are the original's.
    if not is_partitioned(weight):
        set_local_data(weight, original.to(weight.device))


def refuse_not_finite(merged: torch.Tensor, names: Sequence[str]) -> None:
    """Raises where a merge overflows.

    Raises:
        ValueError: If an entry is not finite.
    """
    if not whole(torch.isfinite(merged).all()):
        raise ValueError(
            f"merging {', '.join(names)} gives weights that are not finite in {merged.dtype}. Check the adapter's "
            "values with `print(model.state_dict())`, or merge into a model of a wider dtype."
        )
