"""
Adapters of PEFT's own TinyLoRA as plain LoRA: logits equal to those of PEFT's loading of the same folder.

Values are always drawn before they are saved. CPU, seconds.
"""

import json
import shutil

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from trl_tinylora import TinyLoraConfig, convert_peft_tinylora


pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not (save|load):UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
TARGETS = {
    "qwen2": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "llama": ["q_proj", "k_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def draw_values(model, adapter="default"):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for values in model.base_model.tinylora_v[adapter].values():
            values.copy_(0.5 * torch.randn(values.shape, generator=generator))


def save_adapter(base, folder, **fields):
    model = get_peft_model(base, peft.TinyLoraConfig(**fields))
    draw_values(model)
    model.save_pretrained(folder)
    return model


def assert_same_logits(make_base, ids, lora, expected):
    loaded = PeftModel.from_pretrained(make_base(), lora)
    assert type(loaded.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits_of(loaded, ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits_of(make_base(), ids)).abs().max() > 0.1


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize(
    "fields",
    [
        {"u": 1, "r": 1},
        {"u": 4, "weight_tying": 0.3},
        {"u": 5, "weight_tying": 0.6, "projection_seed": 3},
        {"u": 2, "weight_tying": 1.0, "r": 3},
        {"u": 3, "target_modules": "all-linear", "weight_tying": 0.25},
        {"u": 3, "layers_to_transform": [1], "task_type": "CAUSAL_LM"},
    ],
)
def test_the_lora_computes_what_peft_computes(tiny_model, token_ids, tmp_path, kind, save_projection, fields):
    fields = {"target_modules": TARGETS[kind], "save_projection": save_projection, **fields}
    save_adapter(tiny_model(kind), tmp_path / "tinylora", **fields)
    expected = logits_of(PeftModel.from_pretrained(tiny_model(kind), tmp_path / "tinylora"), token_ids)

    convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "lora", model=tiny_model(kind).config)

    assert_same_logits(lambda: tiny_model(kind), token_ids, tmp_path / "lora", expected)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (kind == "gpt2") and config["task_type"] == fields.get("task_type")
    assert config["r"] == config["lora_alpha"] == fields.get("r", 2) and not config["rank_pattern"]


def test_a_wrong_seed_or_order_of_modules_would_show(tiny_qwen2, token_ids, tmp_path):
    for name, fields in {"first": {}, "other seed": {"projection_seed": 41}, "tied": {"weight_tying": 0.9}}.items():
        fields = {"target_modules": TARGETS["qwen2"], "save_projection": False, "u": 2, **fields}
        save_adapter(tiny_qwen2(), tmp_path / name, **fields)
        convert_peft_tinylora(tmp_path / name, tmp_path / f"{name} lora", model=tiny_qwen2())

    first, seed, tied = (
        logits_of(PeftModel.from_pretrained(tiny_qwen2(), tmp_path / f"{name} lora"), token_ids)
        for name in ("first", "other seed", "tied")
    )
    assert (first - seed).abs().max() > 0.1 and (first - tied).abs().max() > 0.1


def test_projections_of_the_file_are_used_and_not_the_seeds(tiny_qwen2, token_ids, tmp_path):
    save_adapter(tiny_qwen2(), tmp_path / "tinylora", target_modules=TARGETS["qwen2"], u=2)
    path = tmp_path / "tinylora" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: 2 * tensor if ".tinylora_P" in key else tensor for key, tensor in tensors.items()}, path)
    expected = logits_of(PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "tinylora"), token_ids)

    convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "lora", model=tiny_qwen2())

    assert_same_logits(tiny_qwen2, token_ids, tmp_path / "lora", expected)


def test_a_rank_that_a_module_does_not_have_is_filled_with_zeros(tiny_qwen2, token_ids, tmp_path):
    # k_proj and v_proj have 16 rows; PEFT lowers the rank there without a word.
    save_adapter(tiny_qwen2(), tmp_path / "tinylora", target_modules=["q_proj", "v_proj"], r=20, u=2)
    expected = logits_of(PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "tinylora"), token_ids)

    convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "lora", model=tiny_qwen2())

    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.shape[key.endswith("lora_B.weight")] for key, tensor in tensors.items()} == {20}
    assert_same_logits(tiny_qwen2, token_ids, tmp_path / "lora", expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_files_are_read_and_written(tiny_qwen2, token_ids, tmp_path, dtype):
    save_adapter(tiny_qwen2().to(dtype), tmp_path / "tinylora", target_modules=TARGETS["qwen2"], u=2)
    expected = logits_of(PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "tinylora"), token_ids)

    convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "exact", model=tiny_qwen2())
    convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "half", model=tiny_qwen2(), dtype=dtype)

    assert_same_logits(tiny_qwen2, token_ids, tmp_path / "exact", expected)
    half = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {dtype}


# PEFT seeds the projections of a later adapter with the places of the first one


@pytest.fixture
def later_adapter(tiny_qwen2, token_ids, tmp_path):
    """Folder of an adapter that was added after another one, of that other one, and the logits it was saved with."""

    def make(save_projection):
        model = save_adapter(
            tiny_qwen2(), tmp_path / "unused", target_modules=["q_proj", "k_proj"], save_projection=save_projection
        )
        later = peft.TinyLoraConfig(target_modules=["k_proj", "down_proj"], u=2, save_projection=save_projection)
        model.add_adapter("later", later)
        draw_values(model, "later")
        model.set_adapter("later")
        model.save_pretrained(tmp_path / "both")
        return tmp_path / "both" / "later", tmp_path / "both", logits_of(model, token_ids)

    return make


