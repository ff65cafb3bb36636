"""Finding an answer in a text: what all tasks share of it."""

import re
from typing import Any

from .numerals import last_number, read_number, states_number, tidy


# A brace after a backslash is a printed one: \{1, 2\} holds no group.
_BRACES = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)
_ANSWER_IS = re.compile(r"\banswers?\b(?:\s+\w+){0,4}?\s*(?:\bis\b|\bare\b|:|=)[\s:]*", re.IGNORECASE)
_FORMULA = r"(?:\$\$[^$]+\$\$|\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\])"
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
