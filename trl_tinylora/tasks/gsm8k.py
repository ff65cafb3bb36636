"""GSM8K (Cobbe et al., arXiv:2110.14168): prompt, gold answer, grading, reward and loading.

RL, SFT and evaluation, on the real data and on the toy (`recipes/toy`), all use this module: the training reward and
the strict evaluation are the same function, and every arm sees the same prompt.

One row, as OpenAI published it:

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\nNatalia sold 48+24 = <<48+24=72>>72 ...\\n#### 72"}

The paper (Morris et al., arXiv:2602.04118) trains with VERL and states neither its prompt nor its answer format, so the
prompt and the strict reward follow VERL's stock GSM8K recipe. Deviations from VERL's grader: answers are compared as
numbers, not as strings; a "$", a minus before it and any blanks may stand before the number; the whole completion is
read, not its last 300 characters.
"""

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from .answers import NUMBER, digits, is_equal, last_box, last_number, plain_minus, texts_of
from .rows import id_of, read_rows, text_in


if TYPE_CHECKING:
    from datasets import Dataset


# https://github.com/volcengine/verl/blob/030a519ae51a9916b9debd99c6def5f4d83f991f/examples/data_preprocess/gsm8k.py
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'

_NUMBER_WITH_UNIT = re.compile(r"\s*" + NUMBER + r"(?:[^\d\\]|\\%)*")


def build_prompt(question: str, system_prompt: str | None = None) -> list[dict[str, str]]:
    """One user turn: the question and VERL's instruction to end with "####".

    Args:
        question (`str`): The problem's text.
        system_prompt (`str`, *optional*): A system turn before it; without one, there is none.
    Returns:
        `list[dict[str, str]]`: A conversation that ends in the user turn.
    """
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": f"{question} {INSTRUCTION}"}]


def gold_answer(answer: str) -> str:
    """The number after "####" in a row's answer, as plain digits ("1,080" gives "1080").

    Args:
        answer (`str`): The row's whole answer text.
    Returns:
        `str`: The number, without commas or "$".
    Raises:
        ValueError: If no number follows a "####" marker.
    """
    gold = extract_strict(answer)
    if gold is None:
        raise ValueError(f'the gold answer has no number after "####": {answer!r}')
    return gold


def extract_strict(completion: str) -> str | None:
    """The number after the last "####" that is followed by one on its line, or `None`.

    VERL likewise takes the last match (its early versions took the first), so a completion that states two answers is
    graded by its second.

    Args:
        completion (`str`): The text the model wrote.
    Returns:
        `str` or `None`: Plain digits with sign and decimals, as in "-1080.5".
    """
    return last_number(completion, after=r"####[ \t]*")


def extract_flexible(completion: str) -> str | None:
    r"""The strict answer; without one, the last `\boxed{...}`; without that, the last number anywhere.

    Args:
        completion (`str`): The text the model wrote.
    Returns:
        `str` or `None`: A number, or a box's content as written, which may be LaTeX.
    """
    return extract_strict(completion) or last_box(completion) or last_number(completion)


def is_correct(extracted: str | None, gold: str) -> bool:
    r"""Whether an extracted answer equals the gold number in value: "72.0", "$72", "72%" and "72 clips." equal "72".

    What is not a number with a unit (`\frac{144}{2}`) is compared by math-verify.

    Args:
        extracted (`str` or `None`): What [`extract_strict`] or [`extract_flexible`] returned.
        gold (`str`): The gold number.
    Returns:
        `bool`: `False` for `None`.
    Raises:
        ValueError: If `gold` is not a number.
        ImportError: If `extracted` needs math-verify and it is not installed.
    """
    gold_value = _value(gold)
    if gold_value is None:
        raise ValueError(f"gold must be a number, got {gold!r}")
    if extracted is None:
        return False
    value = _value(extracted)
    return value == gold_value if value is not None else is_equal(extracted, str(gold_value))


