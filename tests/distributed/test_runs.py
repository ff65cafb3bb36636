"""The tests' own way to run commands: one that hangs ends, and takes along what it started."""

import subprocess
import sys
import uuid

import psutil
import pytest
from runs import end_with_descendants, run_to_end


# As torchrun does it: the worker is in a session of its own, and holds the pipe to the tests.
LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *sys.argv[1:]], start_new_session=True)
print(worker.pid, flush=True)
time.sleep(600)
"""


def is_running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_launcher_is_ended_with_its_worker_in_another_session():
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    with launcher.stdout as output:
        worker = psutil.Process(int(output.readline()))
        assert is_running(worker)
        end_with_descendants(launcher)
    assert launcher.returncode < 0 and not is_running(worker)


def test_a_command_that_hangs_is_ended_with_all_that_it_started():
    mark = uuid.uuid4().hex
    with pytest.raises(AssertionError, match="no end after 2 s"):
        run_to_end([sys.executable, "-c", LAUNCHER, mark], timeout=2)
    of_the_command = [found for found in psutil.process_iter(["cmdline"]) if mark in (found.info["cmdline"] or [])]
    assert not any(map(is_running, of_the_command))


def test_a_command_that_ends_returns_its_status_and_output():
    completed = run_to_end([sys.executable, "-c", "print('said'); raise SystemExit(3)"], timeout=60)
    assert (completed.returncode, completed.stdout) == (3, "said\n")
