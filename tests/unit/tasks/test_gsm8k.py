"""GSM8K's prompt, grading, reward and loading. CPU, seconds; the whole data set is graded where it is at hand."""

import json
import os
import re
from pathlib import Path

import pytest

from trl_tinylora.tasks import gsm8k


SAMPLE = Path(__file__).parents[2] / "data" / "gsm8k_sample.jsonl"
WHOLE = Path(os.environ.get("TRL_TINYLORA_GSM8K", Path(__file__).parents[4] / "shared" / "data" / "gsm8k"))


def published_gold(answer):
    """The gold number by the simplest reading, without this package: all after "####", commas dropped."""
    return answer.split("####")[1].strip().replace(",", "")


def assert_all_graded_right(rows):
    for row in rows:
        gold = gsm8k.gold_answer(row["answer"])
        assert gold == published_gold(row["answer"])
        assert gsm8k.is_correct(gsm8k.extract_strict(row["answer"]), gold)
        assert gsm8k.is_correct(gsm8k.extract_flexible(row["answer"]), gold)
        assert gsm8k.grade(row["answer"], gold) == {"strict": True, "last_number": True, "flexible": True}


def assert_all_graded_wrong_when_off_by_one(rows):
    for row in rows:
        gold = gsm8k.gold_answer(row["answer"])
        wrong = str(int(gold) + 1)
        assert not gsm8k.is_correct(gsm8k.extract_strict(row["answer"]), wrong)
        assert not gsm8k.is_correct(gsm8k.extract_flexible(row["answer"]), wrong)
        assert not any(gsm8k.grade(row["answer"], wrong).values())


def test_prompt_is_verls_stock_prompt():
    assert gsm8k.build_prompt("How many?") == [
        {
            "role": "user",
            "content": 'How many? Let\'s think step by step and output the final answer after "####".',
        }
    ]


@pytest.mark.parametrize(
    "completion, expected",
    [
        pytest.param("so it is\n#### 72", "72", id="plain"),
        pytest.param("####72", "72", id="no blank after the marker"),
        pytest.param("#### 1,080", "1080", id="comma"),
        pytest.param("#### 109,200,000", "109200000", id="two commas"),
        pytest.param("#### -10", "-10", id="minus"),
        pytest.param("#### \u221210", "-10", id="unicode minus"),
        pytest.param("#### $5", "5", id="dollar"),
        pytest.param("#### -$5", "-5", id="minus before dollar"),
        pytest.param("#### $-5", "-5", id="minus after dollar"),
        pytest.param("#### -$-5", "-5", id="minus before and after dollar"),
        pytest.param("#### 72 clips", "72", id="unit"),
        pytest.param("#### 50%", "50", id="percent"),
        pytest.param("#### 72.", "72", id="trailing period"),
        pytest.param("#### 72.0", "72.0", id="decimal"),
        pytest.param("#### .5", ".5", id="no leading zero"),
        pytest.param("#### 10-3", None, id="a difference is not one number"),
        pytest.param("#### 1\nno, wait\n#### 2", "2", id="two markers: the last counts"),
        pytest.param("#### 1\n####", "1", id="last marker without a number"),
        pytest.param("#### I do not know", None, id="marker without a number"),
        pytest.param("####\n72", None, id="number on the next line"),
        pytest.param("### 72", None, id="three hashes"),
        pytest.param("The answer is 72.", None, id="no marker"),
        pytest.param("", None, id="empty completion"),
    ],
)
def test_strict_extraction_takes_the_number_after_the_last_marker(completion, expected):
    assert gsm8k.extract_strict(completion) == expected


@pytest.mark.parametrize(
    "completion, expected",
    [
        pytest.param("5 then \\boxed{6}\n#### 7", "7", id="the marker wins"),
        pytest.param("#### none, but \\boxed{6} or 8", "6", id="marker without a number: the box wins"),
        pytest.param("\\boxed{5} and \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", id="last box, LaTeX"),
        pytest.param("\\boxed{} so 8", "8", id="empty box"),
        pytest.param("From 48 clips, half is 24.", "24", id="last number"),
        pytest.param("48-24", "24", id="a difference is not a negative number"),
        pytest.param("It is -3 degrees.", "-3", id="minus"),
        pytest.param("She owes $1,080.50.", "1080.50", id="comma, dollar, decimals, period"),
        pytest.param("I do not know.", None, id="no number"),
        pytest.param("", None, id="empty completion"),
    ],
)
def test_flexible_extraction_falls_back_to_box_then_last_number(completion, expected):
    assert gsm8k.extract_flexible(completion) == expected


