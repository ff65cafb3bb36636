"""TinyLoRA for TRL: "Learning to Reason in 13 Parameters" (arXiv:2602.04118) as a PEFT method for TRL's trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import TinyLoraConfig, TinyLoraPeftType
from .convert.lora import export_lora
from .convert.peft_tinylora import convert_peft_tinylora
from .registration import register
from .tuner.model import TinyLoraModel
from .version import __version__


if TYPE_CHECKING:
    from .vllm.fidelity import SamplingFidelityCallback, sampling_fidelity


__all__ = [
    "SamplingFidelityCallback",
    "TinyLoraConfig",
    "TinyLoraModel",
    "TinyLoraPeftType",
    "__version__",
    "convert_peft_tinylora",
    "export_lora",
    "register",
    "sampling_fidelity",
]

register()


def __getattr__(name: str) -> object:
    # The base class of callbacks takes half as long to import as everything else here.
    if name in ("SamplingFidelityCallback", "sampling_fidelity"):
        from .vllm import fidelity

        return getattr(fidelity, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
