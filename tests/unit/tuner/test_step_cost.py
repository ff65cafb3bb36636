"""
What an adapter adds to a training step, in operations, tensors and bytes, never in seconds; and that what saves them
changes no result. CPU, seconds.
"""

import copy
import shutil

import peft
import pytest
import torch
import trl_tinylora.tuner.steps
from peft import get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from trl_tinylora.tuner.steps import HiddenStep, InputStep

from trl_tinylora import TinyLoraConfig
from trl_tinylora.maths.decomposition import mix
from trl_tinylora.tuner.bank import TinyLoraBank, Vectors
from trl_tinylora.tuner.layer import Linear


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, TOKENS = 2, 18
CONFIGS = {
    "ours": lambda: TinyLoraConfig(r=RANK, target_modules=TARGETS),
    "PEFT's": lambda: peft.TinyLoraConfig(r=RANK, u=1, weight_tying=0.0, target_modules=TARGETS),
    "LoRA": lambda: peft.LoraConfig(r=1, target_modules=TARGETS),
}


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Modules as small as they are, and the same taken for large ones."""
    monkeypatch.setattr(trl_tinylora.tuner.steps, "LARGE", {"small": 10**9, "large": 1}[request.param])
    return request.param


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(trl_tinylora.tuner.steps, "LARGE", 1)


def adapted(base, kind="ours"):
    """An adapted model in training mode, with drawn values."""
    torch.manual_seed(3)
    model = get_peft_model(base, CONFIGS[kind]()).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def frozen(base):
    return base.requires_grad_(False).train()


def vectors_of(model):
    return model.base_model.bank.vectors("default")


def make_inputs(model, dtype=torch.float32):
    width = model.get_input_embeddings().weight.shape[1]
    drawn = torch.randn(2, TOKENS // 2, width, generator=torch.Generator().manual_seed(1))
    return drawn.to(dtype).requires_grad_()


def step(model, inputs):
    """Forward and backward pass, the backward down to the inputs."""
    model(inputs_embeds=inputs).logits.float().square().mean().backward()


class Operations(TorchDispatchMode):
    """All operations that compute a tensor: what they are, their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.seen.append((func, args, result))
        return result


def operations_of(model):
    inputs = make_inputs(model, model.dtype)
    step(model, inputs)
    with Operations() as operations:
        step(model, inputs)
    return operations.seen


# Operations


def uses_of_projections(model):
    storage = vectors_of(model).plan.projections_MKRR.untyped_storage().data_ptr()
    return sum(
        any(isinstance(arg, torch.Tensor) and arg.untyped_storage().data_ptr() == storage for arg in flat(args))
        for _, args, _ in operations_of(model)
    )


def flat(args):
    return [part for arg in args for part in (arg if isinstance(arg, (list, tuple)) else [arg])]


def test_one_product_makes_every_mixing_matrix_and_one_gathers_its_gradient(tiny_qwen2, monkeypatch):
    few, many = (adapted(tiny_qwen2(num_hidden_layers=layers)) for layers in (1, 4))

    assert uses_of_projections(few) == uses_of_projections(many) == 2

    # Negative control: where each layer makes its own, the count grows with them.
    monkeypatch.setattr(Vectors, "current_mixing", Vectors.mixing)
    assert uses_of_projections(many) >= 2 + 4 * 7


def test_making_and_gathering_take_as_many_operations_for_any_number_of_modules(tiny_qwen2):
    counts = []
    for layers in (1, 4):
        model = adapted(tiny_qwen2(num_hidden_layers=layers))
        vectors = vectors_of(model)
        step(model, make_inputs(model))
        vectors.grad_MRR = torch.zeros_like(vectors.mixing_MRR)
        with Operations() as operations:
            vectors.refresh()
            vectors.collect()
        counts.append(len(operations.seen))

    assert counts[0] == counts[1] <= 8


def operations_per_module(make, kind):
    added = [
        len(operations_of(adapted(make(num_hidden_layers=n), kind)))
        - len(operations_of(frozen(make(num_hidden_layers=n))))
        for n in (1, 3)
    ]
    return (added[1] - added[0]) / (2 * len(TARGETS))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_operations_per_module_stay_few(tiny_model, size, kind):
    def make(**sizes):
        return tiny_model(kind, **sizes)

    ours = operations_per_module(make, "ours")

    # Products with V and R, and the sum; on the way back with U S, R and V, a sum of gradients (or a copy of U S);
    # the gradient of R, and its sum into the buffer.
    assert ours <= 9
    assert ours < operations_per_module(make, "LoRA")
    assert ours < operations_per_module(make, "PEFT's")


def in_place_flops(total, first, second, out_shape=None, **kwargs):
    return 2 * first[0] * first[1] * second[1]


