"""The names in an exported LoRA of a vision-language model, read by vLLM's own function. CPU, seconds."""

import pytest


pytest.importorskip("vllm")

import ast
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from vision_language import gemma3, llava, qwen2_5_vl
from vllm import __file__ as vllm_file
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.models.utils import WeightsMapper

from trl_tinylora import TinyLoraConfig, export_lora


def mapper_of(module, name):
    """What a class of vLLM's makes of names, from its source: importing it takes torchvision, built for a GPU."""
    source = Path(vllm_file).parent.joinpath("model_executor", "models", f"{module}.py").read_text()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    (value,) = (
        node.value
        for node in classes[name].body
        if isinstance(node, ast.Assign) and node.targets[0].id == "hf_to_vllm_mapper"
    )
    return eval(compile(ast.Expression(value), module, "eval"), {"WeightsMapper": WeightsMapper})


# By the model's class in vLLM.
FAMILIES = {
    "llava.LlavaForConditionalGeneration": llava,
    "gemma3_mm.Gemma3ForConditionalGeneration": gemma3,
    "qwen2_5_vl.Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
}


@pytest.mark.filterwarnings("ignore:target_modules")
@pytest.mark.parametrize("place", FAMILIES)
def test_exported_names_are_those_of_vllms_language_model(place, tmp_path):
    torch.manual_seed(0)
    export_lora(get_peft_model(FAMILIES[place](), TinyLoraConfig(init_weights=False)), tmp_path)
    mapper = mapper_of(*place.split("."))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = {parse_fine_tuned_lora_name(tensor, mapper)[0] for tensor in tensors}
    assert len(names) == 14
    assert all(name.startswith("language_model.model.layers.") for name in names), sorted(names)[:2]
