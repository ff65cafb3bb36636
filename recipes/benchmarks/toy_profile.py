"""
Where the time of the toy's runs goes: one of RL, one of SFT, and the greedy and the sampled half of an evaluation.

    python recipes/benchmark.py toy_profile  # about two minutes on one core

The main thread's stack is looked at every few milliseconds, from a second thread, and each look is put down to the
innermost call that `PARTS` names. Training is cut short, and its share scaled to the recipe's number of steps. On a
GPU, where calls return before their work is done, time is put down to whatever waits for it.

The time of `make compare` itself is read from its records, where `results/compare_quick` holds some.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from types import FrameType

import torch
import yaml
from benchmarks.harness import Row, parser_of, ratio_of, run
from comparison.arguments import CompareArguments
from comparison.plan import Plan
from comparison.runs import Run
from comparison.workers import KEPT_MEMORY


# The repository's root is where a comparison runs: the paths in its files are relative to it.
QUICK = Path("recipes", "toy", "compare_quick.yaml")
BOUND = 600
EVERY = 0.003  # seconds between two looks

# By module and function: the outermost call gives the stage of a run, the innermost one its part.
STAGES = {("evaluation.run", "evaluate"): "evaluation", ("transformers.trainer", "train"): "training"}
PARTS = {
    ("transformers.generation.utils", "generate"): "generation",
    ("trl.trainer.grpo_trainer", "compute_loss"): "forward",
    ("trl.trainer.sft_trainer", "compute_loss"): "forward",
    ("accelerate.accelerator", "backward"): "backward",
    ("accelerate.accelerator", "clip_grad_norm_"): "optimizer",
    ("accelerate.optimizer", "step"): "optimizer",
    ("trl.trainer.grpo_trainer", "_calculate_rewards"): "reward",
    ("transformers.tokenization_utils_base", "__call__"): "tokenisation",
    ("transformers.tokenization_utils_base", "apply_chat_template"): "tokenisation",
    ("transformers.tokenization_utils_base", "decode"): "tokenisation",
    ("transformers.tokenization_utils_base", "batch_decode"): "tokenisation",
    ("trl_tinylora.tasks.rows", "read_rows"): "rows",
    ("datasets.arrow_dataset", "map"): "rows",
    ("datasets.arrow_dataset", "shuffle"): "rows",
    ("transformers.models.auto.auto_factory", "from_pretrained"): "loading",
    ("transformers.models.auto.tokenization_auto", "from_pretrained"): "loading",
    ("peft.mapping_func", "get_peft_model"): "adapter",
    ("transformers.trainer", "save_model"): "saving",
    ("evaluation.completions", "append"): "saving",
    ("evaluation.completions", "write"): "saving",
    ("evaluation.metrics", "graded"): "grading",
    ("evaluation.metrics", "summarize"): "grading",
    ("importlib._bootstrap", "_find_and_load"): "imports",
}
# What a run is for. Everything else is overhead.
WORK = ("generation", "forward", "backward")
TITLES = {
    "rl": "a whole RL run, 13 values",
    "sft": "a whole SFT run, 13 values",
    "greedy": "a greedy evaluation",
    "sampled": "a sampled evaluation",
}


class Looks(threading.Thread):
    """
    Counts what the thread that makes it is at, every few milliseconds, as a context manager.

    `counts` holds the looks by stage and part, `seconds` the time within.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.watched = threading.get_ident()
        self.counts: Counter = Counter()
        self._over = threading.Event()

    def __enter__(self) -> "Looks":
        self._begun = time.perf_counter()
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._over.set()
        self.join()

    def run(self) -> None:
        """Looks until the context ends."""
        while not self._over.wait(EVERY):
            self.counts[place(sys._current_frames()[self.watched])] += 1


def place(frame: FrameType | None) -> tuple[str, str]:
    """
    Stage and part that a stack belongs to.

    Args:
        frame (`FrameType`, *optional*): The innermost frame.
    Returns:
        `tuple[str, str]`: "set-up" and "rest" where nothing is named.
    """
    stage, part = "set-up", None
    while frame is not None:
        call = frame.f_globals.get("__name__"), frame.f_code.co_name
        stage = STAGES.get(call, stage)
        part = part or PARTS.get(call)
        frame = frame.f_back
    return stage, part or "rest"


def profiled(action: Callable[[], object]) -> dict:
    """
    Where a call's time goes.

    Args:
        action (`Callable`): Takes no arguments. What it prints is dropped.
    Returns:
        `dict`: Seconds by stage and part, the largest first.
    """
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        with Looks() as looks:
            action()
    total = looks.counts.total()
    return {place: looks.seconds * count / total for place, count in looks.counts.most_common()}


def runs_of(arguments: argparse.Namespace) -> dict[str, Run]:
    """
    The quick preset's runs that train 13 values, cut short.

    Args:
        arguments (`argparse.Namespace`): `rl_steps`, `sft_steps` and `limit`.
    Returns:
        `dict[str, Run]`: By algorithm.
    """
    comparison = CompareArguments(**yaml.safe_load(QUICK.read_text(encoding="utf-8")) | {"eval_limit": arguments.limit})
    planned = Plan(comparison)
    rate = {"learning_rate": planned.recipes["rl"]["learning_rate"]}
    runs = planned.final({arm: dict.fromkeys(comparison.sizes, rate) for arm in comparison.arms})
    chosen = {each.algorithm: each for each in runs if each.size == "13" and each.arm in ("rl", "sft")}
    for algorithm, steps in (("rl", arguments.rl_steps), ("sft", arguments.sft_steps)):
        chosen[algorithm].settings["max_steps"] = steps
    return chosen


