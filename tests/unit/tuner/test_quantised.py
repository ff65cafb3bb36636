"""
Adapters on quantised base models: factors and gradients of the dequantised weight, merging refused.

The libraries' own kernels on the CPU, seconds; skipped where a library is not installed.
"""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from plain_autograd import checkpointed, expected_gradients, set_values, values_of
from quantisations import BITSANDBYTES, FOREIGN, KINDS, foreign_layer, load_float8, quantisation
from tiny import layers_of
from torch import nn

from trl_tinylora import TinyLoraConfig
from trl_tinylora.maths.svd import truncated_svd
from trl_tinylora.tuner import weights


IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
FIELDS = {"n_tie": 4, "u": 3}
# Of the gradient's largest entry, in float32. Measured over all kinds and without quantisation: 1e-6 to 8e-6.
NOISE = 3e-5


@pytest.fixture
def make(make_model):
    """`make(kind, dtype)`: the tiny model, quantised."""

    def load(kind, dtype=torch.float32):
        return make_model(dtype, quantization_config=quantisation(kind))

    return load


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def relative_error(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_are_those_of_the_weight_that_a_layer_computes_with(make, kind):
    model = get_peft_model(make(kind), TinyLoraConfig())
    layer = layers_of(model)[-1]
    linear = layer.get_base_layer()
    # Without the library's own dequantisation: the product with the identity.
    linear.train()
    weight_OI = linear(torch.eye(linear.in_features)).T - (0 if linear.bias is None else linear.bias[:, None])
    torch.testing.assert_close(layer.unmerged_weight(), weight_OI, rtol=1e-5, atol=1e-6)
    left_OR, right_RI, _ = truncated_svd(weight_OI, 2)
    for found, expected in zip(layer.factors((2, None)), (left_OR, right_RI), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert left_OR.shape == (linear.out_features, 2) and right_RI.shape == (2, linear.in_features)


@pytest.mark.parametrize("mode", ["no checkpointing", "reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_plain_autograd_on_the_dequantised_weights(make, make_model, kind, mode):
    model = checkpointed(get_peft_model(make(kind), TinyLoraConfig(**FIELDS)), mode).train()
    set_values(model)
    loss_of(model).backward()
    (expected,) = expected_gradients(make_model(torch.float64), model, loss_of)
    assert relative_error(values_of(model).grad, expected) < NOISE
    assert values_of(model).dtype == torch.float32 and values_of(model).grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["nf4", "8 bits", "torchao int8"])
def test_in_bfloat16_the_gradient_is_as_exact_as_without_quantisation(make, make_model, kind):
    def error(base):
        model = get_peft_model(base, TinyLoraConfig(**FIELDS)).train()
        squares = 0
        for seed in range(12):
            set_values(model, seed=seed)
            model.zero_grad()
            loss_of(model).backward()
            (expected,) = expected_gradients(make_model(torch.float64), model, loss_of)
            squares += float((values_of(model).grad.double() - expected).norm() / expected.norm()) ** 2
        return (squares / 12) ** 0.5

    # Roundings of activations, about as many in each: 4% to 6% measured in all four. A root mean square of 12 scatters
    # by a fifth.
    assert error(make(kind, torch.bfloat16)) < 2 * error(make_model(torch.bfloat16)) < 0.15


def test_a_gradient_that_a_base_layer_swallows_is_an_error(make_model):
    model = get_peft_model(make_model(), TinyLoraConfig()).train()
    linear = layers_of(model)[3].get_base_layer()
    linear.forward = lambda x: nn.functional.linear(x.detach(), linear.weight)
    with pytest.raises(RuntimeError, match="o_proj, a Linear, passes no gradient on to its input"):
        loss_of(model)
    model.eval()
    with torch.no_grad():
        loss_of(model)


def test_inputs_that_are_quantised_as_well_are_refused(make_model):
    library = pytest.importorskip("torchao.quantization")
    model = make_model()
    library.quantize_(model.model, library.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="q_proj: its torchao weight has act_quant_kwargs=.*Int8WeightOnlyConfig"):
        get_peft_model(model, TinyLoraConfig())
    assert layers_of(model) == []


def test_a_torchao_weight_that_was_not_tried_is_refused_by_name(make_model, monkeypatch):
    library = pytest.importorskip("torchao.quantization")
    model = make_model()
    library.quantize_(model.model, library.Int8WeightOnlyConfig())
    monkeypatch.delitem(weights.KNOWN_QUANTISED, "torchao.quantization.Int8Tensor")
    with pytest.raises(ValueError, match="q_proj is a torchao.quantization.Int8Tensor.*knows no dequantisation"):
        get_peft_model(model, TinyLoraConfig())


@pytest.mark.parametrize("layer", ["Linear4bit", "Linear8bitLt"])
def test_a_layer_that_is_not_quantised_yet_is_refused(make_model, layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_model()
    model.model.layers[1].self_attn.o_proj = getattr(bitsandbytes.nn, layer)(32, 32, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj: this Linear.* not quantised yet"):
        get_peft_model(model, TinyLoraConfig())


def test_a_weight_repacked_for_inference_is_refused(make):
    model = make("nf4")
    # As a CPU with AVX512-BF16 leaves it after the first forward pass in evaluation mode.
    model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"up_proj: bitsandbytes has repacked its weight.*before the model's first"):
        get_peft_model(model, TinyLoraConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass_before_and_after_changes_no_factor(make, kind):
    untouched, used = make(kind), make(kind)
    with torch.no_grad():
        loss_of(used)
    used.train()
    loss_of(used)
    models = [get_peft_model(model, TinyLoraConfig()) for model in (untouched, used)]
    for first, second in zip(*map(layers_of, models), strict=True):
        assert all(map(torch.equal, first.factors((2, None)), second.factors((2, None))))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_rank_is_compared_with_is_the_shape_behind_the_packed_weight(make, kind):
    # (16, 32), packed into (256, 1) by bitsandbytes' 4 bits.
    with pytest.raises(ValueError, match=r"r=17 exceeds the rank 16 that \S*k_proj of shape \(16, 32\)"):
        get_peft_model(make(kind), TinyLoraConfig(r=17, target_modules=["k_proj"]))
    assert TinyLoraConfig.for_budget(make(kind), 13, exact=True).u == 13


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_before_anything_is_changed(make, kind, merge):
    # Of the two modules the first one is not quantised.
    base = make(kind)
    base.model.layers[0].self_attn.o_proj = nn.Linear(32, 32, bias=False)
    model = get_peft_model(base, TinyLoraConfig(target_modules=["o_proj"]))
    set_values(model)
    before = loss_of(model.eval()).detach()
    with pytest.raises(NotImplementedError, match=r"layers.1.self_attn.o_proj is quantised.*export_lora.*dequantize"):
        getattr(model, merge)()
    assert not any(layer.merged for layer in layers_of(model)) and len(layers_of(model)) == 2
    assert torch.equal(loss_of(model), before)
    with pytest.raises(NotImplementedError, match="AdapterRollout"):
        layers_of(model)[1].merge()


@pytest.mark.parametrize("kind", KINDS)
def test_unloading_gives_the_quantised_model_back(make, kind):
    base = make(kind).eval()
    before = loss_of(base).detach()
    model = get_peft_model(base, TinyLoraConfig())
    set_values(model)
    assert loss_of(model.eval()) != before
    assert torch.equal(loss_of(model.unload()), before)
    assert layers_of(base) == [] and type(base.model.layers[0].mlp.up_proj.weight).__name__ != "Parameter"


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_an_adapter_merges_into_the_dequantised_model(make, tmp_path, kind):
    model = get_peft_model(make(kind), TinyLoraConfig())
    set_values(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = loss_of(model.train())
    merged = PeftModel.from_pretrained(make(kind).dequantize(), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(loss_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert {type(module) for module in merged.modules() if isinstance(module, nn.Linear)} == {nn.Linear}


def test_a_quantised_conv1d_is_adapted(tiny_gpt2, tmp_path):
    tiny_gpt2(n_embd=64).save_pretrained(tmp_path)
    base = type(tiny_gpt2()).from_pretrained(tmp_path, quantization_config=quantisation("nf4"))
    plain = type(tiny_gpt2()).from_pretrained(tmp_path)
    model, reference = (get_peft_model(one, TinyLoraConfig()) for one in (base, plain))
    shapes = [[f.shape for f in layer.factors((2, None))] for layer in (*layers_of(model), *layers_of(reference))]
    assert shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :] and len(shapes) == 16
    loss_of(model.train()).backward()
    assert values_of(model).grad.abs().max() > 0


def test_adapters_share_factors_and_switch_on_a_quantised_base(make):
    model = get_peft_model(make("nf4"), TinyLoraConfig())
    model.add_adapter("second", TinyLoraConfig())
    set_values(model, "second", seed=1)
    assert all(len(layer._factors) == 1 for layer in layers_of(model))
    losses = [loss_of(model.eval()).item()]
    model.set_adapter("second")
    losses.append(loss_of(model).item())
    with model.disable_adapter():
        assert loss_of(model).item() == losses[0] != losses[1]


def test_importing_the_package_imports_no_quantisation_library():
    code = "import trl_tinylora, sys; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain = subprocess.run(
        [sys.executable, "-c", code.replace("trl_tinylora", "peft, trl")], capture_output=True, text=True, check=True
    )
    assert not {"bitsandbytes", "torchao"} & (set(result.stdout.split()) - set(plain.stdout.split()))


# What is refused, by name and with the way out


def refused(model, names, words):
    before = [type(module) for module in model.modules()]
    for target_modules in (["o_proj"], "all-linear"):
        with pytest.raises(ValueError, match=f"o_proj, a {names}; TinyLoRA adapts .*{words}"):
            get_peft_model(model, TinyLoraConfig(target_modules=target_modules))
        assert [type(module) for module in model.modules()] == before


def test_float8_layers_are_refused_with_what_loads_them_dequantised(make_model):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = make_model()
    model.model.layers[1].self_attn.o_proj = FP8Linear(32, 32, block_size=(128, 128))
    refused(model, r"transformers\.\S*finegrained_fp8\.FP8Linear", r"FineGrainedFP8Config\(dequantize=True\)")


def test_a_float8_checkpoint_that_transformers_dequantises_is_a_base_as_any(base_folder, tmp_path):
    base = load_float8(base_folder, tmp_path / "float8")
    model = get_peft_model(base, TinyLoraConfig())
    set_values(model)
    loss_of(model.train()).backward()
    assert values_of(model).grad.abs().min() > 0
    model.merge_and_unload()


def test_compressed_tensors_are_refused_by_name(make_model):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    model = make_model()
    config = quantization.QuantizationConfig(config_groups={"W8A16": ["re:.*layers.1.*o_proj"]})
    quantization.apply_quantization_config(model, config)
    refused(model, "compressed_tensors torch.*Linear", r"CompressedTensorsConfig\(dequantize=True\)")
    # Packed, they have no weight.
    del model.model.layers[1].self_attn.o_proj.weight
    refused(model, "compressed_tensors torch.*Linear", r"CompressedTensorsConfig\(dequantize=True\)")


def test_hqq_is_refused_by_name(make_model):
    hqq = pytest.importorskip("hqq.core.quantize")
    model = make_model()
    layer = nn.Linear(64, 64, bias=False)
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    layer = hqq.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
    model.model.layers[1].self_attn.o_proj = layer
    refused(model, r"hqq\.core\.quantize\.HQQLinear", "docs/bases.md")


@pytest.mark.parametrize("library", FOREIGN.values())
def test_layers_of_other_libraries_are_refused_by_name(make_model, library):
    model = make_model()
    model.model.layers[1].self_attn.o_proj = foreign_layer(library)
    refused(model, rf"{library}\.QuantLinear", "docs/bases.md")
    # Left out by name, the others are adapted.
    assert len(layers_of(get_peft_model(model, TinyLoraConfig(exclude_modules=["o_proj"])))) == 12
