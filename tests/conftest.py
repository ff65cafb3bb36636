"""Tiny causal language models with random weights from a fixed seed, one of them with a tokenizer. CPU, no network."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX


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


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PAIRS = [
    ("Anna has 3 pens and buys 4. How many pens?", "3 + 4 = 7\n#### 7"),
    ("Ben has 9 cups and loses 5. How many cups?", "9 - 5 = 4\n#### 4"),
    ("Cora has 2 bags of 6 nuts. How many nuts?", "2 * 6 = 12\n#### 12"),
    ("Dan has 8 eggs and eats 1. How many eggs?", "8 - 1 = 7\n#### 7"),
    ("Eva has 5 pens and buys 5. How many pens?", "5 + 5 = 10\n#### 10"),
    ("Finn has 7 cups and loses 2. How many cups?", "7 - 2 = 5\n#### 5"),
    ("Gina has 3 bags of 3 nuts. How many nuts?", "3 * 3 = 9\n#### 9"),
    ("Hugo has 6 eggs and eats 4. How many eggs?", "6 - 4 = 2\n#### 2"),
]


def train_tokenizer(folder):
    # AutoTokenizer next to a qwen2 configuration builds Qwen2's byte-level BPE, so that is what is trained here.
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    bpe.train_from_iterator(
        ["\n".join(pair) for pair in PAIRS] + ["user\nassistant\n"],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    tokenizer = Qwen2Tokenizer.from_pretrained(
        folder, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The base model and its tokenizer as a folder, as `from_pretrained` wants it."""
    folder = tmp_path_factory.mktemp("base") / "tiny-qwen2"
    tokenizer = train_tokenizer(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Large enough that a step of the values shows in the loss.
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows():
    """Conversational rows for SFT; GRPO takes their prompts."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in PAIRS
        ]
    )