def count_flops(action):
    # What the counter does not know of itself.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flops}) as counter:
        action()
    return counter.get_total_flops()


def cost_of_adapters(model, size):
    """What the formulas take forward and backward: a multiplication and an addition each."""
    shapes = [module.base_layer.weight.shape for module in model.modules() if isinstance(module, Linear)]
    if size == "small":
        forward = sum(RANK * (n_out + n_in) + RANK**2 for n_out, n_in in shapes)
        backward = forward
    else:
        forward = sum(RANK * (n_in + min(n_in, n_out)) + RANK**2 for n_out, n_in in shapes)
        backward = sum(RANK * 2 * n_in + RANK**2 for n_out, n_in in shapes)
    of_gradient = RANK**2 * len(shapes)
    return 2 * TOKENS * forward, 2 * TOKENS * (backward + of_gradient)


# What makes R and gathers its gradient is an element-wise sum or a product of no size, whichever einsum takes.
OF_MIXING = 2 * 14 * RANK**2


def test_the_arithmetic_is_the_formulas_and_no_more(tiny_qwen2, size):
    model, base = adapted(tiny_qwen2()), frozen(tiny_qwen2())
    inputs = make_inputs(model)
    forward, backward = cost_of_adapters(model, size)

    passes = [count_flops(lambda called=called: called(inputs_embeds=inputs)) for called in (model, base)]
    steps = [count_flops(lambda called=called: step(called, inputs)) for called in (model, base)]

    assert 0 <= passes[0] - passes[1] - forward <= OF_MIXING
    assert 0 <= steps[0] - steps[1] - forward - backward <= 2 * OF_MIXING


def test_a_checkpoint_recomputes_no_product_that_the_frozen_base_does_not(tiny_qwen2, size):
    counted = {}
    for kind in ("base", "ours", "PEFT's"):
        model = frozen(tiny_qwen2()) if kind == "base" else adapted(tiny_qwen2(), kind)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inputs = make_inputs(model)
        counted[kind] = count_flops(lambda model=model, inputs=inputs: step(model, inputs))
    forward, backward = cost_of_adapters(adapted(tiny_qwen2()), size)

    assert counted["ours"] - counted["base"] <= 2 * forward + backward + 2 * OF_MIXING
    # Control: what is kept behind the last product makes the recomputation go through it.
    assert counted["PEFT's"] - counted["base"] > 2 * 2 * TOKENS * 32 * 48


def wide_tensors(model):
    """How many new tensors as large as a module's input or output a step makes."""
    return sum(
        result.numel() >= TOKENS * 16
        and not func._schema.name.endswith("_")
        and TOKENS in (result.shape[0], result[..., 0].numel())
        for func, _, result in operations_of(model)
    )


def test_a_large_module_gets_no_further_tensor_of_its_width_but_a_narrow_input(tiny_llama, large, monkeypatch):
    def added(dtype):
        return wide_tensors(adapted(tiny_llama().to(dtype))) - wide_tensors(frozen(tiny_llama().to(dtype)))

    # One is the sink's. In float32 the update is put into the input, where that is no wider than the output.
    narrow = sum(
        module.in_features <= module.out_features
        for name, module in tiny_llama().named_modules()
        if name.rpartition(".")[2] in TARGETS
    )
    assert added(torch.bfloat16) <= 1
    assert added(torch.float32) <= 1 + narrow < 1 + 14

    # Negative control: in small ones the gradient of each input is a tensor of its own.
    monkeypatch.setattr(trl_tinylora.tuner.steps, "LARGE", 10**9)
    assert added(torch.float32) >= 14


# Bytes


