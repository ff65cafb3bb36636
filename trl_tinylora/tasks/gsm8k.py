"""GSM8K (Cobbe et al., arXiv:2110.14168): prompt, gold answer, grading, reward and loading.

RL, SFT and evaluation, on the real data and on the toy (`recipes/toy`), all use this module: the training reward and
the strict evaluation are the same function, and every arm sees the same prompt.

One row, as OpenAI published it:

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\nNatalia sold 48+24 = <<48+24=72>>72 ...\\n#### 72"}

The paper (Morris et al., arXiv:2602.04118) trains with VERL and states neither its prompt nor its answer format, so the
prompt and the strict reward follow VERL's stock GSM8K recipe. Deviations from VERL's grader: answers are compared as
numbers, not as strings; the number must end where the answer ends (VERL takes the digits behind the marker, so 2 for
"#### 2 2/3"), and may be presented as in "#### **73**" and "#### EUR 500", see [`~trl_tinylora.tasks.numerals`]; the
whole completion is read, not its last 300 characters.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .answers import are_equal, last_box, texts_of
from .numerals import last_number, read_number, states_number, value_of
from .rows import demonstration_of, id_of, read_rows, text_in


if TYPE_CHECKING:
    from datasets import Dataset


# https://github.com/volcengine/verl/blob/030a519ae51a9916b9debd99c6def5f4d83f991f/examples/data_preprocess/gsm8k.py
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'

_MARKED = re.compile(r"####[ \t]*((?:(?!####)[^\n])*)")


def build_prompt(
    question: str, system_prompt: str | None = None, instruction: str | None = None
) -> list[dict[str, str]]:
    """One user turn: the question and an instruction, VERL's to end with "####" where none is given.

    Args:
        question (`str`): The problem's text.
        system_prompt (`str`, *optional*): A system turn before it; without one, there is none.
        instruction (`str`, *optional*): Instead of [`INSTRUCTION`]; an empty one leaves the question alone.
    Returns:
        `list[dict[str, str]]`: A conversation that ends in the user turn.
    """
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    asked = f"{question} {INSTRUCTION if instruction is None else instruction}"
    return [*system, {"role": "user", "content": asked.rstrip()}]


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

    The answer ends with its line or sentence. If it is not one number ("18 or 20", "10-3"), there is none. VERL
    likewise takes the last match (its early versions took the first), so a completion that states two answers behind
    two markers is graded by its second.

    Args:
        completion (`str`): The text the model wrote.
    Returns:
        `str` or `None`: Plain digits with sign and decimals, as in "-1080.5"; "8/3" for "2 2/3"; "5:30" for a time.
    """
    answer = _marked(completion)
    return None if answer is None else read_number(answer)


def extract_flexible(completion: str) -> str | None:
    r"""The strict answer; without a marker and number, the last `\boxed{...}`; without that, the last number anywhere.

    What stands behind the marker counts even where it is not one number: then there is no answer.

    Args:
        completion (`str`): The text the model wrote.
    Returns:
        `str` or `None`: A number, or a box's content as written, which may be LaTeX.
    """
    if _marked(completion) is not None:
        return extract_strict(completion)
    return last_box(completion) or last_number(completion)


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
    return _are_correct([extracted], [gold])[0]


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
    found = [extract_strict(completion), last_number(completion), extract_flexible(completion)]
    return dict(zip(("strict", "last_number", "flexible"), _are_correct(found, [gold] * 3), strict=True))


def has_marker(completion: str) -> bool:
    """Whether one number, and no more, follows the last "####"."""
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
    return [float(right) for right in _are_correct(map(extract_strict, texts_of(completions)), answer)]


def flexible_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 where the answer is right by the flexible grading, else 0.0: for models that do not know the marker.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): Texts, or conversations that end in the model's turn.
        answer (`list[str]`): Gold numbers, one a completion: the `answer` column of [`for_rl`].
        kwargs: The other columns and values that TRL hands to every reward function; unused.
    Returns:
        `list[float]`: One reward a completion.
    """
    return [float(right) for right in _are_correct(map(extract_flexible, texts_of(completions)), answer)]


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
        `datasets.Dataset`: Columns `question` and `answer`, and `id` and `demonstration` if every row has one.
    Raises:
        FileNotFoundError: If the file or the split's file does not exist.
        ValueError: If a row cannot be read, lacks a column or has no gold number, or if `limit` is below 1.
    """

    def check(row):
        kept = {name: text_in(row, name) for name in ("question", "answer")}
        gold_answer(kept["answer"])
        return kept | id_of(row) | demonstration_of(row)

    return read_rows(dataset_name, split, config, limit, check)


def for_rl(dataset: "Dataset", system_prompt: str | None = None, instruction: str | None = None) -> "Dataset":
    """Rows for GRPO: `prompt` (conversation) and `answer` (gold number).

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
    """Rows for SFT: `prompt` (the same conversation as in RL) and `completion` (the whole gold answer, or the row's
    `demonstration`).

    Args:
        dataset (`datasets.Dataset`): Rows of [`load_rows`].
        system_prompt (`str`, *optional*): As of [`build_prompt`].
        instruction (`str`, *optional*): As of [`build_prompt`].
    Returns:
        `datasets.Dataset`: Columns `prompt` and `completion`.
    """

    def prompt_and_completion(row):
        solution = {"role": "assistant", "content": row.get("demonstration", row["answer"])}
        return {"prompt": build_prompt(row["question"], system_prompt, instruction), "completion": [solution]}

    return dataset.map(prompt_and_completion, remove_columns=dataset.column_names)


def _marked(completion: str) -> str | None:
    """What stands behind the last "####" that is followed by a number on its line."""
    return next((answer for answer in reversed(_MARKED.findall(completion)) if states_number(answer)), None)


def _are_correct(found: Iterable[str | None], golds: Sequence[str]) -> list[bool]:
    """Whether extracted answers are right; only what is not one number is left to math-verify."""
    checked, hard = [], []
    for extracted, gold in zip(found, golds, strict=True):
        gold_number = read_number(gold)
        if gold_number is None:
            raise ValueError(f"gold must be a number, got {gold!r}")
        number = read_number(extracted or "")
        is_hard = bool(extracted) and number is None
        hard += [(extracted, gold_number)] if is_hard else []
        checked.append(None if is_hard else number is not None and value_of(number) == value_of(gold_number))
    verified = iter(are_equal(hard))
    return [next(verified) if right is None else right for right in checked]
