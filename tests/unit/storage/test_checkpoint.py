"""
What an adapter's folder holds, what proves its base, and what is refused before the model is touched. CPU, seconds.
"""

import json
import os

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import trl_tinylora.config
import trl_tinylora.tuner.build
from trl_tinylora import TinyLoraConfig
from trl_tinylora.maths.basis import recover_basis
from trl_tinylora.maths.svd import truncated_svd
from trl_tinylora.storage.checkpoint import digest
from trl_tinylora.storage.fingerprint import fingerprint, probes_needed, refuse_another_base, take_probe


WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.tinylora_bank.trl_tinylora_v.lora_magnitude_vector"


def values_of(model):
    return next(p for name, p in model.named_parameters() if ".default.lora_magnitude_vector" in name)


def adapted(base, **fields):
    model = get_peft_model(base, TinyLoraConfig(**fields))
    values = values_of(model)
    with torch.no_grad():
        values.copy_(0.3 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def modules_of(model):
    return [name for name, _ in model.named_modules()]


@pytest.fixture
def saved(tiny_qwen2, tmp_path):
    adapted(tiny_qwen2(), u=13, n_tie="all").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# Bytes


@pytest.mark.parametrize("dtype, payload", [("float32", 52), ("bfloat16", 26), ("float16", 26)])
def test_13_values_are_52_bytes_or_26_on_request(tiny_qwen2, token_ids, tmp_path, dtype, payload):
    model = adapted(tiny_qwen2(), u=13, n_tie="all", save_dtype=dtype)
    model.save_pretrained(tmp_path)

    tensors = load_file(tmp_path / WEIGHTS)
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == payload
    assert (tmp_path / WEIGHTS).stat().st_size < 1000
    loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path)
    assert values_of(loaded).dtype == torch.float32
    expected = values_of(model).detach().to(getattr(torch, dtype)).float()
    assert torch.equal(values_of(loaded), expected)
    # What is saved is rounded, what is trained is not.
    assert torch.equal(values_of(model), expected) == (dtype == "float32")


@pytest.mark.bad_input("an adapter's folder, damaged")
def test_an_unknown_dtype_to_save_in_is_refused():
    with pytest.raises(
        ValueError, match=r"`save_dtype` must be one of \('float32', 'bfloat16', 'float16'\), got 'int8'"
    ):
        TinyLoraConfig(save_dtype="int8")


