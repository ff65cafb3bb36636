"""Finding an answer in a text and comparing it with the gold one: what all tasks share of it.

Mathematics is compared by math-verify, through TRL's `accuracy_reward`. That function alone is no grading of the tasks
here: two boxes it joins into a set, so that a corrected answer is always wrong; it takes "the final answer is $x$"
without a box; it counts LaTeX without braces (`\\frac12`) as no answer; and a gold answer that it cannot read gives no
grade. So it gets one answer at a time, in one box, in LaTeX that math-verify's own normaliser has put in order.
"""

import functools
import re
from typing import Any


# A minus after a word, a digit or a bracket is a subtraction or a range ("48-24"), not a sign.
NUMBER = r"((?:(?<![\w)])-)?(?:\\?\$ ?-?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+))"
# A brace after a backslash is a printed one: \{1, 2\} holds no group.
_BRACES = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z])(\d)[eE]([-+]?\d+)\b")


def texts_of(completions: list[Any]) -> list[str]:
    """What the model wrote, of completions as TRL gives them to a reward: texts, or chats that end in its turn."""
    return [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]


def plain_minus(text: str) -> str:
    """The text with the minus sign U+2212 written as a hyphen."""
    return text.replace("\u2212", "-")


def digits(number: str) -> str:
    """A number that [`NUMBER`] matched, without commas and "$"; the two signs of "-$-5" are one."""
    return ("-" if "-" in number else "") + re.sub(r"[-,$\\ ]", "", number)


def last_number(text: str, after: str = "") -> str | None:
    """The last number behind a regular expression without groups, or `None`; plain digits as in "-1080.5"."""
    numbers = re.findall(after + NUMBER, plain_minus(text))
    return digits(numbers[-1]) if numbers else None


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


@functools.lru_cache(maxsize=4096)
def is_equal(answer: str, gold: str) -> bool:
    r"""Whether math-verify takes two answers for the same: `\frac12` and "0.5", "72\%" and "72", "x=5" and "5".

    Args:
        answer (`str`): What was found in the completion: a number or LaTeX, without a box.
        gold (`str`): The gold answer, without a box.
    Raises:
        ImportError: If math-verify is not installed.
    """
    try:
        from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
        from math_verify import parse  # noqa: F401 - TRL's own message has no command in it
        from trl.rewards import accuracy_reward
    except ImportError as error:
        raise ImportError(
            f"grading the answer {answer!r} needs math-verify: pip install 'trl-tinylora[recipes]'"
        ) from error
    order = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    # math-verify reads 4.5e33, as the answers of physics problems are written, as 4.5 times Euler's number times 33.
    answer, gold = (_SCIENTIFIC.sub(r"\1\\times 10^{\2}", plain_minus(text)) for text in (answer, gold))
    completion = [{"role": "assistant", "content": rf"\boxed{{{normalize_latex(answer, order)}}}"}]
    (reward,) = accuracy_reward([completion], [rf"\boxed{{{gold}}}"])
    # A gold answer that math-verify cannot read is compared as text.
    return answer.strip() == gold.strip() if reward is None else bool(reward)
