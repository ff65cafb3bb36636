"""Runs of a comparison side by side: a worker process a GPU or a core, what failed, and one line a run."""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
import transformers
from records.files import write_text

from comparison.arguments import CompareArguments
from comparison.runs import Run


# glibc reads these when a process starts. One without the other would send every tensor to the system and back.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "33554432"}


def execute(run: Run, arguments: CompareArguments, provenance: dict) -> str | None:
    """
    Does one run and writes its JSON. What it prints goes to `log.txt` in its work folder.

    Args:
        run (`Run`): What to do.
        arguments (`CompareArguments`): Where to write.
        provenance (`dict`): Commit, versions and machine, for the record.
    Returns:
        `str` or `None`: The error's last line if it failed.
    """
    folder = arguments.work / run.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with _output_to(folder / "log.txt"):
        try:
            started = time.perf_counter()
            record = run.run(folder)
            record |= {"wall_seconds": round(time.perf_counter() - started, 1), **provenance}
            record["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}".splitlines()[0]
    record = run.described() | record
    # A line a key: readable, and a change to one of them shows as one.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    write_text(arguments.path("runs", f"{run.name}.json"), "{\n" + ",\n".join(lines) + "\n}\n")
    return None


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends also what libraries print to handles they took at import, hence the file descriptors."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(path, "w", encoding="utf-8") as log:
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def _start_worker(threads: int, counter) -> None:
    # The parent ends the workers; a traceback of each on Ctrl-C would bury its message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
    if torch.cuda.device_count() > 1:
        # A GPU each: a Trainer that sees several would spread one small run over all of them.
        with counter.get_lock():
            worker, counter.value = counter.value, counter.value + 1
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]


class Workers:
    """
    Processes that do runs, several at a time, each one after another. They start at the first run and stay to the end.

    Args:
        arguments (`CompareArguments`): Where to write, and how many at a time.
        provenance (`dict`): For the records.
        progress (`Progress`): Told of every run that ends.
    """

    def __init__(self, arguments: CompareArguments, provenance: dict, progress: "Progress"):
        self.arguments, self.provenance, self.progress = arguments, provenance, progress
        self.jobs = worker_count(arguments)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            # Nobody waits for the runs under way.
            for child in multiprocessing.active_children():
                child.terminate()
        self._stop()

    def do(self, runs: list[Run]) -> None:
        """
        Does runs, in their order as far as what they train on is there; two that follow each other may swap.

        Args:
            runs (`list[Run]`): What is to be done.
        """
        queue, running, attempts = list(runs), {}, Counter()
        while queue or running:
            try:
                while len(running) < self.jobs and (run := _next(queue, running.values())) is not None:
                    running[self._start(run)] = run
                    queue.remove(run)
                    attempts[run.name] += 1
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    error = future.result()
                    self.progress.ended(running.pop(future), error)
            except BrokenProcessPool:
                # A worker was killed (out of memory, say) and took the pool with it; which run it had is not told.
                self._stop()
                for run in running.values():
                    if attempts[run.name] < 2:
                        queue.append(run)
                    else:
                        self.progress.ended(run, "its process was killed, twice")
                running = {}

    def _start(self, run: Run) -> Future:
        if self._pool is None:
            # glibc gives freed memory back at every turn and takes it again, page by page: a tenth of a run's time on
            # two cores with a run each. One that has the machine to itself loses nothing.
            for name, value in KEPT_MEMORY.items():
                os.environ.setdefault(name, value)
            threads = int(os.environ.get("OMP_NUM_THREADS", max(1, _cpu_cores() // self.jobs)))
            # Not forked: this process may have threads, and a GPU that a fork could not use.
            context = multiprocessing.get_context("spawn")
            setup = {"initializer": _start_worker, "initargs": (threads, context.Value("i", 0))}
            self._pool = ProcessPoolExecutor(self.jobs, mp_context=context, **setup)
        return self._pool.submit(execute, run, self.arguments, self.provenance)

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _next(queue: list[Run], running: Iterable[Run]) -> Run | None:
    """The first run that trains on nothing that another one has yet to draw."""
    open_names = {run.name for run in (*queue, *running)}
    return next((run for run in queue if run.needs not in open_names), None)


def worker_count(arguments: CompareArguments) -> int:
    """
    Runs at a time: as asked for, else one a GPU, else one a CPU core.

    Args:
        arguments (`CompareArguments`): Read for `jobs`.
    Returns:
        `int`: At least 1.
    """
    if arguments.jobs is not None:
        return arguments.jobs
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return _cpu_cores()


def _cpu_cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """
    One line for every run that ends: result, count, elapsed and remaining time.

    Args:
        arguments (`CompareArguments`): The comparison.
        algorithms (`dict[str, str | None]`): Algorithm of every run of the comparison, by name.
        done (`set[str]`): Runs that were already done.
    """

    def __init__(self, arguments: CompareArguments, algorithms: dict[str, str | None], done: set[str]):
        self.arguments = arguments
        self.algorithms = algorithms
        self.open = set(algorithms) - done
        self.failed: list[str] = []
        self.seconds: dict = {}
        self.started = time.monotonic()

    def ended(self, run: Run, error: str | None) -> None:
        """
        Prints a run's line.

        Args:
            run (`Run`): What ended.
            error (`str`, *optional*): Why it failed, if it did.
        """
        self.open.discard(run.name)
        if error is not None:
            self.failed.append(run.name)
            result = f"FAILED: {error} (log: {self.arguments.work / run.name / 'log.txt'})"
        else:
            record = run.kept(self.arguments.path("runs"))
            self.seconds.setdefault(run.algorithm, []).append(record["wall_seconds"])
            metrics = record.get("metrics", {})
            kinds = [kind for kind in ("greedy", "sampled") if kind in metrics]
            shown = [f"{kind} {metrics[kind][self.arguments.grading]['accuracy']:.1%}" for kind in kinds] or ["done"]
            result = f"{', '.join(shown)} ({record['wall_seconds']:.0f} s)"
        elapsed = timedelta(seconds=round(time.monotonic() - self.started))
        done = len(self.algorithms) - len(self.open)
        print(f"[{done}/{len(self.algorithms)}] {run.name}: {result}; elapsed {elapsed}{self._left()}", flush=True)

    def _left(self) -> str:
        known = [seconds for values in self.seconds.values() for seconds in values]
        if not self.open or not known:
            return ""
        means = {algorithm: sum(values) / len(values) for algorithm, values in self.seconds.items()}
        total = sum(means.get(self.algorithms[name], sum(known) / len(known)) for name in self.open)
        return f", about {timedelta(seconds=math.ceil(total / min(worker_count(self.arguments), len(self.open))))} left"
