"""All that this package knows of DeepSpeed and FSDP: tensors of which a process holds only its share.

Under ZeRO-3 a parameter is empty (shape `(0,)`) until it is gathered; under FSDP2 it is a `DTensor`; under torch's
older FSDP it is flat and cut, and a view of the gathered whole stands in its place during a pass. Every function
here is the identity on ordinary tensors, and imports neither DeepSpeed nor anything of FSDP unless it meets one of
theirs. Gathering is a collective operation: all processes have to get there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Returns the shape of the whole tensor, whatever this process holds of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Returns whether ZeRO-3 has this parameter partitioned at the moment, so that it cannot be read."""
    return hasattr(parameter, "ds_shape") and parameter.shape != parameter.ds_shape


def is_sharded(parameter: torch.Tensor) -> bool:
    """Returns whether the tensor is sharded over processes, whether or not it is gathered at the moment."""
    return hasattr(parameter, "ds_shape") or isinstance(parameter, DTensor)


def is_fsdp(module: nn.Module) -> bool:
    """Returns whether FSDP2 gathers and releases this module's parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_lent(parameter: torch.Tensor) -> bool:
    """Returns whether torch's older FSDP has put a view into a parameter's place, which lives for one pass."""
    return parameter.requires_grad and not parameter.is_leaf


def refuse_unit_of_its_own(holder: nn.Module, values: Optional[torch.Tensor], shape: tuple[int, ...]) -> None:
    """
    Raises where torch's older FSDP has wrapped the values by themselves.

    Args:
        holder (`torch.nn.Module`): What holds the values of all adapters.
        values (`torch.Tensor` or `None`): Those of one adapter, in a forward pass of the model.
        shape (`tuple[int, ...]`): What they have to have when they are gathered.

    Raises:
        NotImplementedError: If they are not gathered where the model is called.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    is_flat = values is not None and not is_sharded(values) and tuple(values.shape) != tuple(shape)
    if is_flat or isinstance(holder, fsdp.FullyShardedDataParallel):
        raise NotImplementedError(
            "the trained values are wrapped by themselves in `FullyShardedDataParallel`, which gathers them in a "
            "forward pass of theirs only, and they have none. Wrap the model and its blocks alone (an "
            "`auto_wrap_policy` of the block's class), or use FSDP2 (recipes/accelerate/fsdp2.yaml)."
        )


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raises where each process computes with a part of a layer, and not with the whole of a gathered one.

    Raises:
        NotImplementedError: If transformers loaded it with tensor parallelism.
    """
    size = getattr(model, "tp_size", None) or 1
    if size > 1:
        raise NotImplementedError(
            f"the model is split by tensor parallelism over {size} processes, of which none sees a whole layer. Shard "
            "it by FSDP2 (`DistributedConfig(fsdp_size=...)`) or DeepSpeed ZeRO-3."
        )


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Makes ZeRO-3's parameters whole inside the context, for reading; those that are whole stay as they are."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole tensor that a `DTensor` is this process's share of."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns a whole tensor, the same on every process, sharded as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    # No communication: every process cuts its share out of its own copy.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def local_data(parameter: nn.Parameter) -> torch.Tensor:
    """Returns what a process holds of a parameter, as [`set_local_data`] will leave it."""
    return parameter.detach().clone() if isinstance(parameter, DTensor) else parameter.data


def set_local_data(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Replaces what a process holds of a parameter."""
    if isinstance(parameter, DTensor):
        # FSDP2 gathers from storage of its own, which the parameter only views.
        with torch.no_grad():
            parameter.copy_(tensor)
    else:
        parameter.data = tensor


def same_on_all(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrites tensors with those of the first process, so that processors of two makes cannot disagree in a bit."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
