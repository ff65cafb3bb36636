r"""MATH and its like (Hendrycks et al., arXiv:2103.03874): prompt, gold answer, grading, rewards and loading.

A row, as HuggingFaceH4/MATH-500 publishes it:

    {"problem": "What is the smallest positive perfect cube that can be written as the sum of three consecutive ...",
     "solution": "The sum of three consecutive integers takes the form ... $\\boxed{27}$ ...", "answer": "27", ...}

The paper (Morris et al., arXiv:2602.04118, section 5) follows SimpleRL-Zoo (Zeng et al., arXiv:2503.18892) with its
"qwen-boxed" template, which is the prompt here, and rewards an exact match. SimpleRL's own reward also pays 0.5 for a
right answer without a box and -0.5 for a wrong one in a box; that is not done here. Its published training rows are
said to hold `\boxed{{}}` in the prompt, an unformatted template; their `question` column is read, not their prompt.
Answers are compared by math-verify, see [`~trl_tinylora.tasks.answers`]. The marker of this task is the box.
"""

from typing import TYPE_CHECKING, Any

from .answers import are_equal, are_readable, final_answer, last_box, texts_of
from .benchmarks import published_as
from .numerals import last_number
from .rows import demonstration_of, id_of, read_rows, text_in


if TYPE_CHECKING:
    from datasets import Dataset

# https://github.com/hkust-nlp/simpleRL-reason, "qwen-boxed".
SYSTEM_PROMPT = "You are a helpful assistant."
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
# The first one that a row has; in SimpleRL's rows `answer` need not be the gold answer.
QUESTION_COLUMNS = ("problem", "question")
ANSWER_COLUMNS = ("gt_answer", "final_answer", "answer", "solution")


def build_prompt(
    question: str, system_prompt: str | None = None, instruction: str | None = None
) -> list[dict[str, str]]:
    r"""SimpleRL's "qwen-boxed" prompt: a system turn, then the question and the instruction to end with `\boxed{}`.

    Args:
        question (`str`): The problem's text.
        system_prompt (`str`, *optional*): Instead of [`SYSTEM_PROMPT`].
        instruction (`str`, *optional*): Instead of [`INSTRUCTION`]; an empty one leaves the question alone.
    Returns:
        `list[dict[str, str]]`: A conversation that ends in the user turn.
    """
    asked = f"{question}\n{INSTRUCTION if instruction is None else instruction}"
    return [
        {"role": "system", "content": SYSTEM_PROMPT if system_prompt is None else system_prompt},
        {"role": "user", "content": asked.rstrip()},
    ]


def gold_answer(answer: str) -> str:
    r"""The gold answer of a row's text: what its last `\boxed{...}` holds, or all of it, without dollars around it.

    Args:
        answer (`str`): An answer or a whole solution.
    Returns:
        `str`: LaTeX or text.
    Raises:
        ValueError: If it is blank.
    """
    gold = (last_box(answer) or answer).strip()
    if len(gold) > 1 and gold[0] == gold[-1] == "$" and "$" not in gold[1:-1]:
        gold = gold[1:-1].strip()
    if not gold:
        raise ValueError(f"the gold answer is blank: {answer!r}")
    return gold


def grade(completion: str, gold: str) -> dict[str, bool]:
    r"""Whether a completion is correct by each of the three gradings.

    "strict" reads the last `\boxed{...}`, "last_number" the last number anywhere whatever stands before it, "flexible"
    the box, and without one a stated answer, else the last formula or number, whichever stands last.

    Args:
        completion (`str`): The text the model wrote.
        gold (`str`): The gold answer.
    Returns:
        `dict[str, bool]`: By "strict", "last_number" and "flexible".
    Raises:
        ImportError: If math-verify is not installed.
    """
    found = [last_box(completion), last_number(completion), _found(completion)]
    return dict(
        zip(("strict", "last_number", "flexible"), are_equal([(answer, gold) for answer in found]), strict=True)
    )


def has_marker(completion: str) -> bool:
    r"""Whether there is a `\boxed{...}` that is closed and not empty."""
    return last_box(completion) is not None


def strict_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    r"""1.0 where the last `\boxed{...}` equals the gold answer, else 0.0: TRL reward and strict grading.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): Texts, or conversations that end in the model's turn.
        answer (`list[str]`): Gold answers, one a completion: the `answer` column of [`for_rl`].
        kwargs: The other columns and values that TRL hands to every reward function; unused.
    Returns:
        `list[float]`: One reward a completion.
    """
    found = map(last_box, texts_of(completions))
    return [float(right) for right in are_equal(list(zip(found, answer, strict=True)))]


