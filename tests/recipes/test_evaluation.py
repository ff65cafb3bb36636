"""The evaluation: gradings, intervals, interruption, benchmarks, re-grading, vLLM's part. CPU, no network, a minute."""

import json
import math
import sys
import types
from pathlib import Path

import datasets
import evaluate
import generation
import numpy as np
import pytest
import torch
import trl
from completions import CompletionsFile, read_lines, settings_path
from evaluate import EvaluationArguments, GenerationArguments
from generation import TransformersGenerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tasks import gsm8k
from trl_tinylora.tasks import math as math_task
from trl_tinylora.tasks.benchmarks import published_as


ROOT = Path(__file__).parents[2]
TOY = ROOT / "recipes" / "toy"
SAMPLE = ROOT / "tests" / "data" / "gsm8k_sample.jsonl"
SHORT = {"samples": 3, "max_new_tokens": 12, "eval_batch_size": 6}


@pytest.fixture(scope="module")
def base():
    name = str(TOY / "base")
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


@pytest.fixture(scope="module")
def rows():
    return gsm8k.load_rows(str(TOY / "data"), "test", limit=7).to_list()


@pytest.fixture(scope="module")
def whole(base, rows, tmp_path_factory):
    """An evaluation that nothing interrupted: its metrics and its file."""
    path = tmp_path_factory.mktemp("whole") / "completions.jsonl"
    return evaluate.evaluate(*base, rows, GenerationArguments(**SHORT), path), path


def parse(command):
    return trl.TrlParser(evaluate.ARGUMENTS).parse_args_and_config(command.split())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# What is measured


def test_the_metrics_are_those_of_the_lines_in_the_file(whole):
    metrics, path = whole
    lines = lines_of(path)
    assert [line["kind"] for line in lines] == ["greedy"] * 7 + ["sampled"] * 21
    assert [line["problem"] for line in lines] == [*range(7), *(problem for problem in range(7) for _ in range(3))]
    assert [line["sample"] for line in lines] == [0] * 7 + [0, 1, 2] * 7
    assert (metrics["n_problems"], metrics["samples"], metrics["temperature"]) == (7, 3, 1.0)
    for kind in ("greedy", "sampled"):
        chosen = [line for line in lines if line["kind"] == kind]
        for grading in ("strict", "last_number", "flexible"):
            right = np.reshape([line[grading] for line in chosen], (7, -1)).sum(axis=1)
            measured = metrics[kind][grading]
            assert measured["correct"] == right.tolist()
            assert measured["accuracy"] == pytest.approx(np.mean([line[grading] for line in chosen]))
            low, high = measured["interval"]
            assert low <= measured["accuracy"] <= high
            assert [gsm8k.grade(line["completion"], line["gold"])[grading] for line in chosen] == [
                line[grading] for line in chosen
            ]
        assert metrics[kind]["tokens"] == sum(line["tokens"] for line in chosen) <= 12 * len(chosen)
        assert metrics[kind]["mean_tokens"] == pytest.approx(np.mean([line["tokens"] for line in chosen]))
        assert metrics[kind]["truncated"] == pytest.approx(np.mean([line["truncated"] for line in chosen]))
        unmarked = [not gsm8k.has_marker(line["completion"]) for line in chosen]
        assert metrics[kind]["no_marker"] == pytest.approx(np.mean(unmarked))
    assert json.loads(json.dumps(metrics)) == metrics


def records(right, kind="greedy"):
    """Graded completions, all gradings alike, from right ones as 0 or 1 by problem and sample."""
    graded = dict.fromkeys(evaluate.GRADINGS)
    return [
        {"kind": kind, "problem": problem, "sample": sample, "tokens": 1, "truncated": False, "marker": True}
        | {grading: bool(value) for grading in graded}
        for problem, values in enumerate(right)
        for sample, value in enumerate(values)
    ]


