r"""Asking math-verify in worker processes, since it can run for ever on what a model writes: `2^{2^{2^{100}}}`.

No signal and no thread of the training process interrupts it there. So it works in processes of its own (`worker.py`),
one for each thread of a small pool. The kernel ends a worker that exceeds its limits; that answer counts as wrong, and
the next question starts another worker. Workers are programs of their own, not forks: they inherit nothing of CUDA, do
not run the training script again, and end with the process that they serve.
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
from pathlib import Path


_COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
_own = threading.local()


def ask(questions: Sequence[tuple[str, ...]]) -> list[bool]:
    """What math-verify says to each question; no where that takes more than the worker's limits.

    Args:
        questions (`Sequence[tuple[str, ...]]`): `("equal", answer, gold)` or `("readable", answer)`.
    Returns:
        `list[bool]`: One answer a question; questions that are the same are asked once.
    Raises:
        ImportError: If math-verify is not installed.
        RuntimeError: If a worker does not start.
    """
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
    return ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // processes)), "math-verify")


@functools.lru_cache(maxsize=4096)
def _ask(question: tuple[str, ...]) -> bool:
    """What this thread's worker says."""
    worker = getattr(_own, "worker", None)
    if worker is not None and worker.poll() is not None:
        worker.communicate()
        worker = None
    worker = _own.worker = worker or _start()
    said = ""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(question), file=worker.stdin, flush=True)
        said = worker.stdout.readline()
    if not said:
        worker.communicate()
        _own.worker = None
    return said == "1\n"


def _start() -> subprocess.Popen:
    """A worker that has loaded math-verify."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    worker = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    if worker.stdout.readline() != "ready\n":
        worker.communicate()
        raise RuntimeError(
            f"the process that compares answers ended as it started, with code {worker.returncode}; its error stands "
            f"above, or run: {' '.join(_COMMAND)}"
        )
    return worker
