"""The recipe scripts and their YAML files. CPU, no network."""

from pathlib import Path

import grpo
import pytest
import sft
import torch
import trl
import yaml
from evaluation.arguments import GenerationArguments
from evaluation.run import evaluate
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora.tasks import gsm8k


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TOY = RECIPES / "toy"

SCRIPTS = {"grpo": grpo, "sft": sft}
# Two short steps: four problems each.
SHORT = {
    "grpo": {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 2, "max_completion_length": 12},
    "sft": {"max_steps": 2, "per_device_train_batch_size": 4},
}


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    # The paths in the YAML files are relative to it.
    monkeypatch.chdir(ROOT)


def parse(name, output_dir, **changes):
    settings = yaml.safe_load((TOY / f"{name}.yaml").read_text()) | changes | {"output_dir": str(output_dir)}
    return trl.TrlParser(SCRIPTS[name].ARGUMENTS).parse_dict(settings)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_parses_into_its_trainers_config(name, tmp_path):
    path = TOY / f"{name}.yaml"
    parser = trl.TrlParser(SCRIPTS[name].ARGUMENTS)
    arguments = ["--config", str(path), "--output_dir", str(tmp_path), "--learning_rate", "0.5"]
    _, training_args, model_args, adapter_args = parser.parse_args_and_config(arguments)
    assert training_args.learning_rate == 0.5, "the command line must win over the YAML"
    assert training_args.max_steps == yaml.safe_load(path.read_text())["max_steps"]
    assert not training_args.use_cpu, "a GPU must be used where there is one"
    assert model_args.model_name_or_path and adapter_args.adapter == "tinylora"


def test_an_unknown_key_in_a_recipe_is_refused(tmp_path):
    path = tmp_path / "grpo.yaml"
    path.write_text((TOY / "grpo.yaml").read_text() + "\nlerning_rate: 0.1\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        trl.TrlParser(grpo.ARGUMENTS).parse_args_and_config(["--config", str(path)])


def test_the_two_scripts_are_equal_but_for_trainer_reward_columns_and_sampler():
    def body(name):
        text = (RECIPES / f"{name}.py").read_text().split('"""', 2)[2]
        only_of_rl = ("reward_funcs=", "use_vllm", "SamplingFidelityCallback", "rollout")
        lines = [line for line in text.splitlines() if not any(word in line for word in only_of_rl)]
        pairs = (("GRPO", "SFT"), ("for_rl", "for_sft"), ("RLArguments", "RecipeArguments"), (" and the reward", ""))
        for pair in pairs:
            lines = [line.replace(*pair) for line in lines]
        return lines

    assert body("grpo") == body("sft")


def test_a_step_of_either_arm_takes_the_same_problems(tmp_path):
    rl, demonstrations = (parse(name, tmp_path)[1] for name in ("grpo", "sft"))
    problems = rl.per_device_train_batch_size * rl.gradient_accumulation_steps // rl.num_generations
    assert problems == demonstrations.per_device_train_batch_size * demonstrations.gradient_accumulation_steps
    assert rl.max_steps * problems <= 2000, "no problem is seen twice"


# Training and evaluation on the toy's base


@pytest.fixture(scope="module")
def base():
    name = str(TOY / "base")
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_training_saves_an_adapter_that_evaluates_as_the_trained_model(name, tmp_path, base):
    trainer = SCRIPTS[name].main(*parse(name, tmp_path / "model", disable_tqdm=True, **SHORT[name]))
    trained = {key: value for key, value in trainer.model.named_parameters() if value.requires_grad}
    assert sum(value.numel() for value in trained.values()) == 13
    assert trainer.state.global_step == 2

    # Two steps move little, so a reloaded adapter that was in truth untrained would go unnoticed.
    with torch.no_grad():
        for value in trained.values():
            value.add_(3.0)
    trainer.save_model()
    rows = gsm8k.load_rows(str(TOY / "data"), "test", limit=4)
    arguments = GenerationArguments(samples=2, max_new_tokens=12)
    lines = [tmp_path / f"{kind}.jsonl" for kind in ("trained", "loaded", "untrained")]
    expected = evaluate(trainer.model, trainer.processing_class, rows, arguments, lines[0])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TOY / "base"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert evaluate(model, tokenizer, rows, arguments, lines[1]) == expected
    assert lines[1].read_text() == lines[0].read_text()
    evaluate(*base, rows, arguments, lines[2])
    assert lines[2].read_text() != lines[0].read_text()

    with pytest.raises(FileExistsError, match="finished run"):
        SCRIPTS[name].main(*parse(name, tmp_path / "model", **SHORT[name]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_recipe_finds_its_learning_rate(name, tmp_path, capsys):
    rates = []
    for share in (1e-4, 1e-2):
        trainer = SCRIPTS[name].main(*parse(name, tmp_path / f"{share}", relative_kl=share, **SHORT[name]))
        rates.append(trainer.args.learning_rate)
        assert trainer.optimizer.param_groups[0]["initial_lr"] == rates[-1]
        assert f"learning rate {rates[-1]:g}" in (tmp_path / f"{share}" / "README.md").read_text()
    assert 5 < rates[1] / rates[0] < 20 and 1e-3 < rates[0] < 0.1
    given = yaml.safe_load((TOY / f"{name}.yaml").read_text())["learning_rate"]
    said = f"Learning rate {rates[1]:.3g}, in place of {given:g}: Adam's first step moves the policy by 0.01"
    assert said in capsys.readouterr().out


@pytest.mark.bad_input("a recipe's arguments and files")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_kl": 1e-3, "optim": "sgd"}, "relative_kl is for Adam and its like, and optim is 'sgd'"),
        ({"relative_kl": -1.0}, "`relative_kl` must be finite and above 0, got -1.0"),
    ],
    ids=str,
)
def test_a_learning_rate_that_cannot_be_found_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        sft.main(*parse("sft", tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_interrupted_training_continues_from_its_last_checkpoint(tmp_path):
    # A linear decay of one step is not the first half of one of two.
    saved = SHORT["sft"] | {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    saved |= {"disable_tqdm": True}
    whole = sft.main(*parse("sft", tmp_path / "whole", **saved))
    sft.main(*parse("sft", tmp_path / "halves", **(saved | {"max_steps": 1})))
    continued = sft.main(*parse("sft", tmp_path / "halves", **saved, resume_from_checkpoint="true"))
    assert [entry["step"] for entry in continued.state.log_history if "loss" in entry] == [1, 2]
    for name, value in whole.model.named_parameters():
        if value.requires_grad:
            assert value.abs().sum() > 0
            torch.testing.assert_close(continued.model.get_parameter(name), value, rtol=0, atol=0)
