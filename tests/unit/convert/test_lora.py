"""
Adapters as plain LoRA: what the file holds, who can read it, and that it computes the same.

Expected factors are computed in float64 NumPy from the weights and the formula; the rules of vLLM and llama.cpp are
those of the files named in `trl_tinylora/export.py`. CPU; one test starts a fresh process.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.pytorch_utils import Conv1D

import trl_tinylora.convert.lora
from trl_tinylora import TinyLoraConfig, export_lora


FIELDS = {"n_tie": 4, "u": 3}
KINDS = ["qwen2", "llama", "gpt2"]
# vllm/config/lora.py, `MaxLoRARanks`.
VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def draw_values(model, adapter="default", scale=0.5):
    (values,) = (p for name, p in model.named_parameters() if f"{adapter}.lora_magnitude_vector" in name)
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values.copy_(scale * drawn)
    return values.detach().double().numpy()


def adapted(base, **fields):
    model = get_peft_model(base, TinyLoraConfig(**(fields or FIELDS)))
    draw_values(model)
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def vllm_accepts(folder, max_lora_rank):
    """The rules of vLLM's `PEFTHelper` and `parse_fine_tuned_lora_name`; returns the module names."""
    config = config_of(folder)
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert max_lora_rank in VLLM_MAX_RANKS and config["r"] <= max_lora_rank
    assert not config["modules_to_save"] and not config["use_dora"] and not config["use_rslora"]
    assert config["bias"] == "none"
    # It knows one scaling for all modules.
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    names = set()
    for key, tensor in tensors_of(folder).items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"] and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"), key
        assert tensor.shape[parts[-2] == "lora_B"] == config["r"]
        names.add(".".join(parts[2:-2]))
    return names


def llama_cpp_accepts(folder):
    """The rules of `convert_lora_to_gguf.py`; returns the names of the base tensors."""
    config = config_of(folder)
    assert float(config["lora_alpha"]) > 0 and config["base_model_name_or_path"] is not None
    assert not config.get("alora_invocation_tokens") and not config.get("invocation_string")
    parts = {}
    for key, tensor in tensors_of(folder).items():
        is_a, is_b = ".lora_A.weight" in key, ".lora_B.weight" in key
        assert is_a or is_b, key
        base_name = key.replace("base_model.model.", "").replace(".lora_A.weight", ".weight")
        parts.setdefault(base_name.replace(".lora_B.weight", ".weight"), {})["A" if is_a else "B"] = tensor
    for pair in parts.values():
        assert pair["A"].shape[-2] == pair["B"].shape[-1] and pair["A"].dtype == pair["B"].dtype
    return set(parts)


