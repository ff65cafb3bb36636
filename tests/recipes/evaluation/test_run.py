"""An evaluation: batches, seeds, prompts, and how it continues. CPU, no network, a minute."""

import json
from pathlib import Path

import pytest
import torch
from evaluation import generation, run
from evaluation.arguments import GenerationArguments
from evaluation.completions import settings_path
from evaluation.generation import TransformersGenerator
from evaluation.metrics import GRADINGS
from transformers import AutoModelForCausalLM

from trl_tinylora.tasks import math as math_task


ROOT = Path(__file__).parents[3]


TOY = ROOT / "recipes" / "toy"


SHORT = {"samples": 3, "max_new_tokens": 12, "eval_batch_size": 6}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_greedy_results_depend_on_neither_batching_nor_order_of_the_rows(base, rows, whole):
    by_one = run.evaluate(*base, rows, GenerationArguments(**SHORT | {"samples": 0, "eval_batch_size": 1}))
    assert by_one["greedy"] == whole[0]["greedy"] and "sampled" not in by_one and by_one["samples"] == 0
    turned = run.evaluate(*base, rows[::-1], GenerationArguments(**SHORT | {"samples": 0}))
    for grading in GRADINGS:
        assert turned["greedy"][grading]["correct"] == whole[0]["greedy"][grading]["correct"][::-1]


def test_problems_of_like_length_share_a_batch(base, rows):
    seen = []

    class Recorder(TransformersGenerator):
        def generate(self, prompts, samples, is_sampled, seed):
            seen.append([len(self.tokenizer(prompt)["input_ids"]) for prompt in prompts])
            return super().generate(prompts, samples, is_sampled, seed)

    arguments = GenerationArguments(**SHORT | {"samples": 0, "eval_batch_size": 3})
    lines = run.complete(Recorder(*base, arguments), base[1], rows, arguments)
    flat = [length for batch in seen for length in batch]
    assert flat == sorted(flat, reverse=True) and list(map(len, seen)) == [3, 3, 1]
    assert [line["problem"] for line in lines] == list(range(7))


def test_evaluating_leaves_no_trace_in_the_random_stream_or_the_mode(base, rows, whole):
    model = base[0].train()
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    assert run.evaluate(*base, rows, GenerationArguments(**SHORT)) == whole[0]
    assert torch.equal(torch.get_rng_state(), state), "a training run after it must not see that it ran"
    assert model.training
    model.eval()


def test_another_seed_draws_other_samples_and_the_same_greedy_ones(base, rows, whole, tmp_path):
    path = tmp_path / "completions.jsonl"
    run.evaluate(*base, rows, GenerationArguments(**SHORT, eval_seed=1), path)
    texts = [[line["completion"] for line in lines_of(file)] for file in (whole[1], path)]
    assert texts[0][:7] == texts[1][:7] and texts[0][7:] != texts[1][7:]
    assert len({tuple(texts[0][7:][start : start + 3]) for start in range(0, 21, 3)}) > 1


def test_the_system_prompt_and_the_instruction_reach_the_model(base, rows, tmp_path):
    prompts = []

    class Recorder(TransformersGenerator):
        def generate(self, batch, samples, is_sampled, seed):
            prompts.extend(batch)
            return super().generate(batch, samples, is_sampled, seed)

    arguments = GenerationArguments(
        **SHORT | {"samples": 0}, system_prompt="End with four hashes.", instruction="Be brief."
    )
    run.complete(Recorder(*base, arguments), base[1], rows[:2], arguments)
    assert len(prompts) == 2 and all("system\nEnd with four hashes." in prompt for prompt in prompts)
    assert all(" Be brief.<|im_end|>" in prompt and "step by step" not in prompt for prompt in prompts)


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
        run.evaluate(*base, rows, GenerationArguments(**SHORT), path)
    if is_cut and batches:
        # The last completion of the last batch is cut, so that all of its batch is missing.
        path.write_text(path.read_text()[:-25])
    generated = []

    def counting(self, prompts, samples, is_sampled, seed):
        generated.append(len(prompts))
        return original(self, prompts, samples, is_sampled, seed)

    monkeypatch.setattr(TransformersGenerator, "generate", counting)
    assert run.evaluate(*base, rows, GenerationArguments(**SHORT), path) == whole[0]
    assert path.read_text() == whole[1].read_text()
    assert len(generated) == 6 - batches + bool(is_cut and batches)  # 2 batches of greedy ones, 4 of samples
    generated.clear()
    assert run.evaluate(*base, rows, GenerationArguments(**SHORT), path) == whole[0]
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
    run.evaluate(*base, rows, GenerationArguments(**SHORT), path)
    assert path.read_text() != whole[1].read_text()


def test_completions_of_other_settings_problems_or_models_are_refused(base, rows, whole, tmp_path):
    _, path = whole
    with pytest.raises(FileExistsError, match=r"other settings, temperature=1.0 \(now 0.5\): choose another folder"):
        run.evaluate(*base, rows, GenerationArguments(**SHORT, temperature=0.5), path)
    with pytest.raises(FileExistsError, match="n_problems=7 .now 6., problems="):
        run.evaluate(*base, rows[1:], GenerationArguments(**SHORT), path)
    other = AutoModelForCausalLM.from_pretrained(TOY / "base")
    with torch.no_grad():
        other.model.norm.weight[0] += 0.01
    with pytest.raises(FileExistsError, match="other settings, model="):
        run.evaluate(other, base[1], rows, GenerationArguments(**SHORT), path)
    foreign = tmp_path / "completions.jsonl"
    foreign.write_text("{}\n")
    with pytest.raises(FileExistsError, match="has no completions.settings.json beside it"):
        run.evaluate(*base, rows, GenerationArguments(**SHORT), foreign)


def test_math_is_evaluated_with_its_own_prompt_and_grading(base):
    rows = [{"question": "Half of one?", "answer": r"\frac{1}{2}"}]
    seen = []

    class Boxed(TransformersGenerator):
        def generate(self, prompts, samples, is_sampled, seed):
            seen.extend(prompts)
            return [[generation.Completion(r"so \boxed{\frac12}", 5, False)] * samples for _ in prompts]

    arguments = GenerationArguments(task="math", samples=2)
    lines = run.complete(Boxed(*base, arguments), base[1], rows, arguments)
    assert [(line["strict"], line["flexible"], line["marker"]) for line in lines] == [(True, True, True)] * 3
    assert not any(line["last_number"] for line in lines)
    assert math_task.SYSTEM_PROMPT in seen[0] and math_task.INSTRUCTION in seen[0]
