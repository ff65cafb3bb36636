"""The recipes of the paper's experiments: what can be checked of them without the models' weights.

Numbers of values are compared with the paper's, written here or in published.json; the recipes run for three steps on
random-weight miniatures and real problems, with nothing changed but model, data, lengths, batch sizes and the engine
that samples.
"""

import copy
import json
import math
import re
import shlex
import warnings
from pathlib import Path

import evaluate
import grpo
import pytest
import sft
import torch
import yaml
from comparison.arguments import CompareArguments
from comparison.plan import Plan
from miniatures import FOLDERS, GSM8K, MODULES, make_miniature, write_math_rows
from paper import published
from peft import LoraConfig, get_peft_model
from training.arguments import AdapterArguments
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from trl import TrlParser

from trl_tinylora import TinyLoraConfig


ROOT = Path(__file__).parents[2]
SCRIPTS = {"grpo": grpo, "sft": sft}
RUNS = [pytest.param(folder, name, id=f"{folder.name}-{name}") for folder in FOLDERS for name in SCRIPTS]
COMPARISONS = [path for folder in FOLDERS for path in sorted(folder.glob("compare*.yaml"))]
# config.json of each model: layers, and the rows and columns of q, k, v, o, gate, up and down.
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": (24, 896, 128, 4864),
    "Qwen/Qwen2.5-1.5B-Instruct": (28, 1536, 256, 8960),
    "Qwen/Qwen2.5-3B-Instruct": (36, 2048, 256, 11008),
    "Qwen/Qwen2.5-7B-Instruct": (28, 3584, 512, 18944),
    "Qwen/Qwen2.5-Math-7B": (28, 3584, 512, 18944),
    "meta-llama/Llama-3.2-3B-Instruct": (28, 3072, 1024, 8192),
}
# The model cards' own numbers of parameters, in billions.
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 0.49,
    "Qwen/Qwen2.5-1.5B-Instruct": 1.54,
    "Qwen/Qwen2.5-3B-Instruct": 3.09,
    "Qwen/Qwen2.5-7B-Instruct": 7.62,
    "Qwen/Qwen2.5-Math-7B": 7.62,
    "meta-llama/Llama-3.2-3B-Instruct": 3.21,
}
# The numbers of values on the paper's axes and in its tables, by comparison; LoRA and full fine-tuning apart.
PAPER_COUNTS = {
    "qwen2.5-7b-gsm8k/compare.yaml": [1, 2, 4, 7, 13, 25, 49, 64, 98, 196, 392, 1600, 4096, 12544, 16384, 102400]
    + [262144, 802816, 1048576, 12845056, 51380224],
    "qwen2.5-7b-gsm8k/compare_13.yaml": [13, 13],
    "qwen2.5-0.5b-gsm8k/compare.yaml": [168, 2688, 43008, 688128],
    "qwen2.5-1.5b-gsm8k/compare.yaml": [196, 3136, 50176, 802816],
    "qwen2.5-3b-gsm8k/compare.yaml": [16, 63, 126, 252, 4032, 64512, 1032192],
    "qwen2.5-3b-gsm8k/compare_rank.yaml": sorted(5 * [252, 1008, 4032, 16128]),
    "qwen2.5-3b-gsm8k/compare_sharing.yaml": sorted(
        [1, 4, 16, 64, 4, 16, 64, 256, 32, 128, 512, 2048, 252, 1008, 4032, 16128]
    ),
    "qwen2.5-3b-gsm8k/compare_precision.yaml": sorted(3 * [8, 16, 32, 63, 126, 252, 14, 21, 35, 63, 126, 252]),
    "llama-3.2-3b-gsm8k/compare.yaml": sorted(
        [1, 4, 16, 64, 4, 16, 64, 256, 25, 100, 400, 1600, 196, 784, 3136, 12544]
    ),
    "qwen2.5-3b-math/compare.yaml": [16, 63, 252, 504, 8064, 129024],
    "qwen2.5-7b-math/compare.yaml": [13, 49, 196, 392, 6272, 100352],
    "qwen2.5-math-7b-math/compare.yaml": [196, 392, 6272, 100352],
}
# Their further values only rescale the step, which is what the figures ask about.
REDUNDANT = {"qwen2.5-3b-gsm8k/compare_rank.yaml", "qwen2.5-3b-gsm8k/compare_sharing.yaml"}


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    # The paths in the YAML files are relative to it.
    monkeypatch.chdir(ROOT)