@pytest.mark.parametrize(
    "extracted",
    [
        "72",
        "72.0",
        "72.",
        "$72",
        "72%",
        "72\\%",
        "72 clips",
        "072",
        "\\$72",
        "\\frac{144}{2}",
        "72\\text{ clips}",
        "8*9",
    ],
)
def test_equal_values_are_correct_however_written(extracted):
    assert gsm8k.is_correct(extracted, "72")


@pytest.mark.parametrize("extracted", [None, "", "73", "-72", "7.2", "720", "72.5", "\\frac{144}{3}", "clips"])
def test_other_values_are_wrong(extracted):
    assert not gsm8k.is_correct(extracted, "72")


def test_commas_and_signs_compare_by_value():
    assert gsm8k.is_correct("1,080", "1080")
    assert gsm8k.is_correct("1080", "1,080")
    assert gsm8k.is_correct("-10", "-10.00")
    assert gsm8k.is_correct("-$-10", "-10")
    assert not gsm8k.is_correct("10", "-10")


@pytest.mark.bad_input("a data set's rows")
def test_gold_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="gold must be a number, got 'many'"):
        gsm8k.is_correct("72", "many")
    with pytest.raises(ValueError, match='no number after "####"'):
        gsm8k.gold_answer("It is 72.")


def test_reward_grades_texts_and_conversations_alike():
    texts = ["#### 72", "#### 71", "72", ""]
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    expected = [1.0, 0.0, 0.0, 0.0]
    assert gsm8k.strict_reward(texts, answer=["72"] * 4) == expected
    assert gsm8k.strict_reward(completions=conversations, answer=["72"] * 4, prompts=None, extra=1) == expected


def test_sample_rows_are_graded_right():
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20
    assert_all_graded_right(rows)
    assert_all_graded_wrong_when_off_by_one(rows)


@pytest.mark.parametrize("split, count", [("train", 7473), ("test", 1319)])
def test_every_published_row_is_graded_right(split, count):
    path = WHOLE / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here; set TRL_TINYLORA_GSM8K to the folder of train.jsonl and test.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == count
    assert_all_graded_right(rows)
    assert_all_graded_wrong_when_off_by_one(rows)


def test_rows_load_from_a_file_and_from_a_folder(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(SAMPLE.read_bytes())
    from_file = gsm8k.load_rows(str(SAMPLE), split="test")
    from_folder = gsm8k.load_rows(str(tmp_path), split="test")
    assert from_file.column_names == ["question", "answer"]
    assert len(from_file) == 20
    assert from_file.to_list() == from_folder.to_list()
    assert gsm8k.load_rows(str(SAMPLE), split="test", limit=3).to_list() == from_file.to_list()[:3]


def test_rows_load_from_a_json_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "q", "answer": "#### 1", "other": 2}]), encoding="utf-8")
    assert gsm8k.load_rows(str(path), split="train").to_list() == [{"question": "q", "answer": "#### 1"}]


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'test.jsonl'} does not exist")):
        gsm8k.load_rows(str(tmp_path), split="test")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        gsm8k.load_rows("nowhere.jsonl", split="test")


