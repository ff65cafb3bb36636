"""
Adapters as LoRA files of llama.cpp's: what the file holds, read back with the `gguf` library, and what is refused.

Expected factors are computed in float64 NumPy from the weights and the formula. tests/with_llama_cpp has llama.cpp
itself read such files. CPU.
"""

import hashlib
import os
import sys

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import DECODER
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

import trl_tinylora.storage.atomic_write
from trl_tinylora import TinyLoraConfig, export_gguf
from trl_tinylora.convert.gguf import ARCHITECTURES, rotary_order


FIELDS = {"n_tie": 4, "u": 3}
# Names of weights, as llama.cpp's models have them.
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.fixture
def tiny(tiny_model):
    """`tiny(kind, **overrides)`: a small model of each architecture that is written."""

    def make(kind, **overrides):
        if kind not in ("mistral", "qwen3"):
            return tiny_model(kind, **overrides)
        config = {"mistral": MistralConfig, "qwen3": Qwen3Config}[kind]
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config(**DECODER | {"head_dim": 8} | overrides)).eval()

    return make


def draw_values(model, adapter="default", scale=0.5):
    (values,) = (p for name, p in model.named_parameters() if f"{adapter}.lora_magnitude_vector" in name)
    with torch.no_grad():
        values.copy_(scale * torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))
    return values.detach().double().numpy()


def adapted(base, **fields):
    model = get_peft_model(base, TinyLoraConfig(**(fields or FIELDS)))
    draw_values(model)
    return model


