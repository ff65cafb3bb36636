"""
The gradient of the trained values, which arrives once per backward pass however many modules share them.

    result = W x + U S R V^T x          R = sum_k v_k P_k (arXiv:2602.04118, section 4)
    dR = ((U S)^T g) (V^T x)^T          g: the gradient of the result
    dx = W^T g + V R^T (U S)^T g

A tied vector v is a leaf that hundreds of modules use. Under reentrant checkpointing autograd would accumulate such a
leaf once per checkpointed block, which breaks DeepSpeed ZeRO-2 and 3 and is silently wrong under DDP. So each module's
[`MixedHidden`] adds dR to a [`GradientBuffer`], and autograd uses v in one place: [`GradientSink`], in front of the
first adapted block. All modules take R from it, so that its backward pass, which turns the buffer into dv, runs after
theirs. Inside a reentrant checkpoint they cannot, and there it runs after those of all modules behind it.

Suffixes as in `maths/decomposition.py`; T counts tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Optional, Union

import torch
from torch.autograd.function import once_differentiable


class GradientBuffer:
    """The gradient of every module's R, summed over the backward passes of the modules."""

    def __init__(self):
        self._grad_MRR: Optional[torch.Tensor] = None

    def add(self, index: Union[int, slice], grad_RR: torch.Tensor, n_modules: int) -> None:
        """Adds to the gradient of one module's R, or of that of several that follow one another."""
        if self._grad_MRR is None:
            self._grad_MRR = grad_RR.new_zeros(n_modules, *grad_RR.shape[-2:])
        self._grad_MRR[index].add_(grad_RR.to(self._grad_MRR))

    def take(self) -> Optional[torch.Tensor]:
        """Empties the buffer and returns what it held."""
        grad_MRR, self._grad_MRR = self._grad_MRR, None
        return grad_MRR


class GradientSink(torch.autograd.Function):
    """
    The hidden states and every R unchanged; the backward pass gives v its gradient.

    It runs after those of all that takes one of the two. Of R that is its whole purpose: no gradient comes that way.

    Args:
        hidden (`torch.Tensor` or `None`): What enters the first adapted block, if that is in floating point.
        mixing_MRR (`torch.Tensor`): Every module's R, shape `(modules, r, r)`.
        values_GK (`torch.Tensor`): v, shape `(groups, u)`.
        collect (`Callable`): Returns the gradient of v, shape `(groups, u)`, once all modules have added theirs.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Optional[torch.Tensor],
        mixing_MRR: torch.Tensor,
        values_GK: torch.Tensor,
        collect: Callable[[], torch.Tensor],
    ):
        ctx.set_materialize_grads(False)
        ctx.collect = collect
        return None if hidden is None else hidden.clone(), mixing_MRR.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, _):
        return grad_hidden, None, ctx.collect() if ctx.needs_input_grad[2] else None, None


class MixedHidden(torch.autograd.Function):
    """
    `R V^T x`. Of the tokens only `V^T x` is kept for the backward pass: r numbers each.

    It comes before the base layer, and [`AddUpdate`] behind it, so that a non-reentrant checkpoint, which recomputes up
    to the last tensor that is kept, need not recompute the base layer's own product.

    The large products run in the dtype of x, those of r x r matrices in float32 or wider.

    Args:
        x (`torch.Tensor`): The base layer's input, shape `(..., in_features)`.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`, device and dtype of x.
        mixing_RR (`torch.Tensor`): R, shape `(r, r)`, dtype float32 or wider, from the sink, which waits for this.
        add_gradient (`Callable` or `None`): Called with the gradient of R; `None` where v is frozen.
    """

    @staticmethod
    def forward(ctx, x, right_RI, mixing_RR, add_gradient):
        with without_autocast(x):
            hidden_RT = right_RI @ columns(x)
            mixing_RR = mixing_RR.to(x.device, torch.promote_types(x.dtype, mixing_RR.dtype))
            ctx.save_for_backward(hidden_RT)
            ctx.frozen, ctx.add_gradient, ctx.x_shape = (right_RI, mixing_RR), add_gradient, x.shape
            return (mixing_RR @ hidden_RT.to(mixing_RR.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RT):
        (hidden_RT,), (right_RI, mixing_RR) = ctx.saved_tensors, ctx.frozen
        grad_x = None
        with without_autocast(grad_RT):
            grad_RT = grad_RT.to(mixing_RR.dtype)
            if ctx.add_gradient is not None:
                ctx.add_gradient(grad_RT @ hidden_RT.mT.to(mixing_RR.dtype))
            if ctx.needs_input_grad[0]:
                grad_x = ((mixing_RR.mT @ grad_RT).to(right_RI.dtype).mT @ right_RI).view(ctx.x_shape)
        return grad_x, None, None, None


class AddUpdate(torch.autograd.Function):
    """
    `result + U S (R V^T x)`. Nothing is kept for the backward pass.

    Args:
        result (`torch.Tensor`): The base layer's output, shape `(..., out_features)`.
        mixed_RT (`torch.Tensor`): R V^T x, a column for each token, shape `(r, tokens)`.
        left_OR (`torch.Tensor`): U S, shape `(out_features, r)`, device and dtype of `mixed_RT`.
    """

    @staticmethod
    def forward(ctx, result, mixed_RT, left_OR):
        ctx.left_OR = left_OR
        with without_autocast(result):
            if result.dtype == left_OR.dtype and not torch.compiler.is_compiling():
                # One pass over the output, and one rounding; and no view, since models may add to it in place.
                updated = torch.empty(result.shape, dtype=result.dtype, device=result.device)
                torch.addmm(columns(result).mT, mixed_RT.mT, left_OR.mT, out=columns(updated).mT)
                return updated
            return result + (mixed_RT.mT @ left_OR.mT).view(result.shape).to(result.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with without_autocast(grad):
            return grad, ctx.left_OR.mT @ columns(grad).to(ctx.left_OR.dtype), None


def without_autocast(like: torch.Tensor) -> AbstractContextManager:
    """Returns a context in which products run in the dtype of what they are given."""
    # Entering autocast costs as much as one of the small products, also to turn off what is off.
    kind = like.device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if is_on else nullcontext()


def columns(hidden: torch.Tensor) -> torch.Tensor:
    """Returns hidden states as the equations have them: a column for each token, shape `(features, tokens)`."""
    return hidden.reshape(-1, hidden.shape[-1]).mT
