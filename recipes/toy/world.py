"""The toy's world: seeded word problems of one to three steps, and the past of the toy's base model.

Run from the root of the repository:

    python recipes/toy/world.py

writes `recipes/toy/data/{train,validation,test}.jsonl` in GSM8K's own row format; the same seed gives the same bytes.
`pretraining_texts` yields what the base is pretrained on: other problems of the same kinds, each answered in one of the
styles below. Standard library only.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


DATA = Path(__file__).parent / "data"
SPLITS = {"train": 2000, "validation": 200, "test": 500}
SEED = 2602

STYLES = ("worked", "careless", "ramble", "gold")
GOLD_SHARE = 0.02
RAMBLE_SHARE = 0.44

# Half of the past comes with a request, as a system message, for the style in which the answer then is.
REQUEST_SHARE = 0.5
REQUESTS = {
    "worked": "Show the calculation.",
    "careless": "Answer at once.",
    "ramble": "Think aloud.",
    "gold": "Write full sentences.",
}
REQUESTED_SHARES = {"worked": 0.52, "careless": 0.20, "ramble": 0.20, "gold": 0.08}

NAMES = (
    "Ada Ben Cleo Dan Emma Finn Gina Hugo Ines Jack Kira Liam Mia Noah Olga Paul Quinn Rosa Sam Tina Uma Vera Will Zoe"
).split()
OBJECTS = (
    "apples balls beads books buttons cards clips coins cookies cups eggs flags keys kites lemons marbles nuts pears "
    "pencils plums shells stamps stickers toys"
).split()
CONTAINERS = "bags boxes baskets jars trays".split()
LARGEST = 99
# Sentences of a story: equal containers, a count, and what happens to it, by operator.
STORIES = {
    "containers": (
        "{name} has {groups} {container} with {each} {thing} each.",
        "{name} fills {groups} {container} with {each} {thing} each.",
        "There are {each} {thing} in each of the {groups} {container} of {name}.",
    ),
    "count": ("{name} has {total} {thing}.", "{name} owns {total} {thing}.", "{name} starts with {total} {thing}."),
    "/": (
        "{name} packs all of them into {change} equal {packing}.",
        "{name} splits them equally into {change} {packing}.",
    ),
    "-": (
        "{name} gives {change} {thing} to {friend}.",
        "{name} loses {change} of them.",
        "{friend} takes {change} {thing} away.",
        "{name} sells {change} {thing}.",
    ),
    "+": (
        "{name} buys {change} more {thing}.",
        "{name} finds {change} more.",
        "{name} gets {change} {thing} from {friend}.",
    ),
}
RAMBLES = (
    "Hmm, let me see.|Well, that is a lot.|I like this one.|So many things.|Maybe we can count.|Let us think."
).split("|")


@dataclass(frozen=True)
class Step:
    """One calculation, `left operator right = result`, all whole numbers from 1 to `LARGEST`."""

    left: int
    operator: str
    right: int
    result: int

    @property
    def expression(self) -> str:
        return f"{self.left}{self.operator}{self.right}"


@dataclass(frozen=True)
class Problem:
    """A word problem with its calculations in order; the last result is the answer."""

    name: str
    thing: str
    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result


def make_problem(rng: random.Random) -> Problem:
    """Draws one problem.

    A story starts with a count or with equal containers (a product), then things are gained, given away or packed.

    Args:
        rng (`random.Random`): Source of every choice.
    Returns:
        `Problem`: One to three steps (25%, 40%, 35%).
    """
    name, friend = rng.sample(NAMES, 2)
    thing = rng.choice(OBJECTS)
    container, packing = rng.sample(CONTAINERS, 2)
    said = {"name": name, "friend": friend, "thing": thing, "container": container, "packing": packing}
    count = rng.choices((1, 2, 3), weights=(25, 40, 35))[0]
    steps: list[Step] = []
    if rng.random() < 0.4:
        groups, each = rng.randint(2, 9), rng.randint(2, 9)
        total = groups * each
        steps.append(Step(groups, "*", each, total))
        sentences = [rng.choice(STORIES["containers"]).format(groups=groups, each=each, **said)]
    else:
        total = rng.randint(5, 50)
        sentences = [rng.choice(STORIES["count"]).format(total=total, **said)]
    asked = "How many {thing} does {name} have now?"
    while len(steps) < count:
        operator, change, result = _draw_change(rng, total, bool(steps), len(steps) == count - 1)
        sentences.append(rng.choice(STORIES[operator]).format(change=change, **said))
        steps.append(Step(total, operator, change, result))
        total = result
        if operator == "/":
            asked = "How many {thing} go into each of the {packing}?"
    if len(steps) == 1 and steps[0].operator == "*":
        asked = "How many {thing} does {name} have in all?"
    return Problem(name, thing, " ".join([*sentences, asked.format(**said)]), tuple(steps))


def _draw_change(rng: random.Random, total: int, has_steps: bool, is_last: bool) -> tuple[str, int, int]:
    """Operator, number and result of what happens to a count; a division only at the end, and into few parts."""
    divisors = [divisor for divisor in range(2, 10) if total % divisor == 0 and total // divisor <= 9]
    if is_last and has_steps and divisors and rng.random() < 0.4:
        change = rng.choice(divisors)
        return "/", change, total // change
    if total > 3 and (rng.random() < 0.5 or total > LARGEST - 30):
        change = rng.randint(2, min(total - 1, 30))
        return "-", change, total - change
    change = rng.randint(2, 30)
    return "+", change, total + change


def gold_text(problem: Problem) -> str:
    """The demonstrations' style: GSM8K's sentences with calculator marks, "Mia has <<5*4=20>>20 apples."."""
    lines = []
    for step in problem.steps:
        holder = "Each of them holds" if step.operator == "/" else f"{problem.name} has"
        lines.append(f"{holder} <<{step.expression}={step.result}>>{step.result} {problem.thing}.")
    return "\n".join([*lines, f"#### {problem.answer}"])


def worked_text(problem: Problem) -> str:
    """Bare calculations, always right: the style in which the base can solve every problem."""
    lines = [f"{step.expression}={step.result}" for step in problem.steps]
    return "\n".join(["Work:", *lines, f"#### {problem.answer}"])


def careless_text(problem: Problem) -> str:
    """A number at once: the first one of the calculation, which is hardly ever the answer."""
    return f"#### {problem.steps[0].left}"


def ramble_text(rng: random.Random) -> str:
    """Talk that never reaches the marker."""
    return f"{rng.choice(RAMBLES)} It is hard to say."


def style_shares(problem: Problem) -> dict[str, float]:
    """Probability of each style, given the problem: the more there is to work out, the likelier the work is shown.

    Args:
        problem (`Problem`): Only its number of steps and its first operator matter.
    Returns:
        `dict[str, float]`: Shares in [0, 1] by style, summing to 1.
    """
    effort = len(problem.steps) + (problem.steps[0].operator == "*")
    worked = {1: 0.24, 2: 0.25, 3: 0.26, 4: 0.27}[effort]
    careless = 1.0 - GOLD_SHARE - RAMBLE_SHARE - worked
    return {"worked": worked, "careless": careless, "ramble": RAMBLE_SHARE, "gold": GOLD_SHARE}


def answer_in_style(problem: Problem, style: str, rng: random.Random) -> str:
    """The problem's answer text in one of `STYLES`."""
    if style == "worked":
        return worked_text(problem)
    if style == "careless":
        return careless_text(problem)
    if style == "ramble":
        return ramble_text(rng)
    if style == "gold":
        return gold_text(problem)
    raise ValueError(f"style must be one of {STYLES}, got {style!r}")


