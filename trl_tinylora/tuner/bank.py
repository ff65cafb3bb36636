"""
The holder of every adapter's values on a model: one module, registered once, that PEFT takes for an adapter layer.

Adapters that differ in their values alone share one [`~trl_tinylora.tuner.plan.Plan`].
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import TinyLoraConfig
from ..distributed import is_fsdp, refuse_unit_of_its_own
from ..storage.fingerprint import Measured
from .mixed_batch import MixedBatch
from .plan import Plan
from .targets import refuse_data_parallel
from .values import Vectors


class TinyLoraLayer(BaseTunerLayer):
    """What PEFT finds by type when it switches, deletes or merges adapters: the bank and the adapted layers."""

    # Set by `peft.helpers.disable_input_dtype_casting`, and of no effect: inputs are never cast, factors are.
    cast_input_dtype_enabled = True


class TinyLoraBank(nn.Module, TinyLoraLayer):
    """
    Holds the vectors of every adapter on a model, registered once, and the plans that they follow.

    To PEFT it is one more adapter layer, so that switching, freezing, deleting and saving adapters are PEFT's own. The
    adapted layers hold nothing of an adapter: what is active and which modules an adapter has they ask of the bank.
    """

    adapter_layer_names = ("trl_tinylora_v",)
    # No linear layer, though those who go through a model's adapter layers ask each of them for its sizes.
    in_features = out_features = None

    def __init__(self):
        super().__init__()
        self.trl_tinylora_v = nn.ModuleDict()
        self.merged_adapters = []
        # The first names of the layers whose weights are merged: fewer than all where a merge failed half-way.
        self.merged_layers: set[str] = set()
        self.plans: list[Plan] = []
        # Set while a batch is under way whose rows have adapters of their own.
        self.mixed_batch: Optional[MixedBatch] = None
        # Of the forward pre-hooks on the base model's modules, by the name of the first adapted block.
        self._block_hooks: dict[str, list] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns its input: a `torch.nn.Sequential` that is adapted calls the bank as its last module."""
        return x

    def plan_in_same_words(self, config: TinyLoraConfig) -> Optional[Plan]:
        """Returns the plan of adapters whose configuration named the modules in the same words, or None."""
        targets = Plan.targets_of(config)
        return next((plan for plan in self.plans if targets in plan.targets and plan.serves(config)), None)

    def same_plan(self, plan: Plan) -> Plan:
        """Returns the plan that is there already with the same content, or the given one."""
        return next((known for known in self.plans if not known.differences(plan)), plan)

    def measured(self, module: str, rank: int) -> Optional[Measured]:
        """Returns what is known of a module's weight, or None where no adapter of this rank has the module."""
        found = (plan.measured[module] for plan in self.plans if plan.rank == rank and module in plan.measured)
        # The one with most probes, which serves an adapter of few modules as well.
        return max(found, key=lambda measured: len(measured.probe.values), default=None)

    def add(self, adapter_name: str, vectors: Vectors) -> None:
        """Takes in an adapter's vectors."""
        self.trl_tinylora_v[adapter_name] = vectors
        vectors.plan.adapters.add(adapter_name)
        if vectors.plan not in self.plans:
            self.plans.append(vectors.plan)

    def vectors(self, adapter_name: str) -> Optional[Vectors]:
        """Returns an adapter's vectors, or None where there is no such adapter."""
        return self.trl_tinylora_v[adapter_name] if adapter_name in self.trl_tinylora_v else None

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, and its plan where no other one follows it; one that is not there is none to delete."""
        super().delete_adapter(adapter_name)
        for plan in self.plans:
            plan.adapters.discard(adapter_name)
        self.plans = [plan for plan in self.plans if plan.adapters]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, trained unless `inference_mode`."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        # One cheap look at each: there may be thousands.
        for name, vectors in self.trl_tinylora_v.items():
            vectors.set_trained(name in names and not inference_mode)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Turns adapters on or off; one that is frozen is frozen afterwards."""
        # PEFT's own makes the active adapters trained.
        if not enabled:
            super().enable_adapters(False)
            return
        for vectors in self.trl_tinylora_v.values():
            vectors.set_trained(vectors.is_trained)
        self._disable_adapters = False

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets whether adapters are trained."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            vectors = self.vectors(name)
            if vectors is not None:
                vectors.set_trained(requires_grad)

    def before_blocks(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of what calls the blocks: puts the original weights back where merged ones would be wrong.

        That is a pass with the adapters disabled, and one that trains: merged values would get no gradient. TRL merges,
        sends the weights and unmerges, and where sending them fails nothing unmerges. The place is outside the blocks,
        for a reentrant checkpoint around one calls it without gradients.
        """
        if not self.merged_layers or not (self.disable_adapters or self._trains(module)):
            return
        n_merged = len(self.merged_layers)
        for layer in module.modules():
            if isinstance(layer, TinyLoraLayer):
                layer.unmerge()
        self.unmerge()
        if not self.disable_adapters:
            warnings.warn(
                f"{n_merged} layers were still merged when a training pass began: something was raised between "
                "`merge_adapter` and `unmerge_adapter`, or the latter was not called. Their original weights were put "
                "back, bit for bit, and training goes on. To compute with merged weights, call `model.eval()` or use "
                "`torch.no_grad()`.",
                stacklevel=2,
            )

    def _trains(self, module: nn.Module) -> bool:
        if not (torch.is_grad_enabled() and module.training):
            return False
        # FSDP2 has two tensors for the values, of which PEFT told one.
        return any(vectors.is_trained or vectors.values_GK.requires_grad for vectors in self.trl_tinylora_v.values())

    def place_hooks(self, model: nn.Module, block: str) -> None:
        """Puts the forward pre-hooks on a first adapted block and on what calls the blocks, unless they are there."""
        if block in self._block_hooks:
            return
        # What calls the blocks: their list and a dictionary of modules around it have no forward of their own.
        caller = block
        while caller and (caller == block or type(model.get_submodule(caller)).forward is nn.Module.forward):
            caller = caller.rpartition(".")[0]
        before_block = partial(self.before_first_block, block)
        self._block_hooks[block] = [
            model.get_submodule(block).register_forward_pre_hook(before_block, with_kwargs=True),
            model.get_submodule(caller).register_forward_pre_hook(self.before_blocks, prepend=True),
        ]

    def remove_hooks(self) -> None:
        """Takes the forward pre-hooks off the base model's modules."""
        for handle in (handle for handles in self._block_hooks.values() for handle in handles):
            handle.remove()
        self._block_hooks.clear()

    # Traced by torch.compile, what a hook leaves in Python objects would be lost.
    @torch.compiler.disable
    def before_first_block(self, block: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of a first adapted block: R of the active adapters that begin there, and their sinks.

        Raises:
            RuntimeError: If the block gets no hidden states, or runs as a replica of `torch.nn.DataParallel`.
            NotImplementedError: If torch's older FSDP has wrapped the values by themselves.
        """
        if self.disable_adapters or self.mixed_batch is not None:
            return args, kwargs
        refuse_data_parallel(module)
        refuse_unit_of_its_own(self.trl_tinylora_v, None, ())
        for name in self.active_adapters:
            vectors = None if name in self.merged_adapters else self.vectors(name)
            if vectors is not None and block in vectors.plan.first_blocks:
                refuse_unit_of_its_own(self.trl_tinylora_v, vectors.values_GK, vectors.plan.shape)
                if is_fsdp(module):
                    # FSDP2 keeps a gathered and a sharded tensor for the values, of which PEFT told one.
                    vectors.values_GK.requires_grad_(vectors.is_trained)
                args, kwargs = _replace_hidden(module, args, kwargs, vectors, is_model=not block)
        return args, kwargs

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Notes that the layers were merged; they do it themselves."""
        merged_before = list(self.merged_adapters)
        names = self.active_adapters if adapter_names is None else adapter_names
        self.merged_adapters.extend(name for name in names if name not in merged_before)
        if merged_before:
            warnings.warn(
                f"{', '.join(merged_before)} had been merged before and not unmerged: merged afresh, from the original "
                "weights and the present values.",
                stacklevel=2,
            )

    def unmerge(self) -> None:
        """Notes that the layers were unmerged."""
        self.merged_adapters.clear()

    def _apply(self, fn, recurse=True):
        for plan in self.plans:
            plan.apply(fn)
        return super()._apply(fn, recurse)

    @property
    def weight(self) -> None:
        """The bank adapts no weight of its own; PEFT asks every adapter layer for one."""
        return None

    @property
    def bias(self) -> None:
        """None, as [`weight`] is."""
        return None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The values stay where they were made, in float32.
        if device is not None and adapter_name in self.trl_tinylora_v:
            self.trl_tinylora_v[adapter_name].to(device)


def _replace_hidden(
    module: nn.Module, args: tuple, kwargs: dict, vectors: Vectors, is_model: bool
) -> tuple[tuple, dict]:
    for position, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return (*args[:position], vectors.begin_pass(value), *args[position + 1 :]), kwargs
    floating = [key for key, value in kwargs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    usual = [key for key in ("hidden_states", "inputs_embeds", "x", "input") if key in floating]
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    # Beside tokens, to which no gradient flows, what floats may be a mask.
    has_tokens = any(tensor.dtype in (torch.int32, torch.int64) for tensor in tensors)
    alone = floating if len(floating) == 1 and not (is_model and has_tokens) else []
    for key in usual[:1] or alone:
        return args, {**kwargs, key: vectors.begin_pass(kwargs[key])}
    if is_model:
        vectors.begin_pass(None)
        return args, kwargs
    raise RuntimeError(
        f"{type(module).__name__} was called without hidden states as its first argument or as `hidden_states`; "
        f"got {len(args)} positional arguments and {sorted(kwargs)}, of which {floating} are floating-point tensors, "
        "where one was expected. TinyLoRA cannot be placed before this block."
    )
