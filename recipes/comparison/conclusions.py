"""What a comparison's report says in words: each sentence follows from an interval and a p-value by a rule.

The rules, in this order, on the 95% interval of a difference and its p-value after correction (Holm):

* the interval leaves out zero and p is at most `SIGNIFICANCE`: higher, or lower;
* the interval leaves out zero and p does not: suggested, and said to fail the correction;
* the whole interval lies within `MARGIN` of zero: no difference of more than that;
* else the data do not decide.
"""

SIGNIFICANCE = 0.05
MARGIN = 0.05


def verdict(difference: dict | None) -> str:
    """
    What a difference's interval and p-value carry, by the rules above.

    Args:
        difference (`dict`, *optional*): As [`difference`] returns, with `p_corrected`.
    Returns:
        `str`: `"higher"`, `"lower"`, `"suggested"`, `"level"`, `"open"`, or `"unknown"` where there is none.
    """
    if difference is None:
        return "unknown"
    low, high = difference["interval"]
    if low > 0 or high < 0:
        if difference["p_corrected"] > SIGNIFICANCE:
            return "suggested"
        return "higher" if low > 0 else "lower"
    return "level" if -MARGIN <= low and high <= MARGIN else "open"


def points(value: float, signed: bool = True) -> str:
    """
    A share as percentage points, with one decimal, or more where one would show a difference as none.

    Args:
        value (`float`): In [-1, 1].
        signed (`bool`, *optional*, defaults to `True`): Whether a positive one has its sign.
    Returns:
        `str`: As `"+1.2"`.
    """
    decimals = next((count for count in (1, 2, 3) if round(100 * value, count)), 1)
    rounded = round(100 * value, decimals) + 0.0  # -0.0 would print its sign
    return f"{rounded:+.{decimals}f}" if signed and rounded else f"{rounded:.{decimals}f}"


def _interval(difference: dict) -> str:
    """A difference's interval in words, as "-2.0 to 4.4"."""
    low, high = difference["interval"]
    return f"{points(low, signed=False)} to {points(high, signed=False)}"


def p_value(p: float) -> str:
    """
    A p-value with two significant digits.

    Args:
        p (`float`): In [0, 1].
    Returns:
        `str`: As `"0.012"`, or `"< 0.0001"`.
    """
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def compared(first: str, other: str, difference: dict | None) -> str:
    """
    A sentence on two models' difference.

    Args:
        first (`str`): The model whose score the difference is counted from.
        other (`str`): The model that is subtracted.
        difference (`dict`, *optional*): As [`difference`] returns.
    Returns:
        `str`: A sentence that claims what [`verdict`] carries.
    """
    # A label with a comma would be taken for a list of models.
    first, other = (f"“{name}”" if "," in name else name for name in (first, other))
    if difference is None:
        return f"{first} and {other} cannot be compared: they share no seed, or their answers were not kept."
    numbers = f"difference {points(difference['difference'])} points, 95% interval {_interval(difference)}"
    side = "higher" if difference["difference"] > 0 else "lower"
    sentence = {
        "higher": f"{first} scores higher than {other}",
        "lower": f"{first} scores lower than {other}",
        "suggested": f"Before correction only, {first} scores {side} than {other} ({_corrected(difference)})",
        "level": f"{first} and {other} do not differ by more than {points(MARGIN, signed=False)} points",
        "open": f"The data do not tell {first} from {other}",
    }[verdict(difference)]
    return f"{sentence}: {numbers}{_coverage(difference)}."


def gained(gains: dict | None, grading: str = "strict") -> str:
    """
    What a model gained over the untrained one, in words that follow a subject and a colon.

    Args:
        gains (`dict`, *optional*): A cell's `gains` of one kind of decoding: `strict`, `flexible` and `format`, each
            as [`difference`] returns or None.
        grading (`str`, *optional*, defaults to `"strict"`): Whose gain is told. Only a strict one has a part that is
            format.
    Returns:
        `str`: As `"a gain of 8.0 points (5.0 to 11.0): +6.0 for answers right more often, +2.0 for format."`
    """
    gain = gains and gains[grading]
    if not gain:
        return "not compared with the untrained model."
    if all(gains[name] and gains[name]["is_identical"] for name in ("strict", "flexible")):
        return "graded as the untrained model on every problem."
    size, bounds = points(abs(gain["difference"]), signed=False), _interval(gain)
    kind = "gain" if gain["difference"] > 0 else "loss"
    found = verdict(gain)
    sentence = {
        "higher": f"a gain of {size} points ({bounds})",
        "lower": f"a loss of {size} points ({bounds})",
        "suggested": f"before correction only, a {kind} of {size} points ({bounds}; {_corrected(gain)})",
        "level": f"no change of more than {points(MARGIN, signed=False)} points "
        f"({points(gain['difference'])}, {bounds})",
        "open": f"neither a gain nor a loss is shown ({points(gain['difference'])}, {bounds})",
    }[found]
    return f"{sentence}{_split(gains, found) if grading == 'strict' else ''}{_coverage(gain)}."


