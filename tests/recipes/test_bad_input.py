"""What a user gets for wrong arguments and files: one line that names the value and the way out, and no file changed.

In this process, each before a model is loaded. CPU, no network.
"""

import shutil
import sys
from pathlib import Path

import evaluate
import grpo
import pytest
import sft
from peft import get_peft_model
from training import launch
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig


ROOT = Path(__file__).parents[2]
TOY = ROOT / "recipes" / "toy"
SCRIPTS = {"grpo": grpo, "sft": sft, "evaluate": evaluate}


# Of a recipe, by its key.
WRONG_VALUES = {
    "max_steps": "max_steps: [1]",
    "learning_rate": "learning_rate: {a: 1}",
    "model_name_or_path": "model_name_or_path: 7",
    "dataset_name": "dataset_name: [1]",
    "output_dir": "output_dir: 3",
    "tying": "tying: [tiled]",
    "target_modules": "target_modules: 3",
}


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    # The paths in the YAML files are relative to it.
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter of the toy's base."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TOY / "base"), TinyLoraConfig(n_tie="all"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def places(tmp_path, saved):
    """Files and folders that are not what they are given for, by the names in the commands below."""
    shutil.copytree(saved, tmp_path / "adapter")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty.jsonl").touch()
    row = '{"question": "1 + 1?", "answer": "#### 2"}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    (tmp_path / "latin.jsonl").write_bytes((row + row.replace("1 +", "caf\xe9")).encode("latin-1"))
    (tmp_path / "cut.jsonl").write_text(row + row[:20])
    (tmp_path / "blank.jsonl").write_text(row + "\n" + row)
    (tmp_path / "rows.json").write_text("[" + row)
    for script in ("sft", "grpo"):
        text = (TOY / f"{script}.yaml").read_text()
        (tmp_path / f"typo-{script}.yaml").write_text(text + "\nlerning_rate: 0.1\n")
        for name, line in WRONG_VALUES.items():
            kept = [row for row in text.splitlines() if not row.startswith(f"{name}:")]
            (tmp_path / f"{name}-{script}.yaml").write_text("\n".join([*kept, line]))
    for name in ("cut", "list"):
        shutil.copytree(saved, tmp_path / f"{name}-adapter")
        (tmp_path / f"{name}-adapter" / "adapter_config.json").write_text("[1" if name == "cut" else "[1]")
    shutil.copytree(saved, tmp_path / "no-values")
    (tmp_path / "no-values" / "adapter_model.safetensors").unlink()
    for name, state in (
        ("cut-adapter", '{"global_step": 1}'),
        ("list-adapter", '{"global_step": 1}'),
        ("folder", "[]"),
    ):
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("max_steps: [1\n")
    return tmp_path


@pytest.fixture
def refused(monkeypatch, capsys, places):
    """`refused(script, command)`: the one line that a command ends with; `%` in it is the folder of [`places`]."""

    def call(script, command):
        before = {path: path.is_file() and path.read_bytes() for path in places.rglob("*")}
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *command.replace("%", str(places)).split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            launch.run(SCRIPTS[script].main, SCRIPTS[script].ARGUMENTS)
        printed = capsys.readouterr()
        assert ended.value.code == 1 and printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        assert {path: path.is_file() and path.read_bytes() for path in places.rglob("*")} == before
        return line.replace(str(places), "%")

    return call


TRAIN = "--config recipes/toy/sft.yaml --use_cpu true --output_dir %/out"
EVALUATE = f"--model_name_or_path {TOY / 'base'} --dataset_name %/rows.jsonl --output_dir %/out"


