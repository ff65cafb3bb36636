"""
One proof of an adapter in every way in: what was altered, swapped or damaged is refused by every loader. CPU, seconds.
"""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from trl_tinylora import TinyLoraConfig
from trl_tinylora.storage.checkpoint import FORMAT


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.tinylora_bank.trl_tinylora_v.lora_magnitude_vector"
FIELDS = {"n_tie": 4, "u": 3}
FORMATS = Path(__file__).parents[2] / "data" / "adapter_formats"


def adapted(base, seed=0, **fields):
    model = get_peft_model(base, TinyLoraConfig(**{**FIELDS, **fields}))
    values = model.base_model.bank.vectors("default").values_GK
    with torch.no_grad():
        values.copy_(0.3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def base(base_folder):
    """A folder with a base model and its tokenizer."""
    return base_folder


@pytest.fixture
def saved(base, tmp_path):
    """An adapter on the base, and one with other values and another seed."""
    for name, fields in [("adapter", {}), ("other", {"seed": 1, "projection_seed": 1})]:
        adapted(AutoModelForCausalLM.from_pretrained(base), **fields).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
    return tmp_path / "adapter"


LOADERS = {
    "PeftModel": lambda folder, base: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder),
    "AutoPeftModel": lambda folder, base: AutoPeftModelForCausalLM.from_pretrained(folder),
    "transformers' load_adapter": lambda folder, base: load_adapter(folder, base),
    "AutoModel": lambda folder, base: AutoModelForCausalLM.from_pretrained(folder),
    "pipeline": lambda folder, base: pipeline("text-generation", model=str(folder)).model,
    "a configuration read before": lambda folder, base: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder, config=PeftConfig.from_pretrained(folder)
    ),
}


def load_adapter(folder, base, **options):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(folder), **options)
    return model


def edit(**fields):
    def damage(folder):
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def edit_tensor(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file({name: change(tensor) for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})

    return damage


def swap(name):
    return lambda folder: shutil.copy(folder.parent / "other" / name, folder / name)


def flip_a_bit(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def remove_fingerprint(folder):
    edit(base_fingerprint=None)(folder)


DAMAGES = {
    "another seed": edit(projection_seed=1),
    "another rank": edit(r=3),
    "another tying": edit(tying="structured"),
    "another projection": edit(projection="basis"),
    "another number of values and groups": edit(u=6, n_tie=8),
    "no fingerprint": remove_fingerprint,
    "a basis for a module that has one": edit(singular_bases={"model.layers.0.mlp.up_proj": "AAAAAAAA"}),
    "a flipped bit": flip_a_bit,
    "not a number": edit_tensor(lambda tensor: tensor * float("nan")),
    "other values": edit_tensor(lambda tensor: tensor * 1.001),
    "another dtype": edit_tensor(lambda tensor: tensor.bfloat16()),
    "another adapter's file": swap(WEIGHTS),
    "another adapter's configuration": swap(CONFIG),
}


@pytest.mark.bad_input("an adapter's folder, altered")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_altered_is_refused_by_every_loader(saved, base, damage, loader):
    DAMAGES[damage](saved)
    # transformers' own error of another shape has its details in a report.
    messages = "not what was saved|not finite|values of shape|`singular_bases` of|You set `ignore_mismatched_sizes`"
    with pytest.raises((ValueError, RuntimeError), match=messages):
        LOADERS[loader](saved, base)


@pytest.mark.bad_input("an adapter's folder, altered")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {},
        lambda tensors: {name.replace("magnitude", "magnitudes"): tensor for name, tensor in tensors.items()},
        lambda tensors: {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)},
        lambda tensors: {name: tensor.int() for name, tensor in tensors.items()},
    ],
    ids=["empty", "renamed", "a LoRA's", "integers"],
)
def test_values_that_are_not_there_are_refused_at_the_first_pass_at_the_latest(saved, base, token_ids, loader, change):
    save_file(change(load_file(saved / WEIGHTS)), saved / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="no TinyLoRA checkpoint|values were not loaded|has dtype|not what was saved"):
        logits_of(LOADERS[loader](saved, base), token_ids)


@pytest.mark.bad_input("an adapter's folder, altered")
def test_a_tensor_of_the_base_in_the_file_is_refused(saved, base):
    tensors = {**load_file(saved / WEIGHTS), "base_model.model.model.norm.weight": torch.ones(32)}
    save_file(tensors, saved / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="norm.weight beside the values.*of different adapters"):
        LOADERS["PeftModel"](saved, base)


