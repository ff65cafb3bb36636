"""`AdapterRollout` without vLLM: what it refuses, and what it asks a server, by a stand-in that notes every request.

The real vLLM is in tests/with_vllm. CPU, seconds.
"""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from quantisations import quantisation
from safetensors.torch import load_file
from sampled import set_values
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_tinylora import AdapterRollout, TinyLoraConfig, export_lora
from trl_tinylora.vllm.engine import max_lora_rank
from trl_tinylora.vllm.rollout import _refuse_quantised, _refuse_settings, _tokenize


@pytest.fixture
def make_trainer(arguments, base_folder, rows):
    def make(rollout=None, peft_config=None, **args):
        return GRPOTrainer(
            model=base_folder,
            reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
            args=GRPOConfig(**arguments(num_generations=2, max_completion_length=4, **args)),
            train_dataset=rows.select_columns(["prompt"]),
            peft_config=TinyLoraConfig(u=3, n_tie="all") if peft_config is None else peft_config,
            rollout_func=rollout,
        )

    return make


def test_a_server_gets_the_adapter_as_a_lora_and_is_asked_for_the_trainers_settings(
    stand_in, make_trainer, rows, tmp_path
):
    rollout = AdapterRollout(stand_in.url + "/")
    trainer = make_trainer(rollout, temperature=0.7, top_p=0.9, top_k=20, generation_kwargs={"seed": 3})
    prompts = [row["prompt"] for row in rows.select(range(3))]
    set_values(trainer.model, 0.1, seed=1)
    made = rollout(prompts, trainer)
    assert made["completion_ids"] == [[5, 0], [5, 1], [5, 2]]
    assert made["logprobs"] == [[-0.5, -1.0], [-0.5, -2.0], [-0.5, -3.0]]
    assert made["prompt_ids"] == trainer._tokenize_prompts(prompts)[0]
    (path, loaded), (other, asked) = stand_in.requests
    assert path == "/v1/load_lora_adapter" and other == "/v1/completions"
    assert asked["model"] == loaded["lora_name"] and asked["prompt"] == made["prompt_ids"]
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 4, "n": 1, "logprobs": 0, "seed": 3}
    assert wanted.items() <= asked.items() and asked["return_token_ids"] is True
    export_lora(trainer.model, tmp_path / "lora")
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert all(torch.equal(stand_in.files[0][name], value) for name, value in written.items())
    assert stand_in.files[0].keys() == written.keys()


def test_an_adapter_is_sent_where_its_values_have_changed_and_under_a_new_name(stand_in, make_trainer, rows):
    rollout = AdapterRollout(stand_in.url)
    trainer = make_trainer(rollout)
    prompts = [rows[0]["prompt"]]
    for seed in (1, 1, 2):
        set_values(trainer.model, 0.1, seed=seed)
        rollout(prompts, trainer)
    paths = [path.rpartition("/")[2] for path, _ in stand_in.requests]
    assert paths == [
        "load_lora_adapter", "completions", "completions", "unload_lora_adapter", "load_lora_adapter", "completions"
    ]  # fmt: skip
    first, second = (body for path, body in stand_in.requests if path == "/v1/load_lora_adapter")
    assert first["lora_name"] != second["lora_name"] == stand_in.requests[-1][1]["model"]
    # Shared memory holds one adapter at a time.
    assert Path(second["lora_path"]).is_dir() and not Path(first["lora_path"]).exists()
    rollout.close()
    assert stand_in.requests[-1] == ("/v1/unload_lora_adapter", {"lora_name": second["lora_name"]})
    assert not Path(second["lora_path"]).exists()


def test_the_files_go_where_the_server_can_read_them(stand_in, make_trainer, rows, tmp_path):
    rollout = AdapterRollout(stand_in.url, folder=tmp_path, dtype=torch.bfloat16)
    rollout([rows[0]["prompt"]], make_trainer(rollout))
    assert Path(stand_in.requests[0][1]["lora_path"]).is_relative_to(tmp_path)
    assert {value.dtype for value in stand_in.files[0].values()} == {torch.bfloat16}


@pytest.mark.parametrize("prompt", ["2 + 2", [{"role": "user", "content": "2 + 2"}]], ids=["text", "conversation"])
def test_prompts_are_tokenized_as_the_trainer_does(make_trainer, prompt):
    trainer = make_trainer(chat_template_kwargs={"enable_thinking": False})
    assert _tokenize([prompt, prompt], trainer) == trainer._tokenize_prompts([prompt, prompt])[0]


