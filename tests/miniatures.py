"""Random-weight miniatures of the models in the paper's recipes: their architecture, tokenizer and chat format, small.

The shapes keep what differs between the models: Llama's scaled rotary positions and its headers, Qwen2's biases and
ChatML, whether embedding and head are tied, and how many query heads share a key head. CPU, no network.
"""

import json
import re
from pathlib import Path

import torch
from tiny import make_base
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


# Real problems, MIT licence: tests/data/README.md.
GSM8K = Path(__file__).parent / "data" / "gsm8k_sample.jsonl"
# Of the paper's experiments.
RECIPES = Path(__file__).parents[1] / "recipes"
FOLDERS = sorted(path for path in RECIPES.iterdir() if re.fullmatch(r".+-(gsm8k|math)", path.name))
LAYERS = 2
MODULES = 7 * LAYERS
# The format of Llama 3's conversations, without its template's dates and tools.
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def make_miniature(name, folder):
    """Writes the miniature of a model on the Hub, with its tokenizer, into a folder that does not exist yet."""
    family = name.partition("/")[2].lower()
    if family.startswith("llama"):
        return make_llama(folder)
    is_tied = not family.endswith(("7b", "7b-instruct"))
    return make_base(folder, max_position_embeddings=1024, tie_word_embeddings=is_tied)


def make_llama(folder):
    """Writes a Llama 3.2 of hidden size 48 with its tokenizer."""
    tokenizer = train_llama_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_llama_tokenizer(folder):
    """Byte-level BPE with Llama 3's special tokens; like the real one, it has no padding token."""
    bpe = Tokenizer(models.BPE())
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    bpe.train_from_iterator(
        (text for row in rows() for text in row.values()),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[AddedToken(name, special=True) for name in names],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=names[0], eos_token="<|eot_id|>", chat_template=LLAMA_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def rows():
    """Real rows of GSM8K."""
    return [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]


def write_math_rows(path):
    """The same problems with their answers in a box, in the columns of SimpleRL's data set, whose rows are not free."""
    lines = []
    for row in rows():
        worked, _, gold = row["answer"].rpartition("#### ")
        solution = f"{worked}The answer is $\\boxed{{{gold}}}$."
        lines.append(json.dumps({"question": row["question"], "gt_answer": gold, "solution": solution}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