def test_embeddings_that_were_saved_beside_the_values_are_loaded(base, tmp_path):
    model = adapted(AutoModelForCausalLM.from_pretrained(base))
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 1.0
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = LOADERS["PeftModel"](tmp_path, base)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.bad_input("an adapter's folder, altered")
@pytest.mark.parametrize("fields", [{"trainable_token_indices": [3, 6]}, {"trainable_token_indices": None}])
def test_other_tokens_than_those_that_were_trained_are_refused(base, tmp_path, fields):
    config = {"trainable_token_indices": [3, 5], "target_modules": ["q_proj"]}
    adapted(AutoModelForCausalLM.from_pretrained(base), **config).save_pretrained(tmp_path)
    LOADERS["PeftModel"](tmp_path, base)
    edit(**fields)(tmp_path)
    with pytest.raises(ValueError, match="not what was saved"):
        LOADERS["PeftModel"](tmp_path, base)


@pytest.mark.parametrize("read", [PeftConfig.from_pretrained, TinyLoraConfig.from_pretrained])
def test_a_configuration_read_from_a_folder_serves_for_a_new_adapter(saved, base, token_ids, tmp_path, read):
    def new(**changes):
        config = read(saved)
        config.inference_mode = False
        for name, value in changes.items():
            setattr(config, name, value)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)

    model = new()
    model(input_ids=token_ids, labels=token_ids).loss.backward()
    with torch.no_grad():
        model.base_model.bank.vectors("default").values_GK.fill_(0.2)
    model.save_pretrained(tmp_path / "checkpoint")
    # As a trainer resumes, or loads the best of its checkpoints at the end.
    resumed = new()
    resumed.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    model.load_adapter(tmp_path / "checkpoint", "default", is_trainable=True)
    assert torch.equal(logits_of(resumed, token_ids), logits_of(model, token_ids))
    new(u=2, tying="structured")


@pytest.mark.parametrize("loader", LOADERS)
def test_what_was_saved_is_loaded_by_every_loader(saved, base, token_ids, loader):
    expected = logits_of(LOADERS["PeftModel"](saved, base), token_ids)
    assert torch.equal(logits_of(LOADERS[loader](saved, base), token_ids), expected)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(base), token_ids)
    assert (expected - plain).abs().max() > 1e-2


def test_a_rounded_adapter_is_loaded_by_transformers(base, token_ids, tmp_path):
    adapted(AutoModelForCausalLM.from_pretrained(base), save_dtype="bfloat16").save_pretrained(tmp_path)
    expected = logits_of(LOADERS["PeftModel"](tmp_path, base), token_ids)
    assert torch.equal(logits_of(load_adapter(tmp_path, base, is_trainable=True), token_ids), expected)


def test_an_altered_adapter_is_refused_for_training_as_well(saved, base):
    edit(projection_seed=1)(saved)
    with pytest.raises(ValueError, match="not what was saved"):
        load_adapter(saved, base, is_trainable=True)


