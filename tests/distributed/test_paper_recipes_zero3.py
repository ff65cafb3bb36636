"""The paper's recipes under ZeRO-3, by the command of their READMEs, on random-weight miniatures. Two CPU processes."""

import pytest
import torch
import yaml
from miniatures import FOLDERS, GSM8K, MODULES, make_miniature, write_math_rows
from runs import ROOT, accelerate_launch, refuse_failure
from tiny import values_in


# In the default run, for half a minute: test_recipes_launched.py launches sft.py there.
BY_DEFAULT = ("llama-3.2-3b-gsm8k", "grpo")
RUNS = [
    pytest.param(
        folder,
        name,
        id=f"{folder.name}-{name}",
        marks=() if (folder.name, name) == BY_DEFAULT else pytest.mark.slow,
    )
    for folder in FOLDERS
    for name in ("grpo", "sft")
]


@pytest.mark.parametrize(("folder", "name"), RUNS)
def test_a_paper_recipe_runs_three_steps_under_zero3(tmp_path, folder, name):
    path = folder / f"{name}.yaml"
    settings = yaml.safe_load(path.read_text())
    overrides = {
        "model_name_or_path": make_miniature(settings["model_name_or_path"], tmp_path / "miniature"),
        "dataset_name": GSM8K if settings["task"] == "gsm8k" else write_math_rows(tmp_path / "math.jsonl"),
        "max_steps": 3,
        "gradient_accumulation_steps": 1,
        "output_dir": tmp_path / "run",
        "use_cpu": not torch.cuda.is_available(),
    }
    if name == "grpo":
        # A random reward: the miniature answers nothing right, and the values would stay where they are.
        overrides |= {"use_vllm": False, "max_completion_length": 8, "reward": "random"}
    given = [text for key, value in overrides.items() for text in (f"--{key}", value)]
    completed = accelerate_launch("zero3", ROOT / "recipes" / f"{name}.py", "--config", path, *given)
    refuse_failure(completed)
    values = values_in(tmp_path / "run")
    groups = -(-MODULES // settings["n_tie"])
    assert values.dtype == torch.float32 and values.numel() == groups * settings["u"]
    assert values.isfinite().all() and values.abs().min() > 0
