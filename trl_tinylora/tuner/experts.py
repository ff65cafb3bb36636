"""
Fused experts of a mixture, each matrix of each expert with its own U, S, V, P and a share of the values.

transformers 5 keeps the experts of a layer in three-dimensional parameters, `(experts, out_features, in_features)`, and
runs them by an implementation that it looks up under a name in its `ALL_EXPERTS_FUNCTIONS`
(`transformers/integrations/moe.py`). Ours, under [`ADAPTED`], is the grouped product that is the library's own default
and two thin grouped products beside each: no expert's weight is copied. It runs inside the base layer's own call, so
that ZeRO-3 and FSDP2 gather the weights as they do without adapters.

Suffixes as in `maths/decomposition.py`; E counts experts, S pairs of a token and one of its experts, in the order of
the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Optional

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .adapted_layer import AdaptedLayer
from .bank import TinyLoraBank
from .gradient import without_autocast
from .plan import Plan
from .weights import expert_names


# Of the implementation in transformers' registry.
ADAPTED = "trl_tinylora"
# Of the strides that a grouped product takes.
ALIGNED_BYTES = 16
GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Experts(AdaptedLayer):
    """
    Frozen fused experts plus `U S R V^T x` in each product of each expert (arXiv:2602.04118, section 4).

    Args:
        base_layer (`torch.nn.Module`): The experts, of a class that transformers' `use_experts_implementation` made.
        name (`str`): Its name in the base model.
        bank ([`TinyLoraBank`]): Holder of the values.
    """

    def __init__(self, base_layer: nn.Module, name: str, bank: TinyLoraBank):
        super().__init__(base_layer, expert_names(name, base_layer), bank)
        self.name = name

    def factors(self, key: Hashable, name: Optional[str] = None) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
        """Returns U S and V^T of one matrix, or None where no adapter with these factors was added."""
        rank, basis = key
        for (parameter, (known_rank, rotated)), (left_EOR, right_ERI) in self._factors.items():
            if name in self.names[parameter] and known_rank == rank and dict(rotated).get(name) == basis:
                expert = self.names[parameter].index(name)
                return left_EOR[expert], right_ERI[expert]
        return None

    @property
    def is_transposed(self) -> bool:
        """Whether the base layer keeps its matrices as (in_features, out_features)."""
        return self.get_base_layer().is_transposed

    def factors_of(self, plan: Plan, parameter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns U S and V^T of every expert, shapes `(experts, out_features, r)` and `(experts, r, in_features)`."""
        return self._factors[parameter, plan.factors_key]

    def keep_factors(self, plan: Plan, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keeps the factors of a plan's adapters, given by the matrices' names, unless that was done before."""
        for parameter, names in self.names.items():
            if names[0] in plan.index and (parameter, plan.factors_key) not in self._factors:
                lefts, rights = zip(*(factors[name] for name in names), strict=True)
                # With r rows in memory each, as the grouped products want them.
                left_EOR = torch.stack([left_OR.mT for left_OR in lefts]).mT
                self._factors[parameter, plan.factors_key] = left_EOR, torch.stack(rights)

    def drop_unused_factors(self) -> None:
        """Forgets the factors that no adapter of this layer uses."""
        used = {
            (parameter, plan.factors_key)
            for plan in self._bank[0].plans
            for parameter, names in self.names.items()
            if names[0] in plan.index
        }
        if not used.issuperset(self._factors):
            self._factors = {key: factors for key, factors in self._factors.items() if key in used}
            self._cast_factors.clear()

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """Returns the experts' output with every active adapter's updates inside, in the base layer's dtype.

        Args:
            *args, **kwargs: As of the base layer: hidden states, shape `(tokens, hidden_size)`, the experts of each
                token and their weights, both of shape `(tokens, experts a token)`.

        Returns:
            `torch.Tensor` of the hidden states' shape.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or not any(self._active(parameter) for parameter in self.names):
            return self.base_layer(*args, **kwargs)
        config = self.base_layer.config
        self.base_layer.config = _AdaptedConfig(config, self)
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            self.base_layer.config = config

    def _active(self, parameter: str) -> list[tuple]:
        """Vectors and positions of the adapters that are active and not merged."""
        unmerged = [name for name in self.active_adapters if name not in self.merged_adapters]
        return [place for name in unmerged if (place := self.place(name, parameter)) is not None]

    def project(self, parameter: str, x_SI: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Returns the product of each pair's token with its expert's adapted matrix, and its bias.

        Args:
            parameter (`str`): The parameter of the base layer that holds the matrices.
            x_SI (`torch.Tensor`): Inputs, shape `(pairs, in_features)`.
            pairs ([`Pairs`]): Which expert each of them goes to.

        Returns:
            `torch.Tensor` of shape `(pairs, out_features)`, in the weight's dtype.
        """
        experts = self.get_base_layer()
        weight = getattr(experts, parameter)
        # As transformers has it: grouped products know no autocast.
        x_SI = x_SI.to(weight.dtype)
        updates = []
        for vectors, index in self._active(parameter):
            left_ERO, right_ERI = self._factors_like(parameter, vectors.plan, x_SI)
            mixing_ERR, add_gradient = vectors.mixing_of_pass(index, self.training), vectors.gradient_hook(index)
            updates.append((MixedPairs.apply(x_SI, right_ERI, mixing_ERR, pairs, add_gradient), left_ERO))
        result_SO = grouped_product(x_SI, weight if self.is_transposed else weight.mT, pairs)
        if experts.has_bias:
            result_SO = result_SO + getattr(experts, f"{parameter}_bias")[pairs.experts]
        for mixed_SR, left_ERO in updates:
            result_SO = AddToPairs.apply(result_SO, mixed_SR, left_ERO, pairs)
        return result_SO

    def _factors_like(self, parameter: str, plan: Plan, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(U S)^T and V^T as x is, with rows of zeros up to what a grouped product takes."""
        key = parameter, plan.factors_key, x.device, x.dtype
        if key not in self._cast_factors:
            left_EOR, right_ERI = (factor.to(x.device, x.dtype) for factor in self.factors_of(plan, parameter))
            missing = -plan.rank % max(ALIGNED_BYTES // x.dtype.itemsize, 1)
            self._cast_factors[key] = tuple(F.pad(rows, (0, 0, 0, missing)) for rows in (left_EOR.mT, right_ERI))
        return self._cast_factors[key]

    @torch.no_grad()
    def unmerged_weight(self, parameter: str) -> torch.Tensor:
        """Returns a parameter of the base layer without adapters, which stay merged where they are."""
        weight = getattr(self.get_base_layer(), parameter)
        return self._originals.get(parameter, weight.data).to(weight.device)


class Pairs:
    """
    Tokens and their experts, a pair of them at a time, in the order of the experts.

    Args:
        chosen (`torch.Tensor`): The experts of each token, shape `(tokens, experts a token)`.
        n_experts (`int`): How many there are.
    """

    def __init__(self, chosen: torch.Tensor, n_experts: int):
        # As transformers sorts them: where v is zero, every bit is the base model's.
        self.experts, self.order = chosen.reshape(-1).sort()
        self.tokens = self.order // chosen.shape[-1]
        numbers = torch.arange(n_experts, device=chosen.device)
        # The end of each expert's pairs.
        self.ends = torch.searchsorted(self.experts, numbers, right=True).to(torch.int32)

    @cached_property
    def sizes(self) -> list[int]:
        """How many pairs each expert has; an accelerator is waited for."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()


def grouped_product(x_SI: torch.Tensor, weight_EIO: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Returns each pair's input times its expert's matrix, shape `(pairs, out_features)`."""
    if _is_grouped_mm_for(x_SI, weight_EIO):
        return F.grouped_mm(x_SI, weight_EIO, offs=pairs.ends)
    parts = x_SI.split(pairs.sizes)
    found = [part_SI @ weight_EIO[expert] for expert, part_SI in enumerate(parts) if len(part_SI)]
    return torch.cat(found) if found else x_SI.new_zeros(0, weight_EIO.shape[2])


def _is_grouped_mm_for(x_SI: torch.Tensor, weight_EIO: torch.Tensor) -> bool:
    """Whether torch has a grouped product of these (from 2.10 on), and its backward pass."""
    if not hasattr(F, "grouped_mm") or weight_EIO.dtype not in GROUPED_DTYPES:
        return False
    if x_SI.is_cuda and torch.cuda.get_device_capability(x_SI.device) < (8, 0):
        return False
    is_aligned = all(size * weight_EIO.itemsize % ALIGNED_BYTES == 0 for size in weight_EIO.shape[1:])
    return is_aligned and x_SI.data_ptr() % ALIGNED_BYTES == weight_EIO.data_ptr() % ALIGNED_BYTES == 0


class MixedPairs(torch.autograd.Function):
    """
    `R V^T x` of each pair, with its expert's R and V; what [`MixedHidden`] is to a linear layer.

    Args:
        x_SI (`torch.Tensor`): Inputs, shape `(pairs, in_features)`.
        right_ERI (`torch.Tensor`): V^T, and rows of zeros behind the first r, device and dtype of x.
        mixing_ERR (`torch.Tensor`): R of each expert, shape `(experts, r, r)`, dtype float32 or wider.
        pairs ([`Pairs`]): Which expert each input goes to.
        add_gradient (`Callable` or `None`): Called with the gradient of R; `None` where v is frozen.
    """

    @staticmethod
    def forward(
        ctx,
        x_SI: torch.Tensor,
        right_ERI: torch.Tensor,
        mixing_ERR: torch.Tensor,
        pairs: Pairs,
        add_gradient: Optional[Callable],
    ):
        mixing_ERR = mixing_ERR.to(x_SI.device, torch.promote_types(x_SI.dtype, mixing_ERR.dtype))
        hidden_SR = grouped_product(x_SI, right_ERI.mT, pairs)[:, : mixing_ERR.shape[1]]
        ctx.save_for_backward(hidden_SR)
        ctx.frozen, ctx.pairs, ctx.add_gradient = (right_ERI, mixing_ERR), pairs, add_gradient
        mixed_SR = torch.einsum("sij,sj->si", mixing_ERR[pairs.experts], hidden_SR.to(mixing_ERR.dtype))
        return mixed_SR.to(x_SI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SR):
        (hidden_SR,), (right_ERI, mixing_ERR), pairs = ctx.saved_tensors, ctx.frozen, ctx.pairs
        grad_SR = grad_SR.to(mixing_ERR.dtype)
        grad_x = None
        if ctx.add_gradient is not None:
            outer_SRR = grad_SR[:, :, None] * hidden_SR[:, None].to(mixing_ERR.dtype)
            ctx.add_gradient(torch.zeros_like(mixing_ERR).index_add_(0, pairs.experts, outer_SRR))
        if ctx.needs_input_grad[0]:
            back_SR = torch.einsum("sij,si->sj", mixing_ERR[pairs.experts], grad_SR).to(right_ERI.dtype)
            grad_x = grouped_product(_with_zeros(back_SR, right_ERI), right_ERI, pairs)
        return grad_x, None, None, None, None


class AddToPairs(torch.autograd.Function):
    """
    `result + U S (R V^T x)` of each pair. Nothing is kept for the backward pass.

    Args:
        result_SO (`torch.Tensor`): The base layer's product, shape `(pairs, out_features)`.
        mixed_SR (`torch.Tensor`): R V^T x, shape `(pairs, r)`.
        left_ERO (`torch.Tensor`): (U S)^T, and rows of zeros behind the first r, device and dtype of the result.
        pairs ([`Pairs`]): Which expert each of them goes to.
    """

    @staticmethod
    def forward(ctx, result_SO: torch.Tensor, mixed_SR: torch.Tensor, left_ERO: torch.Tensor, pairs: Pairs):
        ctx.left_ERO, ctx.pairs, ctx.rank = left_ERO, pairs, mixed_SR.shape[1]
        return result_SO + grouped_product(_with_zeros(mixed_SR, left_ERO), left_ERO, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SO):
        grad_SR = grouped_product(grad_SO.contiguous(), ctx.left_ERO.mT, ctx.pairs)[:, : ctx.rank]
        return grad_SO, grad_SR, None, None


def _with_zeros(numbers_SR: torch.Tensor, rows_ERI: torch.Tensor) -> torch.Tensor:
    """With as many columns as the matrices have rows."""
    return F.pad(numbers_SR, (0, rows_ERI.shape[1] - numbers_SR.shape[1]))


class _AdaptedConfig:
    """Stands for the configuration of fused experts during a pass with adapters: another implementation, ours."""

    _experts_implementation = ADAPTED

    def __init__(self, config: object, layer: Experts):
        self.config, self.layer = config, layer

    def __getattr__(self, name: str):
        return getattr(self.config, name)


# Traced by torch.compile, the gradient of R would be lost: it goes to a buffer, which a graph does not have.
@torch.compiler.disable
def adapted_experts(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The implementation for transformers' registry: the experts' output, with the adapters' updates.

    Args:
        experts (`torch.nn.Module`): The base layer of an [`Experts`], during its forward pass.
        hidden_states (`torch.Tensor`): Shape `(tokens, hidden_size)`.
        top_k_index (`torch.Tensor`): The experts of each token, shape `(tokens, experts a token)`.
        top_k_weights (`torch.Tensor`): Their weights, of the same shape.

    Returns:
        `torch.Tensor` of the hidden states' shape and dtype.
    """
    layer = experts.config.layer
    pairs = Pairs(top_k_index, experts.num_experts)
    first, last = layer.names
    with without_autocast(hidden_states):
        inner = layer.project(first, hidden_states[pairs.tokens], pairs)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        outer = layer.project(last, inner, pairs)
        if getattr(experts, "has_post_expert_norm", False):
            outer = experts.post_expert_norm(outer)
        weighted = outer * top_k_weights.reshape(-1)[pairs.order, None]
        # Summed in a fixed order, where `index_add_` has none on an accelerator.
        by_token = weighted[pairs.order.argsort()].unflatten(0, top_k_index.shape)
        return by_token.sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(ADAPTED, adapted_experts)
