"""One adapted linear layer: forward, merge, unmerge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed import is_partitioned, put, standing
from ..maths.decomposition import sum_of_outer_products
from .bank import Plan, TinyLoraBank, TinyLoraLayer, Vectors
from .merging import merged_weight, refuse_not_finite, restore, set_aside
from .sides import Place, Side, is_alone, side_of
from .steps import HiddenStep, InputStep, UpdateStep, add_update, enter, never_traced, to_hidden, without_autocast


class Linear(nn.Module, TinyLoraLayer):
    """
    A frozen linear layer plus `x -> x V R^T (U S)^T`, the transpose of `U S R V^T` (arXiv:2602.04118, section 4).

    The frozen factors are kept once per rank, whatever the number of adapters. The layer holds no parameter and nothing
    else of an adapter: both are in the bank.

    Args:
        base_layer (`torch.nn.Module`): The linear layer, `nn.Linear` or `Conv1D`.
        name (`str`): Its name in the base model.
        bank ([`TinyLoraBank`]): Holder of the values.
    """

    def __init__(self, base_layer: nn.Module, name: str, bank: TinyLoraBank):
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        # A tuple, so that the bank does not become a child of every layer.
        self._bank = (bank,)
        # No buffers: DDP broadcasts those before every forward pass, megabytes beside the 52 bytes of a gradient.
        self._factors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        # What the last pass found of the active adapters, and when: see `_places`.
        self._places_at: tuple = (None,)
        self.merged_adapters = []
        # The base weight without adapters, while adapters are merged.
        self._original_weight: Optional[torch.Tensor] = None
        self._disable_adapters = False

    def factors(self, rank: int) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
        """Returns U S and V^T at a rank, or None where no adapter of that rank was added.

        Args:
            rank (`int`): The rank.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]` of shapes `(out_features, rank)` and `(rank, in_features)`, or `None`.
        """
        return self._factors.get(rank)

    def factors_of(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns U S and V^T as the adapters of a plan use them.

        Args:
            plan ([`Plan`]): One that has this module.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]` of shapes `(out_features, rank)` and `(rank, in_features)`.
        """
        return plan.own_factors.get(self.name) or self._factors[plan.rank]

    def keep_factors(self, rank: int, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keeps the factors for adapters of a rank, unless that was done before.

        Args:
            rank (`int`): The rank.
            factors (`tuple[torch.Tensor, torch.Tensor]`): U S and V^T at that rank.
        """
        self._factors.setdefault(rank, factors)

    def drop_unused_factors(self) -> None:
        """Forgets the factors of ranks that no adapter of this module has."""
        used = {plan.rank for plan in self._bank[0].plans if self.name in plan.index}
        if not used.issuperset(self._factors):
            self._factors = {rank: factors for rank, factors in self._factors.items() if rank in used}

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapters, as the bank has them."""
        return self._bank[0].active_adapter

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Of no effect: PEFT tells the bank as well.

        Args:
            adapter_names (`str` or `list[str]`): Names of the adapters to make active.
            inference_mode (`bool`, *optional*, defaults to `False`): Whether they are frozen.
        """

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter from the bank, unless that was done before, and the factors that no other one uses.

        Args:
            adapter_name (`str`): Its name.
        """
        # PEFT comes to the layers first, and asks them which adapter is active then.
        self._bank[0].delete_adapter(adapter_name)
        self.drop_unused_factors()

    def _apply(self, fn, recurse=True):
        if self._original_weight is not None:
            self._original_weight = fn(self._original_weight)
        self._factors = {rank: tuple(fn(factor) for factor in factors) for rank, factors in self._factors.items()}
        self._places_at = (None,)
        return super()._apply(fn, recurse)

    def place(self, adapter_name: str) -> Optional[tuple[Vectors, int]]:
        """Returns an adapter's vectors and this module's position in them, or None where it leaves the module out.

        Args:
            adapter_name (`str`): The adapter.

        Returns:
            `tuple[Vectors, int]` or `None`
        """
        vectors = self._bank[0].vectors(adapter_name)
        if vectors is None or self.name not in vectors.plan.index:
            return None
        return vectors, vectors.plan.index[self.name]

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Returns the base layer's output plus every active adapter's, in the base layer's dtype.

        Args:
            x (`torch.Tensor`): Input, shape `(..., in_features)`.
            *args, **kwargs: Passed on to the base layer.

        Returns:
            `torch.Tensor` of shape `(..., out_features)`.

        Raises:
            ValueError: If the rows have adapters of their own and there are more or fewer of them than inputs.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        rows = self._bank[0].rows
        if rows is not None:
            result = self.base_layer(x, *args, **kwargs)
            for plan, mixing_BRR in rows.of(self.name, x).items():
                result = result + self._update_of_rows(x, plan, mixing_BRR).to(result.dtype)
            return result
        inner_x, updates = self._before_base(x)
        return self._after_base(self.base_layer(inner_x, *args, **kwargs), updates)

    @never_traced
    def _before_base(self, x: torch.Tensor) -> tuple[torch.Tensor, list[tuple]]:
        # The x for the base layer, and what is added behind it: a part, its V^T x, and x where the sum has a backward
        # pass of its own.
        places, linear = self._places(x)
        has_graph = torch.is_grad_enabled() and x.requires_grad
        through_base, updates = [], []
        for place in places:
            part = place.part()
            if place.goes_through(linear.weight):
                through_base.append(part)
            elif has_graph:
                updates.append((part, HiddenStep.apply(x, part), x))
            else:
                updates.append((part, to_hidden(x, part.right_RI), None))
        if through_base:
            adds = side_of(x, linear.weight.dtype, len(through_base[0].left_OR)) is Side.INPUT
            if has_graph:
                x, *hidden = InputStep.apply(x, through_base, adds, is_alone(self.base_layer))
            else:
                x, *hidden = enter(x, through_base, adds)
            if not adds:
                updates += [(part, hidden_RT, None) for part, hidden_RT in zip(through_base, hidden, strict=True)]
        return x, updates

    @never_traced
    def _after_base(self, result: torch.Tensor, updates: list[tuple]) -> torch.Tensor:
        for part, hidden_RT, x in updates:
            may_overwrite = is_alone(self.base_layer)
            if x is None:
                result = add_update(result, hidden_RT, part, may_overwrite)
            else:
                result = UpdateStep.apply(result, hidden_RT, x, part, may_overwrite)
        return result

    def _places(self, x: torch.Tensor) -> tuple[list[Place], nn.Module]:
        # Looked up and cast once, for each of that takes as long as one of the small products.
        active = self.active_adapters
        key = self._bank[0].changes, tuple(active), x.dtype, x.device
        if self._places_at[0] != key:
            found = []
            for vectors, index in filter(None, map(self.place, active)):
                is_own = self.name not in vectors.plan.own_factors
                found.append(Place.of(vectors, index, self.factors_of(vectors.plan), x, is_own))
            self._places_at = key, found, self.get_base_layer()
        return self._places_at[1:]

    def _update_of_rows(self, x: torch.Tensor, plan: Plan, mixing_BRR: torch.Tensor) -> torch.Tensor:
        left_OR, right_RI = (factor.to(x.device, x.dtype) for factor in self.factors_of(plan))
        with without_autocast(x):
            hidden_R = F.linear(x, right_RI).to(torch.promote_types(x.dtype, mixing_BRR.dtype))
            mixed_R = _mix_each_row(hidden_R, mixing_BRR.to(x.device, hidden_R.dtype))
            return F.linear(mixed_R.to(x.dtype), left_OR)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Returns what an adapter adds to the weight, from its present values: `U S R V^T`.

        Args:
            adapter_name (`str`): The adapter.

        Returns:
            `torch.Tensor` of the base weight's shape and device, dtype float32 (float64 on a float64 base).
        """
        left_OR, _ = self.factors_of(self.place(adapter_name)[0].plan)
        return sum_of_outer_products(*self._present_update([adapter_name], left_OR.device, left_OR.dtype))

    def _present_update(
        self, adapter_names: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # `left` and `right` of `merged_weight`.
        dtype = torch.promote_types(dtype, torch.float32)
        lefts, rights = [], []
        with torch.autocast(device.type, enabled=False):
            for name in adapter_names:
                vectors, index = self.place(name)
                left_OR, right_RI = (factor.to(device, dtype) for factor in self.factors_of(vectors.plan))
                mixed_OR = left_OR @ vectors.mixing(index).to(device, dtype)
                is_transposed = isinstance(self.get_base_layer(), Conv1D)
                lefts.append(right_RI.mT if is_transposed else mixed_OR)
                rights.append(mixed_OR.mT if is_transposed else right_RI)
        return torch.cat(lefts, dim=1), torch.cat(rights)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """
        Puts adapters into the base weight: `W' = W + U S R V^T` in float32, rounded once to the weight's dtype.

        Adapters that are merged already are merged afresh, from the original weight and the present values. The
        original is set aside: on its device, or in host memory where a GPU is nearly full. Whatever fails leaves the
        layer as it was.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): Whether to refuse a result that is not finite.
            adapter_names (`list[str]`, *optional*): Adapters to merge; the active ones by default.

        Raises:
            TypeError: If `adapter_names` is a string.
            ValueError: If `safe_merge` and the result is not finite.
            RuntimeError: If ZeRO-3 has the weight partitioned.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if self.place(name) is not None]
        if not names:
            return
        weight = self.get_base_layer().weight
        if is_partitioned(weight):
            raise RuntimeError(
                "this weight is partitioned by ZeRO-3, and what is merged into its parts would be lost. Merge, use and "
                "unmerge inside `with deepspeed.zero.GatheredParameters(list(model.parameters())):`, or load the "
                "adapter on an ordinary model."
            )
        former, former_original, former_names = standing(weight), self._original_weight, list(self.merged_adapters)
        names = list(dict.fromkeys([*former_names, *names]))
        original = former if former_original is None else former_original
        merged = merged_weight(original, *self._present_update(names, weight.device, weight.dtype))
        if safe_merge:
            refuse_not_finite(merged, names)
        try:
            self._note_merge(set_aside(original), names)
            put(weight, merged)
        except BaseException:
            put(weight, former)
            self._note_merge(former_original, former_names)
            raise

    def _note_merge(self, original: Optional[torch.Tensor], names: list[str]) -> None:
        self._original_weight = original
        self.merged_adapters[:] = names
        if names:
            self._bank[0].merged_layers.add(self.name)
        else:
            self._bank[0].merged_layers.discard(self.name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the original weight, bit for bit."""
        if self._original_weight is not None:
            restore(self.get_base_layer().weight, self._original_weight)
        self._note_merge(None, [])

    @torch.no_grad()
    def unmerged_weight(self) -> torch.Tensor:
        """Returns the base weight as it is without adapters, which stay merged where they are.

        Returns:
            `torch.Tensor`
        """
        weight = self.get_base_layer().weight
        return weight.data if self._original_weight is None else self._original_weight.to(weight.device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns True: the update is a matrix of rank r added to the weight.

        Args:
            adapter_name (`str`, *optional*): The adapter.

        Returns:
            `bool`
        """
        return True

    def __repr__(self) -> str:
        return "trl_tinylora." + super().__repr__()


def _mix_each_row(hidden_BR: torch.Tensor, mixing_BRR: torch.Tensor) -> torch.Tensor:
    # As (rows, tokens, r), whatever stands between the rows and the last dimension.
    hidden_BTR = hidden_BR.reshape(len(hidden_BR), -1, hidden_BR.shape[-1])
    return torch.bmm(hidden_BTR, mixing_BRR.mT).reshape(hidden_BR.shape)