def test_intervals_are_wilsons_and_the_bootstraps():
    greedy = evaluate.summarize(records([[1]] * 8 + [[0]] * 2), 1.0, seed=0)["greedy"]["strict"]
    assert greedy["accuracy"] == 0.8 and greedy["interval"] == pytest.approx([0.4901625, 0.9433178])
    assert "pass_at" not in greedy

    def sampled(right):
        return evaluate.summarize(records([[1]] * len(right)) + records(right, "sampled"), 1.0, seed=0)["sampled"]

    # Problems, not samples, are what is drawn again: all samples of a problem agree here, so each counts once.
    repeated = sampled([[1] * 4] * 8 + [[0] * 4] * 2)["flexible"]
    assert repeated["accuracy"] == 0.8 and repeated["interval"] == pytest.approx([0.5, 1.0], abs=0.11)
    assert sampled([[1] * 4] * 2)["strict"]["interval"] == [1.0, 1.0]
    assert sampled([[1, 0]])["strict"]["interval"] == [0.0, 1.0]


def test_pass_at_k_counts_draws_without_replacement():
    right = [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0] * 6]
    measured = evaluate.summarize(records([[0]] * 3) + records(right, "sampled"), 1.0, seed=0)["sampled"]["strict"]
    expected = {
        str(k): np.mean([1 - math.comb(6 - sum(row), k) / math.comb(6, k) for row in right]) for k in (1, 2, 4, 6)
    }
    assert measured["pass_at"] == pytest.approx(expected)
    assert measured["pass_at"]["1"] == pytest.approx(measured["accuracy"])
    assert measured["pass_at"]["6"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"eval_batch_size": 2, "samples": 4}, "eval_batch_size must be at least 4, got 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"eval_seed": -1}, "eval_seed must be at least 0, got -1"),
        ({"task": "chess"}, "task must be one of gsm8k, math, got 'chess'"),
    ],
)
def test_impossible_generation_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        GenerationArguments(**given)


# Batches and seeds


def test_greedy_results_depend_on_neither_batching_nor_order_of_the_rows(base, rows, whole):
    by_one = evaluate.evaluate(*base, rows, GenerationArguments(**SHORT | {"samples": 0, "eval_batch_size": 1}))
    assert by_one["greedy"] == whole[0]["greedy"] and "sampled" not in by_one and by_one["samples"] == 0
    turned = evaluate.evaluate(*base, rows[::-1], GenerationArguments(**SHORT | {"samples": 0}))
    for grading in evaluate.GRADINGS:
        assert turned["greedy"][grading]["correct"] == whole[0]["greedy"][grading]["correct"][::-1]


def test_problems_of_like_length_share_a_batch(base, rows):
    seen = []

    class Recorder(TransformersGenerator):
        def generate(self, prompts, samples, is_sampled, seed):
            seen.append([len(self.tokenizer(prompt)["input_ids"]) for prompt in prompts])
            return super().generate(prompts, samples, is_sampled, seed)

    arguments = GenerationArguments(**SHORT | {"samples": 0, "eval_batch_size": 3})
    lines = evaluate.complete(Recorder(*base, arguments), base[1], rows, arguments)
    flat = [length for batch in seen for length in batch]
    assert flat == sorted(flat, reverse=True) and list(map(len, seen)) == [3, 3, 1]
    assert [line["problem"] for line in lines] == list(range(7))


def test_evaluating_leaves_no_trace_in_the_random_stream_or_the_mode(base, rows, whole):
    model = base[0].train()
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    assert evaluate.evaluate(*base, rows, GenerationArguments(**SHORT)) == whole[0]
    assert torch.equal(torch.get_rng_state(), state), "a training run after it must not see that it ran"
    assert model.training
    model.eval()


def test_another_seed_draws_other_samples_and_the_same_greedy_ones(base, rows, whole, tmp_path):
    path = tmp_path / "completions.jsonl"
    evaluate.evaluate(*base, rows, GenerationArguments(**SHORT, eval_seed=1), path)
    texts = [[line["completion"] for line in lines_of(file)] for file in (whole[1], path)]
    assert texts[0][:7] == texts[1][:7] and texts[0][7:] != texts[1][7:]
    assert len({tuple(texts[0][7:][start : start + 3]) for start in range(0, 21, 3)}) > 1


