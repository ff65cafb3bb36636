"""On which side of a frozen layer the adapters' updates are added, and what is needed there (see `steps.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import nn

from .bank import Vectors
from .steps import Part, is_large


class Side(Enum):
    """
    Where updates that go through the base layer's backward pass are added.

    The input is the way of fewer passes over memory where it is the narrower side, and for float32 alone: beside the
    output an update is as much larger as its singular values are larger than the others, so that in 16 bits less of a
    small one is lost there.
    """

    INPUT = auto()
    OUTPUT = auto()


class Place(NamedTuple):
    """
    An adapter in a layer.

    Args:
        vectors ([`~trl_tinylora.tuner.bank.Vectors`]): The adapter's.
        index (`int`): Position of the layer among the adapted ones.
        left_OR (`torch.Tensor`): U S, shape `(out_features, r)`, device and dtype of the layer's input.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`, device and dtype of the layer's input.
        is_own (`bool`): Whether they are of this layer's weight, so that `W V = U S`.
    """

    vectors: Vectors
    index: int
    left_OR: torch.Tensor
    right_RI: torch.Tensor
    is_own: bool

    @classmethod
    def of(cls, vectors: Vectors, index: int, factors: Sequence[torch.Tensor], x: torch.Tensor, is_own: bool) -> Place:
        """
        Returns a place with the factors as a pass uses them.

        Args:
            vectors ([`~trl_tinylora.tuner.bank.Vectors`]): The adapter's.
            index (`int`): Position of the layer among the adapted ones.
            factors (`Sequence[torch.Tensor]`): U S and V^T.
            x (`torch.Tensor`): The layer's input.
            is_own (`bool`): Whether the factors are of this layer's weight.
        """
        left_OR, right_RI = (factor.to(x.device, x.dtype) for factor in factors)
        return cls(vectors, index, left_OR, right_RI, is_own)

    def part(self) -> Part:
        """Returns what the adapter does in the pass under way."""
        vectors = self.vectors if self.vectors.values_GK.requires_grad else None
        return Part(self.left_OR, self.right_RI, self.vectors.current_mixing(self.index), vectors, self.index)

    def goes_through(self, weight: torch.Tensor) -> bool:
        """
        Returns whether the base layer's backward pass serves for the update's, and is worth it.

        Args:
            weight (`torch.Tensor`): The base layer's; one that is trained soon has other singular vectors.
        """
        return self.is_own and not weight.requires_grad and is_large(self.left_OR, self.right_RI)


def side_of(x: torch.Tensor, weight_dtype: torch.dtype, out_features: int) -> Side:
    """
    Returns where updates are added that go through the base layer's backward pass.

    Args:
        x (`torch.Tensor`): The layer's input, shape `(..., in_features)`.
        weight_dtype (`torch.dtype`): The base weight's; its shape may be a part's here.
        out_features (`int`): Width of the layer's output.

    Returns:
        [`Side`]
    """
    is_float32 = x.dtype == weight_dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    return Side.INPUT if is_float32 and x.shape[-1] <= out_features else Side.OUTPUT


def is_alone(base_layer: nn.Module) -> bool:
    """
    Returns whether nobody else has what a layer is given and returns.

    Args:
        base_layer (`torch.nn.Module`): What an adapted layer calls.
    """
    # What a hook was given it may have kept, and other layers may return what they keep themselves.
    return type(base_layer) is nn.Linear and not base_layer._forward_hooks and not base_layer._forward_pre_hooks
