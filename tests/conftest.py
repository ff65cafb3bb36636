"""Tiny causal language models with random weights from a fixed seed, one of them with a tokenizer. CPU, no network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
# Tests of the cache give it a folder; no other one writes outside its own.
os.environ["TRL_TINYLORA_CACHE"] = "off"

import pytest
import torch
from datasets import Dataset
from tiny import ROWS, make_base
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config


def _build(config, defaults, overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{**defaults, **overrides}))
    # Where a new model's biases are zero, one that went missing would show nowhere.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


# Standard deviation 0.2, so that at hidden size 32 the singular values are of the order of one.
_DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


@pytest.fixture
def tiny_qwen2():
    """`tiny_qwen2(**overrides)`: a Qwen2 of hidden size 32 and 2 layers, 14 linear modules beside the head."""
    return lambda **overrides: _build(Qwen2Config, _DECODER, overrides)


@pytest.fixture
def tiny_llama():
    """`tiny_llama(**overrides)`: a Llama of hidden size 32 and 2 layers, 14 linear modules beside the head."""
    return lambda **overrides: _build(LlamaConfig, _DECODER, overrides)


@pytest.fixture
def tiny_gpt2():
    """`tiny_gpt2(**overrides)`: a GPT-2 of hidden size 32 and 2 layers, 8 `Conv1D` modules beside the head."""
    defaults = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return lambda **overrides: _build(GPT2Config, defaults, overrides)


@pytest.fixture
def tiny_model(tiny_qwen2, tiny_llama, tiny_gpt2):
    """`tiny_model("qwen2" | "llama" | "gpt2", **overrides)`."""
    factories = {"qwen2": tiny_qwen2, "llama": tiny_llama, "gpt2": tiny_gpt2}
    return lambda kind, **overrides: factories[kind](**overrides)


@pytest.fixture
def token_ids():
    """Two sequences of nine tokens."""
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The base model and its tokenizer as a folder, as `from_pretrained` wants it."""
    return str(make_base(tmp_path_factory.mktemp("base") / "tiny-qwen2"))


@pytest.fixture(scope="session")
def rows():
    """Conversational rows for SFT; GRPO takes their prompts."""
    return Dataset.from_list(ROWS)
