"""The quantisations of base models that are known, as `from_pretrained` takes them, each with the library it needs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig


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


def write_float8(base_folder, folder):
    """The tiny model as a checkpoint of float8 weights with a scale for each block of 128 x 128."""

    def quantise(weight):
        scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        return (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)

    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return _write(base_folder, folder, quantise, "weight_scale_inv", settings)


def load_float8(base_folder, folder):
    """That checkpoint loaded: on a machine without a GPU transformers dequantises it. Skips where it cannot."""
    try:
        return AutoModelForCausalLM.from_pretrained(write_float8(base_folder, folder), dtype=torch.float32)
    except RuntimeError as error:
        # Of transformers 5.6 in our oldest versions.
        if "automatic conversion of the weights" not in str(error):
            raise
        pytest.skip("this transformers does not convert such a checkpoint")


def foreign_layer(library):
    """A layer as GPTQ's and AWQ's libraries have it: a class for each kernel, no weight, and these attributes."""
    return type("QuantLinear", (nn.Module,), {"__module__": library, "in_features": 32, "out_features": 32})()


FOREIGN = {"GPTQ": "gptqmodel.nn_modules.qlinear.torch", "AWQ": "awq.modules.linear.gemm"}


def write_compressed(base_folder, folder):
    """The tiny model as a checkpoint of compressed-tensors: int8 with a scale for each output."""

    def quantise(weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round().to(torch.int8), scale

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    settings |= {"ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    return _write(base_folder, folder, quantise, "weight_scale", settings)


def _write(base_folder, folder, quantise, scale_name, settings):
    shutil.copytree(base_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name], tensors[name.replace("weight", scale_name)] = quantise(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
