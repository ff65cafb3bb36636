"""Every trainer of docs/trainers.md takes three steps with an adapter, which then loads again. CPU, half a minute."""

import importlib
import inspect
import pkgutil

import pytest
import torch
import trl
import trl.experimental
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from trl_trainers import MOVED, TRAINERS

from trl_tinylora import TinyLoraConfig


LISTED = {listed.trainer: listed for listed in TRAINERS}
every_trainer = pytest.mark.parametrize("name", LISTED)


@pytest.fixture
def make(arguments, base_folder, monkeypatch):
    """Makes a trainer of the table with an adapter, and what it lacks on a CPU put in place."""

    def run(name, peft_config=None, model=None, stands_in=True, **args):
        listed = LISTED[name]
        if Version(trl.__version__) < Version(listed.since):
            pytest.skip(f"{name} is run with TRL {listed.since} and later")
        for place, replacement in listed.stands_in(base_folder).items() if stands_in else ():
            monkeypatch.setattr(place, replacement)
        return listed.make(base_folder, arguments(**{"max_steps": 3, **listed.args, **args}), peft_config, model)

    return run


@pytest.fixture
def adapted(base_folder):
    """Gives a trainer's base model an adapter whose values are all the same."""

    def give(name, value):
        model = get_peft_model(LISTED[name].load(base_folder), adapter_of(LISTED[name]))
        with torch.no_grad():
            model.base_model.bank.trl_tinylora_v["default"].values_GK.fill_(value)
        return model

    return give


def adapter_of(listed):
    """With four values of their own for 14 modules."""
    return TinyLoraConfig(n_tie=4, **listed.fields)


@every_trainer
def test_three_steps_train_the_values_and_a_new_head_alone_and_both_are_saved(
    make, name, values, base_weights, base_folder, tmp_path
):
    listed = LISTED[name]
    trainer = make(name, adapter_of(listed))
    model = trainer.model
    trainable = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    heads = [key for key in trainable if "modules_to_save" in key]
    assert len(trainable) == 1 + len(heads) and len(heads) == bool(listed.labels)
    assert values(model).shape == (4, 1) and (values(model) == 0).all()
    before = base_weights(model)

    trainer.train()

    assert trainer.state.global_step == 3
    assert values(model).dtype == torch.float32 and (values(model) != 0).all()
    after = base_weights(model)
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        key.removeprefix("base_model.model.") for key in heads
    }

    trainer.save_model(str(tmp_path / "saved"))
    # Another head than the one that training began with.
    torch.manual_seed(5)
    loaded = PeftModel.from_pretrained(listed.load(base_folder), tmp_path / "saved").eval()
    assert torch.equal(values(loaded), values(model))
    # Some trainers bring an attention that takes more than the tokens.
    model.get_base_model().set_attn_implementation("sdpa")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, logits)
        with model.disable_adapter():
            assert not torch.equal(model(input_ids=ids).logits, logits)


# The reference


def completion_of(row):
    """What is chosen of a row of preferences or of labelled answers, and nothing of one that is not."""
    return row.get("chosen", row["completion"] if row.get("label") else None)


def log_probability(model, row, tokenizer):
    """That of a row's chosen completion."""
    template = {"tokenize": True, "return_dict": True}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **template)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + completion_of(row), **template)["input_ids"]
    with torch.no_grad():
        rows = model(torch.tensor(whole)[None]).logits[0].log_softmax(-1)
    return rows[:-1].gather(1, torch.tensor(whole)[1:, None])[len(prompt) - 1 :].sum().item()


@pytest.mark.parametrize("start", [None, 0.1])
@pytest.mark.parametrize("name", ["trl.DPOTrainer", "trl.KTOTrainer"])
def test_the_reference_is_the_base_or_the_adapter_as_it_was_given(make, adapted, logged, base_folder, name, start):
    listed = LISTED[name]
    given = {"peft_config": adapter_of(listed)} if start is None else {"model": adapted(name, start)}
    reference = (listed.load(base_folder) if start is None else adapted(name, start)).eval()
    # Every step sees all rows, so that a reference that stays gives the same mean.
    trainer = make(name, **given, per_device_train_batch_size=8, learning_rate=0.1)
    chosen = [row for row in listed.rows if completion_of(row)]
    expected = sum(log_probability(reference, row, trainer.processing_class) for row in chosen) / len(chosen)

    trainer.train()

    assert trainer.ref_model is None and ("ref" in trainer.model.peft_config) == (start is not None)
    policy, rewards = logged(trainer, "logps/chosen"), logged(trainer, "rewards/chosen")
    # A reward is beta times what the policy's log-probability exceeds the reference's by.
    references = [there - reward / trainer.args.beta for there, reward in zip(policy, rewards, strict=True)]
    # Sums of about ten tokens in float32.
    assert references == pytest.approx([expected] * 3, abs=1e-4)
    assert abs(policy[2] - expected) > 0.01


