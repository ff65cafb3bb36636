"""The toy's base, some of its problems, and an evaluation that nothing interrupted."""

from pathlib import Path

import pytest
from evaluation.arguments import GenerationArguments
from evaluation.run import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora.tasks import gsm8k


TOY = Path(__file__).parents[3] / "recipes" / "toy"
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
    return evaluate(*base, rows, GenerationArguments(**SHORT), path), path
