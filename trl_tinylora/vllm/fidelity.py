"""
How much of an update the sampler gets, when it samples from merged weights.

TRL hands vLLM `W + D` with `D = U S R V^T` (arXiv:2602.04118, section 4), rounded to the dtype in which vLLM holds its
weights. Where D is far below the spacing of that dtype's numbers, the sum is rounded back to W: completions come from
the base model, whatever the values are, and nothing else in the logs says so.

| symbol | what                                                                                    |
|--------|-----------------------------------------------------------------------------------------|
| eff    | what arrives: `round(W + D) - round(W)`, in the sampler's dtype                         |
| share  | `<eff, D> / <D, D>`, sums over the entries: 1 where D arrives whole, 0 where none does  |
| ulps   | median of `|D| / ulp(W)`, where ulp is the distance from |W| to the next larger number  |

Measured on the toy (`recipes/benchmarks/fidelity.py`): where the sampler's dtype holds W itself exactly, as bfloat16
does a checkpoint that was published in it, the sampler's distance from the policy over the base's, as divergences, is
about `(1 - share)^2`. Where it rounds W as well, the share is right on average only, and does not say that the update
is lost in the rounding; the median does.

Suffix N: entries of a weight that are read.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
from torch import nn
from transformers import TrainerCallback

from ..distributed import gathered, whole
from ..tuner.layer import Linear
from ..tuner.plan import Plan
from ..tuner.targets import as_OI
from ..tuner.values import Vectors


if TYPE_CHECKING:
    from transformers import Trainer


# Read of each weight. `recipes/benchmarks/fidelity.py` measures what that costs and by how much the estimate is off.
ENTRIES = 16384
# The sampler is effectively the base model below the first, or below the second where W is rounded itself.
LOWEST_SHARE = 0.7
LOWEST_ULPS = 0.1
SHARE_KEY = "sampling/merged_update/share"
ULPS_KEY = "sampling/merged_update/median_ulps"
# The real root of x^3 = x + 1.
PLASTIC_NUMBER = 1.324717957244746


class Survival(NamedTuple):
    """
    What becomes of an update of a weight, or of some of its entries, when it is merged.

    Args:
        inner (`torch.Tensor`): `<eff, D>`, a float64 number.
        square (`torch.Tensor`): `<D, D>`, a float64 number.
        ulps (`torch.Tensor`): `|D| / ulp(W)` of each entry, float64, the shape of the weight.
        n_inexact (`torch.Tensor`): Of how many entries the sampler's dtype cannot hold W, an int64 number.
    """

    inner: torch.Tensor
    square: torch.Tensor
    ulps: torch.Tensor
    n_inexact: torch.Tensor


class Fidelity(NamedTuple):
    """
    How much of an update arrives at the sampler.

    Args:
        share (`float` or `None`): `<eff, D> / <D, D>`. Rounding can overshoot, so that it may be a little above 1.
            `None` where D is zero: nothing arrives, and nothing was to arrive.
        ulps (`float`): Median of `|D| / ulp(W)`.
        is_exact (`bool`): Whether the sampler's dtype holds W itself, so that nothing but the update is rounded.
    """

    share: Optional[float]
    ulps: float
    is_exact: bool

    @property
    def is_base(self) -> bool:
        """Whether the sampler is effectively the base model, though the policy is another one."""
        if self.share is None:
            return False
        return self.share < LOWEST_SHARE or (not self.is_exact and self.ulps < LOWEST_ULPS)


class ModelFidelity(NamedTuple):
    """
    How much of a model's update arrives at the sampler.

    Args:
        total ([`Fidelity`]): Of all modules together: the sum of their inner products over the sum of their squares,
            and the median over all entries that were read.
        modules (`dict[str, Fidelity]`): Of each module, by name.
    """

    total: Fidelity
    modules: dict[str, Fidelity]


def ulp(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    Returns the distance from each |x| to the next larger number of a dtype: `2^(floor(log2 |x|) + 1 - p)`.

    p is the precision in bits: 8 for bfloat16, 11 for float16, 24 for float32. Up to the smallest normal number, at
    zero too, it is the smallest subnormal one.

    Args:
        tensor (`torch.Tensor`): Finite numbers of that dtype, in any float dtype.
        dtype (`torch.dtype`): A float dtype.

    Returns:
        `torch.Tensor` of the same shape, dtype float64.
    """
    info = torch.finfo(dtype)
    # |x| = mantissa * 2^exponent, with a mantissa from 1/2 up to but not including 1.
    exponent = torch.frexp(tensor.double().abs().clamp_min(info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)


def survival(weight: torch.Tensor, delta: torch.Tensor, dtype: Optional[torch.dtype] = None) -> Survival:
    """
    Returns what becomes of an update when it is merged: `eff = round(W + D) - round(W)` against D.

    The sum is what [`Linear.merge`] makes of it, in float32 or wider with one rounding to the weight's dtype; and
    rounded once more where the sampler holds its weights in another one. All that follows is float64.

    Args:
        weight (`torch.Tensor`): W, not merged, or any of its entries; any shape and float dtype.
        delta (`torch.Tensor`): D = U S R V^T, the same entries, float32 or wider.
        dtype (`torch.dtype`, *optional*): What the sampler holds the weight in; the weight's own by default.

    Returns:
        [`Survival`]: On the device of the weight.
    """
    dtype = weight.dtype if dtype is None else dtype
    held = weight.to(dtype).double()
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta
    effective = merged.to(weight.dtype).to(dtype).double() - held
    delta = delta.double()
    ulps, n_inexact = delta.abs() / ulp(held, dtype), (held != weight).sum()
    return Survival((effective * delta).sum(), delta.square().sum(), ulps, n_inexact)


def spread_entries(shape: tuple[int, int], entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns which entries of a weight are read: spread evenly over its rows and its columns, without a period.

    Whole rows would cost as much and say less: an update is large in some rows and small in others, all along. Equal
    distances would meet the same places of every attention head.

    Args:
        shape (`tuple[int, int]`): Shape of the weight.
        entries (`int`): Number of entries wanted; all are taken where there are no more.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Row and column of each, int64, shape `(N,)`.
    """
    rows, columns = shape
    if rows * columns <= entries:
        return torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    # The additive sequence of the plastic number: in two dimensions what the golden ratio's is in one.
    steps_N = torch.arange(entries, dtype=torch.float64) + 0.5
    row_N, column_N = (steps_N / PLASTIC_NUMBER).frac() * rows, (steps_N / PLASTIC_NUMBER**2).frac() * columns
    return row_N.long(), column_N.long()


@torch.no_grad()
def sampling_fidelity(
    model: nn.Module,
    adapter_name: Optional[str] = None,
    *,
    dtype: Optional[torch.dtype] = None,
    entries: int = ENTRIES,
) -> ModelFidelity:
    """
    Returns how much of an adapter's update arrives at a sampler of merged weights, estimated from part of the entries.

    The entries that are read stand for their module: its sums are scaled to all of them. Nothing of the model is
    changed, and it may be merged. Where weights or values are spread over processes they are gathered, one weight at a
    time, so that all processes have to call this.

    Args:
        model (`torch.nn.Module`): A model with TinyLoRA adapters, wrapped or not.
        adapter_name (`str`, *optional*): The adapter; the active ones together by default, as TRL merges them.
        dtype (`torch.dtype`, *optional*): What the sampler holds its weights in; each weight's own by default.
        entries (`int`, *optional*, defaults to `16384`): How many entries of each weight are read; all where there are
            no more. For a 3584 x 3584 weight in bfloat16 the share was then off by 0.02 at most and the median by 2%;
            over several modules errors average out.

    Returns:
        [`ModelFidelity`]

    Raises:
        ValueError: If the model has no such adapter, or `entries` is less than 1.
        NotImplementedError: If a weight is quantised.
    """
    if entries < 1:
        raise ValueError(f"`entries` must be at least 1, got {entries}.")
    mixings: dict[Vectors, torch.Tensor] = {}
    parts: dict[str, Survival] = {}
    for layer in model.modules():
        if not isinstance(layer, Linear):
            continue
        names = layer.active_adapters if adapter_name is None else [adapter_name]
        places = [place for name in names if (place := layer.place(name)) is not None]
        for vectors, _ in places:
            # Once for all modules: under ZeRO-3 the values have to be gathered.
            if vectors not in mixings:
                mixings[vectors] = vectors.mixings()
        if places:
            updates = [(vectors.plan, mixings[vectors][index]) for vectors, index in places]
            parts[layer.name] = _survival_in(layer, updates, dtype, entries)
    if not parts:
        raise ValueError(
            f"the model has no TinyLoRA adapter{'' if adapter_name is None else f' {adapter_name!r}'}. Pass the model "
            "that `get_peft_model` or `PeftModel.from_pretrained` returned, and the name of one of its adapters."
        )
    return _summed_up(parts)


def _survival_in(
    layer: Linear, updates: list[tuple[Plan, torch.Tensor]], dtype: Optional[torch.dtype], entries: int
) -> Survival:
    """Of one layer, its sums scaled to all entries."""
    linear = layer.get_base_layer()
    if not linear.weight.is_floating_point():
        raise NotImplementedError(
            f"the weight of {layer.name} is quantised ({linear.weight.dtype}), and what a merge leaves of an update "
            "there is not known. Measure on the same model in bfloat16."
        )
    with gathered([linear.weight]):
        weight_OI = as_OI(linear, whole(layer.unmerged_weight()))
        size = weight_OI.numel()
        row_N, column_N = (places.to(weight_OI.device) for places in spread_entries(tuple(weight_OI.shape), entries))
        # A copy: what was gathered is gone behind this block.
        weight_N = weight_OI[row_N, column_N]
    delta_N = sum(_delta_at(layer.factors_of(plan), mixing_RR, row_N, column_N) for plan, mixing_RR in updates)
    found, scale = survival(weight_N, delta_N, dtype), size / len(weight_N)
    return found._replace(inner=found.inner * scale, square=found.square * scale, ulps=found.ulps.float())


def _delta_at(
    factors: tuple[torch.Tensor, torch.Tensor], mixing_RR: torch.Tensor, row_N: torch.Tensor, column_N: torch.Tensor
) -> torch.Tensor:
    """Entries of U S R V^T."""
    left_OR, right_RI = (factor.to(row_N.device) for factor in factors)
    dtype = torch.promote_types(left_OR.dtype, torch.float32)
    mixed_NR = left_OR[row_N].to(dtype) @ mixing_RR.to(row_N.device, dtype)
    return (mixed_NR * right_RI.mT[column_N].to(dtype)).sum(1)


def _summed_up(parts: dict[str, Survival]) -> ModelFidelity:
    device = next(iter(parts.values())).inner.device
    ulps = torch.cat([part.ulps.to(device) for part in parts.values()]).median().item()
    rows = [torch.stack([part.inner, part.square, part.n_inexact, part.ulps.median()]) for part in parts.values()]
    # One transfer for all modules: a GPU stops for each.
    table = torch.stack([row.to(device) for row in rows]).tolist()
    modules = {name: _fidelity(*row) for name, row in zip(parts, table, strict=True)}
    inner, square, n_inexact, _ = (sum(column) for column in zip(*table, strict=True))
    return ModelFidelity(_fidelity(inner, square, n_inexact, ulps), modules)


def _fidelity(inner: float, square: float, n_inexact: float, ulps: float) -> Fidelity:
    return Fidelity(inner / square if square > 0 else None, ulps, n_inexact == 0)


class SamplingFidelityCallback(TrainerCallback):
    """
    Logs how much of the update arrives at vLLM, beside TRL's own `sampling/` metrics, and warns where hardly any does.

    At every logging step `sampling/merged_update/share` and `sampling/merged_update/median_ulps` (see
    [`sampling_fidelity`]) of the values that the next transfer to vLLM merges. They reach the history, the console and
    every reporter. As long as the values are zero there is nothing to lose, and neither is logged.

    A share under 0.7 brings a warning when it gets there, one when it is over, and one at the end where it is not; a
    median under 0.1 as well where vLLM's dtype rounds the base weights themselves. Under `use_vllm` only, for only then
    the samples come from merged weights.

    Usage:
    ```python
    >>> trainer = GRPOTrainer(..., peft_config=TinyLoraConfig())
    >>> trainer.add_callback(SamplingFidelityCallback(trainer))
    ```

    Args:
        trainer (`transformers.Trainer`): The trainer that it is added to.
        dtype (`torch.dtype`, *optional*): What vLLM holds its weights in. By default what vLLM's `dtype="auto"` makes
            of the model's: bfloat16 of float32, and 16 bits as they are.
        entries (`int`, *optional*, defaults to `16384`): How many entries of each weight are read.

    Raises:
        ValueError: If the trainer's model has no TinyLoRA adapter.
    """

    def __init__(self, trainer: Trainer, dtype: Optional[torch.dtype] = None, entries: int = ENTRIES):
        if not any(isinstance(module, Linear) for module in trainer.model.modules()):
            raise ValueError(
                f"the model of this {type(trainer).__name__} has no TinyLoRA adapter, so that there is no update to "
                "follow. Make the trainer with `peft_config=TinyLoraConfig(...)`, or leave this callback out."
            )
        self.trainer = trainer
        self.dtype = dtype
        self.entries = entries
        self._n_logged = self._n_as_base = 0
        self._is_base = self._was_over = False

    def on_train_begin(self, args, state, control, **kwargs):
        # Reporters come before what a user adds, and write down what they are told when it is their turn. Not in the
        # same list, which the trainer is going through.
        handler = self.trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        # Neither an evaluation nor the summary at the end.
        if "loss" not in logs:
            return
        found = sampling_fidelity(model, dtype=self._dtype_of_sampler(model), entries=self.entries).total
        if found.share is None:
            return
        metrics = {SHARE_KEY: found.share, ULPS_KEY: found.ulps}
        logs.update(metrics)
        # The trainer has put a copy of the logs there before it called.
        state.log_history[-1].update(metrics)
        if getattr(args, "use_vllm", False) and state.is_world_process_zero:
            self._judge(found, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self._is_base:
            self._warn(f"To the end, {self._count()}, vLLM sampled from what is effectively the base model.")

    def _dtype_of_sampler(self, model: nn.Module) -> Optional[torch.dtype]:
        if self.dtype is not None:
            return self.dtype
        # `_resolve_auto_dtype` in vllm/config/model.py takes no float32.
        weights = (module.get_base_layer().weight for module in model.modules() if isinstance(module, Linear))
        return torch.bfloat16 if any(weight.dtype.itemsize > 2 for weight in weights) else None

    def _judge(self, found: Fidelity, step: int) -> None:
        was_base, self._is_base = self._is_base, found.is_base
        if was_base and not found.is_base and not self._was_over:
            self._was_over = True
            self._warn(
                f"At step {step} {found.share:.0%} of the update survives the merge, and vLLM samples from the policy. "
                f"Before, {self._count()}, it sampled from what is effectively the base model."
            )
        self._n_logged += 1
        self._n_as_base += found.is_base
        if found.is_base and self._n_as_base == 1:
            self._warn(
                f"At step {step} the weights that vLLM gets are effectively those of the base model: {found.share:.0%} "
                f"of the update survives the merge (at least {LOWEST_SHARE:.0%} should), and its median entry is "
                f"{found.ulps:.2g} of the last place of its weight (at least {LOWEST_ULPS} should, where rounding "
                "changes the base weights too). In the first steps of a run this passes. Where it stays so, the "
                "completions are not the policy's: raise the learning rate, sample from the adapter itself "
                "(use_vllm=False), or let model and vLLM hold the weights in float32 (dtype float32, "
                "vllm_mode='server', and `--dtype float32` there)."
            )

    def _count(self) -> str:
        return f"at {self._n_as_base} of {self._n_logged} logged steps"

    @staticmethod
    def _warn(text: str) -> None:
        warnings.warn(text, stacklevel=2)