@pytest.mark.bad_input("an adapter's folder, damaged")
@pytest.mark.parametrize(
    "file, content, message",
    [
        (CONFIG, b'{"peft_type": "TRL_TINYLORA", ', "no complete JSON file"),
        (CONFIG, b"", "no complete JSON file"),
        (CONFIG, b'{"peft_type": "\xff"}', "no complete JSON file"),
        (CONFIG, b'["TRL_TINYLORA"]', "must hold an object"),
        (WEIGHTS, b"", "no complete safetensors file"),
        (WEIGHTS, b"\x00" * 30, "no complete safetensors file"),
    ],
)
def test_a_damaged_file_is_named_by_its_path(saved, file, content, message):
    (saved / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        TinyLoraConfig.from_pretrained(saved)
    assert str(saved / file) in str(raised.value)


@pytest.mark.bad_input("an adapter's configuration of wrong types")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"base_fingerprint": "text"}, "`base_fingerprint` is damaged"),
        ({"base_fingerprint": {"modules": 14}}, "`base_fingerprint` is damaged, KeyError"),
        ({"base_fingerprint": {"modules": 14, "names": "x", "probes": "no base64!"}}, "`base_fingerprint` is damaged"),
        ({"base_fingerprint": {"modules": "14", "names": "x", "probes": ""}}, "`base_fingerprint` is damaged"),
        ({"base_fingerprint": {"modules": 14, "names": "x", "probes": "AAAA"}}, "damaged: 14 modules"),
        ({"singular_bases": ["text"]}, "`singular_bases` must hold a text for each module"),
        ({"singular_bases": {"module": 3}}, "`singular_bases` must hold a text for each module"),
        ({"checkpoint_digest": 5}, "`checkpoint_digest` must be a text"),
        ({"checkpoint_format": FORMAT + 1}, "`checkpoint_format` is 4.*install the newest one"),
        ({"checkpoint_format": "2"}, "`checkpoint_format` is '2'"),
        ({"r": "2"}, "`r` must be an integer, got '2'"),
        ({"n_tie": 2.0}, "`n_tie` must be an integer, got 2.0"),
        ({"checkpoint_format": float(FORMAT)}, f"`checkpoint_format` is {FORMAT}.0"),
        ({"target_modules": None}, "`target_modules` must be"),
        ({"inference_mode": "no"}, "`inference_mode` must be True or False, got 'no'"),
        ({"revision": 7}, "`revision` must be a text or None, got 7"),
        ({"auto_mapping": "x"}, "`auto_mapping` must be a dictionary or None"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_with_the_path(saved, base, fields, message):
    edit(**fields)(saved)
    with pytest.raises(ValueError, match=message) as raised:
        LOADERS["PeftModel"](saved, base)
    assert str(saved) in str(raised.value)
    # transformers reads the configuration by itself, and knows the path.
    with pytest.raises((TypeError, ValueError), match=message):
        LOADERS["AutoModel"](saved, base)


@pytest.mark.bad_input("an adapter's configuration of wrong types")
@pytest.mark.parametrize("kind", ["NOPE", None])
def test_a_type_that_nobody_knows_is_refused_with_the_path(saved, kind):
    edit(peft_type=kind)(saved)
    with pytest.raises(ValueError, match="adapter_config.json: `peft_type` is .*, which PEFT does not know"):
        TinyLoraConfig.from_pretrained(saved)


def test_the_folder_says_the_number_of_its_format(saved):
    assert json.loads((saved / CONFIG).read_text())["checkpoint_format"] == FORMAT == 3


def test_a_configuration_changed_after_the_model_was_made_is_saved_as_the_model_is(base, tmp_path, token_ids):
    model = adapted(AutoModelForCausalLM.from_pretrained(base))
    expected = logits_of(model, token_ids)
    model.peft_config["default"].projection_seed = 7
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(LOADERS["PeftModel"](tmp_path, base), token_ids), expected)


@pytest.mark.parametrize("name", sorted(path.name for path in FORMATS.iterdir() if path.is_dir()))
def test_every_format_that_was_ever_written_loads_with_its_logits(name, tiny_qwen2, token_ids):
    """README.md beside the folders says what each holds."""
    model = tiny_qwen2()
    turned = model.get_submodule("model.layers.0.mlp.up_proj").weight
    with torch.no_grad():
        turned.copy_(load_file(FORMATS / "base.safetensors")["weight"])
    loaded = PeftModel.from_pretrained(model, FORMATS / name)
    expected = load_file(FORMATS / name / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits_of(loaded, token_ids)[:, -1], expected, rtol=0, atol=5e-5)


