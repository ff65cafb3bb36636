"""Completions of candidates by a server, of which a stand-in notes every request. A tiny model, CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.arguments import GenerationArguments
from evaluation.generation import TransformersGenerator
from evolution.arguments import EvolutionArguments
from evolution.candidates import Candidates
from evolution.sampling import make_sampler
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from trl_tinylora import TinyLoraConfig, export_lora


ROWS = [{"prompt": [{"role": "user", "content": text}]} for text in ("How many cups?", "Cleo owns 22 cups.")]


def length(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def candidates(make_model, base_folder, stand_in, tmp_path):
    model = get_peft_model(make_model(), TinyLoraConfig(n_tie=4)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    generator = TransformersGenerator(model, tokenizer, GenerationArguments(temperature=0.7, max_new_tokens=6))
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": stand_in.url}
    args = EvolutionArguments(output_dir=str(tmp_path), **served)
    return Candidates(model, tokenizer, make_sampler(args, model, generator, 3, None), 3)


def asked_of(stand_in, path):
    return [body for name, body in stand_in.requests if name == path]


def test_each_completion_comes_from_its_candidate_under_a_seed_of_its_own(candidates, stand_in, tmp_path):
    # A token more for each candidate, so that the rewards say whose completion is whose.
    end = candidates.tokenizer.eos_token_id
    stand_in.complete = lambda body, place: [5] * int(body["model"].rpartition("-")[2]) + [end, 5]
    values = np.random.default_rng(0).normal(0, 1, (3, 4))
    rewards, tokens = candidates.rewards(values, ROWS, 2, [length], seed=40)
    assert rewards.tolist() == [[[n, n], [n, n]] for n in (2.0, 3.0, 4.0)] and tokens == rewards.sum()
    asked = asked_of(stand_in, "/v1/completions")
    assert sorted(body["seed"] for body in asked) == list(range(40, 52))
    texts = [candidates.tokenizer.decode(body["prompt"][0]) for body in sorted(asked, key=lambda body: body["seed"])]
    assert ["22" in text for text in texts] == [False, False, True, True] * 3
    wanted = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 6}
    assert all(wanted.items() <= body.items() and len(body["prompt"]) == 1 for body in asked)
    for number, name in enumerate(candidates.names):
        export_lora(candidates.model, tmp_path / name, name)
        written = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(torch.equal(stand_in.files[number][key], value) for key, value in written.items())


def test_a_step_replaces_the_candidates_of_the_one_before_and_the_last_are_taken_off(candidates, stand_in):
    for seed in (0, 1):
        candidates.rewards(np.random.default_rng(seed).normal(0, 1, (3, 4)), ROWS, 1, [length], seed)
    loaded = [body["lora_name"] for body in asked_of(stand_in, "/v1/load_lora_adapter")]
    assert len(set(loaded)) == 6
    assert [body["lora_name"] for body in asked_of(stand_in, "/v1/unload_lora_adapter")] == loaded[:3]
    candidates.sampler.close()
    assert [body["lora_name"] for body in asked_of(stand_in, "/v1/unload_lora_adapter")] == loaded
    assert not any(Path(body["lora_path"]).exists() for body in asked_of(stand_in, "/v1/load_lora_adapter"))
