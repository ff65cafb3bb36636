"""The fitness of candidates: in one batch as each has it alone. A tiny model, CPU."""

from functools import partial

import numpy as np
import pytest
import torch
from evaluation.arguments import GenerationArguments
from evaluation.generation import TransformersGenerator
from evolution.candidates import Candidates
from evolution.sampling import BatchSampler
from peft import get_peft_model
from transformers import AutoTokenizer

from trl_tinylora import TinyLoraConfig


# Sampling that is greedy, for the order of the rows in a batch decides what is drawn.
COLD = GenerationArguments(temperature=1e-4, max_new_tokens=6)
PROBLEMS = ["Anna has 3 pens and buys 4. How many?", "How many cups?", "Cleo owns 22 cups."]
ROWS = [{"prompt": [{"role": "user", "content": text}], "answer": str(place)} for place, text in enumerate(PROBLEMS)]


def letters(prompts, completions, completion_ids, answer, **columns):
    """A number from the completion, the problem and its column."""
    texts = [completion[0]["content"] for completion in completions]
    assert all(ids and isinstance(ids[0], int) for ids in completion_ids)
    return [
        (sum(map(ord, text)) % 101) + 1000 * int(gold) + 0 * len(prompt)
        for prompt, text, gold in zip(prompts, texts, answer, strict=True)
    ]


@pytest.fixture
def make(make_model, base_folder):
    def build(count, batch_size):
        model = get_peft_model(make_model(), TinyLoraConfig(n_tie=4)).eval()
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        sampler = BatchSampler(TransformersGenerator(model, tokenizer, COLD), batch_size)
        return Candidates(model, tokenizer, sampler, count)

    return build


@pytest.mark.parametrize("batch_size", [100, 4])
def test_the_rewards_of_a_batch_are_those_of_each_candidate_alone(make, batch_size):
    values = np.random.default_rng(0).normal(0, 1.5, (3, 4))
    together, tokens = make(3, batch_size).rewards(values, ROWS, 2, [letters], seed=0)
    assert together.shape == (3, 3, 2) and tokens > 0
    assert (together[:, :, 0] == together[:, :, 1]).all()
    for candidate in range(3):
        alone, _ = make(1, 100).rewards(values[candidate : candidate + 1], ROWS, 1, [letters], seed=5)
        assert (alone[0, :, 0] == together[candidate, :, 0]).all()
    # Candidates say different things, and every problem got its own column.
    assert len(np.unique(together[:, :, 0] % 1000)) > 3
    assert (together // 1000 == np.arange(3)[None, :, None]).all()


def test_several_rewards_are_summed(make):
    once, _ = make(2, 100).rewards(np.zeros((2, 4)), ROWS, 1, [letters], seed=0)
    twice, _ = make(2, 100).rewards(np.zeros((2, 4)), ROWS, 1, [letters, letters], seed=0)
    assert (twice == 2 * once).all()


def constant(value, completions, **columns):
    return [value] * len(completions)


def test_what_does_not_apply_adds_nothing_and_what_is_not_finite_ends_the_search(make):
    candidates = make(2, 100)

    def rewards(*values):
        functions = [partial(constant, value) for value in values]
        return candidates.rewards(np.zeros((2, 4)), ROWS, 1, functions, seed=0)[0]

    assert (rewards(None, 0.5) == 0.5).all() and not rewards(None).any()
    with pytest.raises(FloatingPointError, match="6 of 6 rewards are not finite"):
        rewards(float("nan"))


def test_values_that_break_the_model_end_the_search(make):
    with pytest.raises(FloatingPointError, match=r"logits of a candidate are not finite.*1e\+38: lower --sigma"):
        make(1, 100).rewards(np.full((1, 4), 1e38), ROWS, 1, [letters], seed=0)


def test_values_are_rounded_to_the_dtype_that_they_are_kept_in(make):
    candidates = make(1, 100)
    candidates.dtype = torch.bfloat16
    candidates.set_values("candidate-0", np.full(4, 0.1001))
    (rounded,) = torch.unique(candidates.model.base_model.bank.vectors("candidate-0").values_GK)
    assert rounded == torch.tensor(0.1001).to(torch.bfloat16)
