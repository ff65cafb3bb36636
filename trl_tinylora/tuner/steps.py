"""
An adapter's part of the passes through one layer, in as few passes over large tensors as can be.

    result = W x + U S R V^T x        R = sum_k v_k P_k (arXiv:2602.04118, section 4)

U, S and V are of W itself: `W V = U S`. So the sum can stand on either side of the base layer, and the gradient of R,
which is made of S U^T g where g is the gradient of the result, can be made of what the base layer's own backward pass
returns, `W^T g`:

    result = W (x + V R V^T x)
    dR = (S U^T g) (V^T x)^T = (V^T W^T g) (V^T x)^T        dx = W^T g + V R^T (V^T W^T g)

[`InputStep`], before the base layer, has all of it but the sum, where that is left for behind the base layer, to
[`add_update`]. Where the factors are not those of this very weight, [`HiddenStep`] and [`UpdateStep`] stand around the
base layer and take the gradient through U S. Suffixes as in `decomposition.py`; T counts tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


if TYPE_CHECKING:
    from .bank import Vectors


# Modules with as many inputs or outputs take the way that saves passes over memory; in smaller ones there is little to
# save, and what small models were recorded to do stays the same to the last bit.
LARGE = 512


class Part(NamedTuple):
    """
    What one adapter does in one layer. Factors are on the device and in the dtype of the layer's input.

    Args:
        left_OR (`torch.Tensor`): U S, shape `(out_features, r)`.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`.
        mixing_RR (`torch.Tensor`): R, shape `(r, r)`, dtype float32 or wider.
        vectors ([`~trl_tinylora.tuner.bank.Vectors`] or `None`): Who is given the gradient of R; `None` where nobody is.
        index (`int`): Position of the layer among the adapted ones.
    """

    left_OR: torch.Tensor
    right_RI: torch.Tensor
    mixing_RR: torch.Tensor
    vectors: Optional[Vectors]
    index: int

    def deposit(self, grad_mixed_RT: torch.Tensor, hidden_RT: torch.Tensor) -> None:
        """Leaves the gradient of R to the adapter's vectors.

        Args:
            grad_mixed_RT (`torch.Tensor`): Gradient of `R V^T x`, shape `(r, tokens)`, dtype float32 or wider.
            hidden_RT (`torch.Tensor`): `V^T x`, of the same shape.
        """
        if self.vectors is not None:
            self.vectors.deposit(self.index, grad_mixed_RT @ hidden_RT.to(grad_mixed_RT.dtype).mT)


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


class InputStep(torch.autograd.Function):
    """
    The x for the base layer, and `V^T x` of each part: r numbers a token, all that is kept for the way back.

    Its backward pass gets the base layer's gradient of x, makes the gradients of R of it, and adds the parts' to it. It
    stands before the base layer, for a checkpoint that recomputes a block stops at the last thing kept, and the product
    with the block's last weight comes after it.
    """

    @staticmethod
    def forward(ctx, x, parts: Sequence[Part], adds: bool, may_overwrite: bool):
        inner_x, *hidden = enter(x, parts, adds)
        ctx.save_for_backward(*hidden)
        # The layer's own, and nothing that depends on tokens.
        ctx.parts, ctx.may_overwrite = parts, may_overwrite
        ctx.mark_non_differentiable(*hidden)
        ctx.set_materialize_grads(False)
        return inner_x, *hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x, *_):
        if grad_x is not None:
            may_overwrite = ctx.may_overwrite
            with without_autocast(grad_x):
                # All of them before the first one is added, for they are of the base layer's gradient alone.
                grads = [to_hidden(grad_x, part.right_RI) for part in ctx.parts]
                for part, grad_mixed_RT, hidden_RT in zip(ctx.parts, grads, ctx.saved_tensors, strict=True):
                    grad_mixed_RT = grad_mixed_RT.to(torch.promote_types(grad_mixed_RT.dtype, part.mixing_RR.dtype))
                    part.deposit(grad_mixed_RT, hidden_RT)
                    grad_x = _add_product(grad_x, _grad_hidden(grad_mixed_RT, part), part.right_RI, may_overwrite)
                    # From the first sum on the tensor is our own.
                    may_overwrite = True
        return grad_x, None, None, None


class HiddenStep(torch.autograd.Function):
    """`V^T x` of one part: r numbers a token, kept for the backward pass, which gets the gradient of `R V^T x`."""

    @staticmethod
    def forward(ctx, x, part: Part):
        hidden_RT = to_hidden(x, part.right_RI)
        ctx.save_for_backward(hidden_RT)
        ctx.part = part
        return hidden_RT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mixed_RT):
        (hidden_RT,) = ctx.saved_tensors
        with without_autocast(hidden_RT):
            ctx.part.deposit(grad_mixed_RT, hidden_RT)
        return None, None


class UpdateStep(torch.autograd.Function):
    """`result + U S R V^T x` of one part, with a backward pass that gives x the part's share of its gradient."""

    @staticmethod
    def forward(ctx, result, hidden_RT, x, part: Part, may_overwrite: bool):
        updated = add_update(result, hidden_RT, part, may_overwrite)
        if updated is result:
            ctx.mark_dirty(result)
        ctx.part, ctx.x_shape = part, x.shape
        return updated

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        part = ctx.part
        with without_autocast(grad):
            grad_mixed_TR = _flat(grad).to(part.left_OR) @ part.left_OR
            grad_mixed_RT = grad_mixed_TR.to(torch.promote_types(grad_mixed_TR.dtype, part.mixing_RR.dtype)).mT
            grad_x = (_grad_hidden(grad_mixed_RT, part) @ part.right_RI).view(ctx.x_shape)
        return grad, grad_mixed_RT, grad_x, None, None


def enter(x: torch.Tensor, parts: Sequence[Part], adds: bool) -> tuple[torch.Tensor, ...]:
    """
    Returns the x for the base layer, and `V^T x` of each part.

    Args:
        x (`torch.Tensor`): A module's input, shape `(..., in_features)`.
        parts (`Sequence[Part]`): The adapters.
        adds (`bool`): Whether they are added here, `x + V R V^T x`; `False` returns x as it is.

    Returns:
        `tuple[torch.Tensor, ...]`: The first as x, the others of shape `(r, tokens)`.
    """
    hidden = [to_hidden(x, part.right_RI) for part in parts]
    if adds:
        for part, hidden_RT in zip(parts, hidden, strict=True):
            x = _add_product(x, _mixed(hidden_RT, part), part.right_RI, may_overwrite=False)
    return x, *hidden


def to_hidden(x: torch.Tensor, right_RI: torch.Tensor) -> torch.Tensor:
    """
    Returns `V^T x`.

    Args:
        x (`torch.Tensor`): A module's input, shape `(..., in_features)`.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`, device and dtype of `x`.

    Returns:
        `torch.Tensor` of shape `(r, tokens)`, device and dtype of `x`.
    """
    # Only the r x r step is worth float32; the large products run in the activations' own dtype.
    with without_autocast(x):
        # On a CPU the product takes half the time this way round.
        return right_RI @ _flat(x).mT if right_RI.shape[1] >= LARGE else F.linear(_flat(x), right_RI).mT


def add_update(result: torch.Tensor, hidden_RT: torch.Tensor, part: Part, may_overwrite: bool) -> torch.Tensor:
    """
    Returns `result + U S R V^T x`.

    Args:
        result (`torch.Tensor`): The base layer's output, shape `(..., out_features)`.
        hidden_RT (`torch.Tensor`): V^T x, shape `(r, tokens)`.
        part ([`Part`]): What is added.
        may_overwrite (`bool`): Whether nobody else has the result, so that it may be changed in place.

    Returns:
        `torch.Tensor` of the result's shape and dtype; the result itself where it was changed in place.
    """
    with without_autocast(hidden_RT):
        mixed_TR = _mixed(hidden_RT, part)
        if result.dtype != hidden_RT.dtype:
            return result + F.linear(mixed_TR, part.left_OR).to(result.dtype).view(result.shape)
        # In place on a view, autograd would copy the gradient of what it views, twice.
        return _add_product(result, mixed_TR, part.left_OR.mT, may_overwrite and not result._is_view())


def _mixed(hidden_RT: torch.Tensor, part: Part) -> torch.Tensor:
    mixing_RR = part.mixing_RR.to(hidden_RT.device, torch.promote_types(hidden_RT.dtype, part.mixing_RR.dtype))
    return (mixing_RR @ hidden_RT.to(mixing_RR.dtype)).to(hidden_RT.dtype).mT


def _add_product(total: torch.Tensor, thin_TR: torch.Tensor, wide_RD: torch.Tensor, may_overwrite: bool):
    if may_overwrite and total.is_contiguous():
        # Known to no graph: what is added has no part in the gradient of what it is added to.
        with torch.no_grad():
            _flat(total).addmm_(thin_TR, wide_RD)
        return total
    return torch.addmm(_flat(total), thin_TR, wide_RD).view(total.shape)


def _grad_hidden(grad_mixed_RT: torch.Tensor, part: Part) -> torch.Tensor:
    mixing_RR = part.mixing_RR.to(grad_mixed_RT.device, grad_mixed_RT.dtype)
    return (mixing_RR.mT @ grad_mixed_RT).to(part.right_RI.dtype).mT


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