def flexible_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 where the answer is right by the flexible grading, else 0.0: for models that do not know the box.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): Texts, or conversations that end in the model's turn.
        answer (`list[str]`): Gold answers, one a completion: the `answer` column of [`for_rl`].
        kwargs: The other columns and values that TRL hands to every reward function; unused.
    Returns:
        `list[float]`: One reward a completion.
    """
    found = map(_found, texts_of(completions))
    return [float(right) for right in are_equal(list(zip(found, answer, strict=True)))]


def format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    r"""1.0 where the last `\boxed{...}` holds what math-verify can read, right or wrong, else 0.0: a control.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): Texts, or conversations that end in the model's turn.
        kwargs: The other columns and values that TRL hands to every reward function; unused.
    Returns:
        `list[float]`: One reward a completion.
    """
    return [float(is_read) for is_read in are_readable([last_box(text) for text in texts_of(completions)])]


def load_rows(dataset_name: str, split: str, config: str | None = None, limit: int | None = None) -> "Dataset":
    """Checked rows with the columns `question` and `answer`, from a file, a folder or the Hub.

    Of a data set in [`~trl_tinylora.tasks.benchmarks.BENCHMARKS`], its columns there are read. Of any other, and of
    files, the first of [`QUESTION_COLUMNS`] and of [`ANSWER_COLUMNS`] that a row has, so that a file in the format of
    any of them is read. Rows without a gold answer are left out, with a warning that counts them.

    Args:
        dataset_name (`str`): A `.jsonl` or `.json` file, a folder that holds `{split}.jsonl`, or a name on the Hub.
        split (`str`): Split to load; a single file is taken as this split.
        config (`str`, *optional*): The Hub data set's configuration; those of the table need none.
        limit (`int`, *optional*): Keep the first `limit` rows.
    Returns:
        `datasets.Dataset`: Columns `question` and `answer` (gold answer); `id`, `demonstration`, and `solution` with
        its box, if every row has them.
    Raises:
        FileNotFoundError: If the file or the split's file does not exist.
        ValueError: If a row cannot be read or lacks a column, or if `limit` is below 1.
    """
    known = published_as(dataset_name)
    question_columns = (known.question,) if known else QUESTION_COLUMNS
    answer_columns = (known.answer,) if known else ANSWER_COLUMNS

    def check(row):
        question = text_in(row, next((name for name in question_columns if name in row), question_columns[-1]))
        column = next((name for name in answer_columns if name in row), None)
        if column is None:
            raise ValueError(f"no column {' or '.join(answer_columns)}; it has {sorted(row)}")
        answer = _as_text(row[column], column)
        if column == "solution" and last_box(answer) is None:
            raise ValueError(rf"the solution has no \boxed{{}}: {answer!r}")
        if not answer.strip():
            return None
        solution = row.get("solution")
        has_box = isinstance(solution, str) and last_box(solution) is not None
        worked = {"solution": solution} if has_box else {}
        return {"question": question, "answer": gold_answer(answer)} | id_of(row) | demonstration_of(row) | worked

    return read_rows(dataset_name, split, config, limit, check)


def for_rl(dataset: "Dataset", system_prompt: str | None = None, instruction: str | None = None) -> "Dataset":
    """Rows for GRPO: `prompt` (conversation) and `answer` (gold answer).

    Args:
        dataset (`datasets.Dataset`): Rows of [`load_rows`].
        system_prompt (`str`, *optional*): As of [`build_prompt`].
        instruction (`str`, *optional*): As of [`build_prompt`].
    Returns:
        `datasets.Dataset`: Columns `prompt` and `answer`.
    """

    def prompt_and_answer(row):
        prompt = build_prompt(row["question"], system_prompt, instruction)
        return {"prompt": prompt, "answer": gold_answer(row["answer"])}

    return dataset.map(prompt_and_answer, remove_columns=dataset.column_names)


def for_sft(dataset: "Dataset", system_prompt: str | None = None, instruction: str | None = None) -> "Dataset":
    r"""Rows for SFT: `prompt` (the same conversation as in RL) and `completion` (the solution, or the boxed answer).

    A row's `demonstration` is learnt as it is. SimpleRL's rows have no solutions: what is learnt from them is to answer
    without a reasoning.

    Args:
        dataset (`datasets.Dataset`): Rows of [`load_rows`], or with whole solutions as `answer`.
        system_prompt (`str`, *optional*): As of [`build_prompt`].
        instruction (`str`, *optional*): As of [`build_prompt`].
    Returns:
        `datasets.Dataset`: Columns `prompt` and `completion`.
    """

    def prompt_and_completion(row):
        text = row.get("solution", row["answer"])
        boxed = text if last_box(text) else rf"\boxed{{{text}}}"
        solution = {"role": "assistant", "content": row.get("demonstration", boxed)}
        return {"prompt": build_prompt(row["question"], system_prompt, instruction), "completion": [solution]}

    return dataset.map(prompt_and_completion, remove_columns=dataset.column_names)


def _found(completion: str) -> str | None:
    """The answer that the flexible grading reads."""
    return last_box(completion) or final_answer(completion)


def _as_text(value: Any, column: str) -> str:
    """A gold answer as text: AMC's are numbers, OlympiadBench's are lists of texts."""
    match value:
        case None:
            return ""
        case str():
            return value
        case list() if all(isinstance(item, str) for item in value):
            return ", ".join(gold_answer(item) for item in value if item.strip())
        case int() | float() if not isinstance(value, bool):
            return str(int(value)) if value == int(value) else str(value)
    raise ValueError(f"column {column!r} must hold a text, a number or a list of texts, got {value!r}")