def test_a_later_adapter_with_its_projections_is_what_was_trained(tiny_qwen2, token_ids, tmp_path, later_adapter):
    folder, _, trained = later_adapter(save_projection=True)

    convert_peft_tinylora(folder, tmp_path / "lora", model=tiny_qwen2())

    assert_same_logits(tiny_qwen2, token_ids, tmp_path / "lora", trained)


def test_a_later_adapter_without_projections_is_what_peft_loads_or_what_was_trained(
    tiny_qwen2, token_ids, tmp_path, later_adapter
):
    folder, first, trained = later_adapter(save_projection=False)
    alone = logits_of(PeftModel.from_pretrained(tiny_qwen2(), folder), token_ids)
    # PEFT itself does not load what was trained.
    assert (alone - trained).abs().max() > 0.1

    convert_peft_tinylora(folder, tmp_path / "alone", model=tiny_qwen2())
    convert_peft_tinylora(folder, tmp_path / "trained", model=tiny_qwen2(), earlier_adapters=[first])

    assert_same_logits(tiny_qwen2, token_ids, tmp_path / "alone", alone)
    assert_same_logits(tiny_qwen2, token_ids, tmp_path / "trained", trained)


# The base model


def test_the_base_model_is_found_by_the_adapters_own_note(tiny_qwen2, token_ids, tmp_path):
    tiny_qwen2().save_pretrained(tmp_path / "base")
    base = type(tiny_qwen2()).from_pretrained(tmp_path / "base")
    model = save_adapter(base, tmp_path / "tinylora", target_modules=["q_proj"], u=2)
    expected = logits_of(model, token_ids)

    convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "lora")

    assert_same_logits(tiny_qwen2, token_ids, tmp_path / "lora", expected)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")


def test_another_base_model_is_refused(tiny_qwen2, tiny_gpt2, tmp_path):
    save_adapter(tiny_qwen2(), tmp_path / "tinylora", target_modules=["q_proj"], u=2)

    with pytest.raises(ValueError, match="names no base model"):
        convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "lora")
    for base, count in ((tiny_qwen2(num_hidden_layers=3), 3), (tiny_gpt2(), 0)):
        with pytest.raises(
            ValueError, match=f"adapts 2 modules, and on this base model its configuration means {count}"
        ):
            convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "lora", model=base)
    assert not (tmp_path / "lora").exists()


# Foreign and damaged folders


def test_folders_of_other_methods_are_refused(tiny_qwen2, tmp_path):
    get_peft_model(tiny_qwen2(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    get_peft_model(tiny_qwen2(), TinyLoraConfig()).save_pretrained(tmp_path / "ours")
    (tmp_path / "empty").mkdir()

    for folder, message in (
        ("lora", "type LORA, not TINYLORA"),
        ("ours", "type TRL_TINYLORA, not TINYLORA.*export_lora"),
        ("empty", "no adapter_config.json"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_peft_tinylora(tmp_path / folder, tmp_path / "out", model=tiny_qwen2())


def test_damaged_folders_are_refused(tiny_qwen2, tmp_path):
    save_adapter(tiny_qwen2(), tmp_path / "good", target_modules=["q_proj"], u=2)

    def damaged(name, change):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def without_values(folder):
        path = folder / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(path).items() if ".tinylora_v." not in key}, path)

    cases = {
        "truncated": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x40"), "no complete safetensors"),
        "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        "half a config": (lambda f: (f / "adapter_config.json").write_text('{"r": '), "no complete JSON"),
        "no values": (without_values, "lacks base_model.tinylora_v.0"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            convert_peft_tinylora(damaged(name, change), tmp_path / "out", model=tiny_qwen2())
    assert not (tmp_path / "out").exists()


def test_what_no_lora_can_hold_is_refused(tiny_qwen2, tmp_path):
    save_adapter(tiny_qwen2(), tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_adapter(tiny_qwen2(), tmp_path / "embedding", target_modules=["q_proj", "embed_tokens"])

    with pytest.raises(ValueError, match="modules_to_save=.*merge_and_unload"):
        convert_peft_tinylora(tmp_path / "head", tmp_path / "out", model=tiny_qwen2())
    with pytest.raises(NotImplementedError, match="model.embed_tokens is an embedding"):
        convert_peft_tinylora(tmp_path / "embedding", tmp_path / "out", model=tiny_qwen2())


def test_an_adapter_is_overwritten_only_where_asked_for(tiny_qwen2, tmp_path):
    save_adapter(tiny_qwen2(), tmp_path / "tinylora", target_modules=["q_proj"], u=2)

    with pytest.raises(FileExistsError, match="holds an adapter already"):
        convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "tinylora", model=tiny_qwen2())
    convert_peft_tinylora(tmp_path / "tinylora", tmp_path / "tinylora", model=tiny_qwen2(), overwrite=True)

    assert PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "tinylora").peft_config["default"].peft_type == "LORA"
