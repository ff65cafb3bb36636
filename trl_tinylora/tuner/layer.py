"""One adapted linear layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..maths.decomposition import sum_of_outer_products
from .adapted_layer import AdaptedLayer
from .bank import TinyLoraBank
from .gradient import AddUpdate, MixedHidden
from .mixed_batch import mixed_of_rows
from .plan import Plan
from .weights import shape_of, weight_of


class Linear(AdaptedLayer):
    """
    A frozen linear layer plus `x -> x V R^T (U S)^T`, the transpose of `U S R V^T` (arXiv:2602.04118, section 4).

    Args:
        base_layer (`torch.nn.Module`): The linear layer, `nn.Linear` or `Conv1D`.
        name (`str`): Its name in the base model.
        bank ([`TinyLoraBank`]): Holder of the values.
    """

    def __init__(self, base_layer: nn.Module, name: str, bank: TinyLoraBank):
        super().__init__(base_layer, {"weight": (name,)}, bank)
        self.name = name
        # As those who build on an adapted layer read them off any linear layer.
        shape = shape_of(base_layer)
        self.in_features, self.out_features = shape if isinstance(base_layer, Conv1D) else shape[::-1]

    def factors(self, key: Hashable, name: Optional[str] = None) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
        """Returns U S and V^T, or None where no adapter with these factors was added."""
        return self._factors.get(key)

    @property
    def is_transposed(self) -> bool:
        """Whether the base layer keeps its weight as (in_features, out_features)."""
        return isinstance(self.get_base_layer(), Conv1D)

    def factors_of(self, plan: Plan, parameter: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
        """Returns U S and V^T as the adapters of a plan use them."""
        return self._factors[plan.factor_key(self.name)]

    def keep_factors(self, plan: Plan, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keeps the factors of a plan's adapters, given by the matrices' names, unless that was done before."""
        left_OR, right_RI = factors[self.name]
        # With r rows in memory each: a product with r columns takes up to six times as long.
        self._factors.setdefault(plan.factor_key(self.name), (left_OR.mT.contiguous().mT, right_RI.contiguous()))

    def drop_unused_factors(self) -> None:
        """Forgets the factors that no adapter of this module uses."""
        used = {plan.factor_key(self.name) for plan in self._bank[0].plans if self.name in plan.index}
        if not used.issuperset(self._factors):
            self._factors = {key: factors for key, factors in self._factors.items() if key in used}
            self._cast_factors.clear()

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Returns the base layer's output plus every active adapter's, in the base layer's dtype.

        Args:
            x (`torch.Tensor`): Input, shape `(..., in_features)`.
            *args, **kwargs: Passed on to the base layer.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`.

        Raises:
            ValueError: If the rows have adapters of their own and there are more or fewer of them than inputs.
            RuntimeError: If the base layer passes no gradient on to an input that needs one.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        updates = self._updates(x)
        result = self.base_layer(x, *args, **kwargs)
        if x.requires_grad and torch.is_grad_enabled() and not result.requires_grad:
            raise RuntimeError(
                f"{self.name}, a {type(self.base_layer).__name__}, passes no gradient on to its input: it computes "
                "with a kernel for inference, and what is trained before it would silently get a wrong gradient. "
                "bitsandbytes' 4-bit layers do so on a CPU with AVX512-BF16 once they were called in evaluation mode; "
                "train on a GPU, or load the model in 8 bits or unquantised."
            )
        for mixed_RT, left_OR in updates:
            result = AddUpdate.apply(result, mixed_RT, left_OR)
        return result

    # Traced by torch.compile, the gradient of R would be lost: it goes to a buffer, which a graph does not have.
    @torch.compiler.disable
    def _updates(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`R V^T x` of each active adapter, and U S."""
        batch = self._bank[0].mixed_batch
        updates = []
        if batch is not None:
            for plan, mixing_BRR in batch.of(self.name, x):
                left_OR, right_RI = self._factors_like(plan, x)
                updates.append((mixed_of_rows(x, right_RI, mixing_BRR), left_OR))
            return updates
        unmerged = [name for name in self.active_adapters if name not in self.merged_adapters]
        for vectors, index in filter(None, map(self.place, unmerged)):
            left_OR, right_RI = self._factors_like(vectors.plan, x)
            mixing_RR, add_gradient = vectors.mixing_of_pass(index, self.training), vectors.gradient_hook(index)
            updates.append((MixedHidden.apply(x, right_RI, mixing_RR, add_gradient), left_OR))
        return updates

    def _factors_like(self, plan: Plan, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = plan.factor_key(self.name), x.device, x.dtype
        if key not in self._cast_factors:
            self._cast_factors[key] = tuple(factor.to(x.device, x.dtype) for factor in self.factors_of(plan))
        return self._cast_factors[key]

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Returns what an adapter adds to the weight, from its present values: `U S R V^T`.

        Args:
            adapter_name (`str`): The adapter.

        Returns:
            `torch.Tensor` of the base weight's shape and device, dtype float32 (float64 on a float64 base).
        """
        left_OR, _ = self.factors_of(self.place(adapter_name)[0].plan)
        return sum_of_outer_products(*self._present_update("weight", [adapter_name], left_OR.device, left_OR.dtype))

    @torch.no_grad()
    def unmerged_weight(self, parameter: str = "weight") -> torch.Tensor:
        """Returns the base weight without adapters, which stay merged where they are; a quantised one dequantised."""
        linear = self.get_base_layer()
        original = self._originals.get(parameter)
        return weight_of(linear) if original is None else original.to(linear.weight.device)
