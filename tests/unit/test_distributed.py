"""What is refused before any step, and that ordinary tensors pass through untouched. CPU, seconds."""

import subprocess
import sys

import pytest
import torch
from peft import get_peft_model

from trl_tinylora import TinyLoraConfig, distributed


def test_a_model_split_by_tensor_parallelism_is_refused(tiny_qwen2):
    model = tiny_qwen2()
    model._tp_size = 2
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(NotImplementedError, match="tensor parallelism over 2 processes.*ZeRO-3"):
        get_peft_model(model, TinyLoraConfig())
    assert [name for name, _ in model.named_modules()] == names


def test_merging_into_a_partitioned_weight_is_refused_with_the_way_out(tiny_qwen2):
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig())
    # As ZeRO-3 leaves it between uses.
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.ds_shape, kept = weight.shape, weight.data
    weight.data = torch.empty(0)
    with pytest.raises(RuntimeError, match=r"GatheredParameters\(list\(model.parameters\(\)\)\)"):
        model.merge_adapter()
    weight.data = kept
    model.merge_adapter()


def test_ordinary_tensors_are_handed_on(tiny_qwen2):
    tensor = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    assert distributed.full_shape(tensor) == (2, 3)
    assert not distributed.is_partitioned(tensor) and not distributed.is_sharded(tensor)
    assert distributed.whole(tensor) is tensor and distributed.shard_like(tensor, tensor) is tensor
    with distributed.gathered([tensor]):
        assert tensor.shape == (2, 3)


def test_importing_the_package_imports_no_deepspeed():
    code = "import sys, trl_tinylora; print(sorted({'deepspeed', 'vllm', 'matplotlib'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