def test_rounded_values_load_with_low_memory_use_as_well(tiny_qwen2, tmp_path):
    adapted(tiny_qwen2(), u=13, n_tie="all", save_dtype="bfloat16").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path, low_cpu_mem_usage=True)
    assert values_of(loaded).dtype == torch.float32 and values_of(loaded).abs().sum() > 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    r=st.integers(1, 4),
    u=st.integers(1, 5),
    n_tie=st.one_of(st.just("all"), st.integers(1, 9)),
    tying=st.sampled_from(["tiled", "structured"]),
    projection_seed=st.integers(0, 2**32 - 1),
    save_dtype=st.sampled_from(["float32", "bfloat16"]),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16])] * 2),
    targets=st.sets(st.sampled_from(["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]), min_size=1),
)
@pytest.mark.filterwarnings("ignore:u=.* is more than the r")
def test_any_adapter_comes_back_from_its_values_alone(tmp_path_factory, **drawn):
    folder = tmp_path_factory.mktemp("adapter")
    before, after = drawn.pop("dtypes")
    targets = sorted(drawn.pop("targets"))
    ids = torch.arange(3, 14)[None]
    model = adapted(spread_base().to(before), target_modules=targets, **drawn)
    model.save_pretrained(folder)

    size = 4 if drawn["save_dtype"] == "float32" else 2
    payload = sum(tensor.numel() * tensor.element_size() for tensor in load_file(folder / WEIGHTS).values())
    assert payload == values_of(model).numel() * size
    loaded = PeftModel.from_pretrained(spread_base().to(after), folder)
    expected = adapted(spread_base().to(after), target_modules=targets, **drawn)
    with torch.no_grad():
        values_of(expected).copy_(values_of(model).to(getattr(torch, drawn["save_dtype"])))
    assert torch.equal(logits(loaded, ids), logits(expected, ids))


def spread_base():
    """A tiny Qwen2 whose weights have singular values well apart, so that every basis is certain."""
    torch.manual_seed(0)
    fields = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
    model = Qwen2ForCausalLM(Qwen2Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **fields)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_(left * (2.0 * 0.7 ** torch.arange(len(sigma))) @ right)
    return model


# The base


def quantised(weight, levels):
    """Rounded to a number of levels a row, as absmax quantisation does."""
    scale = weight.abs().amax(dim=1, keepdim=True) / levels
    return (weight / scale).round() * scale


def change(model, how):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.copy_(how(name, weight))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_same_base(tiny_qwen2, saved, dtype):
    PeftModel.from_pretrained(tiny_qwen2().to(dtype), saved)
    # And back: an adapter of the rounded base on the exact one.
    adapted(tiny_qwen2().to(dtype)).save_pretrained(saved / "rounded")
    PeftModel.from_pretrained(tiny_qwen2(), saved / "rounded")


@pytest.mark.bad_input("an adapter's folder, damaged")
@pytest.mark.parametrize(
    "how, message",
    [
        (lambda name, weight: torch.randn_like(weight) * 0.2, "weights of 14 of 14 modules differ.*other weights"),
        (lambda name, weight: -weight, "other weights"),
        (lambda name, weight: 1.05 * weight, "a quantised, fine-tuned, merged or revised variant"),
        (lambda name, weight: quantised(weight, 127), "a quantised, fine-tuned, merged or revised variant"),
        (lambda name, weight: quantised(weight, 7), "a quantised, fine-tuned, merged or revised variant"),
        (lambda name, weight: weight + 0.02 * weight.std() * torch.randn_like(weight), "revised variant"),
        (
            lambda name, weight: weight.flip(0) if "layers.1.mlp.up_proj" in name else weight,
            "weights of 1 of 14 modules differ, the first model.layers.1.mlp.up_proj",
        ),
    ],
    ids=["random", "negated", "scaled", "8 bits", "4 bits", "fine-tuned", "one module permuted"],
)
def test_another_base_is_refused_and_left_as_it_was(tiny_qwen2, token_ids, saved, how, message):
    torch.manual_seed(5)
    other = change(tiny_qwen2(), how)
    before, names = logits(other, token_ids), modules_of(other)
    with pytest.raises(ValueError, match=f"not the base model of the adapter 'default': .*{message}"):
        PeftModel.from_pretrained(other, saved)
    assert modules_of(other) == names and torch.equal(logits(other, token_ids), before)


def test_two_layers_in_each_others_place_are_another_base(tiny_qwen2, saved):
    other = tiny_qwen2()
    other.model.layers = torch.nn.ModuleList(reversed(other.model.layers))
    with pytest.raises(ValueError, match="weights of 14 of 14 modules differ"):
        PeftModel.from_pretrained(other, saved)


def test_a_model_of_other_shapes_or_names_is_another_base(tiny_qwen2, tiny_llama, saved):
    with pytest.raises(ValueError, match="other names, another order or other shapes"):
        PeftModel.from_pretrained(tiny_qwen2(intermediate_size=40), saved)
    # Llama has Qwen2's names and, at this size, its shapes.
    with pytest.raises(ValueError, match="weights of .* modules differ"):
        PeftModel.from_pretrained(tiny_llama(initializer_range=0.1), saved)


def test_a_missing_module_is_noticed(tiny_qwen2, saved):
    config = PeftConfig.from_pretrained(saved)
    config.exclude_modules = {"model.layers.1.mlp.up_proj"}
    with pytest.raises(ValueError, match="trained on 14 modules, and its configuration matches 13 here"):
        PeftModel.from_pretrained(tiny_qwen2(), saved, config=config)


def test_the_check_can_be_overridden(tiny_qwen2, saved):
    other = change(tiny_qwen2(), lambda name, weight: -weight)
    config = PeftConfig.from_pretrained(saved)
    config.base_fingerprint = None
    model = PeftModel.from_pretrained(other, saved, config=config)
    assert values_of(model).abs().sum() > 0
    # Saved again, it is an adapter of this base.
    model.save_pretrained(saved / "again")
    PeftModel.from_pretrained(change(tiny_qwen2(), lambda name, weight: -weight), saved / "again")


def test_a_new_adapter_is_bound_to_no_base_by_a_configuration_used_before(tiny_qwen2, tmp_path):
    config = TinyLoraConfig()
    get_peft_model(tiny_qwen2(), config).save_pretrained(tmp_path / "first")
    second = get_peft_model(tiny_qwen2(initializer_range=0.1), config)
    second.save_pretrained(tmp_path / "second")
    PeftModel.from_pretrained(tiny_qwen2(initializer_range=0.1), tmp_path / "second")
    PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "first")


@pytest.mark.parametrize("modules", [1, 7, 100])
@pytest.mark.parametrize("shape", [(32, 48), (300, 500)])
def test_8_bits_are_told_from_bfloat16_every_time(modules, shape):
    generator = torch.Generator().manual_seed(modules)
    for _ in range(5):
        weights = {f"layer.{i}": torch.randn(*shape, generator=generator) for i in range(modules)}

        def probes(how, weights=weights):
            return {name: take_probe(name, how(weight), probes_needed(modules)) for name, weight in weights.items()}

        expected = fingerprint(probes(lambda weight: weight))
        refuse_another_base(expected, probes(lambda weight: weight.bfloat16()))
        with pytest.raises(ValueError, match="differ"):
            refuse_another_base(expected, probes(lambda weight: quantised(weight, 127)))


def test_a_probe_is_a_bilinear_form_of_signs_whatever_its_dtype():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probe = take_probe("layer", weight, 64)
    # Linear in the weight, and of the size of its entries.
    np.testing.assert_allclose(take_probe("layer", 2 * weight, 64).values, 2 * np.array(probe.values), rtol=1e-12)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(probe.values))), probe.scale, rtol=0.4)
    np.testing.assert_allclose(take_probe("layer", weight.float(), 64).values, probe.values, atol=1e-6)
    np.testing.assert_allclose(take_probe("layer", weight, 3).values, probe.values[:3])
    assert take_probe("another", weight, 64).values != probe.values


