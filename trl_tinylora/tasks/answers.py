"""Finding an answer in a text and comparing it with the gold one: what all tasks share of it."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from .numerals import last_number, read_number, states_number, tidy, value_of
from .verification import ask


# A brace after a backslash is a printed one: \{1, 2\} holds no group.
_BRACES = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)
_ANSWER_IS = re.compile(r"\banswers?\b(?:\s+\w+){0,4}?\s*(?:\bis\b|\bare\b|:|=)[\s:]*", re.IGNORECASE)
_FORMULA = r"(?:\$\$[^$]+\$\$|\$[^$]+\$|\\\(.{1,500}?\\\)|\\\[.{1,500}?\\\])"
_FORMULAS = re.compile(rf"{_FORMULA}(?:\s*(?:,\s*(?:and|or)?|and|or)\s*{_FORMULA})*", re.DOTALL)


def texts_of(completions: list[Any]) -> list[str]:
    """What the model wrote, of completions as TRL gives them to a reward: texts, or chats that end in its turn."""
    return [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]


def last_box(text: str) -> str | None:
    r"""What the last `\boxed{...}` that is closed and not empty holds, as written, or `None`."""
    open_groups, last_start, content = [], -1, None
    for match in _BRACES.finditer(text):
        if match[1]:
            open_groups.append(match.end())
        elif match[2] == "{":
            open_groups.append(None)
        elif match[2] == "}" and open_groups:
            start = open_groups.pop()
            if start is not None and start > last_start and text[start : match.start()].strip():
                last_start, content = start, text[start : match.start()].strip()
    return content


def final_answer(text: str) -> str | None:
    """The answer of a text without a box: what "answer is" or "answer:" states, else its last formula or number.

    Args:
        text (`str`): The text the model wrote.
    Returns:
        `str` or `None`: A number in plain digits, a formula without dollars, or words; `None` if there is nothing.
    """
    # A box that is empty, or that the limit cut, is not to hide what else is there.
    text = re.sub(r"\\boxed\s*\{?", " ", text)
    _, *stated = _ANSWER_IS.split(text)
    after = stated[-1].strip(" .*\n") if stated else ""
    statement = re.split(r"\n|[.!?]\s+(?=[^\W\d])", after)[0]
    if statement and (re.search(r"\d", statement) or not re.search(r"\d", after)):
        formulas = _FORMULAS.search(statement)
        # A list, an interval, an expression or a word is the answer as a whole.
        is_whole = states_number(statement) or re.search(r"[()\[\]{}\\^<>=+*]|^\D*$", statement)
        found = read_number(statement) or (None if formulas else statement if is_whole else last_number(statement))
    else:
        *_, formulas = [None, *_FORMULAS.finditer(text)]
        found = last_number(tidy(text[formulas.end() if formulas else 0 :]))
    return found or (re.sub(r"\$+|\\[()\[\]]", " ", formulas[0]).strip() if formulas else None)


def is_equal(answer: str, gold: str) -> bool:
    r"""Whether two answers are the same: `\frac12` and "0.5", "1 1/4" and "5/4", "72\%" and "72", "x=5" and "5".

    Plain numbers are compared here and exactly; decimals to six places, and to a ten-thousandth of the gold answer
    where that is finer. All else is compared by math-verify.

    Args:
        answer (`str`): What was found in the completion: a number or LaTeX, without a box.
        gold (`str`): The gold answer, without a box.
    Raises:
        ImportError: If this needs math-verify and it is not installed.
    """
    return are_equal([(answer, gold)])[0]


def are_equal(pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
    """As [`is_equal`], of many pairs at once; an answer that is `None` is wrong."""
    known = [False if answer is None else _equal_numbers(answer, gold) for answer, gold in pairs]
    asked = iter(ask([("equal", *pair) for pair, equal in zip(pairs, known, strict=True) if equal is None]))
    return [next(asked) if equal is None else equal for equal in known]


def are_readable(answers: Sequence[str | None]) -> list[bool]:
    """Whether an answer is a number or what math-verify can read; `None` is not."""
    known = [False if answer is None else read_number(answer) is not None or None for answer in answers]
    asked = iter(ask([("readable", answer) for answer, read in zip(answers, known, strict=True) if read is None]))
    return [next(asked) if read is None else read for read in known]


def _equal_numbers(answer: str, gold: str) -> bool | None:
    """Whether two plain numbers are the same; `None` where one of them is none, or means more in a formula."""
    if answer.strip() == gold.strip():
        return True
    # A factorial, or a percentage that math-verify takes for either reading; "y = 5" is not "x = 5".
    if "!" in answer + gold or ("%" in answer) != ("%" in gold) or "=" in gold:
        return None
    numbers = [read_number(answer), read_number(gold)]
    if None in numbers:
        return None
    value, gold_value = map(value_of, numbers)
    if value == gold_value or isinstance(value, str) or isinstance(gold_value, str):
        return value == gold_value
    tolerance = min(Fraction(1, 2_000_000), abs(gold_value) / 10_000)
    return any("." in number for number in numbers) and abs(value - gold_value) <= tolerance