def test_the_system_prompt_reaches_the_model(base, rows, tmp_path):
    prompts = []

    class Recorder(TransformersGenerator):
        def generate(self, batch, samples, is_sampled, seed):
            prompts.extend(batch)
            return super().generate(batch, samples, is_sampled, seed)

    arguments = GenerationArguments(**SHORT | {"samples": 0}, system_prompt="End with four hashes.")
    evaluate.complete(Recorder(*base, arguments), base[1], rows[:2], arguments)
    assert len(prompts) == 2 and all("system\nEnd with four hashes." in prompt for prompt in prompts)


# Interruption


@pytest.mark.parametrize("batches", [0, 2, 4])
@pytest.mark.parametrize("is_cut", [False, True])
def test_an_interrupted_evaluation_continues_where_it_stopped(
    base, rows, whole, tmp_path, monkeypatch, batches, is_cut
):
    path, done = tmp_path / "completions.jsonl", []
    original = TransformersGenerator.generate

    def stopping(self, prompts, samples, is_sampled, seed):
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append(len(prompts))
        return original(self, prompts, samples, is_sampled, seed)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TransformersGenerator, "generate", stopping)
        evaluate.evaluate(*base, rows, GenerationArguments(**SHORT), path)
    if is_cut and batches:
        # The last completion of the last batch is cut, so that all of its batch is missing.
        path.write_text(path.read_text()[:-25])
    generated = []

    def counting(self, prompts, samples, is_sampled, seed):
        generated.append(len(prompts))
        return original(self, prompts, samples, is_sampled, seed)

    monkeypatch.setattr(TransformersGenerator, "generate", counting)
    assert evaluate.evaluate(*base, rows, GenerationArguments(**SHORT), path) == whole[0]
    assert path.read_text() == whole[1].read_text()
    assert len(generated) == 6 - batches + bool(is_cut and batches)  # 2 batches of greedy ones, 4 of samples
    generated.clear()
    assert evaluate.evaluate(*base, rows, GenerationArguments(**SHORT), path) == whole[0]
    assert not generated


def test_without_a_seed_for_each_batch_a_continued_evaluation_would_differ(base, rows, whole, tmp_path, monkeypatch):
    """Negative control of the test before: one stream over all batches starts anew after the interruption."""
    path = tmp_path / "completions.jsonl"
    path.write_text("".join(line + "\n" for line in whole[1].read_text().splitlines()[:13]))
    settings_path(path).write_text(settings_path(whole[1]).read_text())
    original = TransformersGenerator.generate
    monkeypatch.setattr(
        TransformersGenerator,
        "generate",
        lambda self, prompts, samples, is_sampled, seed: original(self, prompts, samples, is_sampled, 0),
    )
    evaluate.evaluate(*base, rows, GenerationArguments(**SHORT), path)
    assert path.read_text() != whole[1].read_text()


