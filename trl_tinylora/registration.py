"""The only place that touches PEFT's registries: plain dictionaries, to which one entry each is added."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import TinyLoraConfig, TinyLoraPeftType
from .tuner.model import TinyLoraModel


def register() -> None:
    """
    Makes `get_peft_model`, `PeftModel.from_pretrained` and TRL's trainers know [`TinyLoraConfig`]. May be repeated.

    PEFT has no public call for a method outside its own enumeration (`register_peft_method` refuses unknown names), so
    the three dictionaries that it dispatches on get an entry under a name of our own. PEFT's TINYLORA is left alone.

    Raises:
        RuntimeError: If another package holds the name.
    """
    name = TinyLoraPeftType.TRL_TINYLORA
    for registry, entry in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, TinyLoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, TinyLoraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, TinyLoraModel.prefix),
    ):
        holder = registry.setdefault(name, entry)
        if holder is not entry and holder != entry:
            raise RuntimeError(
                f"PEFT type {name.value!r} is already registered by {holder!r}. Import one of the two packages only."
            )
