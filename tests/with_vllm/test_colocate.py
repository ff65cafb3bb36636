"""TRL's own transfer to the real vLLM, through `recipes/grpo.py` with a paper recipe's keys. CPU, a minute."""

import pytest


pytest.importorskip("vllm")

import grpo
import torch
import yaml
from miniatures import RECIPES
from sampled import logprobs_of, set_values
from trl import TrlParser

from trl_tinylora import sampling_fidelity
from trl_tinylora.vllm.fidelity import SHARE_KEY


RECIPE = RECIPES / "qwen2.5-7b-gsm8k" / "grpo.yaml"


@pytest.fixture(scope="module")
def trainer(toy, tmp_path_factory):
    """The recipe's trainer after three steps on the toy; nothing is changed but model, data, lengths and sizes."""
    folder = tmp_path_factory.mktemp("run")
    recipe = yaml.safe_load(RECIPE.read_text())
    assert recipe["use_vllm"] is True and recipe["vllm_mode"] == "colocate"
    recipe |= {
        "model_name_or_path": str(toy),
        "dtype": "float32",
        "bf16": False,
        "dataset_name": str(toy.parent / "data"),
        "dataset_train_split": "train",
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 32,
        "vllm_max_model_length": 256,
        "learning_rate": 0.02,
        "use_cpu": True,
        "output_dir": str(folder / "out"),
    }
    del recipe["dataset_config"]
    (folder / "grpo.yaml").write_text(yaml.safe_dump(recipe))
    arguments = TrlParser(grpo.ARGUMENTS).parse_args_and_config(["--config", str(folder / "grpo.yaml")])
    return grpo.main(*arguments)


def weights_in_vllm(trainer):
    """The weights that vLLM holds, under transformers' names: q, k, v and gate, up are fused there."""
    model = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
    held = {}
    for name, weight in model.named_parameters():
        for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            if f"{fused}.weight" in name:
                layer = trainer.model.get_base_model().get_submodule(name.rpartition(f".{fused}")[0])
                rows = [getattr(layer, part).get_base_layer().out_features for part in parts]
                for part, value in zip(parts, weight.detach().split(rows), strict=True):
                    held[name.replace(fused, part)] = value
                break
        else:
            held[name] = weight.detach()
    return {name: value for name, value in held.items() if name.endswith("_proj.weight")}


def base_weights(model):
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight.detach().clone()
        for name, weight in model.named_parameters()
        if name.endswith("base_layer.weight")
    }


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1])
def test_vllm_holds_the_merged_weights_and_the_trainer_its_base(trainer, scale):
    set_values(trainer.model, scale)
    before = base_weights(trainer.model)
    trainer.vllm_generation.sync_weights()
    held, after = weights_in_vllm(trainer), base_weights(trainer.model)
    assert len(before) == 28 and all(torch.equal(after[name], value) for name, value in before.items())
    trainer.model.merge_adapter()
    merged = base_weights(trainer.model)
    trainer.model.unmerge_adapter()
    assert held.keys() == merged.keys()
    # vLLM holds a float32 checkpoint in bfloat16.
    assert all(torch.equal(held[name], value.to(torch.bfloat16)) for name, value in merged.items())
    is_base = all(torch.equal(held[name], value.to(torch.bfloat16)) for name, value in before.items())
    assert is_base == (scale == 0.0)


def test_the_recipe_logs_the_prediction_beside_what_trl_measures(trainer):
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == len(logged) == 3
    assert all("sampling/sampling_logp_difference/mean" in entry for entry in logged)
    assert [SHARE_KEY in entry for entry in logged] == [True, True, True]


@pytest.mark.parametrize(("scale", "arrives"), [(0.1, True), (1e-5, False)])
def test_the_predicted_share_is_what_vllms_log_probabilities_show(trainer, scale, arrives):
    """Whether the sampler is the policy or the base model, as predicted from the weights and as vLLM shows it."""
    set_values(trainer.model, scale)
    found = sampling_fidelity(trainer.model, dtype=torch.bfloat16).total
    trainer.vllm_generation.sync_weights()
    prompt_ids = trainer.processing_class("Tom has 3 apples and buys 4 more. How many are there?")["input_ids"]
    _, completions, logprobs, _ = trainer.vllm_generation.generate(
        prompts=[prompt_ids] * 16, images=None, num_generations=16
    )
    sampled = torch.tensor([place[0] for one in logprobs for place in one])

    def distance_from(model):
        return (torch.cat([logprobs_of(model, prompt_ids, ids) for ids in completions]) - sampled).abs().mean()

    policy = distance_from(trainer.model)
    with trainer.model.disable_adapter():
        base = distance_from(trainer.model)
    # Of a float32 toy the sampler rounds the base as well: its share is right on average, the median ulps tell.
    assert found.is_base != arrives
    assert (policy < 0.2 * base) == arrives