def grade(completion: str, gold: str) -> dict[str, bool]:
    r"""Whether a completion is correct by each of the three gradings.

    "strict" reads the number after the last "####", "last_number" the last number anywhere whatever stands before it,
    "flexible" the marker's number, without one the last `\boxed{...}`, without that the last number.

    Args:
        completion (`str`): The text the model wrote.
        gold (`str`): The gold number.
    Returns:
        `dict[str, bool]`: By "strict", "last_number" and "flexible".
    """
    found = {
        "strict": extract_strict(completion),
        "last_number": last_number(completion),
        "flexible": extract_flexible(completion),
    }
    return {grading: is_correct(answer, gold) for grading, answer in found.items()}


def has_marker(completion: str) -> bool:
    """Whether a number follows a "####" on its line."""
    return extract_strict(completion) is not None


def strict_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 where the number after the last "####" equals the gold number, else 0.0: TRL reward and strict grading.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): Texts, or conversations that end in the model's turn.
        answer (`list[str]`): Gold numbers, one a completion: the `answer` column of [`for_rl`].
        kwargs: The other columns and values that TRL hands to every reward function; unused.
    Returns:
        `list[float]`: One reward a completion.
    """
    pairs = zip(texts_of(completions), answer, strict=True)
    return [float(is_correct(extract_strict(text), gold)) for text, gold in pairs]


def format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """1.0 where a number follows a "####", right or wrong, else 0.0: a control that pays for the format alone.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): Texts, or conversations that end in the model's turn.
        kwargs: The other columns and values that TRL hands to every reward function; unused.
    Returns:
        `list[float]`: One reward a completion.
    """
    return [float(has_marker(text)) for text in texts_of(completions)]


def load_rows(dataset_name: str, split: str, config: str | None = None, limit: int | None = None) -> "Dataset":
    """Checked rows with the columns `question` and `answer`, from a file, a folder or the Hub.

    Args:
        dataset_name (`str`): A `.jsonl` or `.json` file, a folder that holds `{split}.jsonl`, or a name on the Hub.
        split (`str`): Split to load; a single file is taken as this split.
        config (`str`, *optional*): The Hub data set's configuration; "openai/gsm8k" is read as "main" without one.
        limit (`int`, *optional*): Keep the first `limit` rows.
    Returns:
        `datasets.Dataset`: Columns `question` and `answer`, and `id` if every row has one.
    Raises:
        FileNotFoundError: If the file or the split's file does not exist.
        ValueError: If a row cannot be read, lacks a column or has no gold number, or if `limit` is below 1.
    """

    def check(row):
        kept = {name: text_in(row, name) for name in ("question", "answer")}
        gold_answer(kept["answer"])
        return kept | id_of(row)

    return read_rows(dataset_name, split, config, limit, check)


def for_rl(dataset: "Dataset", system_prompt: str | None = None) -> "Dataset":
    """Rows for GRPO: `prompt` (conversation) and `answer` (gold number).

    Args:
        dataset (`datasets.Dataset`): Rows of [`load_rows`].
        system_prompt (`str`, *optional*): As of [`build_prompt`].
    Returns:
        `datasets.Dataset`: Columns `prompt` and `answer`.
    """
    return dataset.map(
        lambda row: {"prompt": build_prompt(row["question"], system_prompt), "answer": gold_answer(row["answer"])},
        remove_columns=dataset.column_names,
    )


def for_sft(dataset: "Dataset", system_prompt: str | None = None) -> "Dataset":
    """Rows for SFT: `prompt` (the same conversation as in RL) and `completion` (the whole gold answer).

    Args:
        dataset (`datasets.Dataset`): Rows of [`load_rows`].
        system_prompt (`str`, *optional*): As of [`build_prompt`].
    Returns:
        `datasets.Dataset`: Columns `prompt` and `completion`.
    """

    def prompt_and_completion(row):
        solution = {"role": "assistant", "content": row["answer"]}
        return {"prompt": build_prompt(row["question"], system_prompt), "completion": [solution]}

    return dataset.map(prompt_and_completion, remove_columns=dataset.column_names)


def _value(text: str) -> Decimal | None:
    """The value of a number with an optional unit, `None` for anything else."""
    match = _NUMBER_WITH_UNIT.fullmatch(plain_minus(text))
    return Decimal(digits(match[1])) if match else None
