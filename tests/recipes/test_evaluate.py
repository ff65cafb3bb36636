"""The command that evaluates: real rows, benchmarks by name, a missing model. CPU, no network."""

import json
from pathlib import Path

import datasets
import evaluate
import pytest
import trl
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tasks.benchmarks import published_as


ROOT = Path(__file__).parents[2]


TOY = ROOT / "recipes" / "toy"


SAMPLE = ROOT / "tests" / "data" / "gsm8k_sample.jsonl"


def parse(command):
    return trl.TrlParser(evaluate.ARGUMENTS).parse_args_and_config(command.split())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def test_a_missing_model_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        evaluate.main(*parse(f"--dataset_name {SAMPLE} --output_dir {tmp_path}"))
