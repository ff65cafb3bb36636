"""One adapted linear layer: forward, merge, unmerge."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed import is_partitioned, local_data, set_local_data
from ..maths.decomposition import sum_of_outer_products
from .bank import TinyLoraBank, TinyLoraLayer
from .gradient import AddUpdate, MixedHidden
from .merging import merged_weight, refuse_not_finite, restore, set_aside
from .mixed_batch import mixed_of_rows
from .plan import Plan
from .targets import is_quantised, weight_of
from .values import Vectors


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
        self._factors: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        # The same on the device and in the dtype of a pass: a cast costs as much as one of the small products.
        self._cast_factors: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self.merged_adapters = []
        # The base weight without adapters, while adapters are merged.
        self._original_weight: Optional[torch.Tensor] = None
        self._disable_adapters = False

    def factors(self, key: Hashable) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
        """Returns U S and V^T, or None where no adapter with these factors was added."""
        return self._factors.get(key)

    def factors_of(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns U S and V^T as the adapters of a plan use them."""
        return self._factors[plan.factor_key(self.name)]

    def keep_factors(self, key: Hashable, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keeps factors for the adapters that use them, unless that was done before."""
        left_OR, right_RI = factors
        # With r rows in memory each: a product with r columns takes up to six times as long.
        self._factors.setdefault(key, (left_OR.mT.contiguous().mT, right_RI.contiguous()))

    def drop_unused_factors(self) -> None:
        """Forgets the factors that no adapter of this module uses."""
        used = {plan.factor_key(self.name) for plan in self._bank[0].plans if self.name in plan.index}
        if not used.issuperset(self._factors):
            self._factors = {key: factors for key, factors in self._factors.items() if key in used}
            self._cast_factors.clear()

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapters, as the bank has them."""
        return self._bank[0].active_adapter

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Of no effect: PEFT tells the bank as well."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter from the bank, unless that was done before, and the factors that no other one uses."""
        # PEFT comes to the layers first, and asks them which adapter is active then.
        self._bank[0].delete_adapter(adapter_name)
        self.drop_unused_factors()

    def _apply(self, fn, recurse=True):
        if self._original_weight is not None:
            self._original_weight = fn(self._original_weight)
        self._factors = {key: tuple(fn(factor) for factor in factors) for key, factors in self._factors.items()}
        self._cast_factors.clear()
        return super()._apply(fn, recurse)

    def place(self, adapter_name: str) -> Optional[tuple[Vectors, int]]:
        """Returns an adapter's vectors and this module's position in them, or None where it leaves the module out."""
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
            mixing_RR, add_gradient = vectors.mixing_of_pass(index), vectors.gradient_hook(index)
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
            ValueError: If an adapter does not exist, or `safe_merge` and the result is not finite.
            RuntimeError: If ZeRO-3 has the weight partitioned.
            NotImplementedError: If the weight is quantised.
        """
        if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names or []):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = self.active_adapters if adapter_names is None else adapter_names
        unknown = [name for name in adapter_names or [] if self._bank[0].vectors(name) is None]
        if unknown:
            raise ValueError(f"Adapter {', '.join(unknown)} not found, there are {list(self._bank[0].trl_tinylora_v)}.")
        names = [name for name in names if self.place(name) is not None]
        if not names:
            return
        refuse_quantised([self])
        weight = self.get_base_layer().weight
        if is_partitioned(weight):
            raise RuntimeError(
                "this weight is partitioned by ZeRO-3, and what is merged into its parts would be lost. Merge, use and "
                "unmerge inside `with deepspeed.zero.GatheredParameters(list(model.parameters())):`, or load the "
                "adapter on an ordinary model."
            )
        former, former_original, former_names = local_data(weight), self._original_weight, list(self.merged_adapters)
        names = list(dict.fromkeys([*former_names, *names]))
        original = former if former_original is None else former_original
        merged = merged_weight(original, *self._present_update(names, weight.device, weight.dtype))
        if safe_merge:
            refuse_not_finite(merged, names)
        try:
            self._note_merge(set_aside(original), names)
            set_local_data(weight, merged)
        except BaseException:
            set_local_data(weight, former)
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
        """Returns the base weight without adapters, which stay merged where they are; a quantised one dequantised."""
        linear = self.get_base_layer()
        return weight_of(linear) if self._original_weight is None else self._original_weight.to(linear.weight.device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns True: the update is a matrix of rank r added to the weight."""
        return True

    def __repr__(self) -> str:
        return "trl_tinylora." + super().__repr__()


def refuse_quantised(layers: Iterable[Linear]) -> None:
    """
    Raises where adapters would be merged into a quantised weight, which would round the update away.

    Raises:
        NotImplementedError: If a base layer is quantised; the message names the ways out.
    """
    found = [layer for layer in layers if is_quantised(layer.get_base_layer())]
    if found:
        raise NotImplementedError(
            f"the weight of {found[0].name} is quantised ({type(found[0].get_base_layer().weight).__name__}; "
            f"{len(found)} layers are), and merging would round a TinyLoRA update away. Nothing was merged. Serve the "
            "adapter as a LoRA (`export_lora`), sample from it in training (`AdapterRollout` in place of `use_vllm`), "
            "or merge into floating-point weights: `PeftModel.from_pretrained(quantised_model.dequantize(), folder)`."
        )
