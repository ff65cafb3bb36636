"""What adapted layers of every kind share: the base layer, the frozen factors, merging and unmerging."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Optional, Union

import torch
from torch import nn

from ..distributed import is_partitioned, local_data, set_local_data
from .bank import TinyLoraBank, TinyLoraLayer
from .merging import merged_weight, refuse_not_finite, restore, set_aside
from .values import Vectors
from .weights import is_quantised


class AdaptedLayer(nn.Module, TinyLoraLayer):
    """
    A frozen layer whose matrices get an update `U S R V^T` each (arXiv:2602.04118, section 4).

    The frozen factors are kept once per rank, whatever the number of adapters. The layer holds no parameter and nothing
    else of an adapter: both are in the bank.

    Args:
        base_layer (`torch.nn.Module`): The layer.
        names (`Mapping[str, Sequence[str]]`): By parameter of the base layer, the names of the matrices that it holds.
        bank ([`TinyLoraBank`]): Holder of the values.
    """

    def __init__(self, base_layer: nn.Module, names: Mapping[str, Sequence[str]], bank: TinyLoraBank):
        super().__init__()
        self.base_layer = base_layer
        self.names = names
        # A tuple, so that the bank does not become a child of every layer.
        self._bank = (bank,)
        # No buffers: DDP broadcasts those before every forward pass, megabytes beside the 52 bytes of a gradient.
        self._factors: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        # The same on the device and in the dtype of a pass: a cast costs as much as one of the small products.
        self._cast_factors: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self.merged_adapters = []
        # The base weights without adapters, by parameter, while adapters are merged.
        self._originals: dict[str, torch.Tensor] = {}
        self._disable_adapters = False

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

    def drop_unused_factors(self) -> None:
        """Forgets the factors that no adapter of this layer uses."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        self._originals = {parameter: fn(original) for parameter, original in self._originals.items()}
        self._factors = {key: tuple(fn(factor) for factor in factors) for key, factors in self._factors.items()}
        self._cast_factors.clear()
        return super()._apply(fn, recurse)

    def place(self, adapter_name: str, parameter: str = "weight") -> Optional[tuple[Vectors, Union[int, slice]]]:
        """Returns an adapter's vectors and the position of a parameter's matrices in them, or None where it leaves them
        out."""
        vectors = self._bank[0].vectors(adapter_name)
        names = self.names[parameter]
        if vectors is None or names[0] not in vectors.plan.index:
            return None
        first = vectors.plan.index[names[0]]
        return vectors, first if parameter == "weight" else slice(first, first + len(names))

    def _present_update(
        self, parameter: str, adapter_names: Sequence[str], device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`left` and `right` of [`merged_weight`], from the present values."""
        dtype = torch.promote_types(dtype, torch.float32)
        lefts, rights = [], []
        with torch.autocast(device.type, enabled=False):
            for name in adapter_names:
                vectors, index = self.place(name, parameter)
                left_OR, right_RI = (factor.to(device, dtype) for factor in self.factors_of(vectors.plan, parameter))
                mixed_OR = left_OR @ vectors.mixing(index).to(device, dtype)
                lefts.append(right_RI.mT if self.is_transposed else mixed_OR)
                rights.append(mixed_OR.mT if self.is_transposed else right_RI)
        return torch.cat(lefts, dim=-1), torch.cat(rights, dim=-2)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """
        Puts adapters into the base weights: `W' = W + U S R V^T` in float32, rounded once to the weight's dtype.

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
        names = [name for name in names if any(self.place(name, parameter) for parameter in self.names)]
        if not names:
            return
        refuse_quantised([self])
        names = list(dict.fromkeys([*self.merged_adapters, *names]))
        merged_in = {
            parameter: [name for name in names if self.place(name, parameter) is not None] for parameter in self.names
        }
        weights = {
            parameter: getattr(self.get_base_layer(), parameter) for parameter, those in merged_in.items() if those
        }
        if any(is_partitioned(weight) for weight in weights.values()):
            raise RuntimeError(
                "this weight is partitioned by ZeRO-3, and what is merged into its parts would be lost. Merge, use and "
                "unmerge inside `with deepspeed.zero.GatheredParameters(list(model.parameters())):`, or load the "
                "adapter on an ordinary model."
            )
        former = {parameter: local_data(weight) for parameter, weight in weights.items()}
        former_originals, former_names = self._originals, list(self.merged_adapters)
        originals = {parameter: former_originals.get(parameter, data) for parameter, data in former.items()}
        try:
            merged = {
                parameter: merged_weight(
                    originals[parameter],
                    *self._present_update(parameter, merged_in[parameter], weight.device, weight.dtype),
                )
                for parameter, weight in weights.items()
            }
            if safe_merge:
                for weight in merged.values():
                    refuse_not_finite(weight, names)
            self._note_merge({parameter: set_aside(original) for parameter, original in originals.items()}, names)
            for parameter, weight in weights.items():
                set_local_data(weight, merged[parameter])
        except BaseException:
            for parameter, weight in weights.items():
                set_local_data(weight, former[parameter])
            self._note_merge(former_originals, former_names)
            raise

    def _note_merge(self, originals: dict[str, torch.Tensor], names: list[str]) -> None:
        self._originals = originals
        self.merged_adapters[:] = names
        (first, *_), *_ = self.names.values()
        if names:
            self._bank[0].merged_layers.add(first)
        else:
            self._bank[0].merged_layers.discard(first)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the original weights, bit for bit."""
        for parameter, original in self._originals.items():
            restore(getattr(self.get_base_layer(), parameter), original)
        self._note_merge({}, [])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Returns True: the update is a matrix of rank r added to the weight."""
        return True

    def __repr__(self) -> str:
        return "trl_tinylora." + super().__repr__()


def refuse_quantised(layers: Iterable[AdaptedLayer]) -> None:
    """
    Raises where adapters would be merged into a quantised weight, which would round the update away.

    Raises:
        NotImplementedError: If a base layer is quantised; the message names the ways out.
    """
    found = [layer for layer in layers if is_quantised(layer.get_base_layer())]
    if found:
        (name, *_), *_ = found[0].names.values()
        raise NotImplementedError(
            f"the weight of {name} is quantised ({type(found[0].get_base_layer().weight).__name__}; "
            f"{len(found)} layers are), and merging would round a TinyLoRA update away. Nothing was merged. Serve the "
            "adapter as a LoRA (`export_lora`), sample from it in training (`AdapterRollout` in place of `use_vllm`), "
            "or merge into floating-point weights: `PeftModel.from_pretrained(quantised_model.dequantize(), folder)`."
        )
