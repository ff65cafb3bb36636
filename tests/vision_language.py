"""Tiny vision-language models with random weights, of five families, and inputs with an image."""

import torch
import transformers
from tiny import DECODER


IMAGE = 5
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava(image_token=IMAGE, **text):
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**DECODER | text)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
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
    model = transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(vision_config=vision, text_config=text)
    )
    # Zero in a new model, so that nothing of an image comes through.
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "mlp_gate")):
            torch.nn.init.constant_(parameter, 0.7)
    return model


def smolvlm():
    return transformers.SmolVLMForConditionalGeneration(
        transformers.SmolVLMConfig(
            vision_config=VISION, text_config=transformers.LlamaConfig(**DECODER), scale_factor=1, image_token_id=IMAGE
        )
    )


FAMILIES = {"Llava": llava, "Gemma 3": gemma3, "Qwen2.5-VL": qwen2_5_vl, "Llama 3.2": mllama, "SmolVLM": smolvlm}


def build(family):
    """A family's model, the same every time."""
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def with_image(family, dtype=torch.float32):
    """What the model of a family (Llava, Gemma 3, Llama 3.2) is called with: an image and eight tokens."""
    tiles = 4 if family == "Llama 3.2" else 1
    pixels = torch.randn(tiles, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9]])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if family == "Gemma 3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    elif family == "Llama 3.2":
        one = torch.ones(1, 1, dtype=torch.long)
        inputs |= {"input_ids": ids[:, ids[0] != IMAGE], "pixel_values": pixels[None, None], "aspect_ratio_ids": one}
        inputs |= {"aspect_ratio_mask": one.expand(1, 1, 4), "cross_attention_mask": one.expand(1, 4, 1, 4)}
    return inputs | {"labels": inputs["input_ids"]}
