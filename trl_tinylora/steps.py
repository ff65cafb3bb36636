"""
An adapter's part of the passes through one layer, in as few passes over large tensors as can be.

    result = W x + U S R V^T x        R = sum_k v_k P_k (arXiv:2602.04118, section 4)

[`HiddenStep`] stands before the base layer and makes `x V`; [`UpdateStep`] stands behind it and adds the rest. In the
backward pass the second makes the gradient of `x V R^T`, and the first one, from that, the gradient of R, which it
leaves to the adapter's vectors, and that of x. Suffixes as in `decomposition.py`; T counts tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# Modules with as many inputs or outputs take the ways that save passes over memory; in smaller ones there is little to
# save, and what small models were recorded to do stays the same to the last bit.
LARGE = 512


def never_traced(function: Callable) -> Callable:
    """
    Returns a function that torch.compile calls as it stands, between two graphs.

    Traced, the gradient of R would be dropped without a word: it goes to a side buffer, which a graph does not have.

    Args:
        function (`Callable`): Any function.

    Returns:
        `Callable`
    """
    untraced = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        # The wrapper of torch costs microseconds, the question does not.
        return untraced(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call


class HiddenStep(torch.autograd.Function):
    """
    `x` unchanged, for the base layer, and `x V`: r numbers a token, all that an adapter keeps for the backward pass.

    A step of its own, before the base layer: a checkpoint that recomputes a block stops at the last thing kept, and the
    product with the block's last weight comes after it. Its backward gets the base layer's gradient of x, to add to,
    and the gradient of `x V R^T`, of which it makes that of R.
    """

    @staticmethod
    def forward(ctx, x, right_RI, mixing_RR, vectors, index, adds_up, may_overwrite):
        hidden_TR = to_hidden(x, right_RI)
        ctx.save_for_backward(hidden_TR)
        # The layer's own, and nothing that depends on tokens.
        ctx.right_RI, ctx.mixing_RR, ctx.vectors, ctx.index = right_RI, mixing_RR, vectors, index
        ctx.adds_up, ctx.may_overwrite = adds_up, may_overwrite
        ctx.set_materialize_grads(False)
        return x, hidden_TR

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, grad_mixed_TR):
        if grad_mixed_TR is not None:
            (hidden_TR,) = ctx.saved_tensors
            with without_autocast(hidden_TR):
                if ctx.vectors is not None:
                    ctx.vectors.deposit(ctx.index, grad_mixed_TR.mT @ hidden_TR.to(grad_mixed_TR.dtype))
                if ctx.adds_up:
                    factors_of_grad = _back_to_x(grad_mixed_TR, ctx.mixing_RR, ctx.right_RI, hidden_TR.dtype)
                    grad_x = _add_product(grad_x, *factors_of_grad, ctx.may_overwrite)
        return grad_x, None, None, None, None, None, None


class UpdateStep(torch.autograd.Function):
    """`result + x V R^T (U S)^T` for one module, in as few passes over tensors of its width as can be; keeps none."""

    @staticmethod
    def forward(ctx, result, hidden_TR, factors, mixing_RR, may_overwrite, x):
        updated = add_update(result, hidden_TR, factors[0], mixing_RR, may_overwrite)
        if updated is result:
            ctx.mark_dirty(result)
        ctx.factors, ctx.mixing_RR, ctx.like = factors, mixing_RR, (hidden_TR.device, hidden_TR.dtype)
        ctx.x_shape = None if x is None else x.shape
        return updated

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        left_OR, right_RI = ctx.factors
        device, dtype = ctx.like
        grad_x = None
        with without_autocast(grad):
            grad_mixed_TR = _through_left(_flat(grad).to(device, dtype), left_OR.to(device, dtype))
            grad_mixed_TR = grad_mixed_TR.to(torch.promote_types(dtype, ctx.mixing_RR.dtype))
            if ctx.x_shape is not None:
                grad_hidden_TR, right_RI = _back_to_x(grad_mixed_TR, ctx.mixing_RR, right_RI, dtype)
                grad_x = (grad_hidden_TR @ right_RI).view(ctx.x_shape)
        return grad, grad_mixed_TR, None, None, None, grad_x


def to_hidden(x: torch.Tensor, right_RI: torch.Tensor) -> torch.Tensor:
    """
    Returns `x V`.

    Args:
        x (`torch.Tensor`): A module's input, shape `(..., in_features)`.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`.

    Returns:
        `torch.Tensor` of shape `(tokens, r)`, dtype and device of `x`.
    """
    # Only the r x r step is worth float32; the large products run in the activations' own dtype.
    with without_autocast(x):
        return F.linear(_flat(x), right_RI.to(x.device, x.dtype))


def add_update(
    result: torch.Tensor, hidden_TR: torch.Tensor, left_OR: torch.Tensor, mixing_RR: torch.Tensor, may_overwrite: bool
) -> torch.Tensor:
    """
    Returns `result + x V R^T (U S)^T`.

    Args:
        result (`torch.Tensor`): The base layer's output, shape `(..., out_features)`.
        hidden_TR (`torch.Tensor`): x V, shape `(tokens, r)`.
        left_OR (`torch.Tensor`): U S, shape `(out_features, r)`.
        mixing_RR (`torch.Tensor`): R, shape `(r, r)`, dtype float32 or wider.
        may_overwrite (`bool`): Whether nobody else has the result, so that it may be changed in place.

    Returns:
        `torch.Tensor` of the result's shape and dtype; the result itself where it was changed in place.
    """
    device, dtype = hidden_TR.device, hidden_TR.dtype
    left_OR = left_OR.to(device, dtype)
    with without_autocast(hidden_TR):
        mixing_RR = mixing_RR.to(device, torch.promote_types(dtype, mixing_RR.dtype))
        mixed_TR = (hidden_TR.to(mixing_RR.dtype) @ mixing_RR.mT).to(dtype)
        if result.dtype != dtype:
            return result + F.linear(mixed_TR, left_OR).to(result.dtype).view(result.shape)
        # In place on a view, autograd would copy the gradient of what it views, twice.
        return _add_product(result, mixed_TR, left_OR.mT, may_overwrite and not result._is_view())


def _add_product(total: torch.Tensor, thin_TR: torch.Tensor, wide_RD: torch.Tensor, may_overwrite: bool):
    if may_overwrite and total.is_contiguous():
        _flat(total).addmm_(thin_TR, wide_RD)
        return total
    return torch.addmm(_flat(total), thin_TR, wide_RD).view(total.shape)


def _back_to_x(grad_mixed_TR, mixing_RR, right_RI, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    # The gradient of x is the product of the two.
    grad_hidden_TR = grad_mixed_TR @ mixing_RR.to(grad_mixed_TR.device, grad_mixed_TR.dtype)
    return grad_hidden_TR.to(dtype), right_RI.to(grad_mixed_TR.device, dtype)


def without_autocast(like: torch.Tensor) -> AbstractContextManager:
    """Returns a context in which products run in the dtype of what they are given.

    Args:
        like (`torch.Tensor`): On the device where they run.

    Returns:
        A context manager.
    """
    # Entering autocast costs as much as one of the small products, also to turn off what is off.
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _flat(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.reshape(-1, hidden.shape[-1])


def is_large(left_OR: torch.Tensor, right_RI: torch.Tensor) -> bool:
    """
    Returns whether a module is large enough for its passes over memory to matter.

    Args:
        left_OR (`torch.Tensor`): U S, shape `(out_features, r)`.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`.

    Returns:
        `bool`
    """
    return max(left_OR.shape[0], right_RI.shape[1]) >= LARGE


def _through_left(grad_TO: torch.Tensor, left_OR: torch.Tensor) -> torch.Tensor:
    # On a CPU the product with U S as it lies in memory takes three times as long.
    if grad_TO.device.type == "cpu" and len(left_OR) >= LARGE:
        return F.linear(grad_TO, left_OR.T.contiguous())
    return grad_TO @ left_OR
