"""The recipe scripts and their YAML files. CPU, no network."""

from pathlib import Path

import evaluate
import grpo
import pytest
import sft
import torch
import trl
import yaml
from arguments import AdapterArguments, build_peft_config, resume_point
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora import TinyLoraConfig
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
        only_of_rl = ("reward_funcs=", "use_vllm", "SamplingFidelityCallback")
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


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"n_values": 13, "u": 1}, "n_values=13 finds u and n_tie itself, but u=1 is given too: drop n_values"),
        ({"n_values": 13, "n_tie": "all"}, "n_tie='all' is given too"),
        ({"adapter": "lora", "r": 2}, "r=2 belongs to adapter='tinylora', but adapter is 'lora'"),
        ({"adapter": "full", "n_values": 13}, "n_values=13 belongs to adapter='tinylora', but adapter is 'full'"),
        ({"n_tie": "most"}, "n_tie must be an integer or 'all', got 'most'"),
        ({"adapter": "dora"}, "got 'dora'"),
        ({"adapter": "full", "kept_dtype": "float16"}, "belongs to adapter='tinylora', but adapter is 'full'"),
        ({"kept_dtype": "int8"}, "kept_dtype must be one of .*, got 'int8'"),
    ],
)
def test_contradictory_adapter_arguments_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        AdapterArguments(**chosen)


@pytest.mark.parametrize("adapter", ["tinylora", "full"])
@pytest.mark.parametrize("lora", [{"lora_r": 1}, {"lora_target_modules": ["all-linear"]}, {"use_peft": True}])
def test_arguments_of_lora_are_refused_elsewhere_before_a_model_is_touched(adapter, lora):
    (name,) = lora
    with pytest.raises(ValueError, match=f"{name}=.* belongs to adapter='lora', but adapter is '{adapter}'"):
        build_peft_config(AdapterArguments(adapter=adapter), trl.ModelConfig("no/such-model", **lora))


def test_each_adapter_gives_its_peft_config():
    model = trl.ModelConfig("no/such-model", lora_r=1, lora_target_modules=["all-linear"])
    lora = build_peft_config(AdapterArguments(adapter="lora"), model)
    assert isinstance(lora, LoraConfig) and lora.r == 1 and lora.target_modules == "all-linear"
    assert build_peft_config(AdapterArguments(adapter="full"), trl.ModelConfig("no/such-model")) is None
    tiny = build_peft_config(AdapterArguments(n_tie="4", projection_seed=7), trl.ModelConfig("no/such-model"))
    assert isinstance(tiny, TinyLoraConfig) and (tiny.n_tie, tiny.projection_seed) == (4, 7)
    assert tiny.u == TinyLoraConfig().u, "what is not given keeps the tuner's default"


def test_a_run_is_never_written_over(tmp_path):
    _, training_args, *_ = parse("sft", tmp_path)
    assert resume_point(training_args) is None
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(FileExistsError, match="interrupted run.*--resume_from_checkpoint true"):
        resume_point(training_args)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileExistsError, match="a finished run: choose another --output_dir"):
        resume_point(training_args)
    training_args.resume_from_checkpoint = "true"
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        resume_point(training_args)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    # Written before it, but not to the end.
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"step')
    assert resume_point(training_args) == str(tmp_path / "checkpoint-10")
    training_args.resume_from_checkpoint = str(tmp_path / "checkpoint-20")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        resume_point(training_args)
    training_args.resume_from_checkpoint = str(tmp_path / "checkpoint-11")
    with pytest.raises(FileNotFoundError, match="checkpoint-11"):
        resume_point(training_args)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    _, training_args, *_ = parse("sft", tmp_path, resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resume_point(training_args)


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
    arguments = evaluate.GenerationArguments(samples=2, max_new_tokens=12)
    lines = [tmp_path / f"{kind}.jsonl" for kind in ("trained", "loaded", "untrained")]
    expected = evaluate.evaluate(trainer.model, trainer.processing_class, rows, arguments, lines[0])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TOY / "base"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert evaluate.evaluate(model, tokenizer, rows, arguments, lines[1]) == expected
    assert lines[1].read_text() == lines[0].read_text()
    evaluate.evaluate(*base, rows, arguments, lines[2])
    assert lines[2].read_text() != lines[0].read_text()

    with pytest.raises(FileExistsError, match="finished run"):
        SCRIPTS[name].main(*parse(name, tmp_path / "model", **SHORT[name]))


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
