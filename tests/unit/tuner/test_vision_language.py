"""Vision-language models: "all-linear" is the language model's blocks. Tiny ones of five families; CPU, seconds."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from plain_autograd import expected_gradients, set_values, values_of
from tiny import DECODER

from trl_tinylora import TinyLoraConfig


IMAGE = 5
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava():
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**DECODER)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


def gemma3():
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config=VISION, text_config=DECODER | {"head_dim": 8}, mm_tokens_per_image=4, image_token_index=IMAGE
        )
    )


def qwen2_5_vl():
    text = DECODER | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "fullatt_block_indexes": [1], "window_size": 8}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def mllama():
    vision = VISION | {"num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32}
    vision["intermediate_layers_indices"] = [0]
    text = DECODER | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(vision_config=vision, text_config=text)
    )


def smolvlm():
    return transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(
            vision_config=VISION, text_config=transformers.LlamaConfig(**DECODER), scale_factor=1, image_token_id=IMAGE
        )
    )


FAMILIES = {"Llava": llava, "Gemma 3": gemma3, "Qwen2.5-VL": qwen2_5_vl, "Llama 3.2": mllama, "SmolVLM": smolvlm}
families = pytest.mark.parametrize("family", FAMILIES)


def build(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


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
@pytest.mark.parametrize("family", ["Llava", "Gemma 3"])
def test_the_gradient_through_an_image_is_that_of_plain_autograd(family):
    model = get_peft_model(build(family), TinyLoraConfig(n_tie=4, u=2))
    set_values(model)
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss_of(dtype):
        inputs = {"input_ids": ids, "pixel_values": pixels.to(dtype)}
        if family == "Gemma 3":
            inputs["token_type_ids"] = (ids == IMAGE).long()
        return lambda called: called(**inputs).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).sum()

    loss_of(torch.float32)(model).backward()
    (expected,) = expected_gradients(build(family), model, loss_of(torch.float64))
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=2e-4, atol=1e-5)
    assert expected.abs().min() > 1e-3
