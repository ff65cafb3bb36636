"""A tiny Qwen2 with its own tokenizer, and runs of TRL's own trainers on it. CPU, no network."""

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


LAYERS = 2

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
        num_hidden_layers=LAYERS,
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


@pytest.fixture
def make_model(base_folder):
    """Loads the base model."""

    def make(dtype=torch.float32, **kwargs):
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype, **kwargs)

    return make


@pytest.fixture(scope="session")
def rows():
    """Conversational rows for SFT; GRPO takes their prompts."""
    return Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
            for q, a in PAIRS
        ]
    )


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a short, repeatable run without files, on the CPU; `args` override them."""
    count = 0

    def fill(**args):
        nonlocal count
        count += 1
        return {
            "output_dir": str(tmp_path / f"run{count}"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            "use_cpu": True,
            "seed": 0,
            **args,
        }

    return fill


@pytest.fixture
def sft(arguments, base_folder, rows):
    """Makes an `SFTTrainer` and, unless told otherwise, trains."""

    def run(peft_config=None, model=None, train=True, resume=None, **args):
        trainer = SFTTrainer(
            model=base_folder if model is None else model,
            args=SFTConfig(**arguments(**args)),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)) if args.get("eval_strategy", "no") != "no" else None,
            peft_config=peft_config,
        )
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture
def grpo(arguments, base_folder, rows):
    """Makes a `GRPOTrainer` and, unless told otherwise, trains; `trainer.seen` holds what the reward function got."""

    def run(peft_config=None, model=None, train=True, resume=None, **args):
        seen = []

        def reward(completions, **kwargs):
            seen.append([completion[0]["content"] for completion in completions])
            return [sum(map(ord, text)) % 7 / 7 for text in seen[-1]]

        trainer = GRPOTrainer(
            model=base_folder if model is None else model,
            reward_funcs=reward,
            args=GRPOConfig(
                **arguments(
                    **{
                        "per_device_train_batch_size": 4,
                        "num_generations": 4,
                        "max_completion_length": 6,
                        **args,
                    }
                )
            ),
            train_dataset=rows.remove_columns("completion"),
            peft_config=peft_config,
        )
        trainer.seen = seen
        if train:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture(scope="session")
def values():
    """Reads a copy of an adapter's trained values."""

    def read(model, adapter="default"):
        return model.base_model.bank.trl_tinylora_v[adapter].values_GK.detach().clone()

    return read


@pytest.fixture(scope="session")
def logged():
    """Reads one quantity of every logged step."""

    def read(trainer, key):
        return [entry[key] for entry in trainer.state.log_history if key in entry]

    return read


@pytest.fixture(scope="session")
def base_weights():
    """Reads copies of the base model's parameters out of an adapted model, under the base model's names."""

    def read(model):
        return {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if "trl_tinylora_" not in name
        }

    return read


@pytest.fixture
def assert_base_untouched(make_model, base_weights):
    """Asserts that an adapted model's base weights are those of the base folder, bit for bit."""

    def check(model, dtype=torch.float32):
        expected, found = base_weights(make_model(dtype)), base_weights(model)
        assert found.keys() == expected.keys() and len(found) > 20
        changed = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert changed == []

    return check


@pytest.fixture
def reentrant_backwards(monkeypatch):
    """Counts the backward passes of reentrant checkpointing: 0 means that it was not used."""
    from torch.utils.checkpoint import CheckpointFunction

    counted, plain = [], CheckpointFunction.backward

    def backward(*args):
        counted.append(1)
        return plain(*args)

    monkeypatch.setattr(CheckpointFunction, "backward", staticmethod(backward))
    return counted
