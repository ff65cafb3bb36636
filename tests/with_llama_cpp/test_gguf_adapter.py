"""
llama.cpp itself reads an exported adapter, and gives the log-probabilities that transformers gives with the adapter.

Needs `llama-cpp-python`, which pip builds in minutes: `make test-llama-cpp` has an environment for it, elsewhere these
tests are skipped. The models are small ones with random weights and the toy's base, written as GGUF files in float32.
With TRL_TINYLORA_GGUF_MODEL, the path of a GGUF file of a supported architecture, a quantised one is compared as well.
CPU.
"""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import trl_tinylora.convert.gguf
from trl_tinylora import TinyLoraConfig, export_gguf
from trl_tinylora.convert.gguf import ARCHITECTURES


llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: `make test-llama-cpp`")

TOY = Path(__file__).parents[2] / "recipes" / "toy" / "base"
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
IDS = [17, 4, 33, 8, 59, 21, 21, 3, 46, 12, 50, 7, 29, 38, 5, 61]
# Of log-probabilities: what float32 leaves of two programs' different orders of summing.
TOLERANCE = 1e-4


@pytest.fixture
def tiny():
    """`tiny(kind)`: a small model of each architecture that is written, with biases that are not zero."""

    def make(kind):
        sizes = {
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
        return model

    return make


def adapted(base, scale=0.3, **fields):
    model = get_peft_model(base, TinyLoraConfig(**{"n_tie": 4, "u": 3, **fields}))
    (values,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        values.copy_(scale * torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))
    return model.eval()


def llama_cpp_order(rows, n_heads):
    """Rows of transformers' q or k in llama.cpp's order, one by one: pairs of the rotary embedding are neighbours."""
    half = len(rows) // n_heads // 2
    return np.stack([rows[2 * half * h + half * j + i] for h in range(n_heads) for i in range(half) for j in range(2)])


def write_base(model, path):
    """Writes a model as a GGUF file in float32, without a tokenizer."""
    config = model.config
    architecture, _ = ARCHITECTURES[type(model).__name__]
    (known,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if architecture == "llama" and "q_proj" in name:
            array = llama_cpp_order(array, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            array = llama_cpp_order(array, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_llama_cpp(base, adapter=None, ids=IDS, scale=1.0):
    """Log-probabilities of every token at every position, in float64, as llama.cpp has them."""
    lora = {} if adapter is None else {"lora_path": str(adapter), "lora_scale": scale}
    # In float16, as by default, keys and values would be rounded.
    cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(str(base), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **cache, **lora)
    llama.eval(ids)
    logits = torch.tensor(llama.scores[: len(ids)]).double()
    llama.close()
    return logits.log_softmax(-1)


def in_transformers(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def largest(difference):
    return float(difference.abs().max())


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("r", [1, 2, 3, 8])
def test_an_adapter_gives_the_log_probabilities_of_transformers(tiny, tmp_path, kind, r):
    base = tiny(kind)
    path = write_base(base, tmp_path / "base.gguf")
    without = in_transformers(base)
    model = adapted(base, r=r)
    export_gguf(model, tmp_path / "adapter.gguf")
    expected = in_transformers(model)

    assert largest(in_llama_cpp(path) - without) < TOLERANCE
    assert largest(in_llama_cpp(path, tmp_path / "adapter.gguf") - expected) < TOLERANCE
    assert largest(expected - without) > 0.1


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rows_of_q_and_k_in_transformers_order_would_not(tiny, tmp_path, monkeypatch, kind):
    path = write_base(tiny(kind), tmp_path / "base.gguf")
    model = adapted(tiny(kind), target_modules=["q_proj", "k_proj"])
    monkeypatch.setattr(trl_tinylora.convert.gguf, "rotary_order", lambda n_rows, n_heads: torch.arange(n_rows))
    export_gguf(model, tmp_path / "adapter.gguf")

    assert largest(in_llama_cpp(path, tmp_path / "adapter.gguf") - in_transformers(model)) > 1000 * TOLERANCE


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_opposite_sign_would_not(tiny, tmp_path, kind):
    path = write_base(tiny(kind), tmp_path / "base.gguf")
    model = adapted(tiny(kind))
    export_gguf(model, tmp_path / "adapter.gguf")

    found = in_llama_cpp(path, tmp_path / "adapter.gguf", scale=-1.0)
    assert largest(found - in_transformers(model)) > 1000 * TOLERANCE


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_it_differs_by_rounding_alone(tiny, tmp_path, kind, dtype):
    base = tiny(kind)
    path = write_base(base, tmp_path / "base.gguf")
    without = in_transformers(base)
    model = adapted(base)
    export_gguf(model, tmp_path / "adapter.gguf", dtype=dtype)
    expected = in_transformers(model)

    found = in_llama_cpp(path, tmp_path / "adapter.gguf")
    # Factors and activations are rounded, each by up to half a unit in the last place.
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert (found - expected).norm() < 4 * unit * (expected - without).norm()


def test_the_toys_adapter_gives_the_log_probabilities_of_transformers(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32).eval()
    path = write_base(base, tmp_path / "base.gguf")
    ids = list(range(4, 100))
    without = in_transformers(base, ids)
    model = adapted(base, n_tie="all", u=13, scale=0.1)
    export_gguf(model, tmp_path / "adapter.gguf")
    expected = in_transformers(model, ids)

    assert largest(in_llama_cpp(path, ids=ids) - without) < TOLERANCE
    assert largest(in_llama_cpp(path, tmp_path / "adapter.gguf", ids=ids) - expected) < TOLERANCE
    assert largest(expected - without) > 0.1


def test_an_adapter_of_another_architecture_is_refused_by_llama_cpp(tiny, tmp_path):
    path = write_base(tiny("llama"), tmp_path / "base.gguf")
    loaded = []
    for kind in ("llama", "qwen2"):
        export_gguf(adapted(tiny(kind)), tmp_path / f"{kind}.gguf")
        llama = llama_cpp.Llama(str(path), n_ctx=64, verbose=False)
        # By the function itself: `Llama` takes the null pointer that means failure for an adapter.
        adapter = llama_cpp.llama_adapter_lora_init(llama._model.model, str(tmp_path / f"{kind}.gguf").encode())
        loaded.append(bool(adapter))
        llama.close()
    assert loaded == [True, False]


@pytest.mark.skipif("TRL_TINYLORA_GGUF_MODEL" not in os.environ, reason="TRL_TINYLORA_GGUF_MODEL names no GGUF file")
def test_on_a_quantised_file_an_adapter_changes_as_much_as_in_transformers(tmp_path):
    path = Path(os.environ["TRL_TINYLORA_GGUF_MODEL"])
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = llama_cpp.Llama(str(path), vocab_only=True, verbose=False).tokenize(
        b"Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    )
    without = in_transformers(base, ids)
    model = adapted(base, n_tie="all", u=13)
    export_gguf(model, tmp_path / "adapter.gguf")

    # llama.cpp quantises activations: without an adapter, too, the two programs differ.
    expected = in_transformers(model, ids) - without
    found = in_llama_cpp(path, tmp_path / "adapter.gguf", ids=ids) - in_llama_cpp(path, ids=ids)
    slope = float((found * expected).sum() / expected.square().sum())
    correlation = float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1])
    assert abs(slope - 1) < 0.05 and correlation > 0.95
