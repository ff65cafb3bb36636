"""What PEFT's users and its own helpers expect of a tuner, beside training, saving and merging. CPU, seconds."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trl_tinylora import TinyLoraConfig


def values_of(model, name="default"):
    return model.base_model.bank.vectors(name).values_GK


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("init_weights", [False, "uniform"])
def test_values_are_drawn_within_the_bound_where_asked_for(tiny_qwen2, token_ids, init_weights):
    config = {"u": 200, "r": 16, "n_tie": 2, "init_weights": init_weights, "init_v_bound": 0.05}
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig(**config))
    values = values_of(model)
    assert values.abs().max() <= 0.05 and values.abs().max() > 0.045
    torch.testing.assert_close(values.std().item(), 0.05 / 3**0.5, rtol=0.05, atol=0)
    assert (logits_of(model, token_ids) - logits_of(tiny_qwen2(), token_ids)).abs().max() > 1e-3
    # The same in every process, whatever its random state.
    torch.manual_seed(7)
    assert torch.equal(values_of(get_peft_model(tiny_qwen2(), TinyLoraConfig(**config))), values)
    other = get_peft_model(tiny_qwen2(), TinyLoraConfig(**config, projection_seed=1))
    assert not torch.equal(values_of(other), values)


def test_drawn_values_are_replaced_by_those_that_are_loaded(tiny_qwen2, tmp_path, token_ids):
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig(init_weights=False))
    with torch.no_grad():
        values_of(model).fill_(0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_qwen2(), tmp_path)
    assert torch.equal(logits_of(loaded, token_ids), logits_of(model, token_ids))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_is_as_frozen_after_disabling_as_before(tiny_qwen2, tmp_path, is_trainable):
    get_peft_model(tiny_qwen2(), TinyLoraConfig()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_qwen2(), tmp_path, is_trainable=is_trainable)
    with model.disable_adapter():
        assert not values_of(model).requires_grad
    assert values_of(model).requires_grad == is_trainable


def test_turning_input_casting_off_changes_nothing(tiny_qwen2, token_ids):
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig(init_weights=False))
    expected = logits_of(model, token_ids)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits_of(model, token_ids), expected)
    assert torch.equal(logits_of(model, token_ids), expected)


def test_an_active_adapter_that_is_not_merged_stays_in_effect(tiny_qwen2, token_ids):
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig(init_weights=False), adapter_name="a")
    model.add_adapter("b", TinyLoraConfig(init_weights=False, projection_seed=1, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["a", "b"])
    with torch.no_grad():
        values_of(model, "a").mul_(20)
        values_of(model, "b").mul_(20)
    expected = logits_of(model, token_ids)
    model.base_model.set_adapter("a")
    assert (logits_of(model, token_ids) - expected).abs().max() > 1e-3
    model.base_model.set_adapter(["a", "b"])

    model.merge_adapter(["a"])

    torch.testing.assert_close(logits_of(model, token_ids), expected, rtol=0, atol=2e-5)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model, token_ids), expected)


class Keyword(nn.Module):
    """Takes its hidden states by a keyword of its own, and something else beside them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, *, X, mask=None, scale=None):
        return self.linear(X)


def test_hidden_states_are_found_under_any_keyword():
    torch.manual_seed(0)
    model = get_peft_model(Keyword(), TinyLoraConfig(target_modules=["linear"], init_weights=False, init_v_bound=1.0))
    x, mask = torch.randn(3, 4), torch.ones(3, dtype=torch.bool)
    model(X=x, mask=mask).sum().backward()
    assert values_of(model).grad.abs().min() > 0
    with model.disable_adapter():
        base = model(X=x, mask=mask)
    assert (model(X=x, mask=mask) - base).abs().max() > 1e-3


def test_several_tensors_that_could_be_a_blocks_hidden_states_are_named():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Keyword()])

        def forward(self, **inputs):
            return self.blocks[0](**inputs)

    model = get_peft_model(Blocks(), TinyLoraConfig(target_modules=["linear"]))
    with pytest.raises(RuntimeError, match=r"\['X', 'scale'\] are floating-point tensors, where one was expected"):
        model(X=torch.randn(3, 4), scale=torch.ones(4))


def test_a_model_without_blocks_may_be_called_with_several():
    model = get_peft_model(Keyword(), TinyLoraConfig(target_modules=["linear"], init_weights=False))
    model(X=torch.randn(3, 4), scale=torch.ones(4)).sum().backward()
    assert values_of(model).grad.abs().min() > 0


def test_the_base_of_an_adapter_trained_on_a_merged_model_is_asked_for(tiny_qwen2, tmp_path):
    from peft import LoraConfig

    lora = get_peft_model(tiny_qwen2(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    get_peft_model(lora.merge_and_unload(), TinyLoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another adapter had been merged into it, save the merged model"):
        PeftModel.from_pretrained(tiny_qwen2(), tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_adapted_layers_have_the_sizes_of_linear_ones(tiny_model, kind):
    targets = {"qwen2": ["up_proj"], "gpt2": ["c_fc"]}[kind]
    model = get_peft_model(tiny_model(kind), TinyLoraConfig(target_modules=targets))
    layer = next(module for name, module in model.named_modules() if name.endswith(targets[0]))
    assert (layer.in_features, layer.out_features) == {"qwen2": (32, 48), "gpt2": (32, 128)}[kind]


def test_every_attribute_of_every_adapter_layer_can_be_read(tiny_qwen2):
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig())
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert model.base_model.bank in layers
    for layer in layers:
        for name in dir(layer):
            getattr(layer, name, None)


def test_an_adapter_is_loaded_beside_another_on_another_base(tiny_qwen2, tmp_path, token_ids):
    trained = get_peft_model(tiny_qwen2(), TinyLoraConfig())
    saved = torch.linspace(-0.1, 0.1, 14).view(14, 1)
    values_of(trained).data.copy_(saved)
    trained.save_pretrained(tmp_path)
    torch.manual_seed(7)
    base = tiny_qwen2()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = get_peft_model(base, TinyLoraConfig()).eval()
    with pytest.raises(ValueError, match="this is not the base model.*other_base=True"):
        model.load_adapter(tmp_path, "refused")

    # PEFT's `load_adapter` passes nothing but the Hub's arguments on to a configuration.
    with pytest.warns(UserWarning, match="'other' is used on another base than its own"):
        model.add_adapter("other", TinyLoraConfig.from_pretrained(tmp_path, other_base=True))
    model.load_adapter(tmp_path, "other")

    assert torch.equal(values_of(model, "other"), saved)
    before = logits_of(model, token_ids)
    model.set_adapter("other")
    assert (logits_of(model, token_ids) - before).abs().max() > 1e-4
