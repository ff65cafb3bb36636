"""`es.py` with vLLM finds what it finds with transformers. CPU, two minutes."""

import pytest


pytest.importorskip("vllm")

import json
import os
import subprocess
import sys
import urllib.request

import numpy as np
from miniatures import RECIPES


# Sampling that is greedy, for each sampler draws in its own way.
COLD = ["--temperature", "1e-4", "--sigma", "0.3", "--population", "5", "--problems_per_step", "8"]
COLD += ["--num_generations", "1", "--max_completion_length", "24", "--vllm_max_model_length", "512"]


def search(folder, *arguments, steps=2):
    """The steps that the recipe logs."""
    command = [sys.executable, str(RECIPES / "es.py"), "--config", str(RECIPES / "toy" / "es.yaml"), *COLD]
    command += ["--max_steps", str(steps), "--reward", "flexible", "--output_dir", str(folder), *arguments]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=RECIPES.parent)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in (folder / "evolution.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def by_transformers(tmp_path_factory):
    return search(tmp_path_factory.mktemp("transformers") / "out")


def assert_the_same(found, wanted):
    for step, other in zip(found, wanted, strict=True):
        # Of eight completions a candidate; where two tokens tie, either may come first.
        off = 8 * np.abs(np.subtract(step["fitness"], other["fitness"]))
        assert off.sum() < 1.5 and step["generated_tokens"] == pytest.approx(other["generated_tokens"], abs=24)
    # The control: candidates differ.
    assert len(set(wanted[0]["fitness"])) > 1


def test_an_engine_in_this_process_finds_what_transformers_find(by_transformers, tmp_path):
    assert_the_same(search(tmp_path / "out", "--use_vllm", "true"), by_transformers)


def test_a_server_finds_what_transformers_find_and_an_interrupted_search_goes_on(by_transformers, server_url, tmp_path):
    served = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", server_url]
    search(tmp_path / "out", *served, steps=1)
    found = search(tmp_path / "out", *served, "--resume_from_checkpoint", "true")
    assert_the_same(found, by_transformers)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with urllib.request.urlopen(f"{server_url}/v1/models", timeout=60) as response:
        known = json.load(response)["data"]
    assert not [model["id"] for model in known if model["id"].startswith("trl-tinylora")]
