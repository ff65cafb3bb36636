r"""The program that compares answers by math-verify, with a limit on time and memory that nothing can block.

It reads questions, a JSON list a line, and writes 1 or 0 for each. The settings are those of TRL's `accuracy_reward`,
which alone is no grading of the tasks here: two boxes it joins into a set, so that a corrected answer is always wrong;
it takes "the final answer is $x$" without a box; and it counts LaTeX without braces (`\frac12`) as no answer. So
math-verify gets one answer at a time, in one box, in LaTeX that its own normaliser has put in order.
"""

import functools
import json
import math
import os
import re
import resource
import signal
import sys


LIMIT_S = 2
LIMIT_BYTES = 4 * 2**30

_SCIENTIFIC = re.compile(r"(?<![A-Za-z])(\d)[eE]([-+]?\d+)\b")
_LISTED = re.compile(r"(?<=[\d})$])\s*(?:,\s*)?(?:\\text\s*\{\s*(?:and|or)\s*\}|\\\s*(?:and|or)\b|\b(?:and|or)\b)\s*")
_OPENING = re.compile(r"\s*(?:\\left)?\s*(\\\{|\\lbrace|[(\[])")
_BASE = re.compile(r"(?<=\d)\s*_\s*\{?\s*(\d+)")


def equal(answer: str, gold: str) -> bool:
    """Whether math-verify takes two answers for the same; a gold answer that it cannot read is compared as text."""
    from math_verify import verify

    golds, answers = _parse(_ordered(gold)), _parse_answer(answer)
    if not golds:
        return answer.strip() == gold.strip()
    kinds = [match and match[1].replace("lbrace", "{") for match in (_OPENING.match(answer), _OPENING.match(gold))]
    if None not in kinds and kinds[0] != kinds[1] and _is_enclosed(answer) and _is_enclosed(gold):
        return False
    # It drops the base of a number.
    bases = [_BASE.findall(text) for text in (answer, gold)]
    if all(bases) and bases[0] != bases[1]:
        return False
    places = _places(golds[0])
    # Six and fifteen are math-verify's own, both absolute.
    precision = {"float_rounding": places, "numeric_precision": places + 9}
    return verify(golds, answers, **precision, allow_set_relation_comp=True, timeout_seconds=None)


def readable(answer: str) -> bool:
    """Whether math-verify can read an answer."""
    return bool(_parse(answer))


def _ordered(text: str) -> str:
    """The text with the scientific notation and the lists that math-verify reads."""
    # math-verify reads 4.5e33, as the answers of physics problems are written, as 4.5 times Euler's number times 33.
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text.replace("\u2212", "-"))
    return _LISTED.sub(", ", text)


def _parse_answer(answer: str) -> list:
    """What math-verify reads in an answer, as TRL's `accuracy_reward` calls it."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
    from math_verify import LatexExtractionConfig, parse

    order = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    read = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    boxed = rf"\boxed{{{normalize_latex(_ordered(answer), order)}}}"
    return parse(boxed, extraction_config=[read], extraction_mode="first_match", parsing_timeout=None)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> list:
    """What math-verify reads in a box; empty if nothing."""
    from math_verify import parse

    return parse(rf"\boxed{{{text}}}", parsing_timeout=None)


def _is_enclosed(text: str) -> bool:
    r"""Whether a text ends in a bracket: "(1, 2)", `\{1, 2\}`, not "(1 + x)^2"."""
    return re.search(r"(?:[)\]]|\\\}|\\rbrace)\s*[.$]*\s*$", text) is not None


def _places(gold: object) -> int:
    """Decimal places that hold a ten-thousandth of the gold number or its smallest element; six, or more."""
    places = 6
    for part in getattr(gold, "args", ()) if type(gold).__name__ in ("FiniteSet", "Tuple", "Interval") else (gold,):
        size = abs(float(part.evalf())) if getattr(part, "is_number", False) and part.is_real else 0
        places = max(places, math.ceil(-math.log10(2e-4 * size))) if 1e-300 < size < 1 else places
    return places


def serve() -> None:
    """Answers questions until there are no more."""
    import math_verify  # noqa: F401 - takes most of the start

    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    # By default the kernel ends a process that gets this signal, whatever its interpreter is doing.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    said, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=said, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in sys.stdin:
        name, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        try:
            result = {"equal": equal, "readable": readable}[name](*texts)
        except Exception:
            result = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(bool(result)), file=said, flush=True)


if __name__ == "__main__":
    serve()
