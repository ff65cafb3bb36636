"""Fused experts: against plain autograd in float64, PEFT's LoRA and the base model. CPU, seconds."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_autograd import checkpointed, set_values, values_of
from tiny import MIXTURE
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from trl_tinylora import TinyLoraConfig, export_gguf, export_lora, sampling_fidelity
from trl_tinylora.maths.decomposition import gaussian_projections
from trl_tinylora.maths.svd import truncated_svd
from trl_tinylora.tuner import experts as experts_module
from trl_tinylora.tuner.experts import Experts, Pairs, grouped_product


pytestmark = pytest.mark.filterwarnings("ignore:2 linear layers have fewer", "ignore:`is_gradient_checkpointing`")

FAMILIES = {"qwen3-moe": Qwen3MoeConfig, "qwen2-moe": Qwen2MoeConfig, "mixtral": MixtralConfig, "gpt-oss": GptOssConfig}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(family="qwen3-moe", dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**MIXTURE | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            # gpt-oss's biases too, which are zero in a new model.
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def adapted(family="qwen3-moe", dtype=torch.float32, **fields):
    model = get_peft_model(mixture(family, dtype), TinyLoraConfig(**{"u": 2, "target_parameters": BOTH, **fields}))
    set_values(model)
    return model.eval()


def expert_matrices(base):
    """Of every expert's matrix its name, its parameter's name, and itself as (out_features, in_features)."""
    for name, module in base.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if name.endswith("experts") and weight.ndim == 3:
                for expert, matrix in enumerate(weight.mT if module.is_transposed else weight):
                    yield f"{name}.{parameter}.{expert}", f"{name}.{parameter}", matrix


def reference(family, model, token_ids):
    """Logits, and the gradient of v of their mean square, by plain autograd through the weights W + U S R V^T."""
    base = mixture(family, torch.float64)
    base.set_experts_implementation("eager")
    weights = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    vectors = model.base_model.bank.vectors("default")
    values_GK = vectors.values_GK.detach().double().requires_grad_()
    config, updates = vectors.config, {}
    transposed = {name for name, module in base.named_modules() if getattr(module, "is_transposed", False)}
    for name, parameter, matrix in expert_matrices(base):
        left_OR, right_RI, _ = truncated_svd(matrix.detach(), config.r)
        group = vectors.plan.groups_M[vectors.plan.index[name]]
        projections_KRR = gaussian_projections(name, config.u, config.r, config.projection_seed).double()
        update_OI = left_OR.double() @ (values_GK[group][:, None, None] * projections_KRR).sum(0) @ right_RI.double()
        is_transposed = parameter.rpartition(".")[0] in transposed
        updates.setdefault(parameter, []).append(update_OI.mT if is_transposed else update_OI)
    for name in vectors.plan.index:
        if f"{name}.weight" in weights:
            left_OR, right_RI = (
                f.double() for f in model.base_model.model.get_submodule(name).factors((config.r, None))
            )
            projections_KRR = gaussian_projections(name, config.u, config.r, config.projection_seed).double()
            mixing_RR = (
                values_GK[vectors.plan.groups_M[vectors.plan.index[name]]][:, None, None] * projections_KRR
            ).sum(0)
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + left_OR @ mixing_RR @ right_RI
    for parameter, of_experts in updates.items():
        weights[parameter] = weights[parameter] + torch.stack(of_experts)
    logits = functional_call(base, weights, (token_ids,)).logits
    (gradient,) = torch.autograd.grad(logits.square().mean(), values_GK)
    return logits.detach(), gradient


def test_each_matrix_of_each_expert_is_a_module_of_its_own():
    model = adapted(n_tie=3)
    plan = model.base_model.bank.vectors("default").plan
    names = [name for name, *_ in expert_matrices(mixture())]
    assert len(names) == 2 * 2 * 4 and [name for name in plan.index if "experts" in name] == names
    # Attention, then its layer's experts.
    assert list(plan.index)[3:6] == ["model.layers.0.self_attn.o_proj", *names[:2]]
    assert plan.shape == (8, 2) and len(plan.index) == 24
    projections = plan.projections_MKRR[[plan.index[name] for name in names]]
    assert len(projections.flatten(1).unique(dim=0)) == len(names)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_zeros_leaves_every_bit_of_the_logits(family, token_ids):
    base = mixture(family)
    with torch.no_grad():
        expected = base(token_ids).logits
        model = get_peft_model(base, TinyLoraConfig(target_parameters=BOTH, target_modules=[]))
        assert torch.equal(model(token_ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
# R is float32 on a base in float64 too.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_logits_and_gradient_are_those_of_plain_autograd(family, dtype, tolerance, token_ids):
    model = adapted(family, dtype)
    # transformers has no grouped product in float64.
    model.get_base_model().set_experts_implementation("eager" if dtype == torch.float64 else "grouped_mm")
    logits, gradient = reference(family, model, token_ids)
    found = model(token_ids).logits
    found.square().mean().backward()
    with torch.no_grad(), model.disable_adapter():
        assert (model(token_ids).logits - found).abs().max() > 0.1
    torch.testing.assert_close(found.double(), logits, rtol=tolerance, atol=tolerance)
    scale = gradient.abs().max()
    torch.testing.assert_close(values_of(model).grad.double() / scale, gradient / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_changes_no_gradient(mode, token_ids):
    gradients = []
    for kind in ("no checkpointing", mode):
        model = checkpointed(adapted(), kind).train()
        model(token_ids).logits.square().mean().backward()
        gradients.append(values_of(model).grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_experts_compute_the_same_and_come_back_bit_for_bit(family, token_ids):
    model = adapted(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(token_ids).logits
        model.merge_adapter()
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n]) and "experts" in n]
        assert len(changed) == 4
        torch.testing.assert_close(model(token_ids).logits, expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        plain = model.merge_and_unload()
        assert not any(isinstance(module, Experts) for module in plain.modules())
        torch.testing.assert_close(plain(token_ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_interrupted_merge_leaves_both_parameters_as_they_were(monkeypatch):
    layer = next(module for module in adapted().modules() if isinstance(module, Experts))
    before = [parameter.clone() for parameter in layer.base_layer.parameters()]
    from trl_tinylora.tuner import adapted_layer

    set_data, calls = adapted_layer.set_local_data, []

    def interrupted(parameter, tensor):
        calls.append(parameter)
        if len(calls) == 2:
            raise KeyboardInterrupt
        set_data(parameter, tensor)

    monkeypatch.setattr(adapted_layer, "set_local_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.merge()
    assert len(calls) == 4 and not layer.merged
    assert all(torch.equal(*pair) for pair in zip(layer.base_layer.parameters(), before, strict=True))


def test_without_the_adapter_the_users_own_implementation_runs(token_ids):
    model, calls = adapted(), []
    original = experts_module.ALL_EXPERTS_FUNCTIONS["batched_mm"]
    try:
        experts_module.ALL_EXPERTS_FUNCTIONS["batched_mm"] = lambda *args: (calls.append(args), original(*args))[1]
        model.get_base_model().set_experts_implementation("batched_mm")
        with torch.no_grad(), model.disable_adapter():
            found = model(token_ids).logits
        assert len(calls) == 2
        model(token_ids)
        assert len(calls) == 2
    finally:
        del experts_module.ALL_EXPERTS_FUNCTIONS["batched_mm"]
    torch.testing.assert_close(found, mixture()(token_ids).logits)
    assert model.get_base_model().config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_gives_the_same_logits_in_every_loader(family, token_ids, tmp_path):
    base, folder = mixture(family), tmp_path / "adapter"
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), TinyLoraConfig(u=2, n_tie=5, target_parameters=BOTH)
    ).eval()
    set_values(model)
    model.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").stat().st_size < 1000
    with torch.no_grad():
        expected = model(token_ids).logits
        assert (expected - base(token_ids).logits).abs().max() > 0.1

    def assert_equal(loaded):
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(token_ids).logits, expected, rtol=1e-5, atol=1e-5)

    assert_equal(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder))
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    try:
        by_transformers.load_adapter(str(folder))
    except TypeError as error:
        assert "distributed_operation" in str(error)
        pytest.skip("this version of transformers loads no adapter of a mixture, LoRA's neither")
    assert_equal(by_transformers)
    assert_equal(AutoModelForCausalLM.from_pretrained(folder))


def test_another_base_is_refused_where_one_expert_alone_differs(tmp_path):
    adapted().save_pretrained(tmp_path)
    other = mixture()
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj[3].mul_(1.2)
    with pytest.raises(ValueError, match=r"the first model\.layers\.1\.mlp\.experts\.down_proj\.3"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[1:]], ids=["both", "down_proj"])
@pytest.mark.filterwarnings('ignore:target_modules="all-linear" leaves out')
def test_the_exported_lora_gives_the_same_logits_in_peft(family, parameters, token_ids, tmp_path):
    model = adapted(family, target_parameters=parameters)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(mixture(family), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(lora(token_ids).logits, model(token_ids).logits, rtol=2e-4, atol=2e-4)


def test_adapters_share_their_experts_factors_and_leave_none_behind(token_ids):
    model = adapted()
    (layer, *_) = [module for module in model.modules() if isinstance(module, Experts)]
    model.add_adapter("other", TinyLoraConfig(target_parameters=BOTH, u=1))
    model.add_adapter("less", TinyLoraConfig(target_parameters=BOTH[:1], target_modules=[], r=1))
    assert len(layer._factors) == 3
    set_values(model, "other", seed=1)
    with torch.no_grad():
        first = model(token_ids).logits
        model.set_adapter("other")
        second = model(token_ids).logits
        model.base_model.set_adapter(["default", "other"])
        both = model(token_ids).logits
    assert min((first - second).abs().max(), (both - first).abs().max()) > 0.01
    model.delete_adapter("less")
    assert len(layer._factors) == 2
    model.delete_adapter("default")
    assert len(layer._factors) == 2
    unloaded = model.unload()
    with torch.no_grad():
        assert torch.equal(unloaded(token_ids).logits, mixture()(token_ids).logits)


def test_budgets_count_experts_without_a_weight_being_read():
    config = mixture().config
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = TinyLoraConfig.for_budget(config, 12, target_parameters=BOTH, exact=True)
    assert (found.u, found.n_tie) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [8, 3])
def test_grouped_products_are_those_of_each_expert_alone(dtype, columns):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0], [1, 0]])
    x = torch.randn(5, 16, generator=generator).to(dtype)
    weight = torch.randn(4, 16, columns, generator=generator).to(dtype)
    pairs = Pairs(chosen, 4)
    assert pairs.sizes == [4, 3, 0, 3]
    inputs = x[pairs.tokens]
    expected = torch.stack([inputs[i] @ weight[expert] for i, expert in enumerate(pairs.experts)])
    torch.testing.assert_close(grouped_product(inputs, weight, pairs), expected)


def test_a_batch_without_a_token_passes(token_ids):
    model = adapted()
    layer = next(module for module in model.modules() if isinstance(module, Experts))
    model(token_ids)
    empty = layer(torch.empty(0, 32), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert empty.shape == (0, 32)


def test_all_linear_says_how_to_adapt_the_experts():
    with pytest.warns(UserWarning, match=r"target_parameters=\['experts.down_proj', 'experts.gate_up_proj'\]"):
        get_peft_model(mixture(), TinyLoraConfig())
    with pytest.warns(UserWarning, match=r"target_parameters=\['experts.down_proj'\]"):
        get_peft_model(mixture(), TinyLoraConfig(target_parameters=BOTH[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(mixture(), TinyLoraConfig(target_parameters=BOTH))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_parameters": ["experts.up_proj"]},
            ValueError,
            r"\['experts.up_proj'\] in target_parameters.*nothing",
        ),
        ({"target_parameters": "experts.down_proj"}, TypeError, "`target_parameters` must be a list of names"),
        ({"target_parameters": [1]}, TypeError, "`target_parameters` must be a list of names"),
        (
            {"target_parameters": ["gate.weight"]},
            ValueError,
            r"matches model.layers.0.mlp.gate.weight, of shape \(4, 32\)",
        ),
        ({"target_parameters": ["q_proj.weight"]}, ValueError, "TinyLoRA adapts the gate_up_proj"),
        ({"r": 17, "target_modules": []}, ValueError, r"r=17 exceeds the rank 16 that an expert of .*down_proj"),
        ({"target_modules": [], "target_parameters": None}, ValueError, "`target_modules` must be"),
        ({"target_modules": None}, ValueError, "`target_modules` must be"),
    ],
)
@pytest.mark.filterwarnings('ignore:target_modules="all-linear" leaves out')
def test_what_are_no_experts_is_refused_before_anything_is_changed(fields, error, message):
    model = mixture()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, TinyLoraConfig(**{"target_parameters": BOTH, **fields}))
    assert [name for name, _ in model.named_modules()] == before


def test_quantised_experts_are_refused():
    model = mixture()
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    model.model.layers[0].mlp.experts.down_proj.data = model.model.layers[0].mlp.experts.down_proj.data.to(
        torch.float8_e4m3fn
    )
    with pytest.raises(ValueError, match=r"the experts .*down_proj are a Parameter of torch.float8_e4m3fn"):
        get_peft_model(model, TinyLoraConfig(target_parameters=BOTH))


def test_what_is_not_known_of_experts_is_refused(token_ids, tmp_path):
    model = adapted()
    with pytest.raises(NotImplementedError, match="'default' adapts fused experts"):
        model(token_ids, adapter_names=["default", "__base__"])
    with pytest.raises(NotImplementedError, match="fused experts"):
        sampling_fidelity(model)
    pytest.importorskip("gguf")
    with pytest.raises(NotImplementedError):
        export_gguf(model, tmp_path / "adapter.gguf")


def test_peak_memory_holds_no_copy_of_the_experts(token_ids):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        """The largest floating-point tensor with storage of its own that any operation makes."""

        def __init__(self, parameters):
            super().__init__()
            self.known, self.elements = {p.untyped_storage().data_ptr() for p in parameters}, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                    self.elements = max(self.elements, tensor.numel())
            return result

    def largest(model):
        experts = [p for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
        with Largest(model.parameters()) as seen:
            model(token_ids[:1, :2]).logits.square().mean().backward()
        return seen.elements, min(p.numel() for p in experts)

    one, whole = largest(adapted())
    assert one < whole
    lora = get_peft_model(mixture(), LoraConfig(r=1, target_parameters=BOTH, lora_dropout=0.0))
    other, whole = largest(lora)
    # The control: PEFT's LoRA adds its update to all experts.
    assert other >= whole
