"""The processes that compare answers: their limits, that they come back, their speed. CPU, half a minute."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from trl_tinylora.tasks import answers, gsm8k, math, verification


# The first computes for ever, the second is too large for any memory.
HANGS, TOO_LARGE = r"9^{9^{9^9}}", r"2^{2^{2^{100}}}"


@pytest.fixture(autouse=True)
def forgotten():
    verification._ask.cache_clear()


def graded_in_a_thread(answer, gold):
    results = []
    thread = threading.Thread(target=lambda: results.append(answers.is_equal(answer, gold)))
    thread.start()
    thread.join(timeout=60)
    return results


def test_an_answer_that_hangs_is_wrong_on_any_thread_and_the_next_one_is_graded():
    start = time.monotonic()
    assert graded_in_a_thread(HANGS, r"\sqrt{2}") == [False]
    assert not answers.is_equal(TOO_LARGE, "5") and graded_in_a_thread(TOO_LARGE, r"\sqrt{2}") == [False]
    assert graded_in_a_thread(r"\frac{2}{\sqrt2}", r"\sqrt{2}") == [True]
    assert time.monotonic() - start < 40


def test_one_answer_that_hangs_does_not_take_the_others_grades():
    pairs = [
        (r"\frac{2}{\sqrt2}", r"\sqrt{2}"),
        (HANGS, r"\sqrt{2}"),
        (r"\sqrt3", r"\sqrt{2}"),
        (None, "1"),
        ("2", "2"),
    ]
    assert answers.are_equal(pairs) == [True, False, False, False, True]


def test_a_format_reward_is_limited_too():
    assert math.format_reward([rf"\boxed{{{HANGS}}}", r"\boxed{\pi}"])[1] == 1.0


def test_a_worker_that_was_ended_is_replaced():
    assert answers.is_equal(r"2\sqrt{2}", r"\sqrt{8}")
    for child in workers():
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert answers.is_equal(r"3\sqrt{2}", r"\sqrt{18}")


def test_numbers_need_no_worker(monkeypatch):
    monkeypatch.setattr(verification, "_start", lambda: pytest.fail("a worker was started"))
    monkeypatch.setattr(verification, "_own", threading.local())
    texts = ["#### 18", "#### 2 2/3", "#### 18 or 20", "so 18", ""]
    assert gsm8k.strict_reward(texts, answer=["18"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert math.strict_reward([r"\boxed{\frac{1}{2}}", r"\boxed{1.5e3}"], answer=["0.5", "1500"]) == [1.0, 1.0]


def test_a_batch_of_256_mixed_rewards_is_cheap():
    """32 problems, 8 completions each; those with formulas, a third, are compared by math-verify.

    0.6 to 1.1 s on two busy cores; the bound leaves room for slower ones.
    """
    completions, golds = mixed_batch()
    answers.is_equal(r"\sqrt{50}", r"5\sqrt{2}")
    start = time.monotonic()
    rewards = math.strict_reward(completions, answer=golds)
    assert time.monotonic() - start < 10
    assert sum(rewards) == len(rewards) / 2


def mixed_batch():
    completions, golds = [], []
    for problem in range(2, 34):
        gold, others = (
            (str(problem), [str(problem + 1), rf"\frac{{{problem}}}{{7}}", f"-{problem}", f"{problem}.5"])
            if problem % 3
            else (rf"\sqrt{{{problem}}}", [rf"{problem}\sqrt{{2}}", rf"\sqrt{{{problem + 1}}}", r"\pi", f"{problem}"])
        )
        for index in range(8):
            completions.append(rf"So it is \boxed{{{gold if index < 4 else others[index - 4]}}}.")
            golds.append(gold)
    return completions, golds


def workers():
    children = psutil.Process().children()
    return [child for child in children if any("worker.py" in part for part in child.cmdline())]


def test_workers_end_with_the_process_that_they_serve_however_it_ends(tmp_path):
    code = r"""
import os, signal, psutil
from trl_tinylora.tasks import answers
assert answers.is_equal(r"2\sqrt{2}", r"\sqrt{8}")
print(*[child.pid for child in psutil.Process().children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # No guard against being imported: a spawned process would run it again.
    (tmp_path / "program.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, env=environment)
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids, done.stderr
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_worker_that_cannot_start_is_an_error_that_says_how_to_see_why(monkeypatch):
    monkeypatch.setattr(verification, "_own", threading.local())
    monkeypatch.setattr(verification, "_COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match=r"ended as it started, with code 3; .* run: .*SystemExit"):
        verification._ask(("equal", r"2\sqrt{2}", r"\sqrt{8}"))


def test_without_math_verify_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(verification.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"grading .* needs math-verify: pip install 'trl-tinylora\[recipes\]'"):
        answers.is_equal(r"2\sqrt{2}", r"\sqrt{8}")