@pytest.mark.bad_input("a data set's rows")
@pytest.mark.parametrize(
    "second_line, message",
    [
        ('{"question": "q"}', r"row 2: no text in column \['answer'\]; it has \['question'\]"),
        ('{"question": "q", "answer": "It is 2."}', 'row 2: the gold answer has no number after "####"'),
        ('{"question": "q", "answer": 2}', r"row 2: no text in column \['answer'\]"),
        ("[1]", "row 2: must be an object"),
        ("not json", "row 2: not JSON"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(tmp_path, second_line, message):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n' + second_line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        gsm8k.load_rows(str(path), split="train")


@pytest.mark.bad_input("a data set's rows")
def test_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        gsm8k.load_rows(str(SAMPLE), split="train", limit=0)


def test_rl_and_sft_share_the_prompt_and_grade_right():
    rows = gsm8k.load_rows(str(SAMPLE), split="train")
    rl, sft = gsm8k.for_rl(rows), gsm8k.for_sft(rows)
    assert sorted(rl.column_names) == ["answer", "prompt"]
    assert sorted(sft.column_names) == ["completion", "prompt"]
    assert rl["prompt"][:] == sft["prompt"][:]
    assert [turns[0]["content"] for turns in sft["completion"]] == rows["answer"][:]
    assert gsm8k.strict_reward(sft["completion"], answer=rl["answer"]) == [1.0] * len(rows)


@pytest.mark.parametrize(
    "completion, strict, last_number, flexible",
    [
        pytest.param("#### 72", True, True, True, id="marker"),
        pytest.param("#### 72 in 2 days", True, False, True, id="a number after the marked one"),
        pytest.param("#### 71, or 72", False, True, False, id="the marker counts"),
        pytest.param(r"\boxed{72} of 80", False, False, True, id="box, then a number"),
        pytest.param(r"\boxed{\frac{144}{2}}", False, False, True, id="LaTeX in a box"),
        pytest.param("so 72.", False, True, True, id="number only"),
        pytest.param("", False, False, False, id="empty completion"),
    ],
)
def test_three_gradings_stand_side_by_side(completion, strict, last_number, flexible):
    graded = gsm8k.grade(completion, "72")
    assert graded == {"strict": strict, "last_number": last_number, "flexible": flexible}
    assert gsm8k.strict_reward([completion], answer=["72"]) == [float(strict)]


def test_the_format_reward_pays_for_the_marker_right_or_wrong():
    texts = ["#### 72", "#### 1", "####", "#### none", "72"]
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    assert gsm8k.format_reward(conversations, answer=["72"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [gsm8k.has_marker(text) for text in texts] == [True, True, False, False, False]


def test_a_system_prompt_stands_before_the_question_in_both_arms():
    rows = gsm8k.load_rows(str(SAMPLE), split="train", limit=2)
    rl, sft = gsm8k.for_rl(rows, "Be brief."), gsm8k.for_sft(rows, "Be brief.")
    assert rl["prompt"][:] == sft["prompt"][:]
    assert [turn["role"] for turn in rl[0]["prompt"]] == ["system", "user"]
    assert rl[0]["prompt"][0]["content"] == "Be brief."
    assert rl[0]["prompt"][1:] == gsm8k.build_prompt(rows[0]["question"])


def test_an_instruction_takes_the_place_of_the_tasks_own_and_an_empty_one_leaves_the_question_alone():
    rows = gsm8k.load_rows(str(SAMPLE), split="train", limit=2)
    rl, sft = gsm8k.for_rl(rows, None, "Be brief."), gsm8k.for_sft(rows, None, "Be brief.")
    assert rl["prompt"][:] == sft["prompt"][:]
    assert rl[0]["prompt"] == [{"role": "user", "content": f"{rows[0]['question']} Be brief."}]
    assert gsm8k.build_prompt("How many?", instruction="") == [{"role": "user", "content": "How many?"}]


def test_sft_learns_a_rows_demonstration_and_rl_is_paid_for_its_answer(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"question": "2 + 2?", "answer": "<<2+2=4>>4\n#### 4", "demonstration": "It is 4."}
    path.write_text(json.dumps(row) + "\n")
    rows = gsm8k.load_rows(str(path), "train")
    assert gsm8k.for_sft(rows)[0]["completion"] == [{"role": "assistant", "content": "It is 4."}]
    assert gsm8k.for_rl(rows)[0]["answer"] == "4"
    path.write_text(json.dumps(row) + "\n" + json.dumps({key: row[key] for key in ("question", "answer")}) + "\n")
    rows = gsm8k.load_rows(str(path), "train")
    assert gsm8k.for_sft(rows)[0]["completion"][0]["content"] == row["answer"], "not every row has one"
