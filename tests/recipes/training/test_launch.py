"""Where a training continues, and what it never writes over."""

import warnings
from pathlib import Path

import grpo
import pytest
import sft
import trl
import yaml
from comparison.arguments import CompareArguments
from peft import get_peft_model
from training import launch
from training.arguments import AdapterArguments, RecipeArguments
from training.launch import prepare, refuse_another_adapter, resume_point
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig


TOY = Path(__file__).parents[3] / "recipes" / "toy"


RECIPES = TOY.parent
PARSED_BY = {"grpo": grpo.ARGUMENTS, "sft": sft.ARGUMENTS, "compare": (CompareArguments,)}
FILES = [path for name in PARSED_BY for path in sorted(RECIPES.glob(f"*/{name}*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
@pytest.mark.filterwarnings("ignore")
def test_every_recipe_of_the_repository_is_taken_from_the_command_line(monkeypatch, path):
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.setattr("sys.argv", [path.stem, "--config", str(path), "--output_dir", "elsewhere"])
    # No bfloat16 on a CPU, which is not the recipes' matter.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True, raising=False)
    script = next(name for name in PARSED_BY if path.stem.startswith(name))
    taken = launch.run(lambda *parsed: parsed, PARSED_BY[script])
    assert taken[0 if script == "compare" else 1].output_dir == "elsewhere"


def parse(name, output_dir, **changes):
    settings = yaml.safe_load((TOY / f"{name}.yaml").read_text()) | changes | {"output_dir": str(output_dir)}
    return trl.TrlParser(sft.ARGUMENTS).parse_dict(settings)


def test_a_run_is_never_written_over(tmp_path):
    _, training_args, *_ = parse("sft", tmp_path)
    assert resume_point(training_args) is None
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(FileExistsError, match="interrupted run: choose another --output_dir, delete the folder$"):
        resume_point(training_args)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    with pytest.raises(FileExistsError, match="interrupted run.*--resume_from_checkpoint true"):
        resume_point(training_args)
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
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


@pytest.mark.bad_input("a run to be continued")
def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    _, training_args, *_ = parse("sft", tmp_path, resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resume_point(training_args)


@pytest.mark.parametrize(
    ("lengths", "state"),
    [
        ({"max_steps": 80}, '{"global_step": 80, "epoch": 0.5}'),
        ({"max_steps": 60}, '{"global_step": 80, "epoch": 0.5}'),
        ({"max_steps": -1, "num_train_epochs": 2}, '{"global_step": 80, "epoch": 2.0}'),
    ],
)
def test_a_finished_run_is_not_resumed_and_nothing_recommends_it(tmp_path, lengths, state):
    checkpoint = tmp_path / "checkpoint-80"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(state)
    (tmp_path / "adapter_config.json").touch()
    for wanted in ("true", str(checkpoint)):
        _, training_args, *_ = parse("sft", tmp_path, resume_from_checkpoint=wanted, **lengths)
        with pytest.raises(ValueError, match="checkpoint-80 is at the last step.*nothing is left to train.*Raise one"):
            resume_point(training_args)
    _, training_args, *_ = parse("sft", tmp_path, **lengths)
    with pytest.raises(FileExistsError, match="a finished run: choose another --output_dir, delete the folder$"):
        resume_point(training_args)
    # Negative control: with a step left it is.
    _, training_args, *_ = parse("sft", tmp_path, resume_from_checkpoint="true", max_steps=81)
    assert resume_point(training_args) == str(checkpoint)


@pytest.mark.bad_input("a run to be continued")
@pytest.mark.parametrize(
    ("config", "kind"),
    [('{"peft_type": "TRL_TINYLORA"}', "tinylora"), ('{"peft_type": "LORA"}', "lora"), (None, "full")],
)
def test_a_checkpoint_of_another_kind_of_adapter_is_refused(tmp_path, config, kind):
    checkpoint = tmp_path / "checkpoint-10"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 10}')
    if config is not None:
        (checkpoint / "adapter_config.json").write_text(config)
    rows = RecipeArguments(dataset_name="rows.jsonl")
    for asked in ("tinylora", "lora", "full"):
        changes = {"model_name_or_path": str(TOY / "base"), "resume_from_checkpoint": "true"}
        _, training_args, model_args, _ = parse("sft", tmp_path, **changes)
        # Of its own kind it is continued.
        if asked == kind:
            assert prepare(rows, training_args, model_args, AdapterArguments(adapter=asked)) == str(checkpoint)
            continue
        with pytest.raises(ValueError, match=f"made with adapter='{kind}', but adapter is '{asked}': give --adapter"):
            prepare(rows, training_args, model_args, AdapterArguments(adapter=asked))


@pytest.mark.parametrize(("adapter", "rate"), [("tinylora", 1e-6), ("tinylora", 1e-5), ("lora", 1e-6), ("full", 1e-6)])
def test_a_learning_rate_of_whole_models_is_warned_of_for_tinylora_alone(tmp_path, adapter, rate):
    changes = {"model_name_or_path": str(TOY / "base"), "learning_rate": rate}
    _, training_args, model_args, _ = parse("sft", tmp_path, **changes)
    rows = RecipeArguments(dataset_name="rows.jsonl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert prepare(rows, training_args, model_args, AdapterArguments(adapter=adapter)) is None
    expected = 1 if (adapter, rate) == ("tinylora", 1e-6) else 0
    assert len(caught) == expected
    assert all("learning_rate=1e-06 moves TinyLoRA" in str(warning.message) for warning in caught)


@pytest.mark.bad_input("a run to be continued")
def test_a_checkpoint_of_another_seed_is_refused_before_the_training(tmp_path):
    def adapted(seed):
        return get_peft_model(
            AutoModelForCausalLM.from_pretrained(TOY / "base"), TinyLoraConfig(n_tie="all", projection_seed=seed)
        )

    adapted(0).save_pretrained(tmp_path)
    refuse_another_adapter(adapted(0), str(tmp_path))
    refuse_another_adapter(adapted(1), None)
    with pytest.raises(ValueError, match=r"projection_seed \(1, 0 there\).*Resume with its own settings"):
        refuse_another_adapter(adapted(1), str(tmp_path))