@pytest.mark.bad_input("a recipe's command line")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "no recipe is named: give --config FILE"),
        ("--config", "no recipe is named: give --config FILE"),
        ("--config %/nothing.yaml", "No such file or directory: '%/nothing.yaml'"),
        ("--config %/list.yaml", "%/list.yaml must contain a YAML mapping"),
        ("--config %/broken.yaml", "while parsing a flow sequence"),
        ("--model_name_or_pth a", "there is no argument --model_name_or_pth: did you mean --model_name_or_path?"),
        ("--frobnicate", "there is no argument --frobnicate (--help lists all)"),
        ("--dtype", "argument --dtype: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_answered_in_one_line(refused, script, command, message):
    assert message in refused(script, command)


@pytest.mark.bad_input("a recipe's arguments and files")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--config %/typo-sft.yaml", "there is no argument --lerning_rate: did you mean --learning_rate?"),
        (f"{TRAIN} --lerning_rate 1", "there is no argument --lerning_rate: did you mean --learning_rate?"),
        (f"{TRAIN} --max_steps many", "invalid int value: 'many'"),
        (f"{TRAIN} --adapter dora", "argument --adapter: invalid choice: 'dora'"),
        ("--use_cpu true --dataset_name %/rows.jsonl", "model_name_or_path is missing: give --model_name_or_path"),
        ("--use_cpu true --model_name_or_path recipes/toy/base", "dataset_name is missing: give --dataset_name"),
        (f"{TRAIN} --model_name_or_path ./nothing", "'./nothing' is no folder, and no Hub id (owner/name)"),
        (f"{TRAIN} --model_name_or_path nobody/nothing", "nobody/nothing is no folder, and not to be had from the Hub"),
        (
            f"{TRAIN} --model_name_or_path %/adapter",
            "%/adapter is an adapter, not a base model. Name the base that its ",
        ),
        (f"{TRAIN} --model_name_or_path %/folder", "%/folder has no config.json: it is no model"),
        (f"{TRAIN} --model_name_or_path %/file", "%/file is a file. Name the folder"),
        (f"{TRAIN} --dataset_name %/nothing.jsonl", "%/nothing.jsonl does not exist"),
        (f"{TRAIN} --dataset_name %/empty.jsonl", "%/empty.jsonl is empty: it must hold a row at least"),
        (f"{TRAIN} --dataset_name %/latin.jsonl", "%/latin.jsonl, row 2: not UTF-8 (byte 0xe9 at position"),
        (f"{TRAIN} --dataset_name %/cut.jsonl", "%/cut.jsonl, row 2: not JSON: Unterminated string"),
        (f"{TRAIN} --dataset_name %/blank.jsonl", "%/blank.jsonl, row 2: not JSON"),
        (f"{TRAIN} --dataset_name %/rows.json", "%/rows.json: not JSON"),
        (f"{TRAIN} --output_dir %/file", "output_dir='%/file' is a file: name a folder by --output_dir"),
        (f"{TRAIN} --output_dir %/adapter", "output_dir='%/adapter' already holds a finished run: choose another"),
        (f"{TRAIN} --n_values 113", "trains exactly 113 values; the nearest"),
        (f"{TRAIN} --n_values 0", "`n_values` must be at least 1, got 0"),
        (f"{TRAIN} --resume_from_checkpoint %/nothing", "resume_from_checkpoint='%/nothing' is no folder"),
        (f"{TRAIN} --resume_from_checkpoint %/folder", "resume_from_checkpoint='%/folder' is no complete checkpoint"),
        (f"{TRAIN} --resume_from_checkpoint %/cut-adapter", "%/cut-adapter/adapter_config.json is no complete JSON"),
        (f"{TRAIN} --resume_from_checkpoint %/list-adapter", "%/list-adapter/adapter_config.json must hold an object"),
        (f"{TRAIN} --output_dir %/file/out", "output_dir='%/file/out' lies in '%/file', a file: name a folder"),
        (f"{TRAIN} --output_dir=", "output_dir is empty: name a folder by --output_dir"),
        (f"{TRAIN} --max_steps 0", "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        (f"{TRAIN} --learning_rate -1", "learning_rate must be finite and at least 0, got -1.0"),
        (f"{TRAIN} --learning_rate nan", "learning_rate must be finite and at least 0, got nan"),
        (f"{TRAIN} --per_device_train_batch_size 0", "per_device_train_batch_size must be at least 1, got 0"),
        ("--use_cpu true --config %/max_steps-sft.yaml", "max_steps must be a number of type int, got [1]"),
        ("--use_cpu true --config %/learning_rate-sft.yaml", "learning_rate must be a number of type float, got {'a'"),
        ("--use_cpu true --config %/model_name_or_path-sft.yaml", "model_name_or_path must be a text, got 7"),
        ("--use_cpu true --config %/dataset_name-sft.yaml", "dataset_name must be a text, got [1]"),
        ("--use_cpu true --config %/output_dir-sft.yaml", "output_dir must be a text, got 3"),
        ("--use_cpu true --config %/tying-sft.yaml --output_dir %/out", "`tying` must be one of"),
        ("--use_cpu true --config %/target_modules-sft.yaml --output_dir %/out", "`target_modules` must be a text"),
    ],
)
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_training_that_cannot_be_is_answered_in_one_line(refused, script, command, message):
    assert message in refused(script, command.replace("sft.yaml", f"{script}.yaml"))


