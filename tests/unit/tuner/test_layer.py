"""
On either side of the base layer, and with a backward pass of its own, an update gives the same outputs and gradients:
those of plain autograd in float64 through `W + U S R V^T`. CPU, seconds.
"""

import pytest
import torch
import trl_tinylora.tuner.steps
from peft import get_peft_model
from tiny import layers_of
from torch import nn
from torch.func import functional_call
from trl_tinylora.tuner.sides import Place, Side, side_of

from trl_tinylora import TinyLoraConfig
from trl_tinylora.maths.decomposition import mix


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IN, WIDE = 6, 11


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """The modules are small, and taken for large ones."""
    monkeypatch.setattr(trl_tinylora.tuner.steps, "LARGE", 1)


class Blocks(nn.Module):
    """Two blocks of a layer that widens and one that narrows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(IN, WIDE), nn.Tanh(), nn.Linear(WIDE, IN, bias=False)) for _ in range(2)]
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def adapted(dtype=torch.float32, names=("default",)):
    """A model with adapters of drawn values, all of them active."""
    config = TinyLoraConfig(target_modules=r"layers\.\d\.[02]", u=2)
    model = get_peft_model(Blocks().to(dtype), config, adapter_name=names[0]).train()
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            values = model.base_model.bank.vectors(name).values_GK
            values.copy_(torch.randn(values.shape, generator=generator))
    return model


def make_inputs(dtype=torch.float32):
    return torch.randn(3, 4, IN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def found(model, inputs):
    """Output, gradient of each adapter's values, and of the inputs."""
    values = [model.base_model.bank.vectors(name).values_GK for name in model.base_model.bank.active_adapters]
    for value in values:
        value.grad = None
    inputs.grad = None
    output = model(inputs)
    output.float().square().sum().backward()
    return [output.detach(), *(value.grad for value in values), inputs.grad]


def expected(model, inputs):
    """The same in float64, by plain autograd."""
    names = model.base_model.bank.active_adapters
    values = {name: model.base_model.bank.vectors(name).values_GK.detach().double().requires_grad_() for name in names}
    own = inputs.detach().double().requires_grad_()
    plain = Blocks().double()
    weights = dict(plain.named_parameters())
    for module in layers_of(model):
        weights[f"{module.name}.weight"] = module.base_layer.weight.detach().double()
        if module.base_layer.bias is not None:
            weights[f"{module.name}.bias"] = module.base_layer.bias.detach().double()
        for name in names:
            plan = model.base_model.bank.vectors(name).plan
            left_OR, right_RI = (factor.double() for factor in module.factors_of(plan))
            mixing_MRR = mix(values[name], plan.groups_M, plan.projections_MKRR.double())
            delta = left_OR @ mixing_MRR[plan.index[module.name]] @ right_RI
            weights[f"{module.name}.weight"] = weights[f"{module.name}.weight"] + delta
    output = functional_call(plain, weights, (own,))
    output.square().sum().backward()
    return [output.detach(), *(value.grad for value in values.values()), own.grad]


