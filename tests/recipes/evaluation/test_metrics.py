"""What completions add up to, and grading them anew. CPU, seconds."""

import json
import math

import evaluate
import numpy as np
import pytest
import trl
from evaluation import generation, run
from evaluation.arguments import GenerationArguments
from evaluation.completions import settings_path
from evaluation.generation import TransformersGenerator
from evaluation.metrics import GRADINGS, regrade, summarize

from trl_tinylora.tasks import gsm8k


SHORT = {"samples": 3, "max_new_tokens": 12, "eval_batch_size": 6}


def parse(command):
    return trl.TrlParser(evaluate.ARGUMENTS).parse_args_and_config(command.split())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(right, kind="greedy"):
    """Graded completions, all gradings alike, from right ones as 0 or 1 by problem and sample."""
    graded = dict.fromkeys(GRADINGS)
    return [
        {"kind": kind, "problem": problem, "sample": sample, "tokens": 1, "truncated": False, "marker": True}
        | {grading: bool(value) for grading in graded}
        for problem, values in enumerate(right)
        for sample, value in enumerate(values)
    ]


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


def test_intervals_are_wilsons_and_the_bootstraps():
    greedy = summarize(records([[1]] * 8 + [[0]] * 2), 1.0, seed=0)["greedy"]["strict"]
    assert greedy["accuracy"] == 0.8 and greedy["interval"] == pytest.approx([0.4901625, 0.9433178])
    assert "pass_at" not in greedy

    def sampled(right):
        return summarize(records([[1]] * len(right)) + records(right, "sampled"), 1.0, seed=0)["sampled"]

    # Problems, not samples, are what is drawn again: all samples of a problem agree here, so each counts once.
    repeated = sampled([[1] * 4] * 8 + [[0] * 4] * 2)["flexible"]
    assert repeated["accuracy"] == 0.8 and repeated["interval"] == pytest.approx([0.5, 1.0], abs=0.11)
    assert sampled([[1] * 4] * 2)["strict"]["interval"] == [1.0, 1.0]
    assert sampled([[1, 0]])["strict"]["interval"] == [0.0, 1.0]


def test_pass_at_k_counts_draws_without_replacement():
    right = [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0] * 6]
    measured = summarize(records([[0]] * 3) + records(right, "sampled"), 1.0, seed=0)["sampled"]["strict"]
    expected = {
        str(k): np.mean([1 - math.comb(6 - sum(row), k) / math.comb(6, k) for row in right]) for k in (1, 2, 4, 6)
    }
    assert measured["pass_at"] == pytest.approx(expected)
    assert measured["pass_at"]["1"] == pytest.approx(measured["accuracy"])
    assert measured["pass_at"]["6"] == pytest.approx(2 / 3)


def test_completions_are_graded_anew_without_a_model(tmp_path, base, rows, monkeypatch):
    path = tmp_path / "completions.jsonl"
    before = run.evaluate(*base, rows, GenerationArguments(**SHORT), path)
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
    as_math = regrade(tmp_path, "math")
    assert as_math["greedy"]["strict"]["accuracy"] == 0.0 and as_math["greedy"]["flexible"]["accuracy"] == 1.0


def test_only_a_whole_evaluation_is_graded_anew(tmp_path, whole):
    with pytest.raises(FileNotFoundError, match="name the output_dir of an evaluation"):
        regrade(tmp_path)
    path = tmp_path / "completions.jsonl"
    settings_path(path).write_text(settings_path(whole[1]).read_text())
    path.write_text("".join(line + "\n" for line in whole[1].read_text().splitlines()[:9]))
    with pytest.raises(ValueError, match="holds 9 of 28 completions: continue the evaluation first"):
        regrade(tmp_path)
