"""Tiny causal language models with random weights from a fixed seed, one of them with a tokenizer. CPU, no network."""

import os
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets import Dataset
from stand_in import StandIn
from tiny import DECODER, ROWS, make_base
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


def _build(config, defaults, overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{**defaults, **overrides}))
    # Where a new model's biases are zero, one that went missing would show nowhere.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def tiny_qwen2():
    """`tiny_qwen2(**overrides)`: a Qwen2 of hidden size 32 and 2 layers, 14 linear modules beside the head."""
    return lambda **overrides: _build(Qwen2Config, DECODER, overrides)


@pytest.fixture
def tiny_llama():
    """`tiny_llama(**overrides)`: a Llama of hidden size 32 and 2 layers, 14 linear modules beside the head."""
    return lambda **overrides: _build(LlamaConfig, DECODER, overrides)


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


@pytest.fixture
def stand_in(base_folder):
    """A stand-in for a vLLM server of the base model, whose folder has another path there."""
    server = StandIn(f"/elsewhere/{Path(base_folder).name}")
    yield server
    server.close()


@pytest.fixture(scope="session")
def rows():
    """Conversational rows for SFT; GRPO takes their prompts."""
    return Dataset.from_list(ROWS)


@pytest.fixture
def make_model(base_folder):
    """Loads the base model."""

    def make(dtype=torch.float32, **kwargs):
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype, **kwargs)

    return make


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
