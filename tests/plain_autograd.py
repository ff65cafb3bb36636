"""What an adapted model should give: plain autograd in float64 through `W + U S R V^T`, no sink, buffer or hook."""

import torch
from tiny import layers_of
from torch import nn
from torch.func import functional_call

from trl_tinylora.maths.decomposition import mix


IN, WIDE = 6, 11


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


def values_of(model, adapter="default"):
    """An adapter's trained values."""
    return model.base_model.bank.vectors(adapter).values_GK


def set_values(model, adapter="default", seed=0):
    """Draws an adapter's values, of the order of one half."""
    values = values_of(model, adapter)
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        values.copy_(0.5 * drawn)


def checkpointed(model, mode):
    """The model with gradient checkpointing of a kind, or without."""
    if mode != "no checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()
    return model


def with_adapted_weights(plain, model):
    """
    A plain model with the weights of an adapted one and the updates of its active adapters, in float64.

    Returns it as something to call with keywords, and the leaves of its graph: for each active adapter its values, and
    the base model's parameters by name.
    """
    bank = model.base_model.bank
    # What a quantised layer computes with in the place of its packed weight.
    base = {f"{layer.name}.weight": layer.unmerged_weight().double().requires_grad_() for layer in layers_of(model)}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "trl_tinylora_" not in name and name not in base:
            base[name] = parameter.detach().double().requires_grad_()
    values = [values_of(model, name).detach().double().requires_grad_() for name in bank.active_adapters]
    weights = dict(base)
    for name, values_GK in zip(bank.active_adapters, values, strict=True):
        plan = bank.vectors(name).plan
        mixing_MRR = mix(values_GK, plan.groups_M, plan.projections_MKRR.double())
        for layer in layers_of(model):
            if layer.name in plan.index:
                left_OR, right_RI = (factor.double() for factor in layer.factors_of(plan))
                update_OI = left_OR @ mixing_MRR[plan.index[layer.name]] @ right_RI
                weights[f"{layer.name}.weight"] = weights[f"{layer.name}.weight"] + update_OI
    return lambda **inputs: functional_call(plain.double(), weights, (), inputs), values, base


def expected_gradients(plain, model, run, inputs=()):
    """The gradients of `run(model)` with regard to each active adapter's values, and to inputs."""
    called, values, _ = with_adapted_weights(plain, model)
    return torch.autograd.grad(run(called), [*values, *inputs])
