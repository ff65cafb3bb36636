"""Modules of several stacks, or beside one: encoder-decoders, vision tower and language model, a head. CPU, seconds."""

import copy
from functools import partial

import pytest
import torch
import transformers
from encoder_decoders import IDS, bart, sequences, sound, t5, whisper
from peft import PeftModel, get_peft_model
from plain_autograd import checkpointed, expected_gradients, set_values, values_of
from tiny import layers_of
from vision_language import llava, mllama, with_image

from trl_tinylora import TinyLoraConfig, export_lora
from trl_tinylora.tuner.build import first_blocks


# Of older versions of transformers, whose checkpoints are around a block's hooks too.
HOOKS_INSIDE = "__call__" in vars(transformers.modeling_layers.GradientCheckpointingLayer)
MODES = ["no checkpointing", "not reentrant", "reentrant"]


def opt():
    """With a projection in front of its blocks and one behind them, as OPT-350m has them."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "max_position_embeddings": 32,
    }
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **sizes, num_hidden_layers=2, num_attention_heads=4, dropout=0.0, init_std=0.2, tie_word_embeddings=False
        )
    )


def tokens(dtype):
    return {"input_ids": IDS, "labels": IDS}


# Of each: the model, what it is called with, its targets, where its stacks begin, and how many modules are adapted.
CASES = {
    "T5": (t5, sequences, "all-linear", ("encoder.block.0", "decoder.block.0"), 32),
    "T5's decoder": (t5, sequences, r"decoder.*\.(q|k|v|o|wi|wo)", ("decoder.block.0",), 20),
    "T5's encoder": (t5, sequences, r"encoder.*\.(q|k|v|o|wi|wo)", ("encoder.block.0",), 12),
    "Bart": (bart, sequences, "all-linear", ("model.encoder.layers.0", "model.decoder.layers.0"), 32),
    "Whisper": (whisper, sound, "all-linear", ("model.encoder.layers.0", "model.decoder.layers.0"), 32),
    "Llava's tower and language model": (
        llava,
        lambda dtype: with_image("Llava", dtype),
        # Of the tower's last block the language model sees nothing.
        r".*(vision.*0|language.*\d)\..*(q_proj|v_proj|fc1|up_proj)|.*multi_modal_projector.linear_1",
        ("model.vision_tower.encoder.layers.0", "", "model.language_model.layers.0"),
        10,
    ),
    "Llama 3.2 with an image": (
        mllama,
        lambda dtype: with_image("Llama 3.2", dtype),
        r".*language_model.*(q|k|v|o|gate|up|down)_proj",
        ("model.language_model.layers.0",),
        21,
    ),
    "OPT's projections": (opt, tokens, "all-linear", ("", "model.decoder.layers.0"), 14),
    "a head": (opt, tokens, ["q_proj", "fc2", "lm_head"], ("model.decoder.layers.0", ""), 5),
}
cases = pytest.mark.parametrize("case", CASES)


def build(case):
    torch.manual_seed(0)
    return CASES[case][0]().eval()


def adapted(case, **fields):
    model = get_peft_model(
        build(case), TinyLoraConfig(**{"n_tie": 4, "u": 2, "target_modules": CASES[case][2], **fields})
    )
    set_values(model)
    return model


def loss_of(case, dtype=torch.float32):
    inputs = CASES[case][1](dtype)
    return lambda model: model(**inputs).loss


@cases
def test_a_stack_begins_at_its_first_adapted_block(case):
    (plan,) = adapted(case).base_model.bank.plans
    assert plan.first_blocks == CASES[case][3] and len(plan.index) == CASES[case][4]


@pytest.mark.parametrize("mode", MODES)
@cases
def test_the_gradient_is_that_of_plain_autograd(case, mode):
    model = checkpointed(adapted(case), mode).train()
    if HOOKS_INSIDE and mode == "reentrant" and len(CASES[case][3]) > 1:
        with pytest.raises(RuntimeError, match="several stacks.*use_reentrant=False"):
            loss_of(case)(model).backward()
        return
    # Twice, so that what a pass leaves behind would show.
    for _ in range(2):
        model.zero_grad()
        loss_of(case)(model).backward()
    (expected,) = expected_gradients(build(case).train(), model, loss_of(case, torch.float64))
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=2e-4, atol=1e-6)
    assert expected.abs().min() > 1e-5


@cases
def test_no_module_is_without_a_gradient(case):
    model = adapted(case, n_tie=1, u=1).train()
    loss_of(case)(model).backward()
    assert values_of(model).grad.abs().min() > 0


@cases
def test_the_values_accumulate_one_gradient_a_backward_pass(case):
    # DDP and DeepSpeed count them.
    model, arrived = checkpointed(adapted(case), "not reentrant").train(), []
    values_of(model).register_post_accumulate_grad_hook(arrived.append)
    loss_of(case)(model).backward()
    assert len(arrived) == 1


@cases
def test_an_adapter_is_saved_loaded_merged_and_exported_as_any(case, tmp_path):
    model, loss = adapted(case), loss_of(case)
    with torch.no_grad():
        expected, without = loss(model), loss(build(case))
    assert abs(expected - without) > 1e-4
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(case), tmp_path / "adapter")
    export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(build(case), tmp_path / "lora")
    with torch.no_grad():
        assert torch.equal(loss(loaded), expected)
        torch.testing.assert_close(loss(lora), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss(model.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
    assert layers_of(model) == []


@pytest.mark.parametrize("case", ["T5", "Bart"])
def test_an_encoder_that_is_called_by_itself_is_adapted(case):
    # So does `generate`.
    model, merged = adapted(case), adapted(case).merge_and_unload()
    options = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    with torch.no_grad():
        found, expected = (one.generate(**options).logits[0] for one in (model, merged))
        without = build(case).generate(**options).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - without).abs().max() > 1e-3


def test_a_pass_that_was_not_trained_is_no_part_of_a_copy():
    model = adapted("T5").train()
    loss_of("T5")(model)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        loss_of("T5")(one).backward()
    assert torch.equal(values_of(model).grad, values_of(twin).grad)


# What a reentrant checkpoint keeps from the sink


class Checkpointed(torch.nn.Module):
    """Calls a block inside a reentrant checkpoint, and its hooks with it, as transformers 5.6 does."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        call = partial(self.block, **kwargs)
        return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=True)


