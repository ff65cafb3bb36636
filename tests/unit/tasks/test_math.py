r"""MATH's prompt, grading, rewards and loading, the table of benchmarks, the control reward. CPU, no network."""

import json
import re
import threading
from fractions import Fraction
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_tinylora.tasks import TASKS, answers, benchmarks, controls, get_task, gsm8k, math, worker
from trl_tinylora.tasks.benchmarks import BENCHMARKS


# A row of each published format, written for these tests; keys as the data sets have them.
ROWS = {
    "gsm8k": {"question": "1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "math500": {
        "problem": "Half of one?",
        "solution": r"It is $\boxed{\frac{1}{2}}$.",
        "answer": r"\frac{1}{2}",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
    "aime24": {"id": 60, "problem": "?", "solution": "So 204.", "answer": "204", "url": "u", "year": "2024"},
    "amc23": {"id": 0, "question": "?", "answer": 27.0, "url": "u"},
    "minerva": {"question": "?", "answer": r"4.5e33"},
    "olympiadbench": {
        "id": 1606,
        "question": "?",
        "solution": ["A long one."],
        "final_answer": ["$2^{1009}$"],
        "is_multiple_answer": False,
        "unit": None,
    },
    "math-level3to5": {
        "input": "<|im_start|>system ...",
        "answer": "8",
        "gt_answer": r"\frac{3}{4}",
        "subject": "Algebra",
        "level": 3,
        "question": "?",
        "prompt": [{"role": "user", "content": r"? \boxed{{}}"}],
    },
}
GOLD = {
    "gsm8k": "2",
    "math500": r"\frac{1}{2}",
    "aime24": "204",
    "amc23": "27",
    "minerva": "4.5e33",
    "olympiadbench": "2^{1009}",
    "math-level3to5": r"\frac{3}{4}",
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# Tasks


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_what_trainers_and_evaluation_call(name):
    task = get_task(name)
    called = ("build_prompt", "gold_answer", "grade", "has_marker", "load_rows", "for_rl", "for_sft")
    assert all(callable(getattr(task, function)) for function in called)
    # TRL names a reward by its function's name.
    rewards = ["strict_reward", "flexible_reward", "format_reward"]
    assert [getattr(task, name).__name__ for name in rewards] == rewards


@pytest.mark.bad_input("a data set's rows")
def test_another_task_is_refused_by_name():
    with pytest.raises(ValueError, match="task must be one of gsm8k, math, got 'chess'"):
        get_task("chess")


def test_prompt_is_simplerls_qwen_boxed():
    assert math.build_prompt("1 + 1?") == [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": "1 + 1?\nPlease reason step by step, and put your final answer within \\boxed{}.",
        },
    ]
    assert math.build_prompt("?", "Be brief.")[0] == {"role": "system", "content": "Be brief."}


# Finding and comparing


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{3}, no, \boxed{4}", "4"),
        (r"\boxed{\frac{\sqrt{a^{2}}}{b_{1}}}", r"\frac{\sqrt{a^{2}}}{b_{1}}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\begin{matrix}1\\{2}\end{matrix}}", r"\begin{matrix}1\\{2}\end{matrix}"),
        (r"} \boxed{5} }", "5"),
        (r"\boxed{4 + \boxed{5}", "5"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{5} and \boxed{ }", "5"),
        (r"\boxed{}", None),
        (r"\boxed 5", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_last_closed_and_filled_box_is_found(text, expected):
    assert answers.last_box(text) == expected


balanced = st.recursive(
    st.text("ab1+ ", max_size=4),
    lambda inner: st.lists(inner.map("{{{}}}".format), max_size=3).map("".join),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(content=balanced.filter(str.strip), before=st.text("x {}", max_size=6), after=st.text("y }", max_size=6))
def test_any_nesting_of_braces_comes_back_whole(content, before, after):
    assert answers.last_box(f"{before}\\boxed{{{content}}}{after}") == content.strip()


@pytest.mark.parametrize(
    "answer, gold",
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\dfrac34", "0.75"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("x=5", "5"),
        (r"50\%", "50"),
        (r"72\text{ clips}", "72"),
        (r"10,\!000", "10000"),
        (r"\text{(C)}", "C"),
        ("Evelyn", r"\text{Evelyn}"),
        (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"4.5\times 10^{33}", "4.5e33"),
        ("4.5E+33", r"4.5 \times 10^{33}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
        ("\u22123", "-3"),
    ],
)
def test_equal_answers_are_equal_however_written(answer, gold):
    assert answers.is_equal(answer, gold)


@pytest.mark.parametrize(
    "answer, gold",
    [("4", "5"), ("-3", "3"), (r"\frac{a}{b}", r"\frac{b}{a}"), ("[2,3)", "(2,3]"), ("Bob", r"\text{Evelyn}")]
    + [("", "3"), ("3, 4", "4"), ("4.5e32", "4.5e33"), (r"\frac{1}{", "1")],
)
def test_other_answers_are_not(answer, gold):
    assert not answers.is_equal(answer, gold)


@settings(max_examples=40, deadline=None)
@given(st.fractions(min_value=-50, max_value=50, max_denominator=40), st.integers(1, 4), st.booleans())
def test_fractions_are_equal_as_python_computes_them(value, factor, is_wrong):
    written = rf"\frac{{{value.numerator * factor}}}{{{value.denominator * factor}}}"
    gold = value + Fraction(1, 7) if is_wrong else value
    assert answers.is_equal(written, rf"\frac{{{gold.numerator}}}{{{gold.denominator}}}") is not is_wrong


def test_gold_that_math_verify_cannot_read_is_compared_as_text(monkeypatch):
    monkeypatch.setattr(worker, "_parse", lambda text: [])
    assert worker.equal("unreadable ", "unreadable") and not worker.equal("unreadable", "another")


def test_trls_reward_alone_would_grade_otherwise():
    """Why `worker.py` says that it is not used alone; when one of these changes, that text is to be changed."""
    from trl.rewards import accuracy_reward

    def reward(text, gold):
        return accuracy_reward([[{"role": "assistant", "content": text}]], [gold])[0]

    assert reward(r"\boxed{3}, no, \boxed{4}", r"\boxed{4}") == 0.0
    assert reward(r"The final answer is $\frac{1}{2}$.", r"\boxed{\frac{1}{2}}") == 1.0
    assert reward(r"\boxed{\frac12}", r"\boxed{\frac{1}{2}}") == 0.0


@pytest.mark.parametrize(
    "completion, strict, last_number, flexible",
    [
        pytest.param(r"2 \boxed{\frac12}", False, False, False, id="box of another value"),
        pytest.param(r"so \boxed{4}", True, True, True, id="box"),
        pytest.param(r"\boxed{4} in 7 ways", True, False, True, id="a number after the box"),
        pytest.param(r"\boxed{5}, so 4", False, True, False, id="the box counts"),
        pytest.param("The answer is 4.", False, True, True, id="no box, number"),
        pytest.param(r"The final answer is $\frac{8}{2}$.", False, False, True, id="no box, LaTeX"),
        pytest.param(r"\boxed{4", False, True, True, id="box that the limit cut"),
        pytest.param("", False, False, False, id="empty completion"),
        pytest.param("no idea", False, False, False, id="nothing to find"),
    ],
)
def test_three_gradings_stand_side_by_side(completion, strict, last_number, flexible):
    graded = math.grade(completion, "4")
    assert graded == {"strict": strict, "last_number": last_number, "flexible": flexible}
    conversation = [{"role": "assistant", "content": completion}]
    assert math.strict_reward([completion, conversation], answer=["4", "4"], extra=1) == [float(strict)] * 2


def test_grading_works_outside_of_the_main_thread():
    graded = []
    thread = threading.Thread(target=lambda: graded.append(math.grade(r"it is $\frac{9}{2}$", "4.5")))
    thread.start()
    thread.join()
    assert graded == [{"strict": False, "last_number": False, "flexible": True}]


def test_the_format_reward_pays_for_the_box_right_or_wrong():
    texts = [r"\boxed{4}", r"\boxed{wrong}", r"\boxed{}", "4", r"\boxed{4"]
    assert math.format_reward(texts, answer=["4"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [math.has_marker(text) for text in texts] == [True, True, False, False, False]


def test_the_gold_answer_is_the_last_box_or_the_text():
    assert math.gold_answer(r"First \boxed{1}, then $\boxed{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert math.gold_answer(" $2^{1009}$ ") == "2^{1009}"
    assert math.gold_answer("$1$ and $2$") == "$1$ and $2$"
    with pytest.raises(ValueError, match="the gold answer is blank"):
        math.gold_answer(" ")


# Loading


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_file_in_the_format_of_a_published_set_is_read(name, tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[name], ROWS[name]])
    task = get_task(BENCHMARKS[name].task)
    rows = task.load_rows(path, split="test")
    assert len(rows) == 2 and rows.column_names[:2] == ["question", "answer"]
    assert task.gold_answer(rows[0]["answer"]) == GOLD[name]
    assert rows[0]["question"] == ROWS[name][BENCHMARKS[name].question]
    rl, sft = task.for_rl(rows), task.for_sft(rows, "Be brief.")
    assert sorted(rl.column_names) == ["answer", "prompt"] and sorted(sft.column_names) == ["completion", "prompt"]
    assert rl[0]["answer"] == GOLD[name]
    assert task.strict_reward(sft["completion"], answer=rl["answer"]) == [1.0, 1.0]
    assert sft[0]["prompt"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_published_set_is_asked_for_by_its_name_configuration_and_split(name, monkeypatch):
    benchmark, asked = BENCHMARKS[name], []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return Dataset.from_list([ROWS[name]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.warns(UserWarning, match=f"has 1 rows, not {benchmark.n_problems}"):
        rows = get_task(benchmark.task).load_rows(benchmark.dataset_name, benchmark.split)
    expected = {
        "gsm8k": (("openai/gsm8k", "main"), {"split": "test"}),
        "math500": (("HuggingFaceH4/MATH-500", None), {"split": "test"}),
        "aime24": (("HuggingFaceH4/aime_2024", None), {"split": "train"}),
        "amc23": (("math-ai/amc23", None), {"split": "test"}),
        "minerva": (("math-ai/minervamath", None), {"split": "test"}),
        "olympiadbench": (("Hothan/OlympiadBench", "OE_TO_maths_en_COMP"), {"split": "train"}),
        "math-level3to5": (
            ("hkust-nlp/SimpleRL-Zoo-Data",),
            {"data_dir": "simplelr_qwen_level3to5", "split": "train"},
        ),
    }[name]
    assert asked == [expected]
    assert get_task(benchmark.task).gold_answer(rows[0]["answer"]) == GOLD[name]


def test_only_a_known_split_of_another_size_is_warned_about(monkeypatch, recwarn):
    sizes = {"train": 7, "test": 500}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: Dataset.from_list([ROWS["math500"]] * sizes[split]))
    assert len(math.load_rows("HuggingFaceH4/MATH-500", "test", limit=3)) == 3
    assert len(math.load_rows("HuggingFaceH4/MATH-500", "train")) == 7
    assert not recwarn.list


def test_a_folder_of_parquet_files_loads_as_simplerls_does(tmp_path):
    """`load_dataset(name, data_dir=folder, split=...)` finds `{split}.parquet` there, and no other folder's."""
    for folder, gold in (("simplelr_qwen_level3to5", "1"), ("simplelr_abel_level3to5", "2")):
        (tmp_path / "hub" / folder).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [{"question": "?", "gt_answer": gold, "split": split}]
            Dataset.from_list(rows).to_parquet(tmp_path / "hub" / folder / f"{split}.parquet")
    loaded = datasets.load_dataset(
        str(tmp_path / "hub"), data_dir="simplelr_qwen_level3to5", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.to_list() == [{"question": "?", "gt_answer": "1", "split": "train"}]


def test_the_first_answer_column_counts_and_a_solution_is_the_last_resort(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "?", "solution": r"\boxed{204}"}])
    rows = math.load_rows(path, "test")
    assert rows.to_list() == [{"question": "?", "answer": "204", "solution": r"\boxed{204}"}]
    assert math.for_sft(rows)[0]["completion"][0]["content"] == r"\boxed{204}"
    path = write(tmp_path / "b.jsonl", [{"question": "?", "final_answer": ["$1$", "$2$"]}])
    assert math.load_rows(path, "test")["answer"][:] == ["1, 2"]


def test_rows_without_a_gold_answer_are_left_out_and_counted(tmp_path):
    rows = [{"question": "?", "gt_answer": gold} for gold in ("1", "", None, "4")]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.warns(UserWarning, match=re.escape("2 of 4 rows have no gold answer and are left out: rows 2, 3")):
        assert math.load_rows(path, "train")["answer"][:] == ["1", "4"]


@pytest.mark.bad_input("a data set's rows")
@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "?"}, "row 2: no column gt_answer or final_answer or answer or solution; it has"),
        ({"answer": "1"}, r"row 2: no text in column \['question'\]"),
        ({"question": "?", "answer": {"a": 1}}, "row 2: column 'answer' must hold a text, a number or a list"),
        ({"question": "?", "solution": "none"}, r"row 2: the solution has no \\boxed{}"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [{"question": "?", "answer": "1"}, row])
    with pytest.raises(ValueError, match=message):
        math.load_rows(path, "train")


def test_ids_are_kept_where_every_row_has_one(tmp_path):
    assert math.load_rows(write(tmp_path / "a.jsonl", [ROWS["math500"]]), "test")["id"][:] == ["test/algebra/1.json"]
    path = write(tmp_path / "b.jsonl", [ROWS["amc23"], ROWS["minerva"]])
    assert "id" not in math.load_rows(path, "test").column_names
    path = write(tmp_path / "c.jsonl", [ROWS["gsm8k"] | {"id": 7}])
    assert gsm8k.load_rows(path, "test").column_names == ["question", "answer", "id"]


def test_the_table_and_the_formats_of_files_agree():
    for benchmark in BENCHMARKS.values():
        if benchmark.task == "math":
            assert benchmark.question in math.QUESTION_COLUMNS and benchmark.answer in math.ANSWER_COLUMNS
    with pytest.raises(ValueError, match="there is no benchmark 'aime': take one of gsm8k, math500, "):
        benchmarks.get_benchmark("aime")


# Controls


def test_the_random_reward_is_a_fair_coin_that_the_seed_fixes():
    torch.manual_seed(0)
    first = controls.random_reward(["text"] * 4000, answer=["1"] * 4000)
    torch.manual_seed(0)
    assert controls.random_reward(["another"] * 4000) == first
    assert controls.random_reward(["text"] * 4000) != first
    # Five standard deviations of 4000 fair coins.
    assert set(first) == {0.0, 1.0} and abs(sum(first) / 4000 - 0.5) < 5 * 0.5 / 4000**0.5


def test_the_tasks_need_nothing_of_the_rest_of_the_package():
    for path in Path(math.__file__).parent.glob("*.py"):
        assert not re.search(r"from \.\.|import trl_tinylora|from trl_tinylora", path.read_text(encoding="utf-8")), path


def test_an_instruction_takes_the_place_of_the_tasks_own_and_an_empty_one_leaves_the_question_alone():
    assert math.build_prompt("?", instruction="Be brief.")[1]["content"] == "?\nBe brief."
    assert math.build_prompt("1 + 1?", instruction="")[1]["content"] == "1 + 1?"


def test_sft_learns_a_rows_demonstration_as_it_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "2 + 2?", "answer": "4", "demonstration": "It is 4."}) + "\n")
    assert math.for_sft(math.load_rows(str(path), "train"))[0]["completion"][0]["content"] == "It is 4."
