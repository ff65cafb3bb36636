"""The bases of docs/bases.md, one entry a row: how a test makes a small one, and what works with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import transformers
import vision_language
from encoder_decoders import bart, sequences, sound, t5, whisper
from quantisations import FOREIGN, foreign_layer, load_float8, quantisation, write_compressed
from tiny import DECODER, MIXTURE
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, CompressedTensorsConfig


IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tokens(dtype):
    return {"input_ids": IDS, "labels": IDS}


@dataclass(frozen=True)
class Listed:
    """
    A row of the table, of which a test tries every cell. A cell begins with "yes" or with "refused".

    Args:
        base (`str`): What base, and how it is loaded.
        kinds (`dict[str, Callable]`): Those that are tried: each gives the model, from the folder of a tiny language
            model and an empty folder.
        trained, loaded, exported, merged (`str`): What of that works; the last three of what is not trained are empty.
        fields (`dict`): Of its `TinyLoraConfig`.
        inputs (`dict[str, Callable]`): What a kind is called with, in a dtype, where that is not tokens alone.
    """

    base: str
    kinds: dict[str, Callable]
    trained: str = "yes"
    loaded: str = "yes"
    exported: str = "yes"
    merged: str = "yes"
    fields: dict = field(default_factory=dict)
    inputs: dict[str, Callable] = field(default_factory=dict)

    @property
    def cells(self) -> dict[str, str]:
        """The row by its columns."""
        columns = "trained", "loaded", "exported", "merged"
        return {"base": self.base} | {column: getattr(self, column) for column in columns}


def load(folder, tmp_path=None, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


def in_dtype(dtype):
    return lambda folder, tmp_path: load(folder, dtype=dtype)


def quantised(kind):
    return lambda folder, tmp_path: load(folder, quantization_config=quantisation(kind))


def with_quantised_inputs(folder, tmp_path):
    library, model = pytest.importorskip("torchao.quantization"), load(folder)
    library.quantize_(model.model, library.Int8DynamicActivationInt8WeightConfig())
    return model


def from_float8(folder, tmp_path):
    return load_float8(folder, tmp_path / "float8")


def decompressed(folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    return load(
        write_compressed(folder, tmp_path / "compressed"), quantization_config=CompressedTensorsConfig(dequantize=True)
    )


def compressed(folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    return load(write_compressed(folder, tmp_path / "compressed"))


def with_layer(make):
    """A layer of another kind in the place of one of the model's."""

    def put(folder, tmp_path):
        model = load(folder)
        model.model.layers[1].self_attn.o_proj = make()
        return model

    return put


def float8_layer():
    return pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear(32, 32, block_size=(128, 128))


def from_config(kind, **fields):
    """A causal language model of an architecture, with weights large enough that an update shows."""

    def make(folder, tmp_path):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        return model

    return make


def with_float8_experts(folder, tmp_path):
    model = from_config("Qwen3MoeConfig", **MIXTURE)(folder, tmp_path)
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name).data.to(torch.float8_e4m3fn)
            setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    return model


def seeded(make):
    def build(folder, tmp_path):
        torch.manual_seed(0)
        return make().eval()

    return build


def classifier(folder, tmp_path):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)


def partly_on_disk(folder, tmp_path):
    places = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0", "model.layers.1"]
    device_map = {place: "disk" if place == "model.layers.1" else "cpu" for place in places}
    return load(folder, device_map=device_map, offload_folder=str(tmp_path / "offloaded"))


GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1}
MERGED = "refused; yes after `model.dequantize()`"
BASES = [
    Listed(
        "in float64, float32, bfloat16 or float16",
        {str(dtype).removeprefix("torch."): in_dtype(dtype) for dtype in DTYPES},
    ),
    Listed(
        "fused projections and `Conv1D`: GPT-2, Phi-3, Falcon",
        {
            "GPT-2": from_config("GPT2Config", **GPT2, bos_token_id=1, eos_token_id=2),
            "Phi-3": from_config("Phi3Config", **DECODER),
            "Falcon": from_config("FalconConfig", **FALCON, eos_token_id=2),
        },
    ),
    Listed(
        'a classifier or reward model (`task_type="SEQ_CLS"`)',
        {"Qwen2": classifier},
        exported="refused: vLLM and llama.cpp take no head",
        fields={"task_type": "SEQ_CLS"},
        inputs={"Qwen2": lambda dtype: {"input_ids": IDS, "labels": torch.tensor([0, 2])}},
    ),
    Listed(
        "bitsandbytes 4 bits, nf4 and fp4, quantised twice or not (`BitsAndBytesConfig(load_in_4bit=True)`)",
        {kind: quantised(kind) for kind in ("nf4", "fp4", "nf4 twice", "nf4 stored as bfloat16")},
        merged=MERGED,
    ),
    Listed("bitsandbytes 8 bits (`load_in_8bit=True`)", {"8 bits": quantised("8 bits")}, merged=MERGED),
    Listed(
        "torchao int8, weight only (`TorchAoConfig(Int8WeightOnlyConfig())`)",
        {"int8": quantised("torchao int8")},
        merged="refused",
    ),
    Listed(
        "torchao int4 and float8, weight only (`IntxWeightOnlyConfig`, `Float8WeightOnlyConfig`)",
        {kind: quantised(f"torchao {kind}") for kind in ("int4", "float8")},
        trained="yes, but transformers' trainers refuse them",
        merged="refused",
    ),
    Listed(
        "torchao with quantised inputs (`Int8DynamicActivationInt8WeightConfig`, ...)",
        {"int8": with_quantised_inputs},
        "refused: no gradient passes",
        *[""] * 3,
    ),
    Listed(
        "a float8 checkpoint (`quant_method: fp8`): dequantised to bfloat16 without a GPU, and with one by "
        "`FineGrainedFP8Config(dequantize=True)`",
        {"blocks of 128": from_float8},
    ),
    Listed("float8 layers", {"FP8Linear": with_layer(float8_layer)}, "refused", *[""] * 3),
    Listed("compressed-tensors, with `CompressedTensorsConfig(dequantize=True)`", {"int8": decompressed}),
    Listed("compressed-tensors, packed", {"int8": compressed}, "refused", *[""] * 3),
    Listed(
        "GPTQ, AWQ",
        {name: with_layer(partial(foreign_layer, library)) for name, library in FOREIGN.items()},
        "refused: a class for each kernel, and no weight to read. Take the model that it was made from",
        *[""] * 3,
    ),
    Listed(
        "a mixture whose experts transformers keeps fused, with `target_parameters`: Qwen3-MoE, Qwen2-MoE, Mixtral, "
        "gpt-oss",
        {name: from_config(f"{name}Config", **MIXTURE) for name in ("Qwen3Moe", "Qwen2Moe", "Mixtral", "GptOss")},
        exported="yes, as a LoRA; refused as GGUF",
        fields={"target_parameters": EXPERTS},
    ),
    Listed(
        "fused experts that are quantised (float8, MXFP4); the other layers can be adapted",
        {"float8": with_float8_experts},
        "refused",
        *[""] * 3,
        fields={"target_parameters": EXPERTS},
    ),
    Listed(
        "the language model of a vision-language model: Llava, Gemma 3, Qwen2.5-VL, Llama 3.2, SmolVLM",
        {family: seeded(make) for family, make in vision_language.FAMILIES.items()},
        inputs={
            family: lambda dtype, family=family: vision_language.with_image(family, dtype)
            for family in ("Llava", "Gemma 3", "Llama 3.2")
        },
    ),
    Listed(
        "vision tower and language model together, named in `target_modules`: Llava",
        {"Llava": seeded(vision_language.llava)},
        fields={"target_modules": r".*layers\.\d+\..*(q_proj|v_proj|fc1|up_proj)"},
        inputs={"Llava": lambda dtype: vision_language.with_image("Llava", dtype)},
    ),
    Listed(
        "encoder-decoders: T5, Bart, Whisper",
        {"T5": seeded(t5), "Bart": seeded(bart), "Whisper": seeded(whisper)},
        inputs={"T5": sequences, "Bart": sequences, "Whisper": sound},
    ),
    Listed(
        "with layers that accelerate keeps on the disk (`device_map`)",
        {"Qwen2": partly_on_disk},
        exported="yes, for a base in memory",
    ),
]