# What is written


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_are_those_of_the_formula_in_float64(tiny_model, tmp_path, kind):
    base = tiny_model(kind)
    linear = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and name != "lm_head"
    }
    weights = {
        n: (m.weight.T if isinstance(m, Conv1D) else m.weight).detach().numpy().copy() for n, m in linear.items()
    }
    model = get_peft_model(base, TinyLoraConfig(**FIELDS))
    values = draw_values(model)

    export_lora(model, tmp_path / "lora")

    tensors = tensors_of(tmp_path / "lora")
    assert len(tensors) == 2 * len(weights)
    for index, (name, weight) in enumerate(weights.items()):
        left, sigma, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
        left, sigma, right = left[:, :2], sigma[:2], right[:2]
        sign = np.sign(left[np.abs(left).argmax(axis=0), range(2)])
        digest = hashlib.sha256(f"0:{name}".encode()).digest()
        stream = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
        projections = stream.standard_normal((3, 2, 2)) / np.sqrt(2)
        mixing = np.einsum("k,kij->ij", values[index // 4], projections)
        down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"].numpy() for part in "AB")
        assert down.dtype == up.dtype == np.float32
        np.testing.assert_allclose(down, right * sign[:, None], rtol=0, atol=1e-6)
        np.testing.assert_allclose(up, (left * sign * sigma) @ mixing, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1},
        {"r": 4, "u": 16, "projection": "basis"},
        {"r": 3, "n_tie": 2, "tying": "structured"},
        {"n_tie": "all", "u": 5, "task_type": "CAUSAL_LM"},
    ],
)
def test_a_plain_lora_model_computes_the_same(tiny_model, token_ids, tmp_path, kind, fields):
    model = adapted(tiny_model(kind), **fields)
    expected, without = logits_of(model, token_ids), logits_of(tiny_model(kind), token_ids)

    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "lora")

    assert type(loaded.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits_of(loaded, token_ids), expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 0.1


# A process of its own, in which nothing of this package can help.
_READER = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

ids = torch.load(sys.argv[1])
result = {}
for folder in sys.argv[2:]:
    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/lora")
        result[folder, "PeftModel"] = model.eval()(input_ids=ids).logits
        result[folder, "merged"] = model.merge_and_unload()(input_ids=ids).logits
        auto = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/lora")
        result[folder, "AutoPeftModel"] = auto.eval()(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(f"{folder}/lora")
        result[folder, "AutoModel"] = plain.eval()(input_ids=ids).logits
assert not any(name.startswith("trl_tinylora") for name in sys.modules)
torch.save(result, f"{sys.argv[1]}.out")
"""


def test_a_process_without_the_package_reads_it_with_equal_logits(tiny_model, token_ids, tmp_path):
    expected = {}
    for kind in KINDS:
        folder = tmp_path / kind
        tiny_model(kind).save_pretrained(folder / "base")
        model = adapted(AutoModelForCausalLM.from_pretrained(folder / "base"))
        expected[str(folder)] = logits_of(model, token_ids)
        export_lora(model, folder / "lora")
    torch.save(token_ids, tmp_path / "ids")

    command = [sys.executable, "-c", _READER, str(tmp_path / "ids"), *expected]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    assert finished.returncode == 0, finished.stderr[-2000:]
    result = torch.load(tmp_path / "ids.out")
    assert len(result) == 4 * len(KINDS)
    for (folder, _), logits in result.items():
        torch.testing.assert_close(logits, expected[folder], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [1, 2, 4])
def test_the_file_keeps_the_rules_of_vllm_and_llama_cpp(tiny_model, tmp_path, kind, r):
    tiny_model(kind).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    weights = {name for name, p in base.named_parameters() if p.ndim == 2}

    export_lora(adapted(base, r=r, task_type="CAUSAL_LM"), tmp_path / "lora")

    names = vllm_accepts(tmp_path / "lora", max_lora_rank=1 if r == 1 else 8)
    assert {f"{name}.weight" for name in names} == llama_cpp_accepts(tmp_path / "lora")
    assert {f"{name}.weight" for name in names} <= weights
    assert {name.rpartition(".")[2] for name in names} == set(config_of(tmp_path / "lora")["target_modules"])


def test_the_rules_do_refuse_a_lora_that_breaks_them(tiny_qwen2, tmp_path):
    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    get_peft_model(tiny_qwen2(), LoraConfig(**fields)).save_pretrained(tmp_path)

    with pytest.raises(AssertionError):
        vllm_accepts(tmp_path, 8)
    with pytest.raises(AssertionError):
        llama_cpp_accepts(tmp_path)


def test_the_configuration_carries_what_loaders_ask_for(tiny_qwen2, tmp_path):
    model = adapted(tiny_qwen2(), task_type="CAUSAL_LM", revision="abc", **FIELDS)
    model.peft_config["default"].base_model_name_or_path = "org/model"
    export_lora(model, tmp_path / "lora")

    config = config_of(tmp_path / "lora")
    assert config["peft_type"] == "LORA" and config["r"] == config["lora_alpha"] == 2
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", "abc")
    assert config["task_type"] == "CAUSAL_LM" and config["inference_mode"] is True
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("qwen2", {"target_modules": ["q_proj", "v_proj"]}, ["q_proj", "v_proj"]),
        (
            "qwen2",
            {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
        ),
        ("qwen2", {"exclude_modules": r".*layers\.0\..*|.*mlp.*|.*[kvo]_proj"}, ["model.layers.1.self_attn.q_proj"]),
        ("gpt2", {}, ["c_attn", "c_fc", "c_proj"]),
        (
            "gpt2",
            {"target_modules": ["attn.c_proj"]},
            ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"],
        ),
    ],
)
def test_exactly_the_adapted_modules_are_targets(tiny_model, token_ids, tmp_path, kind, fields, expected):
    model = adapted(tiny_model(kind), **fields)
    export_lora(model, tmp_path / "lora")

    config = config_of(tmp_path / "lora")
    assert sorted(config["target_modules"]) == expected
    assert config["fan_in_fan_out"] is (kind == "gpt2")
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path / "lora")
    n_adapted = sum(name.endswith(".lora_A.default") for name, _ in loaded.named_modules())
    assert 2 * n_adapted == len(tensors_of(tmp_path / "lora"))
    torch.testing.assert_close(logits_of(loaded, token_ids), logits_of(model, token_ids), rtol=1e-5, atol=1e-5)


# dtypes


def updates_in(tensors):
    """B A of every module, in float64."""
    names = {key.rpartition(".lora_")[0] for key in tensors}
    return {
        n.removeprefix("base_model.model."): tensors[f"{n}.lora_B.weight"].double()
        @ tensors[f"{n}.lora_A.weight"].double()
        for n in names
    }


def worst_error(updates, model):
    """Largest error of an update over its Frobenius norm."""
    worst = 0.0
    for name, update in updates.items():
        exact = model.get_base_model().get_submodule(name).get_delta_weight("default").double()
        worst = max(worst, float((update - exact).norm() / exact.norm()))
    return worst


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 300.0])
def test_rounding_stays_within_the_stated_tolerance(tiny_qwen2, tmp_path, dtype, scale):
    model = adapted(tiny_qwen2())
    draw_values(model, scale=scale)

    export_lora(model, tmp_path / "lora", dtype=dtype)

    tensors = tensors_of(tmp_path / "lora")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    # A few float32 products separate what is compared where nothing is rounded.
    allowed = (1 + math.sqrt(2)) * UNIT_ROUNDOFF[dtype] + 1e-6
    assert worst_error(updates_in(tensors), model) < allowed


def test_float16_without_the_balance_would_not_stay_within_it(tiny_qwen2, tmp_path):
    model = adapted(tiny_qwen2())
    draw_values(model, scale=1e-5)
    export_lora(model, tmp_path / "lora")

    plain = {key: tensor.half() for key, tensor in tensors_of(tmp_path / "lora").items()}

    assert worst_error(updates_in(plain), model) > (1 + math.sqrt(2)) * UNIT_ROUNDOFF[torch.float16]


def test_a_bfloat16_base_is_exported_and_loaded(tiny_qwen2, token_ids, tmp_path):
    model = adapted(tiny_qwen2().bfloat16())
    export_lora(model, tmp_path / "lora", dtype=torch.bfloat16)

    loaded = PeftModel.from_pretrained(tiny_qwen2().bfloat16(), tmp_path / "lora", autocast_adapter_dtype=False)

    # Logits are of the order of ten; bfloat16 has steps of 1/16 there.
    expected = logits_of(model, token_ids)
    assert (logits_of(loaded, token_ids) - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_values_that_do_not_fit_the_dtype_are_refused_and_nothing_is_written(tiny_qwen2, tmp_path):
    model = adapted(tiny_qwen2())
    draw_values(model, scale=1e12)

    with pytest.raises(ValueError, match=r"the update of .*q_proj has entries up to .*not finite in torch\.float16"):
        export_lora(model, tmp_path / "lora", dtype=torch.float16)

    assert list(tmp_path.iterdir()) == []


def test_an_untrained_adapter_is_the_base_model(tiny_qwen2, token_ids, tmp_path):
    for dtype in UNIT_ROUNDOFF:
        export_lora(get_peft_model(tiny_qwen2(), TinyLoraConfig()), tmp_path / str(dtype), dtype=dtype)
        loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path / str(dtype))
        assert torch.equal(logits_of(loaded, token_ids), logits_of(tiny_qwen2(), token_ids))


# Which adapter


def test_a_second_adapter_of_another_rank_is_exported_by_name(tiny_qwen2, token_ids, tmp_path):
    model = adapted(tiny_qwen2())
    model.add_adapter("mine", TinyLoraConfig(r=3, u=2, target_modules=["q_proj", "down_proj"]))
    draw_values(model, "mine")
    first = logits_of(model, token_ids)
    model.set_adapter("mine")
    second = logits_of(model, token_ids)

    export_lora(model, tmp_path / "mine", "mine")
    export_lora(model, tmp_path / "default")

    assert config_of(tmp_path / "mine")["r"] == 3
    for folder, expected in (("mine", second), ("default", first)):
        loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path / folder)
        torch.testing.assert_close(logits_of(loaded, token_ids), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_model_exports_the_same_file(tiny_gpt2, tmp_path):
    model = adapted(tiny_gpt2())
    export_lora(model, tmp_path / "before")
    model.merge_adapter()
    export_lora(model, tmp_path / "after")

    before, after = tensors_of(tmp_path / "before"), tensors_of(tmp_path / "after")
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert config_of(tmp_path / "before")["target_modules"] == config_of(tmp_path / "after")["target_modules"]


# What is refused


def test_what_is_no_such_adapter_is_refused(tiny_qwen2, tmp_path):
    lora = get_peft_model(tiny_qwen2(), LoraConfig(target_modules=["q_proj"]))
    for model in (tiny_qwen2(), lora):
        with pytest.raises(TypeError, match="expected a PeftModel with a TinyLoRA adapter"):
            export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"no adapter 'other'; the model has \['default'\]"):
        export_lora(adapted(tiny_qwen2()), tmp_path / "lora", "other")
    with pytest.raises(ValueError, match=r"`dtype` must be one of torch\.float32.*, got torch\.int8"):
        export_lora(adapted(tiny_qwen2()), tmp_path / "lora", dtype=torch.int8)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}])
def test_modules_trained_in_full_are_refused(tiny_qwen2, tmp_path, fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.*vLLM and llama.cpp refuse.*merge_and_unload"):
        export_lora(adapted(tiny_qwen2(), **fields), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


# Writing


def test_another_adapter_is_overwritten_only_where_asked_for(tiny_qwen2, token_ids, tmp_path):
    folder = tmp_path / "out"
    model = adapted(tiny_qwen2())
    model.save_pretrained(folder)
    (folder / "adapter_model.bin").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    with pytest.raises(FileExistsError, match=r"holds an adapter already \(adapter_config.json, .*or set `overwrite`"):
        export_lora(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    export_lora(model, folder, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    loaded = PeftModel.from_pretrained(tiny_qwen2(), folder)
    torch.testing.assert_close(logits_of(loaded, token_ids), logits_of(model, token_ids), rtol=1e-5, atol=1e-5)


def test_other_files_of_a_folder_stay_and_a_file_is_no_folder(tiny_qwen2, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    export_lora(adapted(tiny_qwen2()), tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and tensors_of(tmp_path / "out")

    with pytest.raises(FileExistsError, match="is a file"):
        export_lora(adapted(tiny_qwen2()), tmp_path / "out" / "notes.txt")


@pytest.mark.parametrize("n_moves", [0, 1])
def test_an_interrupted_overwrite_leaves_nothing_that_loads_half(tiny_qwen2, tmp_path, monkeypatch, n_moves):
    folder = tmp_path / "out"
    model = adapted(tiny_qwen2())
    export_lora(model, folder)
    moves, replace = [], os.replace

    def fail_after(source, target):
        if len(moves) == n_moves:
            raise OSError("disk full")
        moves.append(target)
        replace(source, target)

    monkeypatch.setattr(trl_tinylora.convert.lora.os, "replace", fail_after)
    with pytest.raises(OSError, match="disk full"):
        export_lora(model, folder, overwrite=True)

    assert not (folder / "adapter_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# How TinyLoRA folders themselves travel, without an export


@pytest.fixture
def saved(base_folder, tmp_path):
    """An adapter folder with a tokenizer beside it, tokens, and the logits it was saved with."""
    model = adapted(AutoModelForCausalLM.from_pretrained(base_folder), task_type="CAUSAL_LM", **FIELDS)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "saved")
    ids = torch.arange(4, 14)[None]
    return tmp_path / "saved", ids, logits_of(model, ids)


def test_auto_peft_model_loads_a_saved_adapter(saved):
    folder, ids, expected = saved

    assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(folder), ids), expected)


def test_the_model_card_names_base_and_library(saved, base_folder):
    folder, _, _ = saved
    card = (folder / "README.md").read_text()

    assert re.search(rf"^base_model: {re.escape(base_folder)}$", card, re.MULTILINE)
    assert re.search(r"^library_name: peft$", card, re.MULTILINE)
    assert re.search(r"^pipeline_tag: text-generation$", card, re.MULTILINE)


def test_what_is_pushed_to_the_hub_is_what_was_saved(saved, base_folder, monkeypatch):
    folder, _, _ = saved
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
    repository = SimpleNamespace(repo_id="someone/adapter")
    uploaded = {}

    def upload(working_dir, repo_id, **kwargs):
        uploaded.update({path.name: path.read_bytes() for path in Path(working_dir).iterdir()})

    # The three calls that go out to the Hub.
    hub = SimpleNamespace(create_repo=lambda *args, **kwargs: repository)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub, raising=False)
    monkeypatch.setattr(transformers.utils.hub, "create_repo", hub.create_repo, raising=False)
    monkeypatch.setattr(
        transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("# Card")
    )
    monkeypatch.setattr(model, "_upload_modified_files", upload)
    model.push_to_hub("someone/adapter")

    assert uploaded["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert set(uploaded) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}


def test_transformers_loads_a_saved_adapter_by_its_folder(saved):
    folder, ids, expected = saved

    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder), ids), expected)


def test_a_pipeline_loads_a_saved_adapter_by_its_folder(saved):
    folder, ids, expected = saved

    assert torch.equal(logits_of(pipeline("text-generation", model=str(folder)).model, ids), expected)
