"""`AdapterRollout`: what the real vLLM samples is the policy, to the float32 noise that v = 0 has. CPU, a minute."""

import pytest


pytest.importorskip("vllm")

import torch
from sampled import NOISE, TEMPERATURE, Recorder, distance, make_trainer, set_values
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_tinylora import AdapterRollout


def weights_in(rollout):
    """The weights that the engine holds, by name; not the adapter's."""
    model = rollout._engine.llm.llm_engine.model_executor.driver_worker.model_runner.model
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora" not in name}


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A short run, its recorder, and the weights on both sides before and after."""
    recorder = Recorder(AdapterRollout(enforce_eager=True))
    trainer = make_trainer(toy, tmp_path_factory.mktemp("run"), recorder)
    base = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if "base_layer" in name}
    prompts = [row["prompt"] for row in trainer.eval_dataset]
    recorder(prompts, trainer)
    held = weights_in(recorder.rollout)
    trainer.train()
    yield {"trainer": trainer, "recorder": recorder, "base": base, "held": held}
    recorder.rollout.close()


def test_the_sampler_is_the_policy_to_the_noise_of_float32(run):
    calls = run["recorder"].calls
    assert [call["from_policy"] for call in calls] == pytest.approx([0.0] * 6, abs=NOISE)
    # The control: what was sampled from, once there are values, is not the base model.
    assert min(call["from_base"] for call in calls if call["values"].any()) > 0.01
    assert len({tuple(call["values"].flatten().tolist()) for call in calls}) == 4


def test_one_completion_is_returned_for_each_prompt_in_training_and_in_evaluation(run):
    training = [call for call in run["recorder"].calls[1:] if call["is_training"]]
    evaluation = [call for call in run["recorder"].calls[1:] if not call["is_training"]]
    assert [call["n_prompts"] for call in training] == [8, 8, 8]
    assert [call["n_prompts"] for call in evaluation] == [4, 4]
    for call in run["recorder"].calls:
        assert len(call["completion_ids"]) == len(call["prompt_ids"]) == call["n_prompts"]
    # Each prompt as often as the trainer's settings say.
    for call, times in [(call, 4) for call in training] + [(call, 2) for call in evaluation]:
        counts = {tuple(ids): call["prompt_ids"].count(ids) for ids in call["prompt_ids"]}
        assert set(counts.values()) == {times}


def test_a_completion_ends_in_the_token_that_ends_a_turn_or_at_the_limit(run):
    end = run["trainer"].processing_class.eos_token_id
    completions = [ids for call in run["recorder"].calls for ids in call["completion_ids"]]
    assert all(ids[-1] == end or len(ids) == 32 for ids in completions)
    assert all(end not in ids[:-1] for ids in completions) and any(ids[-1] == end for ids in completions)


def test_no_weight_changes_on_either_side(run):
    after = dict(run["trainer"].model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in run["base"].items())
    held = weights_in(run["recorder"].rollout)
    assert held.keys() == run["held"].keys() and all(torch.equal(held[name], run["held"][name]) for name in held)


def test_no_importance_sampling_correction_is_applied(run):
    logged = {key for entry in run["trainer"].state.log_history for key in entry}
    assert "reward" in logged and not [key for key in logged if key.startswith("sampling/")]
    batch = next(iter(run["trainer"].get_train_dataloader()))
    made = run["trainer"]._generate_and_score_completions(batch)
    assert "importance_sampling_ratio" not in made and made["completion_ids"].shape[0] == 8


def test_what_is_sent_is_the_factors_and_nothing_where_nothing_has_changed(run):
    rollout, model = run["recorder"].rollout, run["trainer"].model
    rollout.send(model)
    assert rollout.send(model) == 0
    set_values(model, 0.02, seed=5)
    modules = [module.get_base_layer() for name, module in model.named_modules() if name.endswith("_proj")]
    numbers = sum(2 * (module.in_features + module.out_features) for module in modules)
    # Beside the numbers: their names, and the configuration.
    assert 4 * numbers < rollout.send(model) < 4 * numbers + 150 * 2 * len(modules) + 2000


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-2, 1e-1])
def test_values_of_every_size_reach_the_sampler(run, scale):
    trainer = run["trainer"]
    prompts = [row["prompt"] for row in trainer.eval_dataset] * 4
    set_values(trainer.model, scale, seed=7)
    assert distance(trainer.model, run["recorder"].rollout(prompts, trainer), TEMPERATURE) < NOISE


def test_a_quantised_base_is_sampled_from_by_what_its_weights_stand_for(toy, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = {"quantization_config": settings, "dtype": "float32"}
    AutoModelForCausalLM.from_pretrained(toy, **loaded).dequantize().save_pretrained(tmp_path / "dequantised")
    AutoTokenizer.from_pretrained(toy).save_pretrained(tmp_path / "dequantised")
    recorder = Recorder(AdapterRollout(model=str(tmp_path / "dequantised"), enforce_eager=True))
    trainer = make_trainer(toy, tmp_path / "run", recorder, eval_strategy="no", model_init_kwargs=loaded)
    trainer.train()
    recorder.rollout.close()
    assert [call["from_policy"] for call in recorder.calls] == pytest.approx([0.0] * 3, abs=NOISE)
    assert recorder.calls[-1]["from_base"] > 0.01
    refused = AdapterRollout(enforce_eager=True)
    with pytest.raises(ValueError, match="are quantised by"):
        refused([trainer.train_dataset[0]["prompt"]], trainer)
