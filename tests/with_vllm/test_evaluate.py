"""`evaluate.py --backend vllm` gives the transformers backend's greedy completions. CPU, three minutes."""

import pytest


pytest.importorskip("vllm")

import json
import os
import subprocess
import sys

import torch
import transformers
from miniatures import RECIPES
from peft import get_peft_model
from sampled import set_values

from trl_tinylora import TinyLoraConfig, export_lora


N_PROBLEMS = 50


@pytest.fixture(scope="module")
def models(toy, tmp_path_factory):
    """Arguments of the same adapted model as an adapter, an exported LoRA and merged, and of the base alone."""
    folder = tmp_path_factory.mktemp("models")
    base = transformers.AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32)
    model = get_peft_model(base, TinyLoraConfig(u=13, n_tie="all", task_type="CAUSAL_LM"))
    set_values(model, 0.05)
    model.save_pretrained(folder / "adapter")
    export_lora(model, folder / "lora")
    model.merge_and_unload().save_pretrained(folder / "merged")
    transformers.AutoTokenizer.from_pretrained(toy).save_pretrained(folder / "merged")
    named = {"base": [str(toy)], "merged": [str(folder / "merged")]}
    for name in ("adapter", "lora"):
        named[name] = [str(toy), "--adapter_path", str(folder / name)]
    return named


def greedy(arguments, backend, toy, folder):
    """The greedy completions of the first test problems, by the recipe's own command."""
    command = [sys.executable, str(RECIPES / "evaluate.py"), "--model_name_or_path", *arguments, "--backend", backend]
    command += ["--dataset_name", str(toy.parent / "data"), "--limit", str(N_PROBLEMS), "--samples", "0"]
    command += ["--dtype", "float32", "--max_new_tokens", "64", "--output_dir", str(folder / backend)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ.copy())
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / backend / "completions.jsonl").read_text().splitlines()]
    return [row["completion"] for row in rows]


@pytest.mark.parametrize("which", ["base", "adapter", "lora", "merged"])
def test_vllm_gives_the_greedy_completions_of_transformers(models, toy, tmp_path, which):
    ours = greedy(models[which], "transformers", toy, tmp_path)
    theirs = greedy(models[which], "vllm", toy, tmp_path)
    differing = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    # Float32 in another order of sums: where two tokens tie, either may come first.
    assert len(ours) == N_PROBLEMS and len(differing) <= 1, differing[:3]
