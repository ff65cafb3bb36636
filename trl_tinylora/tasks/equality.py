r"""Comparing answers: plain numbers here and exactly, all else by math-verify in worker processes.

math-verify (sympy) can run for ever, or fill the memory, on what a model writes: `2^{2^{2^{100}}}`. No signal and no
thread of the training process interrupts it there. So it works in processes of its own (`worker.py`), one for each
thread of a small pool. The kernel ends a worker that exceeds its limits; that answer counts as wrong, and the next
question starts another worker. Workers are programs of their own, not forks: they inherit nothing of CUDA, do not run
the training script again, and end with the process that they serve.
"""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

from .numerals import read_number, value_of


_COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
_own = threading.local()


def is_equal(answer: str, gold: str) -> bool:
    r"""Whether two answers are the same: `\frac12` and "0.5", "1 1/4" and "5/4", "72\%" and "72", "x=5" and "5".

    Decimals are compared to six places, and to a ten-thousandth of the gold answer where that is finer.

    Args:
        answer (`str`): What was found in the completion: a number or LaTeX, without a box.
        gold (`str`): The gold answer, without a box.
    Raises:
        ImportError: If this needs math-verify and it is not installed.
    """
    return are_equal([(answer, gold)])[0]


def are_equal(pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
    """As [`is_equal`], of many pairs at once; an answer that is `None` is wrong."""
    known = [answer is not None and _equal_numbers(answer, gold) for answer, gold in pairs]
    verified = iter(_ask_all([("equal", *pair) for pair, equal in zip(pairs, known, strict=True) if equal is None]))
    return [next(verified) if equal is None else bool(equal) for equal in known]


def are_readable(answers: Sequence[str | None]) -> list[bool]:
    """Whether an answer is a number or what math-verify can read; `None` is not."""
    known = [answer is not None and (read_number(answer) is not None or None) for answer in answers]
    unknown = [("readable", answer) for answer, is_read in zip(answers, known, strict=True) if is_read is None]
    verified = iter(_ask_all(unknown))
    return [next(verified) if is_read is None else bool(is_read) for is_read in known]


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


def _ask_all(questions: list[tuple[str, ...]]) -> list[bool]:
    """What the workers say, each question asked once."""
    if not questions:
        return []
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError(f"grading {questions[0][1]!r} needs math-verify: pip install 'trl-tinylora[recipes]'")
    unique = list(dict.fromkeys(questions))
    answers = dict(zip(unique, _pool(os.getpid()).map(_ask, unique), strict=True))
    return [answers[question] for question in questions]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads that ask, of this process alone: a fork inherits no threads."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // processes)), "grading")


@functools.lru_cache(maxsize=4096)
def _ask(question: tuple[str, ...]) -> bool:
    """What this thread's worker says; no where it exceeds its limits."""
    if getattr(_own, "worker", None) is None or _own.worker.poll() is not None:
        _own.worker = _start()
    said = ""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(question), file=_own.worker.stdin, flush=True)
        said = _own.worker.stdout.readline()
    if not said:
        _own.worker.communicate()
    return said == "1\n"


def _start() -> subprocess.Popen:
    """A worker that has loaded math-verify."""
    search = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": search}
    worker = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    if worker.stdout.readline() != "ready\n":
        worker.communicate()
        raise RuntimeError(
            f"the process that compares answers ended as it started, with code {worker.returncode}; its error stands "
            f"above, or run: {' '.join(_COMMAND)}"
        )
    return worker
