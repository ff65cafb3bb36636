"""TinyLoRA for TRL: "Learning to Reason in 13 Parameters" (arXiv:2602.04118) as a PEFT method for TRL's trainers."""

from .config import TinyLoraConfig, TinyLoraPeftType
from .export import export_lora
from .model import TinyLoraModel
from .peft_tinylora import convert_peft_tinylora
from .registration import register
from .version import __version__


__all__ = [
    "TinyLoraConfig",
    "TinyLoraModel",
    "TinyLoraPeftType",
    "__version__",
    "convert_peft_tinylora",
    "export_lora",
    "register",
]

register()