def kept_bytes(model, dtype):
    """Bytes that autograd keeps for the backward pass, each storage once, without what the model itself holds."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, Linear):
            own |= {factor.untyped_storage().data_ptr() for factor in module.factors(RANK)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result holds the graph, and the graph every storage that was counted.
        output = model(inputs_embeds=make_inputs(model, dtype))
    del output
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_kept_but_r_numbers_a_token_and_module(tiny_qwen2, size, dtype, monkeypatch):
    base = kept_bytes(frozen(tiny_qwen2().to(dtype)), dtype)
    added = {kind: kept_bytes(adapted(tiny_qwen2().to(dtype), kind), dtype) - base for kind in CONFIGS}
    rank_r = 14 * TOKENS * RANK * dtype.itemsize

    assert added["ours"] == rank_r
    assert added["ours"] <= added["PEFT's"]
    # LoRA keeps every module's input, of 32 numbers or more.
    assert added["LoRA"] > 5 * added["ours"]

    # Negative control: an input that is kept is seen.
    function = HiddenStep if size == "small" else InputStep
    forward = function.forward

    def keep_input(ctx, x, *args):
        result = forward(ctx, x, *args)
        ctx.save_for_backward(*ctx.to_save, x)
        return result

    monkeypatch.setattr(function, "forward", staticmethod(keep_input))
    assert kept_bytes(adapted(tiny_qwen2().to(dtype)), dtype) - base > 5 * rank_r


# Results


def expected_gradients(plain, model, inputs):
    """Plain autograd in float64 through `W + U S R V^T`: the gradients of the values and of the inputs."""
    vectors = vectors_of(model)
    values = vectors.values_GK.detach().clone().requires_grad_()
    mixing_MRR = mix(values, vectors.plan.groups_M, vectors.plan.projections_MKRR.to(values.dtype))
    weights = dict(plain.named_parameters())
    for module in model.modules():
        if isinstance(module, Linear):
            left_OR, right_RI = module.factors(RANK)
            delta = left_OR @ mixing_MRR[vectors.plan.index[module.name]] @ right_RI
            weights[f"{module.name}.weight"] = module.base_layer.weight.detach() + delta
    own = inputs.detach().clone().requires_grad_()
    loss = functional_call(plain, weights, (), {"inputs_embeds": own}).logits.float().square().mean()
    return torch.autograd.grad(loss, (values, own))


@pytest.mark.parametrize("mode", ["no checkpointing", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_both_ways_give_the_gradients_of_plain_autograd(tiny_model, size, kind, mode):
    model = adapted(tiny_model(kind).double()).double()
    if mode != "no checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
    inputs = make_inputs(model, torch.float64)

    inputs.grad = None
    step(model, inputs)

    expected = expected_gradients(frozen(tiny_model(kind).double()), model, inputs.detach())
    # The loss is float32, which is some 1e-7 of the gradients: of the order of one, and of 1e-3.
    torch.testing.assert_close(vectors_of(model).values_GK.grad, expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(inputs.grad, expected[1], rtol=1e-6, atol=1e-7)
    assert expected[0].abs().min() > 1e-4


def test_what_hooks_have_kept_is_not_overwritten(tiny_llama, large):
    model = adapted(tiny_llama())
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    kept = []
    layer.base_layer.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))

    step(model, make_inputs(model))

    ((output, copied),) = kept
    assert torch.equal(output, copied)


class Remembering(nn.Linear):
    """Returns what it keeps."""

    def forward(self, x):
        self.kept = super().forward(x)
        self.copied = self.kept.detach().clone()
        return self.kept


def test_what_a_layer_of_another_type_returns_is_not_overwritten(tiny_llama, large):
    base = tiny_llama()
    query = base.model.layers[0].self_attn.q_proj
    query.__class__ = Remembering
    model = adapted(base)

    with torch.no_grad():
        model(inputs_embeds=make_inputs(model))

    assert torch.equal(query.kept, query.copied)


def test_the_gradient_that_a_hook_has_kept_is_not_overwritten(tiny_llama, large):
    model = adapted(tiny_llama())
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    kept = []

    def keep(module, args):
        args[0].register_hook(lambda grad: kept.append((grad, grad.clone())) and None)

    layer.base_layer.register_forward_pre_hook(keep)

    step(model, make_inputs(model))

    ((grad, copied),) = kept
    assert torch.equal(grad, copied)


# torch.compile


class Blocks(nn.Module):
    """Two blocks of two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, 6)) for _ in range(2)]
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x


def compiled_and_eager(backend):
    """Outputs and gradients of a compiled model and of a copy that is not, for two settings of the values."""
    model = get_peft_model(Blocks(), TinyLoraConfig(target_modules=r"layers\.\d\.[02]", u=2)).train()
    called = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(called, backend=backend)
    inputs = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))
    found = []
    for seed in (0, 1):
        for adapted_model, run in ((called, compiled), (model, model)):
            values = vectors_of(adapted_model).values_GK
            with torch.no_grad():
                values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))
            values.grad = None
            own = inputs.clone().requires_grad_()
            output = run(own)
            output.square().sum().backward()
            found.append((output.detach(), values.grad, own.grad))
    torch._dynamo.reset()
    return list(zip(found[::2], found[1::2], strict=True))


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_compiled_model_gives_the_same_outputs_and_gradients(size, backend):
    for compiled, eager in compiled_and_eager(backend):
        for ours, expected in zip(compiled, eager, strict=True):
            # Sums in another order: float32, of the order of one to ten.
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert eager[1].abs().min() > 1e-3


def test_traced_the_side_buffers_gradient_would_be_lost(monkeypatch):
    # Negative control of the above: why the steps are kept out of the graphs.
    for owner, name in ((Linear, "_before_base"), (Linear, "_after_base"), (TinyLoraBank, "before_first_block")):
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)

    ((compiled, eager), _) = compiled_and_eager("eager")

    assert not torch.allclose(compiled[1], eager[1], rtol=1e-2, atol=1e-2)