def whole(seconds: dict, factor: float) -> dict:
    """
    Shares of a run with more steps than were made.

    Args:
        seconds (`dict`): As [`profiled`] returns.
        factor (`float`): Steps of the whole run over those made.
    Returns:
        `dict`: Shares by "stage: part", the largest first.
    """
    scaled = {place: value * (factor if place[0] == "training" else 1) for place, value in seconds.items()}
    total = sum(scaled.values())
    return {": ".join(place): value / total for place, value in sorted(scaled.items(), key=lambda item: -item[1])}


def evaluation(run: Run, kind: str) -> Callable[[], object]:
    """
    One half of the untrained model's evaluation, on a model that is loaded here.

    Args:
        run (`Run`): Whose problems and settings are taken.
        kind (`str`): "greedy" or "sampled".
    Returns:
        `Callable`: Takes no arguments.
    """
    model, tokenizer = run.load()
    return lambda: run.metrics(model, tokenizer, None, kinds=(kind,))


def cpu_seconds(run: Run) -> float:
    """
    Processor time of a run, the system's part included.

    Args:
        run (`Run`): What to do.
    Returns:
        `float`
    """
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    profiled(lambda: _do(run))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _do(run):
    with tempfile.TemporaryDirectory() as folder:
        run.run(Path(folder))


def in_a_new_process(run: Run, keeps_memory: bool) -> tuple[float, float]:
    """
    Processor time of a run in a process of its own.

    Args:
        run (`Run`): What to do.
        keeps_memory (`bool`): Whether the process keeps what it frees, as the workers of a comparison do.
    Returns:
        `tuple[float, float]`: Seconds until the process can begin, and of the run.
    """
    before = {name: os.environ.pop(name, None) for name in KEPT_MEMORY}
    os.environ.update(KEPT_MEMORY if keeps_memory else {})
    try:
        started = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()
            ready = time.perf_counter() - started
            return ready, pool.submit(cpu_seconds, run).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def of_comparison(folder: Path, start: float) -> tuple[list[Row], dict]:
    """
    How long a comparison took, from its records.

    Args:
        folder (`Path`): Its output folder; without records there is no row.
        start (`float`): Seconds that a process takes to begin: the comparison's own, and then its workers.
    Returns:
        `tuple[list[Row], dict]`: The row, and the seconds of every run.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("runs/*.json"))]
    if not records:
        return [], {}
    ends = [datetime.fromisoformat(record["finished"]).timestamp() for record in records]
    seconds = {record["name"]: record["wall_seconds"] for record in records}
    begins = [end - record["wall_seconds"] for end, record in zip(ends, records, strict=True)]
    elapsed = max(ends) - min(begins) + 2 * start
    made = records[0]["machine"]
    row = Row(
        claim=f"`make compare`: {len(records)} runs, {made['gpu'] or str(made['cores']) + ' cores'}",
        ours=elapsed,
        unit="s",
        bound="under 10 minutes",
        holds=elapsed < BOUND,
    )
    return [row], {"seconds": seconds, "runs_at_a_time": sum(seconds.values()) / elapsed, "git": records[0]["git"]}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """
    Profiles the runs, and times one with and without memory kept.

    Args:
        arguments (`argparse.Namespace`): The command line's.
    Returns:
        `tuple[list[Row], dict]`: The rows, and seconds and shares by stage and part.
    """
    full = yaml.safe_load(Path("recipes", "toy", "grpo.yaml").read_text(encoding="utf-8"))["max_steps"]
    runs, found, shares = runs_of(arguments), {}, {}
    for name, each in runs.items():
        found[name] = profiled(lambda each=each: _do(each))
        shares[name] = whole(found[name], full / each.settings["max_steps"])
    for kind in ("greedy", "sampled"):
        found[kind] = profiled(evaluation(runs["rl"], kind))
        shares[kind] = whole(found[kind], 1)

    rows = []
    for name, words in TITLES.items():
        work = sum(share for place, share in shares[name].items() if place.split(": ")[1] in WORK)
        claim = f"share of generation, forward and backward in {words}"
        rows.append(Row(claim, work))

    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for turn in range(arguments.repeats):
        for keeps_memory in (turn % 2 == 0, turn % 2 == 1):
            times[keeps_memory].append(in_a_new_process(runs["rl"], keeps_memory))
    kept, given_back = ([seconds for _, seconds in times[keeps_memory]] for keeps_memory in (True, False))
    starts = [start for each in times.values() for start, _ in each]
    ratio, spread = ratio_of(given_back, kept)
    rows.append(
        Row(
            claim=f"processor time of {arguments.rl_steps} steps of RL and an evaluation, freed memory kept",
            ours=statistics.median(kept),
            theirs=statistics.median(given_back),
            whose="freed memory given back",
            unit="s",
            ratio=ratio,
            spread=spread,
        )
    )
    more_rows, compared = of_comparison(Path(arguments.comparison), statistics.median(starts))
    details = {
        "seconds": {name: {": ".join(place): value for place, value in parts.items()} for name, parts in found.items()},
        "shares": shares,
        "start_seconds": starts,
        "comparison": compared,
    }
    return rows + more_rows, details


def main() -> None:
    """Measures and writes the record."""
    parser = parser_of(__doc__, "toy_profile")
    parser.add_argument("--rl_steps", type=int, default=8, help="steps of the RL run")
    parser.add_argument("--sft_steps", type=int, default=24, help="steps of the SFT run")
    parser.add_argument("--limit", type=int, help="problems of an evaluation; by default all")
    parser.add_argument("--repeats", type=int, default=3, help="processes that are timed with and without memory kept")
    parser.add_argument("--comparison", default="results/compare_quick", help="output folder of `make compare`")
    run("toy_profile", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
