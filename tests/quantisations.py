"""The quantisations of base models that are known, as `from_pretrained` takes them, each with the library it needs."""

import pytest
import torch
from transformers import BitsAndBytesConfig, TorchAoConfig


BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 stored as bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "8 bits": {"load_in_8bit": True},
}
TORCHAO = {
    "torchao int8": lambda library: library.Int8WeightOnlyConfig(),
    "torchao int4": lambda library: library.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "torchao float8": lambda library: library.Float8WeightOnlyConfig(),
}
KINDS = [*BITSANDBYTES, *TORCHAO]


def quantisation(kind):
    """The configuration of one kind; skips the test where its library is not installed."""
    if kind in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**BITSANDBYTES[kind])
    return TorchAoConfig(TORCHAO[kind](pytest.importorskip("torchao.quantization")))
