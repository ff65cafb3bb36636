"""The tests' own way to run commands: one that hangs ends, and takes along what it started."""

import sys

import psutil
import pytest
from runs import run_to_end


# As torchrun does it: the worker is in a session of its own, and holds the pipe to the tests.
LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(worker.pid, flush=True)
time.sleep(600)
"""


def test_a_command_that_hangs_is_ended_with_what_it_started_in_other_sessions():
    with pytest.raises(AssertionError, match="no end after 2 s") as raised:
        run_to_end([sys.executable, "-c", LAUNCHER], timeout=2)
    worker = int(str(raised.value).splitlines()[-1])
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE


def test_a_command_that_ends_returns_its_status_and_output():
    completed = run_to_end([sys.executable, "-c", "print('said'); raise SystemExit(3)"], timeout=60)
    assert (completed.returncode, completed.stdout) == (3, "said\n")
