"""Models that accelerate has put on several devices: with layers on the disk a step is that in memory. CPU, seconds."""

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tuner.bank import TinyLoraLayer


FIELDS = {"n_tie": 4, "init_weights": False, "init_v_bound": 0.5}
LAYERS = ["model.layers.0", "model.layers.1"]


def placed(make_model, tmp_path, *on_disk):
    """The base model, some of its layers on the disk."""
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *LAYERS]
    device_map = {name: "disk" if name in on_disk else "cpu" for name in names}
    if not on_disk:
        return make_model()
    return make_model(device_map=device_map, offload_folder=str(tmp_path / "offloaded"))


def those_on_disk(base):
    """The layers whose weights are in memory during their own pass only."""
    return [name for name in LAYERS if base.get_submodule(f"{name}.self_attn.q_proj").weight.is_meta]


def values_of(model):
    return model.base_model.bank.vectors("default").values_GK


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture
def saved(make_model, tmp_path, token_ids):
    """An adapter's folder, and the logits that it gives."""
    model = get_peft_model(make_model(), TinyLoraConfig(**FIELDS)).eval()
    model.save_pretrained(tmp_path / "saved")
    return str(tmp_path / "saved"), logits_of(model, token_ids)


@pytest.mark.parametrize("on_disk", [LAYERS[:1], LAYERS[1:], LAYERS], ids=["first", "second", "both"])
def test_a_step_and_what_is_generated_are_those_in_memory(make_model, token_ids, tmp_path, on_disk):
    found = []
    for offloaded in ([], on_disk):
        base = placed(make_model, tmp_path, *offloaded)
        assert those_on_disk(base) == offloaded
        model = get_peft_model(base, TinyLoraConfig(**FIELDS)).train()
        model(input_ids=token_ids, labels=token_ids).loss.backward()
        assert values_of(model).device.type == "cpu" and values_of(model).grad.abs().min() > 0
        generated = model.eval().generate(input_ids=token_ids, max_new_tokens=4, do_sample=False)
        found.append((values_of(model).grad, logits_of(model, token_ids), generated))
        assert those_on_disk(base) == offloaded

    for in_memory, with_disk in zip(*found, strict=True):
        assert torch.equal(in_memory, with_disk)


def test_a_model_that_is_offloaded_as_a_whole_is_adapted(tiny_qwen2, token_ids, tmp_path):
    expected = logits_of(get_peft_model(tiny_qwen2(), TinyLoraConfig(**FIELDS)).eval(), token_ids)
    base = tiny_qwen2()
    disk_offload(base, str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(logits_of(get_peft_model(base, TinyLoraConfig(**FIELDS)).eval(), token_ids), expected)


def test_an_adapter_of_a_model_on_the_disk_is_merged_and_saved(make_model, token_ids, tmp_path, saved):
    _, expected = saved
    model = get_peft_model(placed(make_model, tmp_path, *LAYERS), TinyLoraConfig(**FIELDS)).eval()
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make_model(), tmp_path / "again").eval()
    assert torch.equal(logits_of(again, token_ids), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits_of(model, token_ids), expected, rtol=0, atol=2e-5)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model, token_ids), expected)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), token_ids), expected, rtol=0, atol=2e-5)


def test_a_saved_adapter_is_loaded_by_the_ways_that_the_error_names(make_model, token_ids, tmp_path, saved):
    folder, expected = saved
    base = placed(make_model, tmp_path, LAYERS[1])
    with pytest.raises(
        NotImplementedError,
        match=r"has offloaded model.layers.1 to the disk.*load_adapter\(folder\).*set_peft_model_state_dict",
    ):
        PeftModel.from_pretrained(base, folder, offload_folder=str(tmp_path / "elsewhere"))
    assert not any(isinstance(module, TinyLoraLayer) for module in base.modules())

    by_transformers = placed(make_model, tmp_path, LAYERS[1])
    by_transformers.load_adapter(folder)
    by_peft = get_peft_model(placed(make_model, tmp_path, LAYERS[1]), TinyLoraConfig.from_pretrained(folder)).eval()
    set_peft_model_state_dict(by_peft, load_peft_weights(folder))
    for model in (by_transformers.eval(), by_peft):
        assert torch.equal(logits_of(model, token_ids), expected)


def test_factors_follow_a_layer_to_another_device(tiny_qwen2, token_ids):
    # The meta device stands in for a second one: nothing is computed there, and what lies elsewhere is an error.
    model = get_peft_model(tiny_qwen2(), TinyLoraConfig(**FIELDS)).eval()
    layer = model.base_model.model.model.layers[1]
    remove_hook_from_submodules(layer)
    for module in layer.modules():
        if not isinstance(module, TinyLoraLayer):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))
    add_hook_to_module(layer, AlignDevicesHook(execution_device=torch.device("meta")))
    for rest in (model.base_model.model.model.norm, model.base_model.model.lm_head):
        rest.to("meta")

    assert logits_of(model, token_ids).device.type == "meta"
    assert values_of(model).device.type == "cpu"
