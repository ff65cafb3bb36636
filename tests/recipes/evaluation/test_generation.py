"""What generates: transformers, and vLLM by a stand-in, since it is not installable where this was written. CPU."""

import sys
import types
from pathlib import Path

import evaluate
import pytest
import torch
import trl
from evaluation import generation
from evaluation.arguments import GenerationArguments
from evaluation.generation import TransformersGenerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tasks import gsm8k


ROOT = Path(__file__).parents[3]


TOY = ROOT / "recipes" / "toy"


SAMPLE = ROOT / "tests" / "data" / "gsm8k_sample.jsonl"


def parse(command):
    return trl.TrlParser(evaluate.ARGUMENTS).parse_args_and_config(command.split())


@pytest.fixture
def vllm(monkeypatch):
    """A module that answers as vLLM does, and what it was asked."""
    calls = {"engines": [], "requests": []}

    class LLM:
        def __init__(self, **options):
            calls["engines"].append(options)

        def generate(self, prompts, parameters, lora_request, use_tqdm):
            calls["requests"].append((prompts, parameters, lora_request))
            outputs = []
            for wanted in parameters:
                item = types.SimpleNamespace(text="#### 2", token_ids=[1, 2, 3], finish_reason="stop")
                cut = types.SimpleNamespace(text="so", token_ids=[1] * wanted.max_tokens, finish_reason="length")
                outputs.append(types.SimpleNamespace(outputs=[item, cut, cut][: wanted.n]))
            return outputs

    module = types.ModuleType("vllm")
    module.__spec__ = types.SimpleNamespace(name="vllm")
    module.LLM, module.SamplingParams = LLM, types.SimpleNamespace
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: (name, number, path)
    for name, stand_in in (("vllm", module), ("vllm.lora", types.ModuleType("vllm.lora")), (request.__name__, request)):
        monkeypatch.setitem(sys.modules, name, stand_in)
    return calls


def adapted(config, folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TOY / "base"), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


def test_vllm_gets_tinylora_as_a_plain_lora_of_the_same_model(tmp_path, vllm):
    expected = logits(adapted(TinyLoraConfig(n_tie="all"), tmp_path / "model"))
    command = f"--backend vllm --model_name_or_path {TOY / 'base'} --adapter_path {tmp_path / 'model'}"
    args = parse(f"{command} --dataset_name {SAMPLE} --limit 3 --samples 3 --output_dir {tmp_path / 'out'}")
    generator = evaluate._load_generator(*args, AutoTokenizer.from_pretrained(TOY / "base"))
    (engine,) = vllm["engines"]
    assert engine["enable_lora"] and engine["max_lora_rank"] == 8 and engine["model"] == str(TOY / "base")
    name, number, path = generator.lora_request
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TOY / "base"), path)
    assert type(served.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(served), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(TOY / "base")), expected, atol=1e-2)


def test_vllm_gets_a_merged_model_where_the_adapter_is_more_than_a_lora(tmp_path, vllm):
    expected = logits(adapted(TinyLoraConfig(n_tie="all", modules_to_save=["norm"]), tmp_path / "model"))
    (model_args, args) = parse(f"--model_name_or_path {TOY / 'base'} --dataset_name a.jsonl")
    served, lora = generation.prepare_for_vllm(model_args, str(tmp_path / "model"), tmp_path)
    assert lora is None and served == str(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(served)), expected, rtol=1e-4, atol=1e-4)


def test_vllm_gets_a_plain_lora_and_an_untrained_model_as_they_are(tmp_path, vllm):
    adapted(LoraConfig(r=9, target_modules=["q_proj"]), tmp_path / "model")
    model_args, args = parse(f"--model_name_or_path {TOY / 'base'} --dataset_name a.jsonl")
    untrained = str(TOY / "base"), None
    assert generation.prepare_for_vllm(model_args, None, tmp_path) == untrained
    prepared = generation.prepare_for_vllm(model_args, str(tmp_path / "model"), tmp_path)
    assert prepared == (untrained[0], (str(tmp_path / "model"), 9))
    generation.VllmGenerator(model_args, AutoTokenizer.from_pretrained(TOY / "base"), str(tmp_path / "model"), args)
    assert vllm["engines"][-1]["max_lora_rank"] == 16


def test_vllms_completions_are_kept_and_graded_like_transformers(tmp_path, vllm):
    command = f"--backend vllm --model_name_or_path {TOY / 'base'} --dataset_name {TOY / 'data'} --limit 3"
    metrics = evaluate.main(*parse(f"{command} --samples 3 --max_new_tokens 7 --output_dir {tmp_path}"))
    assert "enable_lora" not in vllm["engines"][0]
    assert metrics["sampled"]["truncated"] == pytest.approx(2 / 3) and metrics["greedy"]["truncated"] == 0.0
    assert metrics["sampled"]["no_marker"] == pytest.approx(2 / 3) and metrics["greedy"]["tokens"] == 9
    golds = [gsm8k.gold_answer(answer) for answer in gsm8k.load_rows(str(TOY / "data"), "test", limit=3)["answer"]]
    assert metrics["greedy"]["strict"]["correct"] == [int(gold == "2") for gold in golds]
    (_, greedy, _), (prompts, sampled, _) = vllm["requests"]
    assert {(one.temperature, one.n, one.max_tokens) for one in greedy} == {(0.0, 1, 7)}
    assert {(one.temperature, one.n, one.top_k) for one in sampled} == {(1.0, 3, -1)}
    assert len({one.seed for one in sampled}) == 3
    tokenizer = AutoTokenizer.from_pretrained(TOY / "base")
    assert all("assistant" in tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts)


def test_a_missing_vllm_is_refused_with_the_way_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trl\[vllm\]', or sample with transformers"):
        evaluate.main(*parse(f"--backend vllm --model_name_or_path a --dataset_name {SAMPLE} --output_dir {tmp_path}"))


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_model_is_known_by_its_weights(base, monkeypatch, limit):
    """Whether by all bytes or, of large tensors, by sums of them."""
    monkeypatch.setattr(generation, "WHOLLY_HASHED", limit)

    def identity(change=None):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(TOY / "base"), TinyLoraConfig(n_tie="all"))
        if change is not None:
            with torch.no_grad():
                next(value for value in model.parameters() if value.requires_grad).view(-1)[0] += change
        return TransformersGenerator(model, base[1], GenerationArguments()).identity()

    assert identity() == identity() and identity(0.5) == identity(0.5)
    assert len({identity(), identity(0.5), identity(1e-6)}) == 3
