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

import functools
import warnings
from typing import TYPE_CHECKING, NamedTuple, Optional

import torch
from torch import nn
from transformers import TrainerCallback

from ..distributed import gathered, whole
from ..tuner.experts import Experts
from ..tuner.layer import Linear
from ..tuner.values import Vectors
from ..tuner.weights import KNOWN_DTYPES, as_OI, is_quantised


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
_PLASTIC_NUMBER = 1.324717957244746


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


class _Sums(NamedTuple):
    """Of some entries of one weight: <eff, D>, <D, D>, how many the dtype does not hold exactly, and |D| / ulp(W)."""

    inner: torch.Tensor
    square: torch.Tensor
    n_inexact: torch.Tensor
    ulps_N: torch.Tensor

    def fidelity(self) -> Fidelity:
        inner, square, n_inexact, ulps = torch.stack([*self[:3], self.ulps_N.median()]).tolist()
        return Fidelity(inner / square if square > 0 else None, ulps, n_inexact == 0)


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
    changed, and it may be merged. Sharded weights and values are gathered, one weight at a time, so that all processes
    have to call this.

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
        NotImplementedError: If a weight is quantised, or fused experts are adapted.
    """
    if entries < 1:
        raise ValueError(f"`entries` must be at least 1, got {entries}.")
    # Once for all modules: under ZeRO-3 the values have to be gathered.
    mixings = functools.cache(Vectors.mixings)
    found: dict[str, _Sums] = {}
    if any(isinstance(module, Experts) for module in model.modules()):
        raise NotImplementedError(
            "the adapter is on fused experts too, of which it is not measured what a merge leaves. Measure on an "
            "adapter without `target_parameters`."
        )
    for layer in filter(lambda module: isinstance(module, Linear), model.modules()):
        names = layer.active_adapters if adapter_name is None else [adapter_name]
        places = [place for name in names if (place := layer.place(name)) is not None]
        if places:
            updates = [(*layer.factors_of(vectors.plan), mixings(vectors)[index]) for vectors, index in places]
            found[layer.name] = _sums_of_layer(layer, updates, dtype, entries)
    if not found:
        raise ValueError(
            f"the model has no TinyLoRA adapter{'' if adapter_name is None else f' {adapter_name!r}'}. Pass the model "
            "that `get_peft_model` or `PeftModel.from_pretrained` returned, and the name of one of its adapters."
        )
    device = next(iter(found.values())).inner.device
    *sums, ulps = zip(*([part.to(device) for part in sums] for sums in found.values()), strict=True)
    total = _Sums(*(torch.stack(column).sum() for column in sums), torch.cat(ulps))
    return ModelFidelity(total.fidelity(), {name: sums.fidelity() for name, sums in found.items()})


def _sums_of_layer(
    layer: Linear, updates: list[tuple[torch.Tensor, ...]], dtype: Optional[torch.dtype], entries: int
) -> _Sums:
    """Of one layer and the U S, V^T and R of its adapters, estimated for all entries."""
    linear = layer.get_base_layer()
    if is_quantised(linear) or linear.weight.dtype not in KNOWN_DTYPES:
        raise NotImplementedError(
            f"the weight of {layer.name} is quantised ({linear.weight.dtype}), and what a merge leaves of an update "
            "there is not known. Measure on the same model in bfloat16."
        )
    with gathered([linear.weight]):
        weight_OI = as_OI(linear, whole(layer.unmerged_weight()))
        size, device = weight_OI.numel(), weight_OI.device
        row_N, column_N = (position.to(device) for position in _positions(tuple(weight_OI.shape), entries))
        # A copy: what was gathered is gone behind this block.
        weight_N = weight_OI[row_N, column_N]
    delta_N = 0
    for left_OR, right_RI, mixing_RR in updates:
        wide = torch.promote_types(left_OR.dtype, torch.float32)
        mixed_NR = left_OR.to(device)[row_N].to(wide) @ mixing_RR.to(device, wide)
        delta_N = delta_N + (mixed_NR * right_RI.to(device).mT[column_N].to(wide)).sum(1)
    found, scale = _sums(weight_N, delta_N, dtype or weight_N.dtype), size / len(weight_N)
    return found._replace(inner=found.inner * scale, square=found.square * scale, ulps_N=found.ulps_N.float())


def _sums(weight: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> _Sums:
    """Of entries of W, not merged, and of D in float32 or wider; the sampler holds W in `dtype`."""
    held = weight.to(dtype).double()
    # As `Linear.merge` does, in float32 or wider with one rounding to the weight's dtype; then to the sampler's.
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta
    effective = merged.to(weight.dtype).to(dtype).double() - held
    delta = delta.double()
    inner, square, n_inexact = (effective * delta).sum(), delta.square().sum(), (held != weight).sum()
    return _Sums(inner, square, n_inexact, delta.abs() / _ulp(held, dtype))


def _ulp(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from each |x| to the next larger number of a dtype, float64; `torch.nextafter` has no float16."""
    info = torch.finfo(dtype)
    # |x| = mantissa * 2^exponent, with a mantissa from 1/2 up to but not including 1.
    exponent = torch.frexp(numbers.double().abs().clamp_min(info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)


def _positions(shape: tuple[int, int], entries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the entries to read: even over both, without a period, which attention heads have too."""
    rows, columns = shape
    if rows * columns <= entries:
        return torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    # The additive sequence of the plastic number: in two dimensions what the golden ratio's is in one.
    steps_N = torch.arange(entries, dtype=torch.float64) + 0.5
    row_N, column_N = (steps_N / _PLASTIC_NUMBER).frac() * rows, (steps_N / _PLASTIC_NUMBER**2).frac() * columns
    return row_N.long(), column_N.long()


class SamplingFidelityCallback(TrainerCallback):
    """
    Logs how much of the update arrives at vLLM, beside TRL's own `sampling/` metrics, and warns where hardly any does.

    At every logging step `sampling/merged_update/share` and `sampling/merged_update/median_ulps` (see
    [`sampling_fidelity`]) of the values that the next transfer to vLLM merges. They reach the history, the console and
    every reporter. As long as the values are zero there is nothing to lose, and neither is logged.

    A share under 0.7 brings a warning the first time, and one at the end where it stayed so; a median under 0.1 as well
    where vLLM's dtype rounds the base weights themselves. Under `use_vllm` only, for only then the samples come from
    merged weights.

    Usage:
    ```python
    >>> trainer = GRPOTrainer(..., peft_config=TinyLoraConfig())
    >>> trainer.add_callback(SamplingFidelityCallback(trainer))
    ```

    Args:
        trainer (`transformers.Trainer`): The trainer that it is added to.
        dtype (`torch.dtype`, *optional*): What vLLM holds its weights in. By default what vLLM's `dtype="auto"` makes
            of the model's: bfloat16 of float32, and 16 bits as they are.

    Raises:
        ValueError: If the trainer's model has no TinyLoRA adapter.
    """

    def __init__(self, trainer: Trainer, dtype: Optional[torch.dtype] = None):
        if not any(isinstance(module, Linear) for module in trainer.model.modules()):
            raise ValueError(
                f"the model of this {type(trainer).__name__} has no TinyLoRA adapter, so that there is no update to "
                "follow. Make the trainer with `peft_config=TinyLoraConfig(...)`, or leave this callback out."
            )
        self.trainer = trainer
        self.dtype = dtype
        self._was_base: list[bool] = []

    def on_train_begin(self, args, state, control, **kwargs):
        # To the front: reporters come before what a user adds, and would report before the metrics are there. As a new
        # list, for the trainer is iterating over this one.
        handler = self.trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        # Neither an evaluation nor the summary at the end.
        if "loss" not in logs:
            return
        found = sampling_fidelity(model, dtype=self._dtype_of_sampler(model)).total
        if found.share is None:
            return
        metrics = {SHARE_KEY: found.share, ULPS_KEY: found.ulps}
        logs.update(metrics)
        # The trainer has put a copy of the logs there before it called.
        state.log_history[-1].update(metrics)
        if not getattr(args, "use_vllm", False) or not state.is_world_process_zero:
            return
        if found.is_base and not any(self._was_base):
            warnings.warn(
                f"At step {state.global_step} the weights that vLLM gets are effectively those of the base model: "
                f"{found.share:.0%} of the update survives the merge (at least {LOWEST_SHARE:.0%} should), and its "
                f"median entry is {found.ulps:.2g} of the last place of its weight (at least {LOWEST_ULPS} should, "
                "where rounding changes the base weights too). In the first steps of a run this passes. Where it stays "
                "so, the completions are not the policy's: raise the learning rate, sample from the adapter itself "
                "(use_vllm=False), or let model and vLLM hold the weights in float32 (dtype float32, "
                "vllm_mode='server', and `--dtype float32` there)."
            )
        self._was_base.append(found.is_base)

    def on_train_end(self, args, state, control, **kwargs):
        if self._was_base and self._was_base[-1]:
            warnings.warn(
                f"To the end, at {sum(self._was_base)} of {len(self._was_base)} logged steps, vLLM sampled from what "
                "is effectively the base model."
            )

    def _dtype_of_sampler(self, model: nn.Module) -> Optional[torch.dtype]:
        if self.dtype is not None:
            return self.dtype
        # `_resolve_auto_dtype` in vllm/config/model.py takes no float32.
        weights = (module.get_base_layer().weight for module in model.modules() if isinstance(module, Linear))
        return torch.bfloat16 if any(weight.dtype.itemsize > 2 for weight in weights) else None