def test_completions_of_other_settings_problems_or_models_are_refused(base, rows, whole, tmp_path):
    _, path = whole
    with pytest.raises(FileExistsError, match=r"other settings, temperature=1.0 \(now 0.5\): choose another folder"):
        evaluate.evaluate(*base, rows, GenerationArguments(**SHORT, temperature=0.5), path)
    with pytest.raises(FileExistsError, match="n_problems=7 .now 6., problems="):
        evaluate.evaluate(*base, rows[1:], GenerationArguments(**SHORT), path)
    other = AutoModelForCausalLM.from_pretrained(TOY / "base")
    with torch.no_grad():
        other.model.norm.weight[0] += 0.01
    with pytest.raises(FileExistsError, match="other settings, model="):
        evaluate.evaluate(other, base[1], rows, GenerationArguments(**SHORT), path)
    foreign = tmp_path / "completions.jsonl"
    foreign.write_text("{}\n")
    with pytest.raises(FileExistsError, match="has no completions.settings.json beside it"):
        evaluate.evaluate(*base, rows, GenerationArguments(**SHORT), foreign)


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


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text('{"kind": "greedy"}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_lines(path)
    path.write_text('{"kind": "greedy"}\n{"kin')
    assert read_lines(path) == [{"kind": "greedy"}]


def test_completions_are_in_the_file_before_the_next_batch_begins(tmp_path):
    path = tmp_path / "folder" / "completions.jsonl"
    kept = CompletionsFile(path, {"a": 1})
    kept.append([{"kind": "sampled", "problem": 1, "sample": 0}])
    assert len(read_lines(path)) == 1
    kept.append([{"kind": "greedy", "problem": 0, "sample": 0}])
    assert [line["kind"] for line in read_lines(path)] == ["sampled", "greedy"]
    again = CompletionsFile(path, {"a": 1})
    assert [line["kind"] for line in read_lines(path)] == ["greedy", "sampled"]
    assert again.is_done("greedy", [0], 1) and not again.is_done("greedy", [0, 1], 1)
    assert not again.is_done("sampled", [1], 2)


# The command


def test_real_gsm8k_rows_pass_through_the_command(tmp_path, capsys):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TOY / "base"), TinyLoraConfig(n_tie="all"))
    model.save_pretrained(tmp_path / "model")
    command = f"--model_name_or_path {TOY / 'base'} --adapter_path {tmp_path / 'model'} --dataset_name {SAMPLE}"
    command += f" --limit 3 --samples 2 --max_new_tokens 8 --output_dir {tmp_path / 'evaluation'}"
    metrics = evaluate.main(*parse(command))
    written = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert written["metrics"] == metrics and metrics["n_problems"] == 3
    assert written["settings"]["task"] == "gsm8k" and written["arguments"]["samples"] == 2
    assert written["generated"]["versions"]["transformers"] and written["graded"]["versions"]["math-verify"]
    assert written["generated"]["git"] is None or len(written["generated"]["git"]["commit"]) == 40
    lines = lines_of(tmp_path / "evaluation" / "completions.jsonl")
    assert len(lines) == 9 and all(line["tokens"] <= 8 for line in lines)
    assert "greedy   last_number" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="already holds an evaluation"):
        evaluate.main(*parse(command))


@pytest.fixture
def hub(monkeypatch):
    """One row over and over instead of the Hub; returns what was asked for."""
    asked = []
    rows = {
        "openai/gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
        "HuggingFaceH4/MATH-500": {"problem": "1 + 1?", "answer": "2", "solution": "2", "unique_id": "a/1.json"},
        "math-ai/amc23": {"id": 0, "question": "1 + 1?", "answer": 2.0, "url": ""},
    }

    def load_dataset(name, *arguments, **options):
        asked.append((name, *arguments, options["split"]))
        return datasets.Dataset.from_list([rows[name]] * published_as(name).n_problems)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_several_benchmarks_are_evaluated_by_their_names(tmp_path, hub):
    command = f"--model_name_or_path {TOY / 'base'} --benchmark gsm8k,math500 amc23 --output_dir {tmp_path}"
    command += " --samples 2 --max_new_tokens 4 --limit 2"
    results = evaluate.main(*parse(command))
    assert hub == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("math-ai/amc23", None, "test"),
    ]
    assert list(results) == ["gsm8k", "math500", "amc23"]
    for name, task in (("gsm8k", "gsm8k"), ("math500", "math"), ("amc23", "math")):
        written = json.loads((tmp_path / name / "metrics.json").read_text())
        assert written["metrics"] == results[name] and written["settings"]["task"] == task
        assert {line["gold"] for line in lines_of(tmp_path / name / "completions.jsonl")} == {"2"}
    assert lines_of(tmp_path / "math500" / "completions.jsonl")[0]["id"] == "a/1.json"
    # One of them was lost: the others are not generated again.
    (tmp_path / "amc23" / "metrics.json").unlink()
    assert evaluate.main(*parse(command)) == results
    regraded = evaluate.main(*parse(f"--regrade --benchmark math500,amc23 --output_dir {tmp_path}"))
    assert regraded == {name: results[name] for name in ("math500", "amc23")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either --benchmark or --dataset_name"),
        ({"benchmark": ["gsm8k"], "dataset_name": "a.jsonl"}, "either --benchmark or --dataset_name"),
        ({"benchmark": ["chess"]}, "there is no benchmark 'chess': take one of gsm8k, math500"),
        ({"benchmark": ["math500"], "task": "gsm8k"}, "'math500' is of the task 'math', but task is 'gsm8k'"),
    ],
)
def test_impossible_evaluations_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**given)