@pytest.mark.parametrize("name", ["trl.DPOTrainer", "trl.KTOTrainer"])
def test_the_reference_pass_between_forward_and_backward_pass_changes_no_gradient(make, values, name):
    between = make(name, adapter_of(LISTED[name]))
    before = make(name, adapter_of(LISTED[name]), precompute_ref_log_probs=True)
    between.train()
    before.train()
    assert torch.equal(values(between.model), values(before.model))


@pytest.mark.parametrize("name", ["trl.experimental.a2po.A2POTrainer", "trl.experimental.online_dpo.OnlineDPOTrainer"])
def test_a_copied_reference_stays_the_adapter_as_it_was_given(make, adapted, name):
    trainer = make(name, model=adapted(name, 0.1))
    trainer.train()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = adapted(name, 0.1).eval()(ids).logits
        assert torch.equal(trainer.ref_model.eval()(ids).logits, expected)
        assert not torch.equal(trainer.model.eval()(ids).logits, expected)


# What the remarks say


@pytest.mark.parametrize("name", [name for name, listed in LISTED.items() if "experimental.async" in name])
def test_an_asynchronous_trainer_sends_the_merged_weights(make, name, base_folder):
    trainer = make(name, adapter_of(LISTED[name]))
    trainer.train()
    sent = trainer.weight_transfer.sent
    merged = dict(trainer.model.merge_and_unload().named_parameters())
    # At the start and after each step.
    assert len(sent) == 4 and sent[-1].keys() == merged.keys()
    assert all(torch.equal(sent[-1][key], merged[key]) for key in merged)
    base = dict(LISTED[name].load(base_folder).named_parameters())
    assert all(torch.equal(sent[0][key], base[key]) for key in base)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [name for name, listed in LISTED.items() if "experimental.async" in name])
def test_an_asynchronous_trainer_needs_a_gpu_for_lora_too(make, name):
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        make(name, LoraConfig(r=2, target_modules="all-linear"), stands_in=False)


@pytest.mark.parametrize("name", ["trl.experimental.sdft.SDFTTrainer", "trl.experimental.sdpo.SDPOTrainer"])
def test_trl_refuses_an_averaged_teacher_for_every_method_but_lora(make, name):
    make(name, LoraConfig(r=2, target_modules="all-linear"), teacher_model_kind="ema").train()
    with pytest.raises(ValueError, match="`teacher_model_kind='ema'` with a non-pure-LoRA PEFT model"):
        make(name, adapter_of(LISTED[name]), teacher_model_kind="ema")


def test_averaged_base_weights_fail_for_every_method(make):
    name = "trl.experimental.bema_for_ref_model.DPOTrainer"
    for config in (LoraConfig(r=2, target_modules="all-linear"), adapter_of(LISTED[name])):
        trainer = make(name, config)
        trainer.add_callback(importlib.import_module("trl.experimental.bema_for_ref_model").BEMACallback())
        with pytest.raises(TypeError, match="peft_config"):
            trainer.train()


# The table


def trainers_of_trl():
    """Every trainer that this TRL has, by the name of its public place."""
    folders = [f"trl.experimental.{found.name}" for found in pkgutil.iter_modules(trl.experimental.__path__)]
    modules = {name: importlib.import_module(name) for name in ["trl", *folders]}
    classes = {
        f"{name}.{public}"
        for name, module in modules.items()
        for public in dir(module)
        if public.endswith("Trainer") and not public.startswith("_")
    }
    return {name for name in classes if inspect.isclass(pkgutil.resolve_name(name))}


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="the table is that of TRL 1.16")
def test_the_table_has_every_trainer_of_trl():
    assert set(LISTED) - {"transformers.Trainer"} == trainers_of_trl() - set(MOVED)
