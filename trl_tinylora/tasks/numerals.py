r"""Reading the one number that a statement of an answer holds, and finding the last number of a text.

A number ends where the statement ends. A unit, a currency, emphasis, a box, "x =" or a full stop present it; what makes
it another number is read with it ("2 2/3", "3/4", "5:30", "3 million", "1.5e3"); anything else behind it ("18 or 20",
"10-3", "5 feet 6 inches", `2\pi`) leaves no number at all, never its first part.
"""

import re
import unicodedata
from fractions import Fraction


_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d+)?|\.\d+)"
_WORDS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "k": 3, "K": 3, "M": 6, "B": 9}
_NUMBER = (
    r"(?:(?P<time>\d+(?::\d+)+)"
    rf"|(?:(?P<whole>{_INTEGER})\s+)?(?P<over>{_INTEGER})\s*/\s*(?P<under>{_INTEGER})(?!\.?\d)"
    rf"|(?P<decimal>{_DECIMAL})(?:\s*[x×*]\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,3}})(?!\d)\}}?"
    r"|[eE](?P<exponent>[-+]?\d{1,3})(?!\d))?)"
    r"(?P<words>(?-i:[kKMB])(?!\w)|(?:\s*(?:hundred|thousand|million|billion|trillion)\b)*)"
)
_SIGN = r"(?:[-+]\s*|(?:minus|negative)\s+)?"
_CURRENCY = r"(?:(?:(?-i:(?!NOT?\b)[A-Z]{2,3})|Rs|dollars?|euros?|pounds?|yen|rupees?)\.?\s*)?"
_ABOUT = r"(?:(?:about|approximately|approx\.|around|roughly|exactly|only|just|~)\s*)?"
_STATED = re.compile(rf"\s*(?:[^\d]*:)?[\s(\[{{]*{_ABOUT}(?P<sign>{_SIGN}{_CURRENCY}{_SIGN}){_NUMBER}", re.IGNORECASE)
_FACTOR = re.compile(r"\s*(?:[\^²³⁴√π]|\\(?:sqrt|pi|cdot|times|frac)|[xyz](?![^\W\d_]))")
_GOES_ON = re.compile(
    r"\(|\s*(?:[+*^<>=≤≥±×·÷√π∞²³⁴|\\{&]|[-\u2013\u2014/:,.;]\s*[\d({\\√π]"
    r"|(?i:and|or(?! so\b)|to|plus|minus|over|squared|cubed|thirds|factorial)\b|[xyzinek](?![^\W\d_]))"
)
# "72 in 2 days" and "25 (5 * 5)" are 72 and 25; "1 in 5" is not 1.
_QUALIFIED = re.compile(
    r"(?!.*\b(?:and|or)\b)[^\d(]*\s(?:(?:in|of|per|for|every|each|after|at|within)\s+\d[\d,.]*\s+[^\W\d]\D*$|\(.*\D)"
)
_LAST = re.compile(
    # A minus after a word, a digit or a bracket is a subtraction or a range ("48-24"), not a sign.
    rf"(?<!\d)(?P<sign>(?:(?<![\w)])-)?(?:\\?\$ ?-?)?){_NUMBER}"
)
_SENTENCE = re.compile(r"(\D*\d.*?)[.!?]\s+[^\W\d].*", re.DOTALL)
# What an equation or a sentence comes to stands behind its last sign or verb; one within brackets is a remark.
_SIDES = re.compile(r".*(?:(?<![<>!])[=≈]|\b(?:is|are|equals)\b)(?![^(]*\))(?=.*\d)", re.DOTALL)
_EQUATIONS = re.compile(r"[=≈].*\d.*(?:,\s|;|\band\b|\bor\b)", re.DOTALL)
_TIDIED = [
    (re.compile(pattern), by)
    for pattern, by in (
        ("\u2212", "-"),
        (r"<<[^<>]*>>|</?[A-Za-z]\w*>|<\|\w+\|>", ""),
        ("[\u00bc-\u00be\u2150-\u215e]", lambda match: " " + unicodedata.normalize("NFKC", match[0])),
        ("\u2044", "/"),
        (r"(?<=\d)(?:[ \u00a0\u2009\u202f']|\\[, ]|\{,\}|,\\!)(?=\d{3}(?![\d/]))", ","),
        (
            r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))",
            lambda match: f" {match[1] or match[2]}/{match[3] or match[4]} ",
        ),
        (r"(?<=\d)(?:\\[!,;]|\{)\s*:\s*(?:\\[!,;]|\})?(?=\d)", ":"),
        # Two blanks, so that "5$100" is not taken for 5 100.
        (r"\\(?:left|right|displaystyle)\b|\\[,;:!()\[\] ]|(?:\b[A-Z]{1,2})?\\?[$€£¥₹₩]|[`\"\u201c\u201d]", "  "),
        (r"\\approx\b", "≈"),
        (r"\\(?:times|cdot)\b", "×"),
        (r"\\%", "%"),
        (r"\\+\s*$", ""),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b", "°"),
        (r"(?<!\d)(?<!\d )\*+|\*+(?! ?[\d(])|(?<!\w)_+|_+(?!\w)", ""),
        (
            r"(?<=\d)\s+and\s+(?:(?:a|one)\s+(half|third|quarter)\b|(?=\d+\s*/\s*\d))",
            lambda match: " " + {"half": "1/2", "third": "1/3", "quarter": "1/4"}.get(match[1], ""),
        ),
    )
]
_WRAPPED = re.compile(r"\\(?:boxed|fbox|mbox|text\w*|math\w+|operatorname)\s*\{([^{}]*)\}")


