"""`AdapterRollout` in two processes: an engine in each, or one server. CPU, gloo, a minute."""

import pytest


pytest.importorskip("vllm")

import json
import os
import subprocess
import sys
from pathlib import Path

from sampled import NOISE


TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("where", ["an engine in each process", "a server"])
def test_two_processes_sample_from_the_policy_that_they_train_together(toy, tmp_path, request, where):
    server = [request.getfixturevalue("server_url")] if where == "a server" else []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).with_name("two_processes.py")), str(toy), str(tmp_path), *server]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert one["values"] == other["values"] and one["n_prompts"] == other["n_prompts"] == 8
        assert one["from_policy"] < NOISE and other["from_policy"] < NOISE
        # Each samples for its own prompts.
        assert one["completion_ids"] != other["completion_ids"]
    assert min(first[-1]["from_base"], second[-1]["from_base"]) > 0.01