def with_checkpoints_around(model, blocks):
    """The model with the blocks of a list in checkpoints."""
    listed = model.get_base_model().get_submodule(blocks)
    for index, block in enumerate(listed):
        listed[index] = Checkpointed(block)
    return model.train()


def test_one_stack_in_reentrant_checkpoints_gets_its_whole_gradient():
    model = with_checkpoints_around(adapted("T5's encoder"), "encoder.block")
    model.enable_input_require_grads()
    loss_of("T5's encoder")(model).backward()
    plain = adapted("T5's encoder")
    (expected,) = expected_gradients(build("T5"), plain, loss_of("T5", torch.float64))
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_several_stacks_in_reentrant_checkpoints_are_refused():
    model = with_checkpoints_around(with_checkpoints_around(adapted("T5"), "encoder.block"), "decoder.block")
    model.enable_input_require_grads()
    loss = model(**sequences(), use_cache=False).loss
    with pytest.raises(
        RuntimeError, match=r"stacks, which begin at encoder\.block\.0, decoder\.block\.0.*use_reentrant"
    ):
        loss.backward()


def test_a_layer_in_a_reentrant_checkpoint_whose_input_comes_from_elsewhere_gets_its_gradient():
    case = "Llama 3.2 with an image"
    model = with_checkpoints_around(adapted(case), "model.language_model.layers")
    # Of the tokens alone: nothing of the image requires a gradient.
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    model(**with_image("Llama 3.2"), use_cache=False).loss.backward()
    (expected,) = expected_gradients(build(case), adapted(case), loss_of(case, torch.float64))
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=2e-4, atol=1e-6)


def accumulations(model):
    """Counts the gradients that arrive at the values."""
    arrived = []
    values_of(model).register_post_accumulate_grad_hook(arrived.append)
    return arrived


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_of_two_stacks_in_reentrant_checkpoints(stack):
    model = adapted("T5")
    model.enable_input_require_grads()
    for block in model.get_base_model().get_submodule(stack).block:
        block.forward = partial(in_checkpoint, block.forward)
    arrived = accumulations(model)
    # What computes a block again would find its own keys in a cache.
    model.train()(**sequences(), use_cache=False).loss.backward()
    (expected,) = expected_gradients(build("T5"), adapted("T5"), loss_of("T5", torch.float64))
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=2e-4, atol=1e-6)
    assert len(arrived) == 1