def test_a_later_adapter_of_fewer_modules_is_proved_by_as_many_numbers(tiny_qwen2, tmp_path):
    model = adapted(tiny_qwen2())
    model.add_adapter("few", TinyLoraConfig(target_modules=["model.layers.1.self_attn.q_proj"]))
    model.save_pretrained(tmp_path, selected_adapters=["few"])
    alone = get_peft_model(tiny_qwen2(), TinyLoraConfig(target_modules=["model.layers.1.self_attn.q_proj"]))
    alone.save_pretrained(tmp_path)
    of = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("few", ".")]
    assert of[0]["base_fingerprint"] == of[1]["base_fingerprint"]


# Damage


def test_a_flipped_bit_is_noticed(tiny_qwen2, saved):
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (saved / WEIGHTS).write_bytes(content)
    base = tiny_qwen2()
    names = modules_of(base)
    with pytest.raises(ValueError, match="is not what was saved.*remove `checkpoint_digest`"):
        PeftModel.from_pretrained(base, saved)
    assert modules_of(base) == names

    fields = json.loads((saved / "adapter_config.json").read_text())
    fields.pop("checkpoint_digest")
    (saved / "adapter_config.json").write_text(json.dumps(fields))
    PeftModel.from_pretrained(base, saved)


@pytest.mark.bad_input("an adapter's folder, damaged")
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: content[:-4], "no complete safetensors file"),
        (lambda content: content + b"0" * 64, "no complete safetensors file"),
        (lambda content: b"\x80\x05pickle" * 9, "no complete safetensors file"),
        (lambda content: b"", "no complete safetensors file"),
    ],
    ids=["truncated", "oversized", "foreign", "empty"],
)
def test_a_damaged_file_is_refused_before_the_model_is_touched(tiny_qwen2, saved, damage, message):
    (saved / WEIGHTS).write_bytes(damage((saved / WEIGHTS).read_bytes()))
    base = tiny_qwen2()
    names = modules_of(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert modules_of(base) == names


@pytest.mark.bad_input("an adapter's folder, damaged")
@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.full((1, 13), float("nan")), "13 of the checkpoint's 13 values are not finite"),
        (torch.zeros(13, 1), r"values of shape \(13, 1\), this adapter has \(1, 13\)"),
        (torch.zeros(1, 14), r"values of shape \(1, 14\), this adapter has \(1, 13\)"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_the_model_is_touched(tiny_qwen2, saved, tensor, message):
    save_file({KEY: tensor}, saved / WEIGHTS)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "checkpoint_digest": None}))
    base = tiny_qwen2()
    names = modules_of(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert modules_of(base) == names


@pytest.mark.bad_input("an adapter's folder, damaged")
def test_a_pickle_is_not_read(tiny_qwen2, saved):
    os.remove(saved / WEIGHTS)

    class Trap:
        def __reduce__(self):
            return os.system, ("touch " + str(saved / "ran"),)

    torch.save({KEY: Trap()}, saved / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        PeftModel.from_pretrained(tiny_qwen2(), saved)
    assert not (saved / "ran").exists()


def test_a_configuration_is_written_whole_or_not_at_all(saved, monkeypatch):
    before = (saved / "adapter_config.json").read_text()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TinyLoraConfig(r=3).save_pretrained(saved)
    assert (saved / "adapter_config.json").read_text() == before
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "adapter_config.json", WEIGHTS]


# How sure the factors are


def matrix(sigma, rows=40, columns=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    return left[:, : len(sigma)] * torch.tensor(sigma, dtype=torch.float64) @ right[: len(sigma)]


@pytest.mark.parametrize(
    "sigma, sure",
    [
        ([4.0, 2.0, 1.0], True),
        ([4.0, 4.0, 1.0], False),
        ([4.0, 2.0, 2.0], False),
        ([4.0, 4.0 * (1 - 1e-4), 1.0], False),
        ([4.0, 2.0, 0.0], True),
        ([4.0, 0.0, 0.0], False),
        ([0.0, 0.0, 0.0], False),
    ],
)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_singular_values_that_nearly_coincide_are_noticed(sigma, sure, scale):
    uncertainty = truncated_svd(matrix([scale * value for value in sigma]).float(), 2).uncertainty
    assert (uncertainty < 0.02) == sure and 0 <= uncertainty <= 1


@pytest.mark.parametrize("gap", [0.3, 0.1, 0.03])
def test_the_uncertainty_is_about_what_rounding_to_bfloat16_turns(gap):
    turned, promised = [], []
    for seed in range(12):
        weight = matrix([1.0, 1.0 - gap, 0.3, *[0.1] * 20], seed=seed)
        exact, rounded = truncated_svd(weight, 2), truncated_svd(weight.bfloat16(), 2)
        promised.append(exact.uncertainty)
        cosine = (exact.right_RI[0] @ rounded.right_RI[0].double()).clamp(-1, 1)
        turned.append(torch.arccos(cosine).item())
    assert 0.1 * np.mean(promised) < np.mean(turned) < 3 * np.mean(promised)


# Modules whose singular vectors are not unique


TURNED = "model.layers.0.mlp.up_proj"


def degenerate(model):
    """The model with two equal singular values in one module."""
    with torch.no_grad():
        weight = model.get_submodule(TURNED).weight
        weight.copy_(matrix([4.0, 4.0, *[0.5] * 20], *weight.shape))
    return model


@pytest.fixture
def turned(tiny_qwen2, tmp_path, token_ids, monkeypatch):
    """An adapter that was saved where the SVD gave another basis; its folder and its logits."""

    def elsewhere(weight, rank):
        left, right, uncertainty = truncated_svd(weight, rank)
        if uncertainty < 1:
            return left, right, uncertainty
        sigma = torch.linalg.vector_norm(left, dim=0)
        angle = torch.tensor(0.7)
        turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        return left / sigma @ turn * sigma, turn.T @ right, uncertainty

    with monkeypatch.context() as patch:
        patch.setattr(trl_tinylora.tuner.build, "truncated_svd", elsewhere)
        model = adapted(degenerate(tiny_qwen2()), n_tie=4, u=3)
    expected = logits(model, token_ids)
    model.save_pretrained(tmp_path / "turned")
    return tmp_path / "turned", expected


def test_a_module_without_a_unique_basis_keeps_the_one_it_was_trained_with(tiny_qwen2, token_ids, turned):
    folder, expected = turned
    bases = json.loads((folder / "adapter_config.json").read_text())["singular_bases"]
    assert TURNED in bases and len(bases) < 14
    assert [name for name, tensor in load_file(folder / WEIGHTS).items() if tensor.numel()] == [KEY]
    loaded = PeftModel.from_pretrained(degenerate(tiny_qwen2()), folder)
    torch.testing.assert_close(logits(loaded, token_ids), expected, rtol=0, atol=2e-5)

    # Control: computed again, the basis is another one.
    again = adapted(degenerate(tiny_qwen2()), n_tie=4, u=3)
    assert (logits(again, token_ids) - expected).abs().max() > 1e-2


def test_a_basis_is_that_of_the_adapter_that_it_came_with(tiny_qwen2, token_ids, turned):
    folder, expected = turned
    model = adapted(degenerate(tiny_qwen2()), n_tie=4, u=3)
    before = logits(model, token_ids)
    model.load_adapter(folder, "turned")
    torch.testing.assert_close(logits(model, token_ids), before, rtol=0, atol=0)

    rows = token_ids.repeat(2, 1)[:3]
    with torch.no_grad():
        mixed = model(input_ids=rows, adapter_names=["turned", "default", "__base__"]).logits
    for row, name in enumerate(["turned", "default"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], logits(model, rows)[row], rtol=0, atol=2e-5)
    model.set_adapter("turned")
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=0, atol=2e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, token_ids), expected, rtol=0, atol=2e-5)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="bases of singular vectors that came with a checkpoint"):
        model.base_model.distance("turned", "default")

    # What is saved again is what was loaded.
    model.save_pretrained(folder / "again", selected_adapters=["turned"])
    first, second = (
        json.loads((saved / "adapter_config.json").read_text())["singular_bases"]
        for saved in (folder, folder / "again" / "turned")
    )
    assert first[TURNED] == second[TURNED] and first.keys() == second.keys()

    # Another adapter with this basis follows the plan of the first one, and the factors go with the last of them.
    model.load_adapter(folder, "like it")
    bank, layer = model.base_model.bank, model.get_submodule(f"base_model.model.{TURNED}")
    assert bank.vectors("like it").plan is bank.vectors("turned").plan and len(layer._factors) == 2
    model.delete_adapter("like it")
    model.delete_adapter("turned")
    assert list(layer._factors) == [(2, None)]


