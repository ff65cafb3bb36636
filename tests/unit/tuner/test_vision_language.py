"""Vision-language models: "all-linear" is the language model's blocks. Tiny ones of five families; CPU, seconds."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from plain_autograd import expected_gradients, set_values, values_of
from vision_language import FAMILIES, build, with_image

from trl_tinylora import TinyLoraConfig


families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_all_linear_is_the_language_models_blocks_and_says_what_it_leaves_out(family):
    with pytest.warns(UserWarning, match="adapts the language model, model.* and leaves out 1[0-9] linear layers"):
        model = get_peft_model(build(family), TinyLoraConfig(n_tie="all", u=3))
    (plan,) = model.base_model.bank.plans
    assert len(plan.index) in (14, 21) and all("vision" not in name and "visual" not in name for name in plan.index)


@families
@pytest.mark.filterwarnings("ignore:target_modules")
def test_the_adapter_is_saved_and_loaded_on_the_language_model_alone(family, tmp_path):
    model = get_peft_model(build(family), TinyLoraConfig(n_tie=4))
    set_values(model)
    ids = torch.tensor([[3, 4, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(family), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert loaded.base_model.bank.plans[0].index == model.base_model.bank.plans[0].index


@pytest.mark.filterwarnings("ignore:target_modules")
@pytest.mark.parametrize("family", ["Llava", "Gemma 3", "Llama 3.2"])
def test_the_gradient_through_an_image_is_that_of_plain_autograd(family):
    model = get_peft_model(build(family), TinyLoraConfig(n_tie=4, u=2))
    set_values(model)

    def loss_of(dtype):
        inputs = with_image(family, dtype)
        return lambda called: called(**inputs).loss

    loss_of(torch.float32)(model).backward()
    (expected,) = expected_gradients(build(family), model, loss_of(torch.float64))
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=2e-4, atol=1e-5)
    assert expected.abs().min() > 1e-4