def assert_close(ours, theirs, tolerance):
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("names", [["default"], ["default", "second", "third"]], ids=["one", "three"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_outputs_and_gradients_are_those_of_plain_autograd(dtype, names):
    model, inputs = adapted(dtype, names), make_inputs(dtype)

    assert_close(found(model, inputs), expected(model, inputs), TOLERANCES[dtype])


def test_without_a_graph_the_outputs_are_the_same_to_the_last_bit():
    model, inputs = adapted(), make_inputs()

    with torch.no_grad():
        without = model(inputs)

    assert torch.equal(without, model(inputs))


def stored_factors(model):
    """Factors of another weight, as a checkpoint may bring them."""
    return {module.name: (1.25 * module.factors(2)[0], module.factors(2)[1]) for module in layers_of(model)}


def with_stored_factors():
    model = adapted()
    plan = model.base_model.bank.vectors("default").plan
    model.base_model.bank.change_plan("default", plan.with_own_factors(stored_factors(model)))
    return model


def test_factors_of_another_weight_get_the_gradient_through_themselves(monkeypatch):
    model, inputs = with_stored_factors(), make_inputs()

    assert_close(found(model, inputs), expected(model, inputs), 2e-6)

    # Negative control: through the base layer it would be another one.
    monkeypatch.setattr(Place, "goes_through", lambda place, weight: True)
    ours, theirs = found(model, inputs)[1], expected(model, inputs)[1]
    assert (ours - theirs).norm() > 0.1 * theirs.norm()


def test_factors_that_come_after_a_pass_are_used_by_the_next_one():
    model, inputs = adapted(), make_inputs()
    found(model, inputs)
    plan = model.base_model.bank.vectors("default").plan

    model.base_model.bank.change_plan("default", plan.with_own_factors(stored_factors(model)))

    assert_close(found(model, inputs), expected(model, inputs), 2e-6)


def test_a_trained_base_weight_gets_the_gradient_through_the_factors():
    model, inputs = adapted(), make_inputs()
    found(model, inputs)

    with torch.no_grad():
        for module in layers_of(model):
            module.base_layer.weight.requires_grad_().mul_(1.25)

    assert_close(found(model, inputs), expected(model, inputs), 2e-6)


def test_a_deleted_adapter_leaves_nothing_behind_in_the_layers():
    model, inputs = adapted(names=["default", "second"]), make_inputs()
    found(model, inputs)

    model.delete_adapter("second")

    assert model.base_model.bank.active_adapters == ["default"]
    assert_close(found(model, inputs), expected(model, inputs), 2e-6)


def test_another_dtype_after_a_pass_is_used_by_the_next_one():
    model = adapted()
    found(model, make_inputs())

    model.double()

    inputs = make_inputs(torch.float64)
    assert_close(found(model, inputs), expected(model, inputs), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "of_weight", "n_out", "side"),
    [
        (torch.float32, torch.float32, IN, Side.INPUT),
        (torch.float32, torch.float32, WIDE, Side.INPUT),
        (torch.float32, torch.float32, IN - 1, Side.OUTPUT),
        (torch.bfloat16, torch.bfloat16, WIDE, Side.OUTPUT),
        (torch.float16, torch.float16, WIDE, Side.OUTPUT),
        # A quantised weight is computed with in whatever dtype its library takes.
        (torch.float32, torch.uint8, WIDE, Side.OUTPUT),
        (torch.float64, torch.float64, WIDE, Side.OUTPUT),
    ],
)
def test_the_update_is_put_into_narrow_float32_inputs_alone(dtype, of_weight, n_out, side):
    assert side_of(torch.zeros(2, IN, dtype=dtype), of_weight, n_out) is side


def test_under_autocast_the_update_is_added_to_the_output():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert side_of(torch.zeros(2, IN), torch.float32, WIDE) is Side.OUTPUT


def test_on_the_input_16_bits_would_lose_more_of_a_small_update():
    # Why the input is for float32 alone: singular values of which the first stand out, and a small R.
    torch.manual_seed(0)
    left_OR, right_RI = torch.linalg.qr(torch.randn(256, 2))[0] * 4, torch.linalg.qr(torch.randn(64, 2))[0].T
    weight = (torch.randn(256, 64) / 32 + left_OR @ right_RI).bfloat16()
    left_OR, right_RI = (factor.bfloat16() for factor in (left_OR, right_RI))
    x, mixing_RR = torch.randn(128, 64).bfloat16(), 3e-3 * torch.randn(2, 2)
    update = (x.float() @ right_RI.float().mT @ mixing_RR.mT @ left_OR.float().mT).double()
    result = x @ weight.mT
    mixed = (x.float() @ right_RI.float().mT @ mixing_RR.mT).bfloat16()

    on_output = torch.addmm(result, mixed, left_OR.mT)
    on_input = torch.addmm(x, mixed, right_RI) @ weight.mT

    def share(of):
        return ((of.double() - result.double()) * update).sum() / update.square().sum()

    assert share(on_output) > 0.8
    assert share(on_input) < 0.6 * share(on_output)