def test_another_dtype_of_the_base_changes_an_adapters_effect_by_little(tiny_qwen2, token_ids, tmp_path):
    model = adapted(tiny_qwen2(), n_tie=4, u=3)
    model.save_pretrained(tmp_path)
    rounded = PeftModel.from_pretrained(tiny_qwen2().bfloat16().float(), tmp_path)
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            exact = layer.get_delta_weight("default")
            other = rounded.get_submodule(name).get_delta_weight("default")
            # An uncertainty of 0.02 at most in each of two vectors on either side.
            assert torch.linalg.matrix_norm(other - exact) <= 0.1 * torch.linalg.matrix_norm(exact)


def test_an_adapter_on_the_hub_is_looked_at_before_the_model_is_touched(tiny_qwen2, token_ids, turned, monkeypatch):
    folder, expected = turned

    def download(repo_id, filename, **kwargs):
        assert repo_id == "somebody/adapter"
        return str(folder / filename)

    for module in (peft.config, peft.utils.save_and_load, trl_tinylora.config):
        monkeypatch.setattr(module, "hf_hub_download", download)
    monkeypatch.setattr(peft.utils.save_and_load, "file_exists", lambda **kwargs: True)
    monkeypatch.setattr(peft.utils.save_and_load, "hub_file_exists", lambda *args, **kwargs: True, raising=False)
    loaded = PeftModel.from_pretrained(degenerate(tiny_qwen2()), "somebody/adapter")
    torch.testing.assert_close(logits(loaded, token_ids), expected, rtol=0, atol=2e-5)

    base = tiny_qwen2()
    names = modules_of(base)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        PeftModel.from_pretrained(base, "somebody/adapter")
    assert modules_of(base) == names


