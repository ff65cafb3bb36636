"""
The trained values, held once for all modules, and the gradient sink that makes their gradient arrive once.

A tied vector is a leaf that hundreds of modules use. Ordinary autograd under reentrant checkpointing fires such a leaf
once per checkpointed block, which breaks DeepSpeed ZeRO-2 and 3 and is silently wrong under DDP. So the leaf is used in
one place:

* before the first adapted block, every module's R = sum_k v_k P_k is computed in one product, without a graph;
* in each layer, a Function (`steps.py`) adds the gradient of R to a side buffer;
* at that first place a Function ([`GradientSink`]) hands the hidden states on unchanged. Its backward runs when those
  of all layers behind it have run: it turns the buffer into the gradient of v.

Adapters that differ in their values alone share one [`Plan`]. A batch whose rows have adapters of their own needs no
sink: R of every row and module ([`Rows`]) is computed before the pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable

from ..config import TinyLoraConfig
from ..distributed import gathered, is_fsdp, is_spread, whole
from ..maths.decomposition import basis_projections, gaussian_projections, mix, unmix
from ..maths.tying import assign_groups, count_groups
from ..storage.checkpoint import MAX_UNCERTAINTY
from ..storage.fingerprint import Measured, Probe, fingerprint
from .steps import never_traced, without_autocast


class TinyLoraLayer(BaseTunerLayer):
    """What PEFT finds by type when it switches, deletes or merges adapters: the bank and the adapted layers."""


class Plan:
    """
    Everything that adapters have in common which differ in their values alone: modules, rank, groups and projections.

    A model keeps one plan for all such adapters, so that another one costs its values and a few references to it.

    Args:
        config ([`TinyLoraConfig`]): The configuration of one of the adapters.
        names (`list[str]`): Names of the adapted modules in depth order.
        first_block (`str`): Name of the block whose input they all depend on.
        device (`torch.device`): Where the values live.
        measured (`dict[str, Measured]`): What is known of each module's weight beside its factors.
    """

    FIELDS = ("r", "u", "n_tie", "tying", "projection", "projection_seed")

    def __init__(
        self,
        config: TinyLoraConfig,
        names: list[str],
        first_block: str,
        device: torch.device,
        measured: dict[str, Measured],
    ):
        self.fields = self.fields_of(config)
        self.rank = config.r
        self.shape = (count_groups(names, config.n_tie, config.tying), config.u)
        self.first_block = first_block
        # Position of each module among the adapted ones.
        self.index = {name: index for index, name in enumerate(names)}
        # Configurations that name these modules, what PEFT makes of them, and the adapters that follow the plan.
        self.targets: set[tuple] = set()
        self.target_modules = config.target_modules
        self.adapters: set[str] = set()
        self.measured = measured
        # Factors that came with a checkpoint and are not those of this machine, by module.
        self.own_factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if config.projection == "basis":
            projections = basis_projections(config.u, config.r).expand(len(names), -1, -1, -1)
        else:
            projections = torch.stack(
                [gaussian_projections(name, config.u, config.r, config.projection_seed) for name in names]
            )
        # No buffers, for the reason given in the layers.
        self.projections_MKRR = projections.to(device)
        self.groups_M = torch.tensor(assign_groups(names, config.n_tie, config.tying)).to(device)

    @classmethod
    def fields_of(cls, config: TinyLoraConfig) -> dict:
        """Returns what a configuration says of its plan, apart from the modules.

        Args:
            config ([`TinyLoraConfig`]): Any adapter's.

        Returns:
            `dict`
        """
        return {field: getattr(config, field) for field in cls.FIELDS}

    @staticmethod
    def targets_of(config: TinyLoraConfig) -> tuple:
        """Returns how a configuration names its modules, as something to look up.

        Args:
            config ([`TinyLoraConfig`]): Any adapter's.

        Returns:
            `tuple`
        """
        asked_for = config.target_modules, config.exclude_modules, config.layers_to_transform, config.layers_pattern
        return tuple(
            frozenset(value) if isinstance(value, set) else tuple(value) if isinstance(value, list) else value
            for value in asked_for
        )

    @property
    def probes(self) -> dict[str, Probe]:
        """Each module's part in the base's fingerprint, by name, in depth order."""
        return {name: self.measured[name].probe for name in self.index}

    @property
    def uncertain(self) -> list[str]:
        """Modules whose singular vectors another machine or dtype could turn, so that a checkpoint holds them."""
        return [name for name in self.index if self.measured[name].uncertainty > MAX_UNCERTAINTY]

    @property
    def has_arbitrary_factors(self) -> bool:
        """Whether singular values of a module coincide, so that even the same weights do not settle its vectors."""
        return any(self.measured[name].uncertainty >= 1 for name in self.index)

    @property
    def fingerprint(self) -> dict:
        """What an adapter keeps of its base: `fingerprint.py`'s, and of how many modules it holds the factors."""
        return fingerprint(self.probes) | {"stored": len(self.uncertain)}

    def with_own_factors(self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Plan:
        """Returns this plan for adapters whose factors of some modules are not those of this machine.

        Args:
            factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): U S and V^T by module.

        Returns:
            [`Plan`]: It shares all other tensors with this one.
        """
        plan = copy.copy(self)
        plan.own_factors, plan.adapters, plan.targets = factors, set(), set()
        return plan

    def differences(self, other: Plan) -> list[str]:
        """Returns what sets two plans apart, a phrase for each field.

        Args:
            other ([`Plan`]): Another plan.

        Returns:
            `list[str]`: Empty where the values of one may stand in for those of the other.
        """
        phrases = [
            f"{field} ({value!r} and {other.fields[field]!r})"
            for field, value in self.fields.items()
            if value != other.fields[field]
        ]
        if list(self.index) != list(other.index):
            phrases.append(f"the adapted modules ({len(self.index)} and {len(other.index)} of them)")
        if self.own_factors is not other.own_factors and (self.own_factors or other.own_factors):
            phrases.append("singular vectors that came with a checkpoint")
        return phrases

    def frozen(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the group and the projections of each module, as [`mix`] and [`unmix`] take them.

        Args:
            device (`torch.device`): Where an adapter's values live.
            dtype (`torch.dtype`): What is computed in.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]` of shapes `(modules,)` and `(modules, u, r, r)`.
        """
        return self.groups_M.to(device), self.projections_MKRR.to(device, dtype)

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Takes the frozen tensors to another device or dtype.

        Args:
            fn (`Callable`): What `torch.nn.Module` applies to its tensors.
        """
        self.groups_M, self.projections_MKRR = fn(self.groups_M), fn(self.projections_MKRR)
        self.own_factors = {name: tuple(fn(factor) for factor in pair) for name, pair in self.own_factors.items()}


class Vectors(nn.Module):
    """
    The trained values of one adapter, with what turns them into every module's R.

    Args:
        plan ([`Plan`]): What the adapter shares with others.
        device (`torch.device`): Where the values live; on the meta device they are left open.
        config ([`TinyLoraConfig`]): The adapter's configuration.
    """

    def __init__(self, plan: Plan, device: torch.device, config: TinyLoraConfig):
        super().__init__()
        self.plan = plan
        self.config = config
        # TRL casts every trainable parameter of a quantised model to bfloat16, where small updates stall, unless its
        # name holds this token (trl v1.16.0, trl/trainer/grpo_trainer.py:536-541).
        self.lora_magnitude_vector = nn.Parameter(
            torch.zeros(plan.shape, dtype=torch.float32, device=device), requires_grad=False
        )
        # Every module's R as of the last pass, and the state of the values that it was made of.
        self.mixing_MRR = None
        self.computed_from = None
        self.grad_MRR = None
        self.is_trained = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the whole values, (groups, u)."""
        return self.plan.shape

    @property
    def values_GK(self) -> torch.Tensor:
        """v, shape (groups, u), dtype float32; under ZeRO-3 and FSDP2 this process's share of it between passes."""
        return self.lora_magnitude_vector

    def set_trained(self, is_trained: bool) -> None:
        """Sets whether the values are trained.

        Args:
            is_trained (`bool`): Whether they are.
        """
        self.is_trained = is_trained
        if self.values_GK.requires_grad != is_trained:
            self.values_GK.requires_grad_(is_trained)

    def refresh(self) -> None:
        """Computes every module's R from the present values, without a graph."""
        with torch.no_grad(), without_autocast(self.values_GK):
            dtype = torch.promote_types(self.values_GK.dtype, torch.float32)
            self.mixing_MRR = mix(self.values_GK.to(dtype), *self.plan.frozen(self.values_GK.device, dtype))
        self.computed_from = self._state_of_values()

    @torch.no_grad()
    def mixings(self, modules: slice = slice(None)) -> torch.Tensor:
        """Returns R of modules from the present values, gathered from all processes where they are spread.

        Args:
            modules (`slice`, *optional*): Their positions among the adapted ones; all by default.

        Returns:
            `torch.Tensor` of shape `(modules, r, r)`, dtype float32 or wider.
        """
        dtype = torch.promote_types(self.values_GK.dtype, torch.float32)
        values_GK = self.whole_values().to(dtype)
        groups_M, projections_MKRR = self.plan.frozen(values_GK.device, dtype)
        return mix(values_GK, groups_M[modules], projections_MKRR[modules])

    def mixing(self, index: int) -> torch.Tensor:
        """Returns R of one module, as [`mixings`] does.

        Args:
            index (`int`): Position of the module among the adapted ones.

        Returns:
            `torch.Tensor` of shape `(r, r)`, dtype float32 or wider.
        """
        return self.mixings(slice(index, index + 1))[0]

    @torch.no_grad()
    def whole_values(self) -> torch.Tensor:
        """Returns a copy of v, gathered from all processes where it is spread: shape (groups, u)."""
        with gathered([self.values_GK]):
            return whole(self.values_GK).clone()

    def current_mixing(self, index: int) -> torch.Tensor:
        """Returns R of one module as of the forward pass under way.

        Args:
            index (`int`): Position of the module among the adapted ones.

        Returns:
            `torch.Tensor` of shape `(r, r)`.

        Raises:
            RuntimeError: If the layer was reached without a pass through the first adapted block.
        """
        state = self._state_of_values()
        if self.mixing_MRR is None or (state is not None and state != self.computed_from):
            raise RuntimeError(
                "an adapted layer was called outside the model's forward pass: TinyLoRA computes every module's update "
                "where the hidden states enter the first adapted block. Call the whole model."
            )
        return self.mixing_MRR[index]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Prepares the pass that these hidden states begin, and puts the gradient sink on them.

        Args:
            hidden (`torch.Tensor`): What enters the first adapted block.

        Returns:
            `torch.Tensor`: The same values.
        """
        self.refresh()
        # Empty outside a backward pass: only one that failed half-way leaves something behind.
        if torch._C._current_graph_task_id() == -1:
            self.grad_MRR = None
        if not (torch.is_grad_enabled() and self.values_GK.requires_grad):
            return hidden
        return GradientSink.apply(hidden, self.values_GK, self)

    def deposit(self, index: int, grad_RR: torch.Tensor) -> None:
        """Adds to the gradient of one module's R, for [`collect`] to find.

        Args:
            index (`int`): Position of the module among the adapted ones.
            grad_RR (`torch.Tensor`): Gradient, shape `(r, r)`.
        """
        # Not made by the forward pass: that of a reentrant checkpoint around the first block runs without a graph.
        if self.grad_MRR is None:
            self.grad_MRR = torch.zeros_like(self.mixing_MRR)
        self.grad_MRR[index].add_(grad_RR.to(self.grad_MRR.device, self.grad_MRR.dtype))

    def collect(self) -> torch.Tensor:
        """Returns the gradient of the values from what the layers' backward passes left, and empties the buffer."""
        if self.grad_MRR is None:
            return torch.zeros(self.shape, dtype=self.values_GK.dtype, device=self.values_GK.device)
        groups_M, projections_MKRR = self.plan.frozen(self.grad_MRR.device, self.grad_MRR.dtype)
        grad = unmix(self.grad_MRR, groups_M, projections_MKRR, self.shape[0])
        self.grad_MRR = None
        return grad.to(self.values_GK.dtype)

    def _state_of_values(self) -> tuple | None:
        # Gathered anew for every use, such values lie elsewhere each time, and in the layers they are not whole.
        values_GK = self.values_GK
        return None if is_spread(values_GK) else (values_GK.data_ptr(), values_GK._version)

    def _apply(self, fn, recurse=True):
        # The side buffers follow the module to another device or dtype by being made anew there.
        self.mixing_MRR = self.grad_MRR = self.computed_from = None
        return super()._apply(fn, recurse)


class GradientSink(torch.autograd.Function):
    """Identity on the hidden states, whose backward gives the values their gradient: once per backward pass."""

    @staticmethod
    def forward(ctx, hidden, values_GK, vectors):
        ctx.vectors = vectors
        return hidden.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden):
        return grad_hidden, ctx.vectors.collect() if ctx.needs_input_grad[1] else None, None


class Rows:
    """
    R of every module for each row of a batch whose rows have adapters of their own.

    Rows are told apart by their r x r matrices alone, so that adapters of one rank go through the same products however
    many there are, whatever their groups; a row without an adapter, or with one that leaves a module out, has R = 0.

    Args:
        adapters (`list[Vectors | None]`): The adapter of each row.
    """

    @torch.no_grad()
    def __init__(self, adapters: list[Optional[Vectors]]):
        self.n_rows = len(adapters)
        # For each module, by a plan whose factors are used: shape (rows, r, r).
        self.mixing_BRR: dict[str, dict[Plan, torch.Tensor]] = {}
        plans = list(dict.fromkeys(vectors.plan for vectors in adapters if vectors is not None))
        together: dict[object, list[Plan]] = {}
        for plan in plans:
            together.setdefault(plan if plan.own_factors else plan.rank, []).append(plan)
        for alike in together.values():
            rank = alike[0].rank
            index = {name: i for i, name in enumerate(dict.fromkeys(name for plan in alike for name in plan.index))}
            parts = [self._part(plan, adapters) for plan in alike]
            total_MBRR = parts[0][1].new_zeros(len(index), self.n_rows, rank, rank)
            for plan, (rows, mixing_MBRR) in zip(alike, parts, strict=True):
                modules_M = torch.tensor([index[name] for name in plan.index], device=total_MBRR.device)
                rows_B = torch.tensor(rows, device=total_MBRR.device)
                total_MBRR[modules_M[:, None], rows_B] = mixing_MBRR.to(total_MBRR.device)
            for name, mixing_BRR in zip(index, total_MBRR, strict=True):
                self.mixing_BRR.setdefault(name, {})[alike[0]] = mixing_BRR

    @staticmethod
    def _part(plan: Plan, adapters: list[Optional[Vectors]]) -> tuple[list[int], torch.Tensor]:
        rows = [row for row, vectors in enumerate(adapters) if vectors is not None and vectors.plan is plan]
        # Each adapter once, however many rows it has.
        users = {vectors: i for i, vectors in enumerate(dict.fromkeys(adapters[row] for row in rows))}
        values_NGK = torch.stack([vectors.values_GK for vectors in users])
        values_NGK = values_NGK.to(torch.promote_types(values_NGK.dtype, torch.float32))
        with torch.autocast(values_NGK.device.type, enabled=False):
            groups_M, projections_MKRR = plan.frozen(values_NGK.device, values_NGK.dtype)
            mixing_MNRR = torch.vmap(mix, in_dims=(0, None, None), out_dims=1)(values_NGK, groups_M, projections_MKRR)
        which = torch.tensor([users[adapters[row]] for row in rows], device=values_NGK.device)
        return rows, mixing_MNRR[:, which]

    def of(self, module: str, x: torch.Tensor) -> dict[Plan, torch.Tensor]:
        """Returns R of each row for one module, for each pair of factors that a row of the batch uses.

        Args:
            module (`str`): Name of the module.
            x (`torch.Tensor`): The module's input, whose first dimension counts the rows.

        Returns:
            `dict[Plan, torch.Tensor]`: By a plan with these factors, a tensor of shape `(rows, r, r)`.

        Raises:
            ValueError: If the batch has another number of rows.
        """
        if len(x) != self.n_rows:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{self.n_rows} and {len(x)} respectively."
            )
        return self.mixing_BRR.get(module, {})


class TinyLoraBank(nn.Module, TinyLoraLayer):
    """
    Holds the vectors of every adapter on a model, registered once, and the plans that they follow.

    To PEFT it is one more adapter layer, so that switching, freezing, deleting and saving adapters are PEFT's own. The
    adapted layers hold nothing of an adapter: what is active and which modules an adapter has they ask of the bank.
    """

    adapter_layer_names = ("trl_tinylora_v",)

    def __init__(self):
        super().__init__()
        self.trl_tinylora_v = nn.ModuleDict()
        self.merged_adapters = []
        # Names of the layers whose weights are merged: fewer than all of them where a merge failed half-way.
        self.merged_layers: set[str] = set()
        self.plans: list[Plan] = []
        # Counts the times that adapters came or went, or what they use in the layers did.
        self.changes = 0
        # Set while a batch is under way whose rows have adapters of their own.
        self.rows: Optional[Rows] = None

    def find_plan(self, config: TinyLoraConfig, names: Optional[list[str]] = None) -> Optional[Plan]:
        """Returns the plan that an adapter would follow, or None where no adapter follows it yet.

        Args:
            config ([`TinyLoraConfig`]): The adapter's configuration.
            names (`list[str]`, *optional*): Names of its modules in depth order, where they are known; otherwise an
                adapter is sought whose configuration named them in the same words.

        Returns:
            [`Plan`] or `None`
        """
        fields, targets = Plan.fields_of(config), Plan.targets_of(config)
        for plan in self.plans:
            if plan.own_factors:
                continue
            if plan.fields == fields and (targets in plan.targets if names is None else list(plan.index) == names):
                return plan
        return None

    def measured(self, module: str, rank: int) -> Optional[Measured]:
        """Returns what is known of a module's weight, or None where no adapter of this rank has the module.

        Args:
            module (`str`): Its name.
            rank (`int`): The rank.

        Returns:
            [`~trl_tinylora.storage.fingerprint.Measured`] or `None`
        """
        found = (plan.measured[module] for plan in self.plans if plan.rank == rank and module in plan.measured)
        # The one with most probes, which serves an adapter of few modules as well.
        return max(found, key=lambda measured: len(measured.probe.values), default=None)

    def change_plan(self, adapter_name: str, plan: Plan) -> None:
        """Lets an adapter follow another plan, which takes its values to mean the same but for the factors.

        Args:
            adapter_name (`str`): The adapter.
            plan ([`Plan`]): The plan.
        """
        vectors = self.vectors(adapter_name)
        former, vectors.plan = vectors.plan, plan
        former.adapters.discard(adapter_name)
        if not former.adapters:
            self.plans.remove(former)
        self.add(adapter_name, vectors)

    def add(self, adapter_name: str, vectors: Vectors) -> None:
        """Takes in an adapter's vectors.

        Args:
            adapter_name (`str`): A name that is not yet taken.
            vectors ([`Vectors`]): Its values.
        """
        self.changes += 1
        self.trl_tinylora_v[adapter_name] = vectors
        vectors.plan.adapters.add(adapter_name)
        if vectors.plan not in self.plans:
            self.plans.append(vectors.plan)

    def vectors(self, adapter_name: str) -> Optional[Vectors]:
        """Returns an adapter's vectors, or None where there is no such adapter.

        Args:
            adapter_name (`str`): Its name.

        Returns:
            [`Vectors`] or `None`
        """
        return self.trl_tinylora_v[adapter_name] if adapter_name in self.trl_tinylora_v else None

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, and its plan where no other one follows it; one that is not there is none to delete.

        Args:
            adapter_name (`str`): Its name.
        """
        self.changes += 1
        super().delete_adapter(adapter_name)
        for plan in self.plans:
            plan.adapters.discard(adapter_name)
        self.plans = [plan for plan in self.plans if plan.adapters]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, trained unless `inference_mode`.

        Args:
            adapter_names (`str` or `list[str]`): Their names.
            inference_mode (`bool`, *optional*, defaults to `False`): Whether they are frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        # One cheap look at each: there may be thousands.
        for name, vectors in self.trl_tinylora_v.items():
            vectors.set_trained(name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Sets whether adapters are trained.

        Args:
            adapter_names (`str` or `Sequence[str]`): Their names.
            requires_grad (`bool`, *optional*, defaults to `True`): Whether they are.
        """
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            vectors = self.vectors(name)
            if vectors is not None:
                vectors.set_trained(requires_grad)

    def before_blocks(self, module: nn.Module, args: tuple) -> None:
        """
        Forward pre-hook of what calls the blocks: puts the original weights back where merged ones would be wrong.

        That is a pass with the adapters disabled, and one that trains: merged values would get no gradient. TRL merges,
        sends the weights and unmerges, and where sending them fails nothing unmerges. The place is outside the blocks,
        for a reentrant checkpoint around one calls it without gradients.

        Args:
            module (`torch.nn.Module`): What holds the blocks.
            args (`tuple`): Its positional arguments.
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

    @never_traced
    def before_first_block(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of a first adapted block: R of the active adapters that begin there, and their sinks.

        Args:
            module (`torch.nn.Module`): The block.
            args (`tuple`): Its positional arguments.
            kwargs (`dict`): Its keyword arguments.

        Returns:
            `tuple[tuple, dict]`: The arguments with the hidden states put through the sink.

        Raises:
            RuntimeError: If the block gets no hidden states, or runs as a replica of `torch.nn.DataParallel`.
        """
        if self.disable_adapters or self.merged_adapters or self.rows is not None:
            return args, kwargs
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "`torch.nn.DataParallel` is not supported: its replicas would share one gradient buffer. Start with "
                "`accelerate launch` (one process per GPU), or let the process see one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        for name in self.active_adapters:
            vectors = self.vectors(name)
            if vectors is not None and vectors.plan.first_block == module._trl_tinylora_block:
                if is_fsdp(module):
                    # FSDP2 keeps a gathered and a sharded tensor for the values, of which PEFT told one.
                    vectors.values_GK.requires_grad_(vectors.is_trained)
                args, kwargs = _replace_hidden(module, args, kwargs, vectors)
        return args, kwargs

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Notes that the layers were merged; they do it themselves.

        Args:
            safe_merge (`bool`, *optional*): Of no effect here.
            adapter_names (`list[str]`, *optional*): Adapters; the active ones by default.
        """
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
        self.changes += 1
        for plan in self.plans:
            plan.apply(fn)
        return super()._apply(fn, recurse)

    @property
    def weight(self) -> None:
        """The bank adapts no weight of its own; PEFT asks every adapter layer for one."""
        return None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The values stay where they were made, in float32.
        if device is not None and adapter_name in self.trl_tinylora_v:
            self.trl_tinylora_v[adapter_name].to(device)


def _replace_hidden(module: nn.Module, args: tuple, kwargs: dict, vectors: Vectors) -> tuple[tuple, dict]:
    for position, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return (*args[:position], vectors(value), *args[position + 1 :]), kwargs
    for key in ("hidden_states", "inputs_embeds", "x", "input"):
        if isinstance(kwargs.get(key), torch.Tensor):
            return args, {**kwargs, key: vectors(kwargs[key])}
    raise RuntimeError(
        f"{type(module).__name__} was called without hidden states as its first argument or as `hidden_states`; "
        f"got {len(args)} positional arguments and {sorted(kwargs)}. TinyLoRA cannot be placed before this block."
    )
