"""
The table of docs/lm-eval.md: where the gradings and lm-evaluation-harness's filters differ, from the tests' own list.

    python docs/gradings.py            # prints it
    python docs/gradings.py --update   # writes it into the page
"""

import argparse
import json
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "lm-eval.md"
SECTION = "lm-eval"
LISTS = ROOT / "tests" / "with_lm_eval"
OTHER = {"right": "wrong", "wrong": "right"}


def read_completions() -> list[dict]:
    """
    The completions that both grade.

    Returns:
        `list[dict]`: Each with `source`, `completion`, `golds` (the problem's answer, then every other number that a
        grading reads) and `differences`: grading, gold answer and kind of each.
    """
    return [json.loads(line) for line in (LISTS / "completions.jsonl").read_text(encoding="utf-8").splitlines()]


def read_kinds() -> dict[str, dict]:
    """The kinds of differences by name: `gradings`, what a completion is here (`ours`, right or wrong) and `reason`."""
    return json.loads((LISTS / "differences.json").read_text(encoding="utf-8"))


def table() -> str:
    """One row a kind, with its first completion, and how often the problems' own answers are graded differently."""
    completions, kinds = read_completions(), read_kinds()
    lines = ["| grading | completion | answer | here | there | |", "|---|---|--:|---|---|---|"]
    for name, kind in kinds.items():
        completion, gold = next(
            (row["completion"], gold)
            for row in completions
            for grading, gold, listed in row["differences"]
            if (grading, listed) == (kind["gradings"][0], name)
        )
        shown = completion.replace("\n", " ⏎ ").replace("|", r"\|")
        gradings = ", ".join(kind["gradings"])
        lines.append(f"| {gradings} | `{shown}` | {gold} | {kind['ours']} | {OTHER[kind['ours']]} | {kind['reason']} |")
    return "\n".join([*lines, "", _counted(completions)])


def _counted(completions: list[dict]) -> str:
    """How many completions of a model there are, and how many of them differ for the problem's answer and any other."""
    generated = [row for row in completions if row["source"] != "hand-made"]
    differing = [row for row in generated if row["differences"]]
    problems = [row for row in differing if any(gold == row["golds"][0] for _, gold, _ in row["differences"])]
    return (
        f"Of {len(generated)} completions of SmolLM2-135M-Instruct on GSM8K's test problems, {len(problems)} are\n"
        f"graded differently, and {len(differing)} if any number that a grading reads in them were the right answer."
    )


def main() -> None:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write it into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    print(table())
    if options.update:
        sys.path.insert(0, str(ROOT / "recipes"))
        from records.files import update_section

        update_section(PAGE, SECTION, table())


if __name__ == "__main__":
    main()