def test_transformers_own_loader_finds_the_basis(tiny_qwen2, token_ids, turned):
    folder, expected = turned
    model = degenerate(tiny_qwen2())

    model.load_adapter(str(folder))

    torch.testing.assert_close(logits(model, token_ids), expected, rtol=0, atol=2e-5)


@pytest.fixture
def of_earlier_version(tiny_qwen2, turned):
    """The same adapter as earlier versions wrote it, with U S and V^T in the file; its folder and its logits."""
    folder, expected = turned
    fields = json.loads((folder / "adapter_config.json").read_text())
    tensors = {KEY: load_file(folder / WEIGHTS)[KEY]}
    for name, basis in fields.pop("singular_bases").items():
        factors = recover_basis(name, degenerate(tiny_qwen2()).get_submodule(name).weight.detach(), 2, basis)
        for side, factor in zip(("left", "right"), factors, strict=True):
            tensors[f"base_model.model.trl_tinylora_factors.{name}.{side}"] = factor.contiguous()
    del fields["checkpoint_format"]
    fields["base_fingerprint"]["stored"] = len(tensors) // 2
    own = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    fields["checkpoint_digest"] = digest(own)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / WEIGHTS)
    return folder, expected


def test_factors_in_the_file_of_an_earlier_version_are_read_as_a_basis(tiny_qwen2, token_ids, of_earlier_version):
    folder, expected = of_earlier_version
    loaded = PeftModel.from_pretrained(degenerate(tiny_qwen2()), folder)
    torch.testing.assert_close(logits(loaded, token_ids), expected, rtol=0, atol=2e-5)