def _split(gains, found) -> str:
    """The two parts, wherever one of them might hide in the sum, and whether answers are right more often."""
    right, form = gains["flexible"], gains["format"]
    if right is None or form is None:
        return "; without flexible grading, format cannot be told from answers right more often"
    verdicts = verdict(right), verdict(form)
    if found in ("level", "open") and not {"higher", "lower"} & set(verdicts):
        return ""
    parts = f": {points(right['difference'])} ({_interval(right)}) for answers right more often, "
    parts += f"{points(form['difference'])} for format"
    if verdicts[0] == "lower":
        return f"{parts}; answers are right less often"
    return parts if verdicts[0] == "higher" else f"{parts}; answers are not shown to be right more often"


def _corrected(difference) -> str:
    p = f"p = {p_value(difference['p_corrected'])}".replace("= <", "<")
    return f"{p} when corrected for {difference['corrected_for']} comparisons"


def _coverage(difference) -> str:
    """What one seed cannot tell; where no seed had a part in either model, there is nothing to say."""
    return " (one seed: nothing is known of others)" if difference["n_seeds"] == 1 else ""


def headline(summary: dict) -> list[str]:
    """
    The conclusions of a comparison: the untrained model, its controls, and each of the main sizes.

    Args:
        summary (`dict`): As [`summarize`] returns.
    Returns:
        `list[str]`: Markdown, an item of a list each.
    """
    lines, grading = [], summary["grading"]
    for cell in (cell for cell in summary["cells"] if cell["role"] != "arm"):
        if cell["role"] == "untrained":
            lines.append(_untrained(cell, grading))
        else:
            subject = f"{cell['arm_label']} ({cell['label']})" if cell["size"] else cell["arm_label"]
            sentences = [gained(cell["gains"].get("greedy"), grading), *_pairs(summary, cell["size"], cell["arm"])]
            lines.append(f"**{_capital(subject)}**: {' '.join(sentences)}")
    for size in summary["main_sizes"]:
        group = [cell for cell in summary["cells"] if cell["role"] == "arm" and cell["size"] == size]
        sentences = [
            f"{_capital(cell['arm_label'])}: {gained(cell['gains'].get('greedy'), grading)}"
            f"{_sampled(cell['gains'], grading)}"
            for cell in group
        ]
        sentences += [sentence for cell in group for sentence in _pairs(summary, size, cell["arm"])]
        lines.append(f"**{group[0]['label']}**. {' '.join(sentences)}")
    return lines


def _pairs(summary, size, other) -> list[str]:
    """RL beside another arm or a control of the same size."""
    return [
        compared(pair["first_label"], pair["other_label"], pair["greedy"][summary["grading"]])
        for pair in summary["pairs"]
        if (pair["size"], pair["other"]) == (size, other)
    ]


def _sampled(gains, grading) -> str:
    """The numbers of sampling beside what is said of greedy answers, which a small push may turn."""
    gain = gains.get("sampled", {}).get(grading)
    return f" Sampled: {points(gain['difference'])} ({_interval(gain)})." if gain else ""


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _untrained(cell, grading) -> str:
    greedy = cell["accuracy"]["greedy"]
    if grading == "flexible":
        right, marked = greedy["flexible"]["mean"], greedy["strict"]["mean"]
        return f"**{_capital(cell['arm_label'])}**: {right:.1%} right, {marked:.1%} in the asked-for form."
    line = f"**{_capital(cell['arm_label'])}**: {greedy['strict']['mean']:.1%} strict"
    if "flexible" in greedy:
        lost = greedy["flexible"]["mean"] - greedy["strict"]["mean"]
        line += f", {greedy['flexible']['mean']:.1%} flexible: {points(lost, signed=False)} points lie in the format"
    return line + "."
