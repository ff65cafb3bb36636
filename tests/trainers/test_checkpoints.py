"""Checkpoints of TRL's own trainers: what they hold, resuming, the best model, the final save. CPU, no network."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import values_in
from transformers import Trainer

from trl_tinylora import TinyLoraConfig


WEIGHTS = "adapter_model.safetensors"
SAVING = dict(save_strategy="steps", save_steps=1)


def folder(trainer, step):
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


def optimizer_state(checkpoint):
    (state,) = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    return state


@pytest.fixture
def load_trained(make_model):
    """Makes an adapter whose values, all alike, are given."""

    def load(value):
        model = get_peft_model(make_model(), TinyLoraConfig(n_tie=4, u=2))
        with torch.no_grad():
            model.base_model.bank.trl_tinylora_v["default"].values_GK.fill_(value)
        return model

    return load


def test_a_checkpoint_holds_the_values_and_their_optimizer_state(sft, values):
    trainer = sft(TinyLoraConfig(n_tie=4, u=2), **SAVING)
    saved = values_in(folder(trainer, 2))
    assert (saved.dtype, saved.numel() * saved.element_size()) == (torch.float32, 8 * 4)
    assert torch.equal(saved, values(trainer.model))
    # Behind a header of names; one module of this base has singular values too close for a basis to be certain.
    assert (folder(trainer, 2) / WEIGHTS).stat().st_size < 1024
    assert optimizer_state(folder(trainer, 2))["exp_avg"].shape == (4, 2)
    config = json.loads((folder(trainer, 2) / "adapter_config.json").read_text())
    assert (config["peft_type"], config["n_tie"], config["u"]) == ("TRL_TINYLORA", 4, 2)


@pytest.mark.parametrize("fields", [dict(n_tie="all", u=3), dict()])
def test_sft_resumed_half_way_equals_the_uninterrupted_run(sft, values, logged, fields):
    whole = sft(TinyLoraConfig(**fields), max_steps=4, **SAVING)
    half = sft(TinyLoraConfig(**fields), max_steps=2, **SAVING)
    resumed = sft(TinyLoraConfig(**fields), max_steps=4, resume=str(folder(half, 2)), **SAVING)
    assert torch.equal(values(resumed.model), values(whole.model))
    assert not torch.equal(values(resumed.model), values(half.model))
    state, expected = optimizer_state(folder(resumed, 4)), optimizer_state(folder(whole, 4))
    assert {key: state[key].tolist() for key in state} == {key: expected[key].tolist() for key in expected}
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert [tuple(p.shape) for p in resumed.model.parameters() if p.requires_grad] == [tuple(values(whole.model).shape)]


def test_a_resumed_run_takes_its_values_from_the_checkpoint(sft, values):
    half = sft(TinyLoraConfig(), **SAVING)
    whole = sft(TinyLoraConfig(), max_steps=4, **SAVING)
    tensors = load_file(folder(half, 2) / WEIGHTS)
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, folder(half, 2) / WEIGHTS)
    resumed = sft(TinyLoraConfig(), max_steps=4, resume=str(folder(half, 2)))
    assert (values(resumed.model) - values(whole.model)).abs().min() > 0.3


@pytest.mark.bad_input("a checkpoint of another adapter")
@pytest.mark.parametrize("fields", [{"projection_seed": 1}, {"r": 3}, {"tying": {"all": ""}}, {"projection": "basis"}])
def test_a_plain_trainer_does_not_resume_with_another_adapter_of_equal_shape(sft, fields):
    half = sft(TinyLoraConfig(n_tie=4), **SAVING)
    before = {path: path.read_bytes() for path in Path(half.args.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"differs from this one in {list(fields)[0]} \(.* there\).*Resume with"):
        sft(TinyLoraConfig(**{"n_tie": 4, **fields}), max_steps=4, resume=str(folder(half, 2)))
    assert {path: path.read_bytes() for path in Path(half.args.output_dir).rglob("*") if path.is_file()} == before


# transformers 5.22 and before, to the letter; docs/adapters.md says how to resume there.
LOADS_REFERENCE_ALONE = re.search(
    r"if adapter_subdirs:\s+for subdir_name in adapter_subdirs:", inspect.getsource(Trainer._load_from_checkpoint)
)


def test_grpo_resumed_half_way_equals_the_uninterrupted_run_with_its_reference(
    grpo, values, logged, load_trained, make_model
):
    args = dict(beta=0.1, **SAVING)
    whole = grpo(model=load_trained(0.2), max_steps=4, **args)
    half = grpo(model=load_trained(0.2), max_steps=2, **args)
    # Other values in the model: policy and reference both have to come from the checkpoint.
    model = load_trained(-0.1)
    if LOADS_REFERENCE_ALONE:
        model = PeftModel.from_pretrained(make_model(), folder(half, 2), is_trainable=True)
    resumed = grpo(model=model, max_steps=4, resume=str(folder(half, 2)), **args)
    assert resumed.seen == whole.seen[2:]
    assert torch.equal(values(resumed.model), values(whole.model))
    assert torch.equal(values(resumed.model, "ref"), torch.full((4, 2), 0.2))
    assert logged(resumed, "kl") == logged(whole, "kl")
    assert [tuple(p.shape) for p in resumed.model.parameters() if p.requires_grad] == [(4, 2)]


def test_a_checkpoint_with_a_reference_keeps_it_in_a_folder_of_its_own(grpo, values, load_trained, make_model):
    trainer = grpo(model=load_trained(0.2), beta=0.1, **SAVING)
    checkpoint = folder(trainer, 2)
    policy, reference = (values_in(checkpoint / name) for name in ("", "ref"))
    assert torch.equal(reference, torch.full((4, 2), 0.2))
    assert torch.equal(policy, values(trainer.model)) and (policy != reference).all()
    loaded = PeftModel.from_pretrained(make_model(), checkpoint)
    assert torch.equal(values(loaded), policy) and set(loaded.peft_config) == {"default"}


# On a falling loss the lowest one is the last, where nothing has to be loaded; the highest one is the first.
@pytest.mark.parametrize("greater_is_better, best", [(True, 1), (False, 4)])
def test_load_best_model_at_end_takes_the_best_values(sft, values, logged, greater_is_better, best):
    trainer = sft(
        TinyLoraConfig(n_tie=4),
        max_steps=4,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=greater_is_better,
        **SAVING,
    )
    losses = logged(trainer, "eval_loss")
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4
    assert trainer.state.best_model_checkpoint == str(folder(trainer, best))
    saved = [values_in(folder(trainer, step)) for step in range(1, 5)]
    equal = [step for step in range(1, 5) if torch.equal(values(trainer.model), saved[step - 1])]
    assert equal == [best]
    assert values(trainer.model).dtype == torch.float32
    assert trainer.evaluate()["eval_loss"] == losses[best - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_gives_the_same_logits_when_loaded(sft, base_folder, tmp_path, dtype):
    trainer = sft(TinyLoraConfig(n_tie=4), model_init_kwargs={"dtype": str(dtype).removeprefix("torch.")})
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert loaded.peft_config["default"].base_model_name_or_path == base_folder
    ids = torch.arange(12).reshape(2, 6)
    trained = trainer.model.eval()
    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    with trained.disable_adapter():
        assert not torch.equal(loaded(ids).logits, trained(ids).logits)


def test_modules_to_save_are_in_the_checkpoint_and_come_back(sft, values, make_model):
    def base():
        # The folder's embeddings are tied: the head is drawn anew.
        torch.manual_seed(0)
        return make_model(tie_word_embeddings=False)

    config = dict(n_tie=4, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    whole = sft(TinyLoraConfig(**config), model=base(), max_steps=4, **SAVING)
    half = sft(TinyLoraConfig(**config), model=base(), max_steps=2, **SAVING)
    resumed = sft(TinyLoraConfig(**config), model=base(), max_steps=4, resume=str(folder(half, 2)), **SAVING)
    saved = load_file(folder(whole, 4) / WEIGHTS)
    kept = sorted(tuple(tensor.shape) for tensor in saved.values() if tensor.numel())
    assert kept == [(2, 32), (4, 1), (320, 32)]
    again = load_file(folder(resumed, 4) / WEIGHTS)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)
    loaded = PeftModel.from_pretrained(base(), folder(whole, 4))
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(loaded.eval()(ids).logits, whole.model.eval()(ids).logits)
