"""TinyLoRA for TRL: "Learning to Reason in 13 Parameters" (arXiv:2602.04118) as a PEFT method for TRL's trainers."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from .version import __version__


if TYPE_CHECKING:
    from .config import TinyLoraConfig, TinyLoraPeftType
    from .convert.gguf import export_gguf
    from .convert.lora import export_lora
    from .convert.peft_tinylora import convert_peft_tinylora
    from .learning_rate import find_learning_rate
    from .registration import register
    from .tuner.model import TinyLoraModel
    from .vllm.fidelity import SamplingFidelityCallback, sampling_fidelity
    from .vllm.rollout import AdapterRollout


__all__ = [
    "AdapterRollout",
    "SamplingFidelityCallback",
    "TinyLoraConfig",
    "TinyLoraModel",
    "TinyLoraPeftType",
    "__version__",
    "convert_peft_tinylora",
    "export_gguf",
    "export_lora",
    "find_learning_rate",
    "register",
    "sampling_fidelity",
]

# Imported where they are asked for: the base class of callbacks takes half as long as everything else here.
_MODULES = {
    "AdapterRollout": "vllm.rollout",
    "SamplingFidelityCallback": "vllm.fidelity",
    "TinyLoraConfig": "config",
    "TinyLoraModel": "tuner.model",
    "TinyLoraPeftType": "config",
    "convert_peft_tinylora": "convert.peft_tinylora",
    "export_gguf": "convert.gguf",
    "export_lora": "convert.lora",
    "find_learning_rate": "learning_rate",
    "register": "registration",
    "sampling_fidelity": "vllm.fidelity",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Python imports the package before it runs `python -m trl_tinylora`, whose commands register where they need PEFT: its
# import takes seconds, which `--help` does not. While it does so, `sys.argv[0]` is "-m", and the name stands before the
# command's own arguments.
if not (sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == __name__):
    from .registration import register

    register()
