"""
Our gradings of GSM8K and lm-evaluation-harness's own filters and metric, on the same completions. CPU, half a minute.

completions.jsonl holds completions of every kind that the two could read differently, and what SmolLM2-135M-Instruct
wrote on test problems of GSM8K (128 tokens, greedy), asked as in training and after four worked examples. Each is
graded against `golds`: the problem's answer first, then every other number that a grading reads in it. All are
integers, as GSM8K's answers are. `differences` lists where a grading and a filter disagree; nowhere else do they.
With TRL_TINYLORA_GSM8K, the folder of GSM8K's two JSONL files, its worked answers are graded as well.
"""

import importlib.metadata
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from miniatures import GSM8K, RECIPES

from trl_tinylora.tasks import gsm8k


pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: `make test-lm-eval`")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager


FOLDER = Path(__file__).parent
ROWS = [json.loads(line) for line in (FOLDER / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
KINDS = json.loads((FOLDER / "differences.json").read_text(encoding="utf-8"))
FILTERS = {"strict": "strict-match", "flexible": "flexible-extract", "last_number": "flexible-extract"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """lm-evaluation-harness's task behind recipes/lm-eval/gsm8k.yaml, on a local data set of one row."""
    folder = tmp_path_factory.mktemp("task")
    row = {"question": "How many?", "answer": "#### 1"}
    (folder / "test.json").write_text(json.dumps(row) + "\n")
    group = yaml.safe_load((RECIPES / "lm-eval" / "gsm8k.yaml").read_text(encoding="utf-8"))
    local = {"dataset_path": "json", "dataset_name": None, "training_split": None, "fewshot_split": None}
    group["task"][0] |= local | {"dataset_kwargs": {"data_files": {"test": str(folder / "test.json")}}}
    (folder / "gsm8k.yaml").write_text(yaml.safe_dump(group))
    return TaskManager(include_path=folder).load([group["group"]])["tasks"]["gsm8k"]


def in_lm_eval(task, pairs):
    """What each filter reads in a completion, and whether `exact_match` says that it is the answer."""
    instances = [
        Instance("generate_until", {"question": "", "answer": f"#### {gold}"}, ("", {}), index, resps=[completion])
        for index, (completion, gold) in enumerate(pairs)
    ]
    task._instances = instances
    task.apply_filters()
    return [
        {name: (read, bool(task.process_results(instance.doc, [read])["exact_match"])) for name, read in found.items()}
        for instance in instances
        for found in [instance.filtered_resps]
    ]


def differences_of(task, pairs):
    """Completion, gold answer, grading and what we say, for each difference."""
    found = []
    for (completion, gold), theirs in zip(pairs, in_lm_eval(task, pairs), strict=True):
        ours = gsm8k.grade(completion, gold)
        for grading, name in FILTERS.items():
            if ours[grading] != theirs[name][1]:
                found.append((completion, gold, grading, "right" if ours[grading] else "wrong"))
    return found


def pairs_of(rows):
    return [(row["completion"], gold) for row in rows for gold in row["golds"]]


def test_the_list_was_made_with_the_installed_version():
    (pinned,) = re.findall(r"lm_eval==([\d.]+)", (RECIPES.parent / "Makefile").read_text())
    assert importlib.metadata.version("lm_eval") == pinned


def test_the_two_agree_but_for_the_listed_differences(task):
    listed = [
        (row["completion"], gold, grading, KINDS[kind]["ours"])
        for row in ROWS
        for grading, gold, kind in row["differences"]
    ]
    found = differences_of(task, pairs_of(ROWS))
    assert [difference for difference in found if difference not in listed] == []
    assert [difference for difference in listed if difference not in found] == []
    assert len(found) == len(listed)


def test_a_difference_that_is_not_listed_would_be_found(task):
    pair = ("#### 2 2/3", "2")
    assert differences_of(task, [pair]) == [(*pair, "strict", "wrong")]
    assert differences_of(task, [("#### 18", "18"), ("#### 18", "19")]) == []


def test_every_number_that_either_reads_is_tried_as_the_answer(task):
    missing = []
    for row, theirs in zip(ROWS, in_lm_eval(task, [(row["completion"], "0") for row in ROWS]), strict=True):
        text = row["completion"]
        read = {gsm8k.extract_strict(text), gsm8k.extract_flexible(text), *(found for found, _ in theirs.values())}
        plain = {re.sub(r"[$,]|\.$", "", found) for found in read if found}
        integers = {str(int(number)) for number in plain if re.fullmatch(r"-?[0-9]{1,19}", number)}
        missing += [(text, number) for number in integers - set(row["golds"])]
    assert missing == []


def test_the_list_holds_agreement_of_every_kind(task):
    graded = in_lm_eval(task, pairs_of(ROWS))
    for grading, name in FILTERS.items():
        both = [
            theirs[name][1]
            for (completion, gold), theirs in zip(pairs_of(ROWS), graded, strict=True)
            if gsm8k.grade(completion, gold)[grading] == theirs[name][1]
        ]
        assert 50 < sum(both) < len(both) - 50, grading


def test_worked_answers_are_right_by_all_and_wrong_for_the_next_number(task):
    whole = os.environ.get("TRL_TINYLORA_GSM8K")
    files = [GSM8K, *(sorted(Path(whole).glob("*.jsonl")) if whole else ())]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    answers = [json.loads(line)["answer"] for line in lines]
    golds = [gsm8k.gold_answer(answer) for answer in answers]
    right = list(zip(answers, golds, strict=True))
    wrong = [(answer, str(int(gold) + 1)) for answer, gold in right]
    assert differences_of(task, right + wrong) == []
    assert all(theirs["strict-match"][1] for theirs in in_lm_eval(task, right))
    assert not any(theirs["strict-match"][1] for theirs in in_lm_eval(task, wrong))
