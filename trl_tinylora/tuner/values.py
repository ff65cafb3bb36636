"""The trained values of one adapter, and every module's R that follows from them."""

from __future__ import annotations

from functools import partial
from typing import Optional, Union

import torch
from torch import nn

from ..config import TinyLoraConfig
from ..distributed import gathered, is_lent, is_sharded, whole
from ..maths.decomposition import frozen_stream, mix, unmix
from ..storage.checkpoint import FORMAT, VALUES
from .gradient import GradientBuffer, GradientSink, without_autocast
from .plan import Plan


class Vectors(nn.Module):
    """
    The trained values v of one adapter, and R = sum_k v_k P_k of all its modules in one product.

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
        initial_GK = torch.zeros(plan.shape, dtype=torch.float32, device=device)
        if config.init_weights is not True:
            bound, stream = config.init_v_bound, frozen_stream(f"init:{config.projection_seed}")
            # From a stream of its own, so that it is the same in all processes.
            initial_GK = torch.from_numpy(stream.uniform(-bound, bound, plan.shape)).to(initial_GK)
        self.lora_magnitude_vector = nn.Parameter(initial_GK, requires_grad=False)
        if config.checkpoint_format == FORMAT and config._expected[1] is not None:
            # transformers reports what the file has and the model has not; the values are verified as it sets them.
            self.register_buffer(plan.owner, torch.empty(0))
        self.is_trained = False
        self.buffer = GradientBuffer()
        # Every module's R as of the last pass, whether that had gradients, whether hidden states go through its sink,
        # whether a backward pass has come to its sink, and the state of the values that it was computed from.
        self._mixing_MRR: Optional[torch.Tensor] = None
        self._was_traced = self._has_hidden = True
        self._is_spent = False
        self._computed_from: Optional[tuple] = None

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        """Takes a parameter; of values that another loader has read, verifies that they are those that were saved."""
        is_replaced = name in self._parameters
        super().register_parameter(name, param)
        # transformers' `load_adapter` sets the attribute, and calls nothing else of ours.
        if is_replaced and not (param.is_meta or is_sharded(param)):
            values = param.detach().to(getattr(torch, self.config.save_dtype))
            self.config.verify_values({VALUES: values}, "what was loaded")

    @property
    def values_GK(self) -> torch.Tensor:
        """v, shape (groups, u), dtype float32; under ZeRO-3 and FSDP2 this process's shard of it between passes."""
        return self.lora_magnitude_vector

    def set_trained(self, is_trained: bool) -> None:
        """Sets whether the values are trained."""
        self.is_trained = is_trained
        if self.values_GK.requires_grad != is_trained:
            self.values_GK.requires_grad_(is_trained)

    @torch.no_grad()
    def whole_values(self) -> torch.Tensor:
        """Returns a copy of v, gathered from all processes where it is sharded: shape (groups, u)."""
        with gathered([self.values_GK]):
            return whole(self.values_GK).clone()

    @torch.no_grad()
    def mixings(self, modules: slice = slice(None)) -> torch.Tensor:
        """Returns R of modules from the present values, gathered from all processes where they are sharded."""
        return self._mix(self.whole_values(), modules)

    def mixing(self, index: Union[int, slice]) -> torch.Tensor:
        """Returns R of one module, or of several, as [`mixings`] does."""
        return self.mixings(index) if isinstance(index, slice) else self.mixings(slice(index, index + 1))[0]

    def mixing_of_pass(self, index: Union[int, slice], is_training: bool) -> torch.Tensor:
        """Returns R of one module, or of several, as of the forward pass under way.

        A layer that is reached by another way than through a first adapted block (an encoder called by itself, a first
        block that was dropped) begins the pass itself, with the gradient sink on R.

        Args:
            index (`int` or `slice`): Which modules.
            is_training (`bool`): Whether the layer is in training mode.

        Raises:
            RuntimeError: If a reentrant checkpoint calls the layer where no sink could wait for it, or the values are
                sharded and the layer is reached by another way.
        """
        is_traced = torch.is_grad_enabled() and self.values_GK.requires_grad
        is_backward = _is_backward()
        is_missing = self._mixing_MRR is None or self._computed_from not in ((), self._state_of_values())
        is_missing = is_missing or (self._is_spent and not is_backward)
        if is_backward and not is_missing:
            # A checkpoint computes the layer again, in a graph of its own if it is a reentrant one, of which a backward
            # pass would run the sink. With a leaf in the place of R the layer takes part in it all the same.
            return self._mixing_MRR[index].detach().clone().requires_grad_(is_traced)
        if is_missing:
            is_checkpointed = is_training and self.values_GK.requires_grad and not torch.is_grad_enabled()
            if is_backward or is_checkpointed or is_sharded(self.values_GK) or is_lent(self.values_GK):
                raise RuntimeError(
                    "an adapted layer was called outside the model's forward pass: TinyLoRA computes every module's "
                    "update where the hidden states enter the first adapted block. Call the whole model."
                )
            self.begin_pass(None)
        elif is_traced and not self._mixing_MRR.requires_grad:
            # Left by a pass without gradients, or by a checkpoint that the layer is not in.
            _, self._mixing_MRR = GradientSink.apply(None, self._mixing_MRR, self.values_GK, self.collect)
        if self._mixing_MRR.requires_grad and not torch.is_grad_enabled():
            if not self._has_hidden:
                raise RuntimeError(
                    "an adapted layer was called without gradients in a training pass of a model that has no list of "
                    "blocks and no floating-point input: reentrant checkpointing would give the values a gradient for "
                    "each checkpoint. Pass `use_reentrant=False`, or call the layer outside `torch.no_grad()`."
                )
            # A reentrant checkpoint: its backward pass comes before that of the hidden states that the sink is on.
            self._mixing_MRR = self._mixing_MRR.detach()
        return self._mixing_MRR[index]

    def begin_pass(self, hidden: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        """Computes every module's R, and puts the gradient sink on it and on the hidden states, where there are some.

        Autograd waits for all modules that take R or are behind the hidden states. A reentrant checkpoint has a
        backward pass of its own for its modules, which counts on the hidden states alone.

        Raises:
            RuntimeError: If a reentrant checkpoint computes the first block of one of several stacks again.
        """
        is_traced = torch.is_grad_enabled() and self.values_GK.requires_grad
        # A reentrant checkpoint called the block without gradients first, and calls it again with a detached input.
        is_detached = hidden is not None and hidden.grad_fn is None
        is_backward = _is_backward()
        if len(self.plan.first_blocks) > 1 and is_backward and is_traced and is_detached and not self._was_traced:
            raise RuntimeError(
                f"the adapted modules lie in several stacks, which begin at {', '.join(self.plan.first_blocks)}: "
                "reentrant checkpointing would give the values a gradient for each stack. Pass `use_reentrant=False` "
                "(`gradient_checkpointing_kwargs`) and make no pass without gradients between a forward pass and its "
                "backward pass, or adapt one stack alone."
            )
        with torch.no_grad(), without_autocast(self.values_GK):
            self._mixing_MRR = self._mix(self.values_GK, slice(None))
        self._computed_from = self._state_of_values()
        if not is_backward:
            self._was_traced, self._is_spent = is_traced, False
            # Empty outside a backward pass: only one that failed half-way leaves something behind.
            self.buffer.take()
        if is_traced:
            self._has_hidden = hidden is not None
            hidden, self._mixing_MRR = GradientSink.apply(hidden, self._mixing_MRR, self.values_GK, self.collect)
        return hidden

    def gradient_hook(self, index: Union[int, slice]) -> Optional[partial]:
        """Returns what takes the gradient of R, of one module or of several, or None where the values are frozen."""
        if not self.values_GK.requires_grad:
            return None
        return partial(self.buffer.add, index, n_modules=len(self.plan.index))

    def collect(self) -> torch.Tensor:
        """Empties the buffer and returns the gradient of v that it held, shape (groups, u)."""
        grad_MRR = self.buffer.take()
        self._is_spent = True
        if grad_MRR is None:
            return torch.zeros(self.plan.shape, dtype=self.values_GK.dtype, device=self.values_GK.device)
        grad_MRR = grad_MRR.to(self.values_GK.device)
        groups_M, projections_MKRR = self.plan.frozen(grad_MRR.device, grad_MRR.dtype)
        return unmix(grad_MRR, groups_M, projections_MKRR, self.plan.shape[0]).to(self.values_GK.dtype)

    def _mix(self, values_GK: torch.Tensor, modules: slice) -> torch.Tensor:
        if self.config.lacks_values:
            raise ValueError(
                "the configuration is that of a saved adapter, and its values were not loaded: the file lacks them, or "
                "nobody loaded it. Copy the folder again; for a new adapter make a new `TinyLoraConfig`."
            )
        dtype = torch.promote_types(values_GK.dtype, torch.float32)
        groups_M, projections_MKRR = self.plan.frozen(values_GK.device, dtype)
        return mix(values_GK.to(dtype), groups_M[modules], projections_MKRR[modules])

    def _state_of_values(self) -> tuple:
        # Gathered anew for every use, sharded values lie elsewhere each time, and in the layers they are not whole.
        values_GK = self.values_GK
        return () if is_sharded(values_GK) or is_lent(values_GK) else (values_GK.data_ptr(), values_GK._version)

    def __getstate__(self) -> dict:
        # What a pass has left is no part of a copy, which torch makes of leaves only.
        return {**super().__getstate__(), "_mixing_MRR": None}

    def _apply(self, fn, recurse=True):
        self._mixing_MRR = None
        self.buffer.take()
        return super()._apply(fn, recurse)


def _is_backward() -> bool:
    """Whether a backward pass is under way, in which checkpoints compute layers again."""
    return torch._C._current_graph_task_id() != -1