def read_number(text: str) -> str | None:
    """The one number that a text states, in plain digits, or `None` if it states none or several.

    Args:
        text (`str`): What stands where the answer belongs: behind a marker, in a box.
    Returns:
        `str` or `None`: As in "-1080.5"; "8/3" for "2 2/3"; "5:30" for a time or a ratio.
    """
    # No number that long is an answer, and Python refuses to convert digits by the thousand.
    match = _stated(text) if len(text) < 1000 else None
    if match is None:
        return None
    tail = match.string[match.end() :]
    # The digit of "m^2" or "cm3" belongs to the unit.
    rest = re.sub(r"(?<=[^\W\d_])(?:\s?\^)?\{?-?[23]\}?(?!\d)", "", tail)
    is_whole = not _GOES_ON.match(tail) and (not re.search(r"\d", rest) or _QUALIFIED.match(rest))
    return _plain(match) if is_whole else None


def states_number(text: str) -> bool:
    """Whether a text begins by stating a number, be it the only one or not."""
    return len(text) < 1000 and _stated(text) is not None


def last_number(text: str) -> str | None:
    """The last number of a text, whatever stands before it, or `None`; as of [`read_number`]."""
    matches = list(_LAST.finditer(text.replace("\u2212", "-")))
    if not matches or len(matches[-1][0]) >= 1000 or _FACTOR.match(matches[-1].string, matches[-1].end()):
        return None
    return _plain(matches[-1])


def value_of(number: str) -> Fraction | str:
    """The value of what [`read_number`] returned; a time or a ratio stays text."""
    return number if ":" in number else Fraction(number)


def tidy(text: str) -> str:
    """The text without emphasis, currency signs, boxes and LaTeX's spacing, fractions as in "1/2"."""
    for pattern, by in _TIDIED:
        text = pattern.sub(by, text)
    while (unwrapped := _WRAPPED.sub(r" \1 ", text)) != text:
        text = unwrapped
    return text


def _stated(text: str) -> re.Match | None:
    """The number that a statement begins with, behind its label or equation."""
    text = _SENTENCE.sub(r"\1", tidy(text), count=1)
    sides = _SIDES.match(text)
    # "x = 5, y = 3" are two answers: read from the first on, they are not one number.
    if sides and _EQUATIONS.search(sides[0]):
        return _STATED.match(re.split("[=≈]", text, maxsplit=1)[1])
    return _STATED.match(text[sides.end() :] if sides else text)


def _plain(match: re.Match) -> str | None:
    """A matched number in plain digits."""
    if match["time"]:
        return re.sub(r"\b0+(?=\d)", "", match["time"])
    sign = "-" if re.search(r"-|minus|negative", match["sign"], re.IGNORECASE) else ""
    words = match["words"] if len(match["words"]) == 1 else match["words"].lower()
    power = sum(_WORDS[word] for word in words.split())
    parts = ("whole", "over", "under", "decimal")
    whole, over, under, decimal = ((match[name] or "").replace(",", "") for name in parts)
    power += int(match["power"] or match["exponent"] or 0)
    if decimal and not power:
        return sign + decimal
    if not decimal and not int(under):
        return None
    value = Fraction(decimal) if decimal else int(whole or 0) + Fraction(int(over), int(under))
    return sign + str(value * Fraction(10) ** power)
