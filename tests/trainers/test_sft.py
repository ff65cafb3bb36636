"""TinyLoRA under TRL's own SFTTrainer. CPU, no network."""

import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer
from trl import GRPOTrainer, SFTTrainer

import trl_tinylora
from trl_tinylora import TinyLoraConfig


# What each configuration trains on the tiny base's 14 modules (7 types at 2 depths).
COUNTS = [
    (dict(), (14, 1)),
    (dict(n_tie=16), (1, 1)),
    (dict(n_tie=4, u=2), (4, 2)),
    (dict(n_tie="all", u=3), (1, 3)),
    (dict(n_tie=2, tying="structured"), (7, 1)),
    (dict(n_tie="all", tying="structured", u=2), (7, 2)),
    (dict(projection="basis", u=4), (14, 4)),
]


@pytest.mark.parametrize("fields, shape", COUNTS, ids=lambda value: str(value))
def test_sft_trains_the_values_and_nothing_else(sft, values, logged, assert_base_untouched, fields, shape):
    trainer = sft(TinyLoraConfig(**fields), max_steps=4, per_device_train_batch_size=8)
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trainable] == [shape]
    assert trainer.model.get_nb_trainable_parameters()[0] == shape[0] * shape[1]
    assert [id(p) for group in trainer.optimizer.param_groups for p in group["params"]] == [id(trainable[0])]
    trained = values(trainer.model)
    assert trained.dtype == torch.float32 and (trained != 0).all()
    assert_base_untouched(trainer.model)
    # Every step sees all rows, so that the losses are those of one function.
    losses = logged(trainer, "loss")
    assert len(losses) == 4 and losses[-1] < losses[0] - 1e-3


def test_the_check_of_the_base_weights_sees_a_changed_bit(make_model, assert_base_untouched):
    model = get_peft_model(make_model(), TinyLoraConfig())
    assert_base_untouched(model)
    weight = model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data
    weight[3, 3] = torch.nextafter(weight[3, 3], torch.tensor(9.0))
    with pytest.raises(AssertionError, match="up_proj"):
        assert_base_untouched(model)


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("how", ["object", "path"])
def test_the_values_stay_float32_on_a_bfloat16_base(
    sft, values, make_model, assert_base_untouched, how, mixed_precision
):
    source = (
        dict(model=make_model(torch.bfloat16)) if how == "object" else dict(model_init_kwargs={"dtype": "bfloat16"})
    )
    trainer = sft(TinyLoraConfig(n_tie=4), train=False, bf16=mixed_precision, **source)
    assert trainer.model.dtype == torch.bfloat16
    assert values(trainer.model).dtype == torch.float32
    trainer.train()
    trained = values(trainer.model)
    assert trained.dtype == torch.float32 and (trained != 0).all()
    # Not only the dtype: the values use bits that bfloat16 lacks.
    assert (trained != trained.bfloat16().float()).any()
    assert_base_untouched(trainer.model, torch.bfloat16)


def test_the_values_are_float32_without_pefts_cast_as_trl_asks_under_zero3(make_model):
    model = get_peft_model(make_model(torch.bfloat16), TinyLoraConfig(), autocast_adapter_dtype=False)
    assert [p.dtype for p in model.parameters() if p.requires_grad] == [torch.float32]


def test_mixed_precision_leaves_the_values_in_float32(sft, values, assert_base_untouched):
    trainer = sft(TinyLoraConfig(n_tie=4), bf16=True)
    assert values(trainer.model).dtype == torch.float32 and (values(trainer.model) != 0).all()
    assert_base_untouched(trainer.model)