def fields_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path):
    """Arrays in float32 by name, as NumPy orders their axes."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def factors_in_numpy(weight, name, values, r=2):
    """V^T and U S R in float64, as the formula has them."""
    left, sigma, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    left, sigma, right = left[:, :r], sigma[:r], right[:r]
    sign = np.sign(left[np.abs(left).argmax(axis=0), range(r)])
    digest = hashlib.sha256(f"0:{name}".encode()).digest()
    stream = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
    projections = stream.standard_normal((len(values), r, r)) / np.sqrt(r)
    return right * sign[:, None], (left * sign * sigma) @ np.einsum("k,kij->ij", values, projections)


def llama_cpp_order(rows, n_heads):
    """Rows of transformers' q or k in llama.cpp's order, one by one: pairs of the rotary embedding are neighbours."""
    half = len(rows) // n_heads // 2
    return np.stack([rows[2 * half * h + half * j + i] for h in range(n_heads) for i in range(half) for j in range(2)])


# What is written


@pytest.mark.parametrize(
    ("kind", "is_reordered"), [("llama", True), ("mistral", True), ("qwen2", False), ("qwen3", False)]
)
def test_the_tensors_are_those_of_the_formula_in_float64(tiny, tmp_path, kind, is_reordered):
    base = tiny(kind)
    weights = {
        name: module.weight.detach().numpy().copy()
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    model = get_peft_model(base, TinyLoraConfig(**FIELDS))
    values = draw_values(model)

    export_gguf(model, tmp_path / "adapter.gguf")

    tensors = tensors_of(tmp_path / "adapter.gguf")
    assert len(weights) == 14 and len(tensors) == 28
    for index, (name, weight) in enumerate(weights.items()):
        _, _, layer, module = name.split(".", maxsplit=3)
        down, up = (tensors[f"blk.{layer}.{NAMES[module]}.weight.lora_{part}"] for part in "ab")
        expected_down, expected_up = factors_in_numpy(weight, name, values[index // 4])
        if is_reordered and module.endswith(("q_proj", "k_proj")):
            expected_up = llama_cpp_order(expected_up, 4 if module.endswith("q_proj") else 2)
        np.testing.assert_allclose(down, expected_down, rtol=0, atol=1e-6)
        np.testing.assert_allclose(up, expected_up, rtol=0, atol=1e-5)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_metadata_are_those_that_llama_cpp_asks_for(tiny, tmp_path, r):
    for kind, architecture in (("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")):
        model = adapted(tiny(kind), r=r)
        export_gguf(model, tmp_path / f"{kind}.gguf")

        assert type(model.get_base_model()).__name__ in ARCHITECTURES
        fields = fields_of(tmp_path / f"{kind}.gguf")
        assert fields["general.architecture"] == architecture
        assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
        # The scaling is alpha / r.
        assert fields["adapter.lora.alpha"] == r
        for name, tensor in tensors_of(tmp_path / f"{kind}.gguf").items():
            assert tensor.shape[name.endswith("_b")] == r


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
@pytest.mark.parametrize("scale", [1e-5, 1.0])
def test_rounding_stays_within_the_stated_tolerance(tiny, tmp_path, dtype, scale):
    model = adapted(tiny("qwen2"))
    draw_values(model, scale=scale)

    export_gguf(model, tmp_path / "adapter.gguf", dtype=dtype)

    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert kinds == {{torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]}
    tensors = tensors_of(tmp_path / "adapter.gguf")
    for layer in range(2):
        for module, name in NAMES.items():
            exact = model.get_base_model().get_submodule(f"model.layers.{layer}.{module}").get_delta_weight("default")
            down, up = (tensors[f"blk.{layer}.{name}.weight.lora_{part}"].astype(np.float64) for part in "ab")
            error = np.linalg.norm(up @ down - exact.double().numpy()) / float(exact.double().norm())
            # A few float32 products separate what is compared where nothing is rounded.
            assert error < (1 + np.sqrt(2)) * UNIT_ROUNDOFF[dtype] + 1e-6


def test_the_adapter_that_is_named_is_written_merged_or_not(tiny, tmp_path):
    model = adapted(tiny("llama"))
    model.add_adapter("mine", TinyLoraConfig(r=3, u=2, target_modules=["q_proj"]))
    draw_values(model, "mine")

    export_gguf(model, tmp_path / "mine.gguf", "mine")
    export_gguf(model, tmp_path / "before.gguf")
    model.merge_adapter()
    export_gguf(model, tmp_path / "after.gguf")

    assert fields_of(tmp_path / "mine.gguf")["adapter.lora.alpha"] == 3
    assert len(tensors_of(tmp_path / "mine.gguf")) == 4 and len(tensors_of(tmp_path / "before.gguf")) == 28
    assert (tmp_path / "before.gguf").read_bytes() == (tmp_path / "after.gguf").read_bytes()


# The order of the rows of q and k


def rotated(rows, position, is_by_halves):
    """The rotary embedding of one head in float64: of its two halves, as transformers has it, or of neighbours."""
    half = len(rows) // 2
    angle = position * 10000.0 ** (-np.arange(half) / half)
    first, second = (rows[:half], rows[half:]) if is_by_halves else (rows[0::2], rows[1::2])
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)]
    )


def test_the_order_makes_a_rotary_embedding_of_neighbours_give_the_same_attention_scores():
    q, k = np.random.default_rng(0).standard_normal((2, 3 * 8))
    order = rotary_order(3 * 8, 3).numpy()

    def scores(q, k, is_by_halves):
        heads = zip(q.reshape(3, 8), k.reshape(3, 8), strict=True)
        return np.array([rotated(a, 5, is_by_halves) @ rotated(b, 2, is_by_halves) for a, b in heads])

    expected = scores(q, k, is_by_halves=True)
    np.testing.assert_allclose(scores(q[order], k[order], is_by_halves=False), expected, rtol=1e-12)
    np.testing.assert_array_equal(q[order], llama_cpp_order(q, 3))
    # Negative control.
    assert np.abs(scores(q, k, is_by_halves=False) - expected).max() > 0.1


# What is refused


@pytest.mark.bad_input("a model")
def test_an_architecture_that_is_not_known_is_refused_by_name(tiny, tmp_path):
    for model in (adapted(tiny("gpt2")), adapted(tiny("qwen2").model)):
        kind = type(model.get_base_model()).__name__
        with pytest.raises(
            NotImplementedError, match=rf"{kind} is none of LlamaForCausalLM.*merge_and_unload.*convert_hf"
        ):
            export_gguf(model, tmp_path / "new" / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_llama_cpp_does_not_have_is_refused(tiny, tmp_path):
    base = tiny("llama")
    base.model.layers[0].extra = torch.nn.Linear(8, 8)
    with pytest.raises(NotImplementedError, match="adapts model.layers.0.extra, which has no counterpart.*convert_hf"):
        export_gguf(adapted(base, target_modules=["extra", "q_proj"]), tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5]}])
def test_modules_trained_in_full_are_refused(tiny, tmp_path, fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.*vLLM and llama.cpp refuse.*merge_and_unload"):
        export_gguf(adapted(tiny("qwen2"), **fields), tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_such_adapter_is_refused(tiny, tmp_path):
    for model in (tiny("qwen2"), get_peft_model(tiny("qwen2"), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(TypeError, match="expected a PeftModel with a TinyLoRA adapter"):
            export_gguf(model, tmp_path / "adapter.gguf")
    with pytest.raises(ValueError, match=r"no adapter 'other'; the model has \['default'\]"):
        export_gguf(adapted(tiny("qwen2")), tmp_path / "adapter.gguf", "other")
    with pytest.raises(ValueError, match=r"`dtype` must be one of torch\.float32.*, got torch\.int8"):
        export_gguf(adapted(tiny("qwen2")), tmp_path / "adapter.gguf", dtype=torch.int8)


@pytest.mark.parametrize(("scale", "dtype"), [(1e12, torch.float16), (1e38, torch.float32), (np.nan, torch.float32)])
def test_an_update_that_is_not_finite_in_the_dtype_is_refused_and_nothing_is_written(tiny, tmp_path, scale, dtype):
    model = adapted(tiny("llama"))
    draw_values(model, scale=scale)

    with pytest.raises(ValueError, match=r"the update of .* has entries up to .*not finite in torch\.float"):
        export_gguf(model, tmp_path / "new" / "adapter.gguf", dtype=dtype)

    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_error_says_what_to_install(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs the library `gguf`.*pip install 'trl-tinylora\[gguf\]'"):
        export_gguf(adapted(tiny("qwen2")), tmp_path / "adapter.gguf")


# Writing


@pytest.mark.parametrize("name", ["adapter", "adapter_model.safetensors", "adapter.GGUF"])
def test_a_name_that_ends_otherwise_is_refused_whatever_lies_there(tiny, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"{name} does not end in .gguf. Name a file, such as adapter\w*\.gguf"):
        export_gguf(adapted(tiny("qwen2")), tmp_path / name, overwrite=True)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_is_overwritten_only_where_asked_for_and_a_folder_never(tiny, tmp_path):
    path = tmp_path / "new" / "adapter.gguf"
    export_gguf(adapted(tiny("qwen2")), path)
    before = path.read_bytes()

    with pytest.raises(FileExistsError, match="is there already. Name another file, or set `overwrite`"):
        export_gguf(adapted(tiny("qwen2")), path, dtype=torch.float16)
    assert path.read_bytes() == before
    export_gguf(adapted(tiny("qwen2")), path, dtype=torch.float16, overwrite=True)
    assert len(path.read_bytes()) < len(before)
    assert [found.name for found in path.parent.iterdir()] == ["adapter.gguf"]

    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        export_gguf(adapted(tiny("qwen2")), tmp_path / "folder.gguf", overwrite=True)


@pytest.mark.parametrize("fails", ["write_tensors_to_file", "os.replace"])
def test_an_interrupted_overwrite_leaves_the_former_file(tiny, tmp_path, monkeypatch, fails):
    model, path = adapted(tiny("qwen2")), tmp_path / "adapter.gguf"
    export_gguf(model, path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    if fails == "os.replace":
        monkeypatch.setattr(trl_tinylora.storage.atomic_write.os, "replace", fail)
    else:
        monkeypatch.setattr(gguf.GGUFWriter, fails, fail)
    with pytest.raises(OSError, match="disk full"):
        export_gguf(model, path, dtype=torch.float16, overwrite=True)

    assert path.read_bytes() == before and os.listdir(tmp_path) == ["adapter.gguf"]
