"""TRL's SFT and GRPO trainers, unmodified, on a tiny Llava with images. CPU, seconds."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from tiny import ROWS, train_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil, LlavaProcessor
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from vision_language import llava as tiny_llava

from trl_tinylora import TinyLoraConfig


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Each row's picture has a colour of its own.
IMAGES = [Image.new("RGB", (8, 8), (30 * index, 100, 200 - 20 * index)) for index in range(len(ROWS))]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder of a model and its processor."""
    folder = tmp_path_factory.mktemp("bases") / "llava"
    tokenizer = train_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 8, "width": 8}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    text["max_position_embeddings"] = 256
    torch.manual_seed(0)
    tiny_llava(tokenizer.convert_tokens_to_ids("<image>"), **text).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def trainer_of(kind, base, output_dir):
    arguments = {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    peft_config = TinyLoraConfig(n_tie=4)
    if kind == "SFT":
        rows = [{**row, "images": [image]} for row, image in zip(ROWS, IMAGES, strict=True)]
        config = SFTConfig(**arguments, max_length=None)
        return SFTTrainer(base, config, train_dataset=Dataset.from_list(rows), peft_config=peft_config)
    rows = [{"prompt": row["prompt"], "image": image} for row, image in zip(ROWS, IMAGES, strict=True)]
    config = GRPOConfig(**arguments, num_generations=4, max_completion_length=6)

    def reward(completions, **columns):
        return [sum(map(ord, str(completion))) % 7 / 7 for completion in completions]

    return GRPOTrainer(base, reward, config, train_dataset=Dataset.from_list(rows), peft_config=peft_config)


def logits_of(model, base, image):
    processor = AutoProcessor.from_pretrained(base)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    with torch.no_grad():
        return model.eval()(**processor(images=image, text=text, return_tensors="pt")).logits


@pytest.mark.filterwarnings("ignore:target_modules")
@pytest.mark.parametrize("kind", ["SFT", "GRPO"])
def test_a_trainer_with_images_trains_the_values_of_the_language_model(kind, llava, tmp_path):
    trainer = trainer_of(kind, llava, tmp_path)
    pictures = []
    tower = next(module for name, module in trainer.model.named_modules() if name.endswith("vision_tower"))
    tower.register_forward_hook(lambda module, args, output: pictures.append(args))
    trainer.train()
    trained = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    ((_, values),) = trained.items()
    assert (values.dtype, tuple(values.shape)) == (torch.float32, (4, 1)) and values.abs().min() > 1e-3
    assert len(pictures) >= 3
    assert all(".language_model." in f".{name}" for name in trainer.model.base_model.bank.plans[0].index)

    trainer.save_model()
    base = AutoModelForImageTextToText.from_pretrained(llava)
    plain = logits_of(base, llava, IMAGES[0])
    loaded = PeftModel.from_pretrained(base, tmp_path)
    found = logits_of(loaded, llava, IMAGES[0])
    assert torch.equal(found, logits_of(trainer.model, llava, IMAGES[0]))
    # Both the adapter and the picture matter.
    assert (found - plain).abs().max() > 1e-3
    assert (found - logits_of(loaded, llava, IMAGES[7])).abs().max() > 1e-3