CHECKPOINTING = {
    "off": dict(gradient_checkpointing=False),
    "TRL default": dict(),
    "non-reentrant": dict(gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant": dict(gradient_checkpointing_kwargs={"use_reentrant": True}),
}


@pytest.mark.parametrize("fields", [dict(n_tie="all", u=3), dict(n_tie=4), dict(n_tie=2, tying="structured"), dict()])
def test_every_kind_of_checkpointing_trains_the_same_values(sft, values, reentrant_backwards, fields):
    trained, backwards = {}, {}
    for kind, args in CHECKPOINTING.items():
        reentrant_backwards.clear()
        trained[kind] = values(sft(TinyLoraConfig(**fields), max_steps=3, **args).model)
        backwards[kind] = len(reentrant_backwards)
    # Two checkpointed blocks a step; without this the last case might compare nothing.
    assert backwards == {"off": 0, "TRL default": 0, "non-reentrant": 0, "reentrant": 6}
    for kind in trained:
        assert torch.equal(trained[kind], trained["off"]), kind


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_gradient_of_tied_values_arrives_once_per_backward_pass(sft, reentrant):
    trainer = sft(
        TinyLoraConfig(n_tie="all", u=3),
        train=False,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    (parameter,) = (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    arrivals = []
    parameter.register_post_accumulate_grad_hook(lambda p: arrivals.append(p.grad.clone()))
    trainer.train()
    assert len(arrivals) == 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fields", [dict(n_tie="all", u=3), dict(n_tie=4)])
def test_accumulating_two_rows_equals_a_batch_of_two(sft, values, fields, reentrant):
    args = dict(max_steps=3, optim="sgd", learning_rate=0.1, max_grad_norm=0)
    args["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    whole = values(sft(TinyLoraConfig(**fields), **args).model)
    parts = values(
        sft(TinyLoraConfig(**fields), per_device_train_batch_size=1, gradient_accumulation_steps=2, **args).model
    )
    rows_swapped = values(sft(TinyLoraConfig(**fields), **{**args, "seed": 1}).model)
    # float32 sums in another order: measured differences are about 1e-7. Other rows give another result altogether.
    assert whole.abs().max() > 0.01
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)
    assert (rows_swapped - whole).abs().max() > 1e-3


def test_sft_continues_an_adapter_given_as_a_peft_model(sft, values, make_model, tmp_path, assert_base_untouched):
    first = sft(TinyLoraConfig(n_tie=4))
    first.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    before = values(model)
    assert torch.equal(before, values(first.model)) and (before != 0).all()
    trainer = sft(model=model)
    assert (values(trainer.model) != before).all()
    assert_base_untouched(trainer.model)


def test_a_path_and_an_object_train_the_same_values(sft, values, make_model):
    assert torch.equal(values(sft(TinyLoraConfig()).model), values(sft(TinyLoraConfig(), model=make_model()).model))


@pytest.mark.parametrize(
    "args", [dict(packing=True, max_length=64, packing_strategy="wrapped"), dict(neftune_noise_alpha=5)]
)
def test_other_ways_to_feed_sft_train_the_values(sft, values, assert_base_untouched, args):
    trainer = sft(TinyLoraConfig(n_tie="all", u=3), **args)
    assert (values(trainer.model) != 0).all()
    assert_base_untouched(trainer.model)


def test_evaluation_between_steps_changes_nothing(sft, values, logged):
    evaluated = sft(TinyLoraConfig(n_tie=4), max_steps=3, eval_strategy="steps", eval_steps=1)
    assert len(logged(evaluated, "eval_loss")) == 3
    assert torch.equal(values(evaluated.model), values(sft(TinyLoraConfig(n_tie=4), max_steps=3).model))


def test_modules_to_save_are_trained_beside_the_values(sft, values, make_model):
    trainer = sft(TinyLoraConfig(n_tie=4, modules_to_save=["model.norm"]))
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sorted(tuple(p.shape) for p in trainable.values()) == [(4, 1), (32,)]
    (norm,) = (p for name, p in trainable.items() if "modules_to_save" in name)
    assert not torch.equal(norm, make_model().model.norm.weight)
    assert (values(trainer.model) != 0).all()


# TRL's fused output embedding cannot read PEFT's wrapper of a tied one (with any PEFT method), hence the untied base.
def test_trainable_tokens_are_trained_beside_the_values(sft, values, make_model):
    model = make_model(tie_word_embeddings=False)
    before = model.get_input_embeddings().weight.detach().clone()
    trainer = sft(TinyLoraConfig(n_tie=4, trainable_token_indices=[1, 2]), model=model)
    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sorted(tuple(p.shape) for p in trainable.values()) == [(2, 32), (4, 1)]
    assert (values(trainer.model) != 0).all()
    after = trainer.model.merge_and_unload().get_input_embeddings().weight
    assert (after != before).any(dim=1).nonzero().flatten().tolist() == [1, 2]


def test_a_chat_template_that_adds_tokens_makes_them_and_the_output_embedding_trainable(
    sft, values, make_model, base_folder, tmp_path
):
    source = AutoTokenizer.from_pretrained(base_folder)
    source.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    source.save_pretrained(tmp_path / "source")
    config = TinyLoraConfig(n_tie=4)
    trainer = sft(
        config, model=make_model(tie_word_embeddings=False), chat_template_path=str(tmp_path / "source"), max_steps=1
    )
    # TRL fills the embedding up to a multiple of 64: 320 + <|think|> -> 384.
    assert config.modules_to_save == ["lm_head"]
    assert config.trainable_token_indices == {"embed_tokens": list(range(320, 384))}
    trainable = [tuple(p.shape) for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(trainable) == [(4, 1), (64, 32), (384, 32)]
    assert (values(trainer.model) != 0).all()


# What TRL decides by a parameter's name when the base model is quantised: everything else is cast to bfloat16.
CAST_EXEMPTION = '"lora_magnitude_vector" not in name'
# TRL 1.14 and before, to the letter, so that a later TRL with another exemption fails instead of being skipped.
CASTS_ALL = re.search(
    r"if param\.requires_grad:\s+param\.data = param\.data\.to\(torch\.bfloat16\)",
    inspect.getsource(SFTTrainer.__init__),
)
spares_the_values = pytest.mark.skipif(bool(CASTS_ALL), reason="this TRL casts all trained values on a quantised base")


@spares_the_values
@pytest.mark.parametrize("trainer_class", [SFTTrainer, GRPOTrainer])
def test_the_values_bear_the_name_that_trl_spares_from_its_bfloat16_cast(make_model, trainer_class):
    source = inspect.getsource(trainer_class.__init__)
    assert source.count(CAST_EXEMPTION) == 1 and source.count("param.data.to(torch.bfloat16)") == 1
    model = get_peft_model(make_model(), TinyLoraConfig())
    (name,) = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert "lora_magnitude_vector" in name


@spares_the_values
def test_the_values_stay_float32_where_trl_takes_the_base_for_quantised(sft, values, make_model):
    dtypes = {}
    for config in (TinyLoraConfig(), LoraConfig(r=1, target_modules="all-linear")):
        model = make_model()
        model.is_loaded_in_4bit = True
        trainer = sft(config, model=model, train=False)
        dtypes[type(config)] = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    # LoRA shows that the cast took place.
    assert dtypes == {TinyLoraConfig: {torch.float32}, LoraConfig: {torch.bfloat16}}


def test_no_warning_comes_from_this_package(sft):
    home = Path(trl_tinylora.__file__).parent

    def from_here(caught):
        return [str(w.message) for w in caught if home in Path(w.filename).parents]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = sft(TinyLoraConfig(n_tie=4), max_steps=1, save_strategy="steps", save_steps=1)
        trainer.model.merge_and_unload()
    assert from_here(caught) == []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("import warnings; warnings.warn('seen', FutureWarning)", str(home / "model.py"), "exec"))
    assert from_here(caught) == ["seen"]
