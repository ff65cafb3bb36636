"""What "all-linear" adapts, and what it leaves out and says so. CPU, seconds."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import DECODER, MIXTURE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from trl_tinylora import TinyLoraConfig


def mixture(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**MIXTURE)).eval()


@pytest.mark.parametrize("config", [Qwen2MoeConfig, Qwen3MoeConfig])
def test_fused_experts_are_left_out_with_their_share_of_the_parameters(config):
    model = mixture(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if "experts" in name.split("."))
    share = f"{experts / sum(p.numel() for p in model.parameters()):.0%}"
    with pytest.warns(UserWarning, match=f"leaves out {share} of the parameters: the fused experts model.layers.0.mlp"):
        get_peft_model(model, TinyLoraConfig())


@pytest.mark.filterwarnings("ignore:target_modules")
def test_a_gate_of_one_output_is_left_out_by_all_linear_and_refused_by_name(token_ids, tmp_path):
    with pytest.warns(UserWarning, match=r"2 linear layers have fewer than r=2.*layers.0.mlp.shared_expert_gate"):
        model = get_peft_model(mixture(Qwen2MoeConfig), TinyLoraConfig(init_weights=False, init_v_bound=0.3))
    assert not any("shared_expert_gate" in name for name in model.base_model.bank.plans[0].index)
    with torch.no_grad():
        expected = model(token_ids).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        # What was saved are the names.
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(mixture(Qwen2MoeConfig), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, expected)
    with pytest.raises(ValueError, match=r"r=2 exceeds the rank 1 that model.layers.0.mlp.shared_expert_gate"):
        get_peft_model(mixture(Qwen2MoeConfig), TinyLoraConfig(target_modules=["q_proj", "shared_expert_gate"]))


def test_a_model_without_experts_leaves_nothing_out(tiny_qwen2):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(tiny_qwen2(), TinyLoraConfig())
    assert len(model.base_model.bank.plans[0].index) == 14


def classifier():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(Qwen2Config(**DECODER, num_labels=3)).eval()


# PEFT asks for "classifier" and "score" then, as every sequence classifier has one of them.
@pytest.mark.parametrize("named", [None, ["score"]])
def test_the_head_of_a_classifier_is_trained_saved_and_loaded_by_its_task_alone(token_ids, tmp_path, named):
    model = get_peft_model(classifier(), TinyLoraConfig(task_type="SEQ_CLS", modules_to_save=named))
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert sum(p.requires_grad for p in model.parameters()) == 2 and head.requires_grad
    with torch.no_grad():
        head.add_(0.5)
        expected = model(token_ids).logits
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        model = PeftModel.from_pretrained(classifier(), folder)
        with torch.no_grad():
            assert torch.equal(model(token_ids).logits, expected)


@pytest.mark.filterwarnings("ignore:target_modules")
def test_a_head_of_another_name_is_still_missed():
    with pytest.raises(ValueError, match=r"\['scroe'\] in modules_to_save"):
        get_peft_model(classifier(), TinyLoraConfig(task_type="SEQ_CLS", modules_to_save=["scroe"]))
    with pytest.raises(ValueError, match=r"\['classifier'\] in modules_to_save"):
        get_peft_model(classifier(), TinyLoraConfig(modules_to_save=["classifier"]))


def test_a_head_that_is_neither_trained_nor_saved_is_named_with_the_way_out():
    with pytest.warns(UserWarning, match="leaves out 1 linear layers beside it: score.*unless `modules_to_save` names"):
        get_peft_model(classifier(), TinyLoraConfig())