@pytest.mark.bad_input("a sampler's settings or server")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"use_vllm": True}, "set use_vllm to false"),
        ({"vllm_structured_outputs_regex": "a+"}, "generation_kwargs"),
        ({"vllm_enable_sleep_mode": True}, "leave it out"),
        ({"vllm_tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"generation_kwargs": {"n": 4}}, "num_generations"),
    ],
    ids=str,
)
def test_settings_that_it_would_not_keep_are_refused_by_name(make_trainer, changed, words):
    trainer = make_trainer()
    # The trainer itself refuses some of them without vLLM.
    for name, value in changed.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=words) as caught:
        _refuse_settings(trainer)
    assert next(iter(changed)).removeprefix("generation_kwargs") in str(caught.value)


@pytest.mark.bad_input("a sampler's settings or server")
def test_options_of_an_engine_and_a_server_are_refused_together():
    with pytest.raises(ValueError, match="enforce_eager.*vllm serve"):
        AdapterRollout("http://localhost:1", enforce_eager=True)


@pytest.mark.bad_input("a sampler's settings or server")
def test_a_server_without_a_scheme_is_refused():
    with pytest.raises(ValueError, match="http://localhost:8000"):
        AdapterRollout("localhost:8000")


@pytest.mark.bad_input("a sampler's settings or server")
def test_without_vllm_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        AdapterRollout()


@pytest.mark.bad_input("a sampler's settings or server")
def test_a_server_that_does_not_answer_is_named(make_trainer, rows):
    rollout = AdapterRollout("http://localhost:9")
    with pytest.raises(ConnectionError, match="localhost:9.*vllm serve"):
        rollout([rows[0]["prompt"]], make_trainer(rollout))


@pytest.mark.bad_input("a sampler's settings or server")
def test_a_server_of_another_model_is_refused(stand_in, make_trainer, rows):
    stand_in.model = "Qwen/Qwen2.5-7B"
    rollout = AdapterRollout(stand_in.url)
    with pytest.raises(ValueError, match="Qwen2.5-7B"):
        rollout([rows[0]["prompt"]], make_trainer(rollout))
    assert not stand_in.requests


@pytest.mark.bad_input("a sampler's settings or server")
@pytest.mark.parametrize(
    ("path", "status", "error", "words"),
    [
        ("/v1/load_lora_adapter", 404, ValueError, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ("/v1/load_lora_adapter", 400, RuntimeError, "rank 2 is greater"),
        ("/v1/completions", 500, RuntimeError, "rank 2 is greater"),
    ],
)
def test_what_a_server_refuses_is_said_in_its_words(stand_in, make_trainer, rows, path, status, error, words):
    stand_in.replies[path] = (status, "rank 2 is greater")
    rollout = AdapterRollout(stand_in.url)
    with pytest.raises(error, match=words):
        rollout([rows[0]["prompt"]], make_trainer(rollout))


@pytest.mark.bad_input("a sampler's settings or server")
def test_a_model_without_the_adapter_is_refused(stand_in, make_trainer, rows):
    rollout = AdapterRollout(stand_in.url, adapter_name="other")
    with pytest.raises(ValueError, match="no TinyLoRA adapter 'other'"):
        rollout([rows[0]["prompt"]], make_trainer(rollout))


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (2, 8), (8, 8), (9, 16), (512, 512)])
def test_the_smallest_rank_that_vllm_takes_is_asked_for(rank, limit):
    assert max_lora_rank(rank) == limit


@pytest.mark.bad_input("a sampler's settings or server")
@pytest.mark.parametrize("kind", ["nf4", "8 bits", "torchao int8"])
def test_weights_that_the_trainer_quantised_while_it_loaded_them_are_refused(make_model, kind):
    model = get_peft_model(make_model(quantization_config=quantisation(kind)), TinyLoraConfig())
    with pytest.raises(ValueError, match=r"are quantised by .*AdapterRollout\(model=folder\)"):
        _refuse_quantised(model)


def test_weights_that_vllm_loads_as_the_trainer_does_are_not_refused(make_model, tmp_path):
    _refuse_quantised(get_peft_model(make_model(), TinyLoraConfig()))
    make_model(quantization_config=quantisation("nf4")).save_pretrained(tmp_path)
    _refuse_quantised(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), TinyLoraConfig()))