def test_a_missing_model_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        evaluate.main(*parse(f"--dataset_name {SAMPLE} --output_dir {tmp_path}"))


# Grading anew


def test_completions_are_graded_anew_without_a_model(tmp_path, base, rows, monkeypatch):
    path = tmp_path / "completions.jsonl"
    before = evaluate.evaluate(*base, rows, GenerationArguments(**SHORT), path)
    monkeypatch.setattr(generation.transformers.AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(TransformersGenerator, "generate", None)
    regraded = evaluate.main(*parse(f"--regrade --output_dir {tmp_path}"))
    assert regraded == before
    lines = [line | {"completion": f"It is {line['gold']}.\n#### {line['gold']}"} for line in lines_of(path)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    regraded = evaluate.main(*parse(f"--regrade --output_dir {tmp_path}"))
    assert regraded["greedy"]["strict"]["accuracy"] == 1.0 and regraded["sampled"]["no_marker"] == 0.0
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == regraded
    assert all(line["strict"] for line in lines_of(path))
    # By another task's grading there is no box in them.
    as_math = evaluate.regrade(tmp_path, "math")
    assert as_math["greedy"]["strict"]["accuracy"] == 0.0 and as_math["greedy"]["flexible"]["accuracy"] == 1.0


def test_only_a_whole_evaluation_is_graded_anew(tmp_path, whole):
    with pytest.raises(FileNotFoundError, match="name the output_dir of an evaluation"):
        evaluate.regrade(tmp_path)
    path = tmp_path / "completions.jsonl"
    settings_path(path).write_text(settings_path(whole[1]).read_text())
    path.write_text("".join(line + "\n" for line in whole[1].read_text().splitlines()[:9]))
    with pytest.raises(ValueError, match="holds 9 of 28 completions: continue the evaluation first"):
        evaluate.regrade(tmp_path)


# vLLM: a stand-in for it, by what its documentation says of the calls; it is not installable where this was written


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
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs vLLM: pip install 'trl\[vllm\]'; or take --backend transformers"):
        evaluate.main(*parse(f"--backend vllm --model_name_or_path a --dataset_name {SAMPLE} --output_dir {tmp_path}"))


def test_math_is_evaluated_with_its_own_prompt_and_grading(base):
    rows = [{"question": "Half of one?", "answer": r"\frac{1}{2}"}]
    seen = []

    class Boxed(TransformersGenerator):
        def generate(self, prompts, samples, is_sampled, seed):
            seen.extend(prompts)
            return [[generation.Completion(r"so \boxed{\frac12}", 5, False)] * samples for _ in prompts]

    arguments = GenerationArguments(task="math", samples=2)
    lines = evaluate.complete(Boxed(*base, arguments), base[1], rows, arguments)
    assert [(line["strict"], line["flexible"], line["marker"]) for line in lines] == [(True, True, True)] * 3
    assert not any(line["last_number"] for line in lines)
    assert math_task.SYSTEM_PROMPT in seen[0] and math_task.INSTRUCTION in seen[0]