@pytest.mark.bad_input("an adapter's folder, damaged")
def test_a_folder_without_its_values_is_refused(saved, base):
    (saved / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors"):
        LOADERS["PeftModel"](saved, base)
    # A configuration alone can be read.
    TinyLoraConfig(r=3).save_pretrained(saved / "alone")
    assert TinyLoraConfig.from_pretrained(saved / "alone").r == 3


# Saving


def test_values_that_are_not_finite_are_not_saved_and_the_last_ones_stay(saved, base):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = adapted(AutoModelForCausalLM.from_pretrained(base), seed=3)
    with torch.no_grad():
        model.base_model.bank.vectors("default").values_GK[0, 1] = float("inf")
    with pytest.raises(ValueError, match="1 of the checkpoint's 12 values are not finite"):
        model.save_pretrained(saved)
    after = {path.name: path.read_bytes() for path in saved.iterdir()}
    # PEFT writes the card first.
    assert {**after, "README.md": b""} == {**before, "README.md": b""}


def test_values_that_overflow_in_the_dtype_of_the_file_are_not_saved(base, tmp_path):
    model = adapted(AutoModelForCausalLM.from_pretrained(base), save_dtype="float16")
    with torch.no_grad():
        model.base_model.bank.vectors("default").values_GK[0, 1] = 1e6
    with pytest.raises(ValueError, match="not finite"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_pickle_is_refused_where_it_would_be_saved(saved, base, tmp_path, is_there):
    folder = saved if is_there else tmp_path / "new"
    before = {path.name: path.read_bytes() for path in saved.iterdir() if path.name != "README.md"}
    model = adapted(AutoModelForCausalLM.from_pretrained(base), seed=3)
    with pytest.raises(ValueError, match="writes .*adapter_model.bin, a pickle.*safe_serialization=True"):
        model.save_pretrained(folder, safe_serialization=False)
    assert not (folder / "adapter_model.bin").exists() and (folder / CONFIG).exists() == is_there
    assert {path.name: path.read_bytes() for path in saved.iterdir() if path.name != "README.md"} == before


# Resuming


@pytest.mark.bad_input("a checkpoint of another adapter")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"projection_seed": 1}, r"projection_seed \(1, 0 there\)"),
        ({"r": 3}, r"r \(3, 2 there\)"),
        ({"tying": "structured"}, r"tying \('structured', 'tiled' there\)"),
        ({"projection": "basis"}, r"projection \('basis', 'gaussian' there\)"),
        ({"n_tie": 2}, r"n_tie \(2, 4 there\)"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, r"modules adapted \(8, 14 there\)"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused_and_both_are_named(saved, base, fields, message):
    model = adapted(AutoModelForCausalLM.from_pretrained(base), **fields)
    with pytest.raises(ValueError, match=f"{message}.*would mean something else"):
        model.base_model.refuse_checkpoint(saved)
    with pytest.raises(ValueError, match=r"Adapter nope not found, there are \['default'\]"):
        model.base_model.refuse_checkpoint(saved, "nope")


@pytest.mark.bad_input("a checkpoint of another adapter")
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"projection_seed": 1}, r"projection_seed \(1, 0 there\)"),
        ({"r": 3}, r"r \(3, 2 there\)"),
        ({"tying": {"all.": "proj"}}, r"tying \({'all.': 'proj'}, 'tiled' there\)"),
        ({"projection": "basis"}, r"projection \('basis', 'gaussian' there\)"),
        (
            {"n_tie": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            r"modules \(8, 14 there\), n_tie \(2, 4 there\)",
        ),
    ],
)
def test_values_are_not_loaded_into_another_adapter_that_is_there(saved, base, fields, message):
    """As a trainer resumes: PEFT reads the file alone."""
    model = adapted(AutoModelForCausalLM.from_pretrained(base), seed=3, **fields)
    values = model.base_model.bank.vectors("default").values_GK
    before = values.detach().clone()
    with pytest.raises(ValueError, match=f"differs from this one in .*{message}.*would mean something else here"):
        model.load_adapter(saved, "default", is_trainable=True)
    assert torch.equal(values, before)


def test_an_adapter_that_goes_on_from_a_folder_takes_no_checkpoint_of_another(saved, base):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), saved, is_trainable=True)
    model.load_adapter(saved, "default", is_trainable=True)
    with pytest.raises(ValueError, match=r"projection_seed \(0, 1 there\)"):
        model.load_adapter(saved.parent / "other", "default", is_trainable=True)


@pytest.mark.bad_input("an adapter's folder, altered")
def test_values_that_say_no_longer_what_they_belong_to_are_not_loaded(saved, base):
    tensors = load_file(saved / WEIGHTS)
    save_file({name.removesuffix("}"): tensor for name, tensor in tensors.items()}, saved / WEIGHTS)
    model = adapted(AutoModelForCausalLM.from_pretrained(base))
    with pytest.raises(ValueError, match=r"differs from this one in .*, r \(2, None there\)"):
        model.load_adapter(saved, "default", is_trainable=True)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_the_values_belong_to_is_reported_by_no_loader(saved, base, loader, caplog, recwarn):
    logging.getLogger("transformers").propagate = True
    LOADERS[loader](saved, base)
    load_adapter(saved, base, is_trainable=True)
    reported = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in recwarn]
    assert not [text for text in reported if "UNEXPECTED" in text or "MISSING" in text or "adapter keys" in text]


def test_a_checkpoint_of_the_same_adapter_is_taken(saved, base):
    adapted(AutoModelForCausalLM.from_pretrained(base), seed=5).base_model.refuse_checkpoint(saved)
