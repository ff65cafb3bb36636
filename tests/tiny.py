"""A tiny Qwen2 of random weights from a fixed seed, with its own tokenizer, as a folder. CPU, no network."""

import json

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from trl_tinylora.tuner.layer import Linear


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Standard deviation 0.2, so that at hidden size 32 the singular values are of the order of one.
DECODER = {
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

# A decoder of these sizes with experts, for transformers' configurations of several families.
MIXTURE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}

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

# Conversational, for SFT; GRPO takes their prompts.
ROWS = [
    {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
    for question, answer in PAIRS
]


def values_in(folder):
    """The values in a saved adapter's folder, of which there is one tensor."""
    tensors = load_file(folder / "adapter_model.safetensors")
    (values,) = (tensor for name, tensor in tensors.items() if name.endswith("lora_magnitude_vector"))
    return values


def write_split(folder, split):
    """Writes the rows as a split with GSM8K's columns."""
    folder.mkdir()
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in PAIRS]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


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


def make_base(folder, **overrides):
    """Writes model and tokenizer, as `from_pretrained` wants them, and returns the folder."""
    tokenizer = train_tokenizer(folder)
    fields = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        # Large enough that a step of the values shows in the loss.
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    config = Qwen2Config(**{**fields, **overrides})
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def layers_of(model):
    """The adapted layers of a model."""
    return [module for module in model.modules() if isinstance(module, Linear)]