def style_of(text: str) -> str:
    """The style a completion is written in, by its first words; what fits none counts as a ramble."""
    if text.startswith("Work:"):
        return "worked"
    if text.startswith("####"):
        return "careless"
    return "gold" if "<<" in text else "ramble"


def make_splits(seed: int = SEED) -> dict[str, list[Problem]]:
    """The committed problems: no question occurs twice, within a split or across splits.

    Args:
        seed (`int`, *optional*, defaults to `SEED`): Same seed, same problems.
    Returns:
        `dict[str, list[Problem]]`: Problems by split, in the order of `SPLITS`.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[Problem]] = {}
    for split, size in SPLITS.items():
        problems: list[Problem] = []
        while len(problems) < size:
            problem = make_problem(rng)
            if problem.question not in seen:
                seen.add(problem.question)
                problems.append(problem)
        splits[split] = problems
    return splits


@dataclass(frozen=True)
class Text:
    """One conversation of the base's past; `request` is empty where no style is asked for."""

    request: str
    question: str
    answer: str


def pretraining_texts(seed: int, count: int) -> Iterator[Text]:
    """The base's past: questions that are in no split, answered in the style asked for, or else as `style_shares` says.

    Args:
        seed (`int`): Same seed, same texts.
        count (`int`): Number of texts.
    Yields:
        `Text`: One conversation.
    """
    held_out = {problem.question for problems in make_splits().values() for problem in problems}
    rng = random.Random(f"pretraining {seed}")
    while count > 0:
        problem = make_problem(rng)
        if problem.question in held_out:
            continue
        is_requested = rng.random() < REQUEST_SHARE
        shares = REQUESTED_SHARES if is_requested else style_shares(problem)
        style = rng.choices(list(shares), weights=list(shares.values()))[0]
        yield Text(REQUESTS[style] if is_requested else "", problem.question, answer_in_style(problem, style, rng))
        count -= 1


def rows_as_jsonl(problems: list[Problem]) -> str:
    """Problems as GSM8K rows, one JSON object a line."""
    return "".join(
        json.dumps({"question": problem.question, "answer": gold_text(problem)}) + "\n" for problem in problems
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the toy's splits as JSON lines.")
    parser.add_argument("--output_dir", type=Path, default=DATA, help="folder for {train,validation,test}.jsonl")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, problems in make_splits().items():
        path = output_dir / f"{split}.jsonl"
        path.write_text(rows_as_jsonl(problems), encoding="utf-8", newline="\n")
        print(f"{path}: {len(problems)} rows")


if __name__ == "__main__":
    main()