@pytest.mark.bad_input("an adapter's folder, damaged")
def test_a_loader_that_leaves_the_factors_of_an_earlier_version_unread_is_refused(tiny_qwen2, of_earlier_version):
    # transformers' own, which reads the configuration by itself.
    config = PeftConfig.from_pretrained(of_earlier_version[0])
    with pytest.raises(NotImplementedError, match="saved by an earlier version.*PeftModel.from_pretrained"):
        degenerate(tiny_qwen2()).add_adapter(config, "default")


# The card


def test_the_card_says_what_the_adapter_is_and_keeps_what_others_wrote(tiny_qwen2, tmp_path):
    model = adapted(tiny_qwen2(), u=13, n_tie="all", save_dtype="bfloat16")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "13 trained values (26 bytes, bfloat16)" in card and "in each of 14 modules" in card
    assert "W' = W + U S (sum_k v_k P_k) V^T" in card and "import trl_tinylora" in card
    assert "install it from a clone of its repository" in card
    assert fields["base_fingerprint"]["names"] in card
    stored = load_file(tmp_path / WEIGHTS)[KEY]
    assert " ".join(f"{value:.8g}" for value in stored.float().flatten().tolist()) in card
    # PEFT's own front matter stands before it.
    assert card.startswith("---") and "library_name: peft" in card

    (tmp_path / "README.md").write_text(card + "\nMy own words.\n")
    with torch.no_grad():
        values_of(model).fill_(0.125)
    model.save_pretrained(tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert again.count("## TinyLoRA") == 1 and "0.125 0.125" in again and "My own words." in again


def test_an_adapter_of_many_values_does_not_list_them(tiny_qwen2, tmp_path):
    adapted(tiny_qwen2(), u=10, r=4).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "140 trained values (560 bytes, float32)" in card and len(card) < 8000


@pytest.mark.parametrize("threads", [1, 2])
def test_factors_do_not_depend_on_the_number_of_threads(threads):
    weight = matrix([4.0, 2.0, 1.0, *[0.2] * 30], 400, 300).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        left, right, _ = truncated_svd(weight, 2)
    finally:
        torch.set_num_threads(before)
    expected = torch.linalg.svd(weight.double(), full_matrices=False)
    for k in range(2):
        exact = expected.S[k] * torch.outer(expected.U[:, k], expected.Vh[k])
        torch.testing.assert_close(torch.outer(left[:, k], right[k]).double(), exact, rtol=0, atol=1e-5)
        assert left[:, k].abs().max() == left[:, k].max()
