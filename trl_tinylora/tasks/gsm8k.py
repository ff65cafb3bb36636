"""GSM8K (Cobbe et al., arXiv:2110.14168): prompt, gold answer, grading, reward and loading.

RL, SFT and evaluation, on the real data and on the toy (`recipes/toy`), all go through this module: the training
reward and the strict evaluation are the same function, and every arm sees the same prompt.

One row, as OpenAI published it:

    {"question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. ...",
     "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\\nNatalia sold 48+24 = <<48+24=72>>72 ...\\n#### 72"}

The paper (Morris et al., arXiv:2602.04118) trains with VERL and states neither its prompt nor its answer format, so the
prompt and the strict reward follow VERL's stock GSM8K recipe. Deviations from VERL's grader: answers are compared as
numbers, not as strings; a "$", a minus before it and any blanks may stand before the number; the whole completion is
read, not its last 300 characters.
"""

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


# https://github.com/volcengine/verl/blob/030a519ae51a9916b9debd99c6def5f4d83f991f/examples/data_preprocess/gsm8k.py
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'

# A minus after a word, a digit or a bracket is a subtraction or a range ("48-24"), not a sign.
_NUMBER = r"((?:(?<![\w)])-)?(?:\\?\$ ?-?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+))"
_ANY_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(r"####[ \t]*" + _NUMBER)
_NUMBER_WITH_UNIT = re.compile(r"\s*" + _NUMBER + r"(?:[^\d\\]|\\%)*")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")


def build_prompt(question: str) -> list[dict[str, str]]:
    """One user turn: the question and VERL's instruction to end with "####".

    Args:
        question (`str`): The problem's text.
    Returns:
        `list[dict[str, str]]`: A conversation of one user turn.
    """
    return [{"role": "user", "content": f"{question} {INSTRUCTION}"}]


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
    numbers = _MARKED_NUMBER.findall(_plain_minus(completion))
    return _digits(numbers[-1]) if numbers else None


def extract_flexible(completion: str) -> str | None:
    r"""The strict answer; without one, the last `\boxed{...}`; without that, the last number anywhere.

    Args:
        completion (`str`): The text the model wrote.
    Returns:
        `str` or `None`: A number, or a box's content as written, which may be LaTeX.
    """
    strict = extract_strict(completion)
    if strict is not None:
        return strict
    boxes = [box.strip() for box in _BOXED.findall(completion) if box.strip()]
    if boxes:
        return boxes[-1]
    numbers = _ANY_NUMBER.findall(_plain_minus(completion))
    return _digits(numbers[-1]) if numbers else None


def is_correct(extracted: str | None, gold: str) -> bool:
    r"""Whether an extracted answer equals the gold number in value: "72.0", "$72", "72%" and "72 clips." equal "72".

    What is not a number with a unit (`\frac{144}{2}`) is compared by `math_verify`.

    Args:
        extracted (`str` or `None`): What [`extract_strict`] or [`extract_flexible`] returned.
        gold (`str`): The gold number.
    Returns:
        `bool`: `False` for `None`.
    Raises:
        ValueError: If `gold` is not a number.
        ImportError: If `extracted` needs `math_verify` and it is not installed.
    """
    gold_value = _value(gold)
    if gold_value is None:
        raise ValueError(f"gold must be a number, got {gold!r}")
    if extracted is None:
        return False
    value = _value(extracted)
    if value is not None:
        return value == gold_value
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            f"grading the answer {extracted!r} needs math-verify: pip install 'trl-tinylora[recipes]'"
        ) from error
    return verify(parse(str(gold_value)), parse(rf"\boxed{{{extracted}}}"))


def strict_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 where the number after the last "####" equals the gold number, else 0.0: TRL reward and strict grading.

    Args:
        completions (`list[str]` or `list[list[dict[str, str]]]`): Texts, or conversations that end in the model's turn.
        answer (`list[str]`): Gold numbers, one a completion: the `answer` column of [`for_rl`].
        kwargs: The other columns and values that TRL hands to every reward function; unused.
    Returns:
        `list[float]`: One reward a completion.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [float(is_correct(extract_strict(text), gold)) for text, gold in zip(texts, answer, strict=True)]


