"""A server of the real vLLM: exported adapters by name, many at once, `AdapterRollout` by URL. CPU, two minutes."""

import pytest


pytest.importorskip("vllm")

import json
import urllib.request

import grpo
import torch
import transformers
import yaml
from miniatures import RECIPES
from peft import get_peft_model
from sampled import NOISE, Recorder, distance, logprobs_of, make_trainer, set_values
from trl import GRPOConfig, GRPOTrainer, TrlParser

from trl_tinylora import AdapterRollout, TinyLoraConfig, export_lora
from trl_tinylora.tasks import gsm8k


QUESTIONS = ("Tom has 3 apples and buys 4 more. How many are there?", "What is 12 minus 5?", "2 + 2 =", "Ann sells")


@pytest.fixture(scope="module")
def tokenizer(toy):
    return transformers.AutoTokenizer.from_pretrained(toy)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(question)["input_ids"] for question in QUESTIONS]


def load_base(toy):
    return transformers.AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32).eval()


def ask(url, path, **body):
    """The server's answer to a POST request, or to a GET request where there is no body."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        answer = response.read().decode()
    return json.loads(answer) if answer.startswith("{") else answer


def served(url, name, prompts, max_tokens=12):
    """Greedy completions of prompts by the adapter that the server knows under a name."""
    body = {"model": name, "prompt": prompts, "temperature": 0.0, "max_tokens": max_tokens, "logprobs": 0}
    choices = ask(url, "/v1/completions", return_token_ids=True, **body)["choices"]
    return {
        "prompt_ids": prompts,
        "completion_ids": [choice["token_ids"] for choice in choices],
        "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
    }


@pytest.mark.parametrize("fields", [{"u": 3}, {"u": 3, "n_tie": 4}, {"u": 3, "n_tie": "all"}], ids=str)
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_an_exported_adapter_is_served_with_the_adapters_log_probabilities(
    server_url, toy, prompts, tmp_path, r, fields
):
    fields = fields | {"u": min(fields["u"], r * r)}
    model = get_peft_model(load_base(toy), TinyLoraConfig(r=r, task_type="CAUSAL_LM", **fields))
    set_values(model, 0.2, seed=r)
    export_lora(model, tmp_path / "lora")
    name = f"r{r}-{fields.get('n_tie', 1)}"
    ask(server_url, "/v1/load_lora_adapter", lora_name=name, lora_path=str(tmp_path / "lora"))
    sampled = served(server_url, name, prompts)
    ask(server_url, "/v1/unload_lora_adapter", lora_name=name)
    assert distance(model, sampled) < NOISE
    with model.disable_adapter():
        assert distance(model, sampled) > 0.02


def test_sixty_four_adapters_in_one_server_answer_as_in_one_batch_of_transformers(server_url, toy, prompts, tmp_path):
    names = [f"adapter{number}" for number in range(64)]
    model = get_peft_model(load_base(toy), TinyLoraConfig(u=4, n_tie=7), adapter_name=names[0]).eval()
    for name in names[1:]:
        model.add_adapter(name, TinyLoraConfig(u=4, n_tie=7))
    for number, name in enumerate(names):
        set_values(model, 0.1, seed=number, adapter=name)
        export_lora(model, tmp_path / name, name)
        ask(server_url, "/v1/load_lora_adapter", lora_name=name, lora_path=str(tmp_path / name))
    answers = [served(server_url, name, prompts[:1], max_tokens=8) for name in names]
    ids = torch.tensor(prompts[:1] * 64)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=names,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    n_equal = 0
    for name, answer, row in zip(names, answers, generated.tolist(), strict=True):
        (tokens,), (logprobs,) = answer["completion_ids"], answer["logprobs"]
        of_adapter = logprobs_of(model, prompts[0], tokens, adapter_names=[name])
        assert (of_adapter - torch.tensor(logprobs)).abs().max() < NOISE
        n_equal += row[len(prompts[0]) :][: len(tokens)] == tokens
    # Greedy choices may differ where two tokens tie.
    assert n_equal >= 63 and len({tuple(answer["completion_ids"][0]) for answer in answers}) > 16


def test_a_rollout_by_a_server_is_the_policy_and_leaves_no_adapter_there(server_url, toy, tmp_path):
    recorder = Recorder(AdapterRollout(server_url))
    trainer = make_trainer(toy, tmp_path / "run", recorder)
    trainer.train()
    assert [call["from_policy"] for call in recorder.calls] == pytest.approx([0.0] * 5, abs=NOISE)
    assert recorder.calls[-1]["from_base"] > 0.01
    recorder.rollout.close()
    known = ask(server_url, "/v1/models")["data"]
    assert not [model["id"] for model in known if model["id"].startswith("trl-tinylora")]


def test_a_recipe_samples_from_the_adapter_by_one_key(server_url, toy, tmp_path):
    recipe = yaml.safe_load((RECIPES / "qwen2.5-7b-gsm8k" / "grpo.yaml").read_text())
    assert recipe["use_vllm"] is True and "rollouts" not in recipe
    recipe |= {
        "rollouts": "adapter",
        "vllm_mode": "server",
        "vllm_server_base_url": server_url,
        "model_name_or_path": str(toy),
        "dtype": "float32",
        "bf16": False,
        "dataset_name": str(toy.parent / "data"),
        "dataset_config": None,
        "dataset_train_split": "train",
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 32,
        "learning_rate": 0.02,
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(recipe))
    trainer = grpo.main(*TrlParser(grpo.ARGUMENTS).parse_args_and_config(["--config", str(tmp_path / "grpo.yaml")]))
    assert trainer.state.global_step == 2 and isinstance(trainer.rollout_func, AdapterRollout)
    assert trainer.model.base_model.bank.vectors("default").whole_values().abs().min() > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_trls_own_transfer_to_a_server_needs_a_gpu(server_url, toy, tmp_path):
    """TRL hands weights over by NCCL: `vllm_mode: server` was not run."""
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        GRPOTrainer(
            model=str(toy),
            reward_funcs=gsm8k.strict_reward,
            args=GRPOConfig(
                str(tmp_path),
                use_vllm=True,
                vllm_mode="server",
                vllm_server_base_url=server_url,
                use_cpu=True,
                bf16=False,
                report_to="none",
            ),
            train_dataset=gsm8k.for_rl(gsm8k.load_rows(str(toy.parent / "data"), "train")),
            peft_config=TinyLoraConfig(u=13, n_tie="all"),
        )