def short_name(path):
    return f"{path.parent.name}/{path.name}"


def settings_in(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def parse(name, path, **overrides):
    """As the script parses it; without a GPU, bf16 needs to be told that there is none."""
    if not torch.cuda.is_available():
        overrides.setdefault("use_cpu", True)
    given = [text for key, value in overrides.items() for text in (f"--{key}", str(value))]
    return TrlParser(SCRIPTS[name].ARGUMENTS).parse_args_and_config(["--config", str(path), *given])


def config_for(model):
    """The model's published architecture, as far as it decides the number of values."""
    layers, hidden, key_value, intermediate = SHAPES[model]
    is_llama = "Llama" in model
    head = 64 if "0.5B" in model else 128
    return (LlamaConfig if is_llama else Qwen2Config)(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        num_key_value_heads=key_value // head,
        intermediate_size=intermediate,
        vocab_size=128256 if is_llama else 152064 if "7B" in model else 151936,
        tie_word_embeddings="7B" not in model,
    )


def test_there_are_recipes_and_each_folder_is_complete():
    assert len(FOLDERS) == 8
    for folder in FOLDERS:
        assert {"README.md", "grpo.yaml", "sft.yaml", "compare.yaml"} <= {path.name for path in folder.iterdir()}
    assert {short_name(path) for path in COMPARISONS} == PAPER_COUNTS.keys()


@pytest.mark.parametrize(("folder", "name"), RUNS)
def test_every_yaml_parses_into_its_trainers_config(folder, name):
    path = folder / f"{name}.yaml"
    script_args, training_args, model_args, adapter_args = parse(name, path)
    settings = settings_in(path)
    assert model_args.model_name_or_path in SHAPES and training_args.learning_rate == settings["learning_rate"]
    for key, value in settings.items():
        found = [
            getattr(item, key) for item in (script_args, training_args, model_args, adapter_args) if key in vars(item)
        ]
        # `reward` is a list, and may be written as its one name.
        assert value in found or [value] in found or (key, found) == ("report_to", [[]]), (key, found)


def test_a_misspelt_key_is_refused(tmp_path):
    path = tmp_path / "grpo.yaml"
    path.write_text((FOLDERS[0] / "grpo.yaml").read_text().replace("num_generations:", "num_generation:"))
    with pytest.raises(ValueError, match="num_generation"):
        parse("grpo", path)


@pytest.mark.parametrize(("folder", "name"), RUNS)
def test_every_key_says_where_its_value_comes_from(folder, name):
    lines = (folder / f"{name}.yaml").read_text().splitlines()
    keys = [line for line in lines if re.match(r"\w+:", line)]
    assert len(keys) == len(settings_in(folder / f"{name}.yaml")) > 20
    unsourced = [line for line in keys if not re.search(r"  # (paper\b|not stated in the paper, ours\b)", line)]
    assert unsourced == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_files_that_a_recipe_names_exist(folder):
    text = "\n".join(path.read_text() for path in [folder / "README.md", *folder.glob("*.yaml")])
    named = set(re.findall(r"recipes/[\w./-]+\.(?:yaml|py)", text))
    assert f"recipes/{folder.name}/compare.yaml" in named and "recipes/accelerate/single.yaml" in named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_commands_of_a_readme_are_accepted(folder):
    (block,) = re.findall(r"```bash\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    commands = [command for command in commands if command]
    evaluated, compared, trained = [], [], []
    for command in commands:
        if command[1] == "recipes/evaluate.py":
            evaluated.append(TrlParser(evaluate.ARGUMENTS).parse_args_and_config(command[2:]))
        elif command[1] == "recipes/compare.py":
            (arguments,) = TrlParser(CompareArguments).parse_args_and_config(command[2:])
            compared.append(command[command.index("--config") + 1])
            assert arguments.jobs == 8
        else:
            assert command[:3] == ["accelerate", "launch", "--config_file"]
            assert yaml.safe_load(Path(command[3]).read_text())["distributed_type"] == "NO"
            trained.append(Path(command[4]).stem)
            assert command[5:] == ["--config", f"recipes/{folder.name}/{trained[-1]}.yaml"]
    assert trained == ["grpo", "sft"] and len(evaluated) == 2
    assert sorted(compared) == sorted(path.relative_to(ROOT).as_posix() for path in folder.glob("compare*.yaml"))
    settings = settings_in(folder / "grpo.yaml")
    for model_args, evaluation_args in evaluated:
        assert model_args.model_name_or_path == settings["model_name_or_path"]
        assert evaluation_args.max_new_tokens == settings["max_completion_length"]
    names = ["gsm8k"]
    if folder.name.endswith("math"):
        names += ["math500", "minerva", "olympiadbench", "aime24", "amc23"]
    assert evaluated[0][1].benchmark == names
    assert [args.adapter_path for _, args in evaluated] == [None, settings["output_dir"]]


@pytest.mark.parametrize("path", COMPARISONS, ids=short_name)
def test_the_arms_of_a_comparison_differ_in_listed_keys_only(path):
    plan = Plan(published.read_comparison(path))
    assert plan.sweep() and plan.final_names()


def test_an_arm_that_differs_in_another_key_is_refused(tmp_path):
    folder = FOLDERS[0]
    (tmp_path / "sft.yaml").write_text((folder / "sft.yaml").read_text().replace("warmup_steps: 0", "warmup_steps: 5"))
    arguments = published.read_comparison(folder / "compare.yaml")
    arguments.arms = copy.deepcopy(arguments.arms)
    arguments.arms["sft"]["recipe"] = str(tmp_path / "sft.yaml")
    with pytest.raises(ValueError, match="warmup_steps"):
        Plan(arguments)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_both_arms_see_as_many_problems_a_step_as_the_paper(folder):
    rl, sft_settings = (settings_in(folder / f"{name}.yaml") for name in SCRIPTS)
    completions = rl["per_device_train_batch_size"] * rl["gradient_accumulation_steps"]
    demonstrations = sft_settings["per_device_train_batch_size"] * sft_settings["gradient_accumulation_steps"]
    batch, samples = (256, 8) if folder.name.endswith("math") else (64, 4)
    assert (completions / rl["num_generations"], demonstrations) == (batch, batch)
    assert rl["num_generations"] == samples
    assert rl["num_train_epochs"] == sft_settings["num_train_epochs"] == 3
    assert rl["beta"] == (0.001 if folder.name.endswith("math") else 0.0)


@pytest.mark.parametrize("path", COMPARISONS, ids=short_name)
def test_the_grid_of_learning_rates_lies_within_the_papers(path):
    paper = [1e-7, 5e-7, 1e-6, 5e-6, 1e-5, 1e-4, 2e-4]
    sizes = settings_in(path)["sizes"]
    grids = [grid for size in sizes.values() for grid in size["learning_rates"].values()]
    for grid in grids:
        assert sorted(grid) == grid and paper[0] <= grid[0] and grid[-1] == paper[-1]
        assert path.name != "compare.yaml" or grid == paper


@pytest.mark.parametrize("path", COMPARISONS, ids=short_name)
def test_the_numbers_of_values_are_the_papers(path):
    model = settings_in(path.parent / "grpo.yaml")["model_name_or_path"]
    layers, hidden, key_value, intermediate = SHAPES[model]
    counts = []
    for size in settings_in(path)["sizes"].values():
        arguments = size["arguments"]
        kind = arguments.get("adapter", "tinylora")
        counted = published.count_values(model, arguments)
        if kind == "lora":
            # Rows and columns of q and o, k and v, gate, up and down.
            both = 2 * (hidden + hidden) + 2 * (hidden + key_value) + 3 * (hidden + intermediate)
            assert counted == layers * both * arguments["lora_r"]
        elif kind == "full":
            assert counted / 1e9 == pytest.approx(PARAMETERS[model], abs=0.006)
        else:
            modules = 7 * layers
            tied = modules if arguments["n_tie"] == "all" else arguments["n_tie"]
            is_structured = arguments.get("tying") == "structured"
            groups = 7 * math.ceil(layers / tied) if is_structured else math.ceil(modules / tied)
            assert counted == groups * arguments["u"]
            counts.append(counted)
    assert sorted(counts) == PAPER_COUNTS[short_name(path)]


@pytest.mark.parametrize("entry", published.read()["tables"], ids=lambda entry: f"{entry['recipe']}-{entry['section']}")
def test_every_published_number_stands_at_its_number_of_values(entry):
    comparison = published.read_comparison(ROOT / "recipes" / entry["recipe"] / entry["comparison"])
    model = published._settings_of(entry["recipe"])["model_name_or_path"]
    assert len(entry["rows"]) > 3
    for row in entry["rows"]:
        if row["size"] is not None:
            assert published.count_values(model, comparison.sizes[row["size"]]["arguments"]) == row["values"]
        assert len(row["paper"]) == len(entry["columns"])


@pytest.mark.parametrize("model", SHAPES)
def test_the_counts_are_those_of_the_real_architectures(model):
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config_for(model))
    assert published.count_values(model, {"adapter": "full"}) / 1e9 == pytest.approx(
        sum(parameter.numel() for parameter in real.parameters()) / 1e9, abs=0.001
    )
    # PEFT's own count, and one value a module.
    adapted = get_peft_model(real, LoraConfig(r=8, target_modules="all-linear"))
    lora = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert published.count_values(model, {"adapter": "lora", "lora_r": 8}) == lora
    config = TinyLoraConfig.for_budget(
        config_for(model), published.count_values(model, {"u": 1, "n_tie": 4}), exact=True
    )
    assert (config.u, config.n_tie) == (1, 4)


@pytest.mark.parametrize("path", COMPARISONS, ids=short_name)
def test_only_the_two_ablations_of_freedom_have_values_that_add_none(path):
    warned = set()
    for name, size in settings_in(path)["sizes"].items():
        if size["arguments"].get("adapter", "tinylora") == "tinylora":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                TinyLoraConfig(**AdapterArguments(**size["arguments"]).tinylora_fields())
            warned |= {name for item in caught if "degrees of freedom" in str(item.message)}
    assert bool(warned) == (short_name(path) in REDUNDANT), warned


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_shows_the_published_numbers_and_that_nothing_was_run(folder):
    document = (folder / "README.md").read_text(encoding="utf-8")
    assert document == published.renewed(folder.name, published.read()), "run python recipes/tables.py"
    tables = [entry for entry in published.read()["tables"] if entry["recipe"] == folder.name]
    assert document.count("| not run |") == sum(len(entry["rows"]) for entry in tables) > 0


def test_a_changed_number_makes_a_readme_stale():
    numbers = published.read()
    table = next(entry for entry in numbers["tables"] if entry["recipe"] == FOLDERS[0].name)
    table["rows"][0]["paper"] = [12.3] * len(table["columns"])
    document = (FOLDERS[0] / "README.md").read_text(encoding="utf-8")
    assert "12.3" not in document and "12.3" in published.renewed(FOLDERS[0].name, numbers)


def cell_of(arm, size, strict, spread, flexible):
    """As a summary has it, of what the tables read."""
    accuracy = {"strict": {"mean": strict, "std": spread}, "flexible": {"mean": flexible, "std": spread}}
    return {"arm": arm, "size": size, "accuracy": {"greedy": accuracy}}


def test_a_result_of_our_own_replaces_not_run():
    entry = copy.deepcopy(next(entry for entry in published.read()["tables"] if entry["section"] == "the-headline"))
    comparison = published.read_comparison(ROOT / "recipes" / entry["recipe"] / entry["comparison"])
    summary = {
        "cells": [
            cell_of("untrained", None, 0.5, None, 0.75),
            cell_of("zero", "13", 0.5, None, 0.75),
            cell_of("rl-format", "13", 0.8, 0.01, 0.9),
        ]
    }
    before = published.table(published.read(), entry, comparison, None)
    after = published.table(published.read(), entry, comparison, summary)
    assert "| untrained | nothing | 0 | not run |" in before and "| RL, format-only reward |" not in before
    assert "| untrained | nothing | 0 | 50.0 / 75.0 |" in after
    assert "| zero adapter | nothing | 0 | 50.0 / 75.0 | - | - |" in after
    assert "| RL, format-only reward | TinyLoRA, 13 values | 13 | 80.0 ± 1.0 / 90.0 ± 1.0 | - | - |" in after
    entry["rows"].append({"arm": "rl", "size": "14", "values": 14, "paper": [1.0], "replications": []})
    with pytest.raises(ValueError, match="'14'"):
        published.table(published.read(), entry, comparison, None)


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    """A miniature of each model, and rows for each task; made once."""
    folder = tmp_path_factory.mktemp("miniatures")
    models = {name: make_miniature(name, folder / name.replace("/", "-")) for name in SHAPES}
    return models, {"gsm8k": GSM8K, "math": write_math_rows(folder / "math.jsonl")}


def run_three_steps(miniatures, folder, name, output_dir, **overrides):
    """Runs a recipe in this process, with nothing changed that is not about its size or its machine."""
    models, data = miniatures
    settings = settings_in(folder / f"{name}.yaml")
    overrides |= {
        "model_name_or_path": models[settings["model_name_or_path"]],
        "dataset_name": data[settings["task"]],
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "output_dir": output_dir,
    }
    if name == "grpo":
        overrides |= {"use_vllm": False, "max_completion_length": 8}
        overrides["per_device_train_batch_size"] = settings["num_generations"]
    return SCRIPTS[name].main(*parse(name, folder / f"{name}.yaml", **overrides))


@pytest.mark.parametrize(("folder", "name"), RUNS)
def test_a_recipe_runs_three_steps_on_a_miniature_and_real_problems(miniatures, folder, name, tmp_path):
    trainer = run_three_steps(miniatures, folder, name, tmp_path / "run")
    settings = settings_in(folder / f"{name}.yaml")
    (values,) = [value for value in trainer.model.parameters() if value.requires_grad]
    assert trainer.state.global_step == 3 and values.dtype == torch.float32 and values.isfinite().all()
    assert values.numel() == math.ceil(MODULES / settings["n_tie"]) * settings["u"]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    logged = {key for entry in trainer.state.log_history for key in entry}
    if name == "grpo":
        assert "rewards/strict_reward/mean" in logged and ("kl" in logged) == (settings["beta"] > 0)
        prompts = trainer.train_dataset[0]["prompt"]
        instruction = r"\boxed{}" if settings["task"] == "math" else '"####"'
        assert instruction in prompts[-1]["content"]
    else:
        assert "loss" in logged and values.abs().min() > 0


@pytest.mark.parametrize("folder", [FOLDERS[0], FOLDERS[-1]], ids=lambda folder: folder.name)
def test_the_random_reward_moves_the_values(miniatures, folder, tmp_path):
    arm = published.read_comparison(folder / "compare.yaml").arms["rl-random"]
    trainer = run_three_steps(miniatures, folder, "grpo", tmp_path / "run", **arm["arguments"])
    (values,) = [value for value in trainer.model.parameters() if value.requires_grad]
    assert values.abs().min() > 0
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 2