def load_rows(dataset_name: str, split: str, config: str | None = None, limit: int | None = None) -> "Dataset":
    """Checked rows with the columns `question` and `answer`, from a file, a folder or the Hub.

    Args:
        dataset_name (`str`): A `.jsonl` or `.json` file, a folder that holds `{split}.jsonl`, or a name on the Hub.
        split (`str`): Split to load; a single file is taken as this split.
        config (`str`, *optional*): The Hub data set's configuration; "openai/gsm8k" is read as "main" without one.
        limit (`int`, *optional*): Keep the first `limit` rows.
    Returns:
        `datasets.Dataset`: Columns `question` and `answer`.
    Raises:
        FileNotFoundError: If the file or the split's file does not exist.
        ValueError: If a row cannot be read, lacks a column or has no gold number, or if `limit` is below 1.
    """
    from datasets import Dataset, load_dataset

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(dataset_name)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    is_local = path.suffix in {".jsonl", ".json"} or path.is_absolute() or dataset_name.startswith(".")
    if is_local:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist (dataset_name={dataset_name!r}, split={split!r})")
        rows = _read_json(path)
    else:
        if config is None and dataset_name == "openai/gsm8k":
            config = "main"
        rows = load_dataset(dataset_name, config, split=split)
    source = str(path) if is_local else f"{dataset_name} ({split})"
    checked = [_check_row(row, number, source) for number, row in enumerate(rows, start=1)][:limit]
    if not checked:
        raise ValueError(f"{source} holds no rows")
    return Dataset.from_list(checked)


def for_rl(dataset: "Dataset") -> "Dataset":
    """Rows for GRPO: `prompt` (conversation) and `answer` (gold number).

    Args:
        dataset (`datasets.Dataset`): Rows of [`load_rows`].
    Returns:
        `datasets.Dataset`: Columns `prompt` and `answer`.
    """
    return dataset.map(
        lambda row: {"prompt": build_prompt(row["question"]), "answer": gold_answer(row["answer"])},
        remove_columns=["question"],
    )


def for_sft(dataset: "Dataset") -> "Dataset":
    """Rows for SFT: `prompt` (the same conversation as in RL) and `completion` (the whole gold answer).

    Args:
        dataset (`datasets.Dataset`): Rows of [`load_rows`].
    Returns:
        `datasets.Dataset`: Columns `prompt` and `completion`.
    """
    return dataset.map(
        lambda row: {
            "prompt": build_prompt(row["question"]),
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=["question", "answer"],
    )


def _plain_minus(text: str) -> str:
    """Writes the minus sign U+2212 as a hyphen."""
    return text.replace("\u2212", "-")


def _digits(number: str) -> str:
    """Drops the commas and "$" of a matched number."""
    return re.sub(r"[,$\\ ]", "", number)


def _value(text: str) -> Decimal | None:
    """The value of a number with an optional unit, `None` for anything else."""
    match = _NUMBER_WITH_UNIT.fullmatch(_plain_minus(text))
    return Decimal(_digits(match[1])) if match else None


def _read_json(path: Path) -> list[Any]:
    """Rows of a JSON array or of JSON lines; blank lines are an error, so that row and line numbers agree."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a JSON array of rows, got {type(rows).__name__}")
        return rows
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number}: not JSON: {error}") from error
    return rows


def _check_row(row: Any, number: int, source: str) -> dict[str, str]:
    """The row's question and answer, once both are known to be text and to hold a gold number."""
    if not isinstance(row, dict):
        raise ValueError(f"{source}, row {number}: must be an object with question and answer, got {row!r}")
    missing = [name for name in ("question", "answer") if not isinstance(row.get(name), str)]
    if missing:
        raise ValueError(f"{source}, row {number}: no text in column {missing}; it has {sorted(row)}")
    try:
        gold_answer(row["answer"])
    except ValueError as error:
        raise ValueError(f"{source}, row {number}: {error}") from error
    return {"question": row["question"], "answer": row["answer"]}