def in_checkpoint(forward, *args, **kwargs):
    """As transformers 5.23 makes it: the hooks on a block stay outside."""
    return torch.utils.checkpoint.checkpoint(partial(forward, **kwargs), *args, use_reentrant=True)


def test_an_evaluation_with_gradients_between_the_two_passes_of_a_reentrant_checkpoint_changes_nothing(tiny_llama):
    model = checkpointed(get_peft_model(tiny_llama(), TinyLoraConfig(n_tie=4, u=2)), "reentrant").train()
    set_values(model)
    inputs = {"input_ids": IDS, "labels": IDS}
    arrived = accumulations(model)
    loss = model(**inputs).loss
    # Not through checkpoints, which the model has in training only.
    model.eval()(**inputs)
    loss.backward()
    (expected,) = expected_gradients(tiny_llama(), model, lambda called: called(**inputs).loss)
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=2e-4, atol=1e-6)
    assert len(arrived) == 1


# A first block that is left out


@pytest.mark.parametrize("before", ["nothing", "evaluation", "training"])
@pytest.mark.parametrize("mode", ["no checkpointing", "not reentrant"])
def test_a_pass_that_drops_the_first_block_gets_its_whole_gradient(before, mode):
    def losing_its_first_layer():
        base = build("Bart")
        base.model.encoder.layers[0].forward = lambda hidden, *args, **kwargs: hidden
        return base

    model = checkpointed(adapted("Bart"), mode).train()
    if before == "evaluation":
        with torch.no_grad():
            loss_of("Bart")(model)
    elif before == "training":
        loss_of("Bart")(model).backward()
        model.zero_grad()
    # As LayerDrop does it: the layer and its hooks are not called.
    layers = model.get_base_model().model.encoder.layers
    first = layers[0]
    layers[0] = Dropped()
    loss_of("Bart")(model).backward()
    layers[0] = first
    (expected,) = expected_gradients(losing_its_first_layer(), model, loss_of("Bart", torch.float64))
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.bad_input("a model or a configuration that does not fit")
def test_a_first_block_dropped_where_the_others_are_in_reentrant_checkpoints_is_an_error():
    model = adapted("T5's encoder")
    model.enable_input_require_grads()
    blocks = model.get_base_model().encoder.block
    for block in blocks:
        block.forward = partial(in_checkpoint, block.forward)
    loss_of("T5")(model.train()).backward()
    # T5's first block makes the others' positions; here it is kept, and its hook is not called.
    (hook, *_) = blocks[0]._forward_pre_hooks
    del blocks[0]._forward_pre_hooks[hook]
    with pytest.raises(RuntimeError, match="called outside the model's forward pass"):
        loss_of("T5")(model)


class Dropped(torch.nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def test_blocks_in_a_list_of_lists_are_found(tiny_llama):
    model = tiny_llama()
    model.model.layers = torch.nn.ModuleList(torch.nn.ModuleList([block]) for block in model.model.layers)
    names = ["model.layers.0.0.mlp.up_proj", "model.layers.1.0.mlp.up_proj"]
    assert first_blocks(model, names) == ("model.layers.0.0", "model.layers.1.0")


@pytest.mark.bad_input("a batch whose rows have adapters")
def test_rows_of_images_cannot_have_adapters_of_their_own():
    case = "Llava's tower and language model"
    model = adapted(case)
    model.add_adapter("other", model.peft_config["default"])
    model.eval()
    inputs = with_image("Llava")
    with pytest.raises(
        NotImplementedError, match=r"adapts model\.vision_tower\S+, which lies outside.*batch of their own"
    ):
        model(**inputs, adapter_names=["other"])
    # On the language model alone they can.
    alone = get_peft_model(build(case), TinyLoraConfig(target_modules=r".*language_model.*q_proj"))
    with torch.no_grad():
        alone.eval()(**inputs, adapter_names=["default"])
