"""What of an evaluation's arguments is refused."""

import pytest
from evaluation.arguments import EvaluationArguments, GenerationArguments


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