@pytest.mark.bad_input("a recipe's arguments and files")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--num_generations 0", "num_generations must be at least 1, got 0"),
        ("--max_completion_length 0", "max_completion_length must be at least 1, got 0"),
        ("--temperature 0", "temperature must be finite and above 0, got 0.0"),
        ("--temperature nan", "temperature must be finite and above 0, got nan"),
        ("--reward nope", "reward must be one of strict, flexible, format, random, or a dotted path"),
        ("--reward no.such.reward", "reward='no.such.reward' cannot be imported"),
    ],
)
def test_sampling_that_cannot_be_is_answered_in_one_line(refused, command, message):
    assert message in refused("grpo", f"{TRAIN.replace('sft.yaml', 'grpo.yaml')} {command}")


@pytest.mark.bad_input("an evaluation's arguments and files")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{EVALUATE} --adapter_path nothere", "'nothere' is no folder, and no Hub id (owner/name)"),
        (f"{EVALUATE} --adapter_path %/folder", "%/folder has no adapter_config.json: it is no adapter folder"),
        (f"{EVALUATE} --adapter_path recipes/toy/base", "recipes/toy/base has no adapter_config.json"),
        (f"{EVALUATE} --model_name_or_path %/adapter", "%/adapter is an adapter, not a base model"),
        (f"{EVALUATE} --model_name_or_path ./nothing", "'./nothing' is no folder, and no Hub id"),
        (f"{EVALUATE} --output_dir %/file", "output_dir='%/file' is a file: name a folder by --output_dir"),
        (f"{EVALUATE} --dataset_name %/empty.jsonl", "%/empty.jsonl is empty"),
        (f"{EVALUATE} --dataset_name %/latin.jsonl", "%/latin.jsonl, row 2: not UTF-8"),
        (f"{EVALUATE} --samples -1", "samples must be at least 0, got -1"),
        (f"{EVALUATE} --temperature nan", "temperature must be finite and above 0, got nan"),
        (f"{EVALUATE} --output_dir %/file/out", "output_dir='%/file/out' lies in '%/file', a file"),
        (f"{EVALUATE} --adapter_path %/cut-adapter", "%/cut-adapter/adapter_config.json is no complete JSON file"),
        (f"{EVALUATE} --adapter_path %/list-adapter", "%/list-adapter/adapter_config.json must hold an object"),
        (f"{EVALUATE} --adapter_path %/no-values", "%/no-values lacks adapter_model.safetensors, the values"),
        (f"--model_name_or_path {TOY / 'base'} --benchmark=", "name what to evaluate on: either --benchmark"),
    ],
)
def test_an_evaluation_that_cannot_be_is_answered_in_one_line(refused, command, message):
    assert message in refused("evaluate", command)


def test_the_traceback_is_shown_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("TRL_TINYLORA_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    with pytest.raises(ValueError, match="no recipe is named"):
        launch.run(sft.main, sft.ARGUMENTS)


def test_a_bug_is_not_hidden(monkeypatch):
    def broken(*arguments):
        raise AssertionError("a bug")

    monkeypatch.setattr(sys, "argv", ["sft.py", "--use_cpu", "true"])
    with pytest.raises(AssertionError, match="a bug"):
        launch.run(broken, sft.ARGUMENTS)
