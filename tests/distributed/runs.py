"""Starts distributed runs of worker.py the way a user starts a recipe, and reads what they found."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# FSDP2 by transformers shards at load time and needs a launcher only; accelerate's own (fsdp2.yaml) needs a GPU.
LAUNCHERS = {mode: f"{mode}.yaml" for mode in ("single", "ddp", "zero1", "zero2", "zero3")} | {"fsdp2": "ddp.yaml"}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def accelerate_launch(mode, script, *arguments, processes=2, timeout=600, environment=None):
    """
    Runs `accelerate launch` in a session of its own and ends all of it when time is up.

    Returns the completed process with stdout and stderr in one.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / LAUNCHERS[mode])]
    command += ["--num_processes", str(1 if mode == "single" else processes), "--main_process_port", str(free_port())]
    command += [str(script), *map(str, arguments)]
    variables = {
        **os.environ,
        # DeepSpeed compiles its shared-memory communication with the ninja that stands beside this Python.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes"), os.environ.get("PYTHONPATH", "")]),
        **(environment or {}),
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{mode}: no end after {timeout} s\n{output[-4000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def run_cases(mode, cases, base, rows, folder, timeout=600):
    """Runs cases in one launch; returns what each rank found, by case name. Raises with the output if one failed."""
    found, completed = try_cases(mode, cases, base, rows, folder, timeout)
    for case in cases:
        errors = [rank["error"] for rank in found.get(case["name"], []) if "error" in rank]
        if errors or case["name"] not in found:
            raise AssertionError(f"{mode} {case['name']}: {errors or 'no result'}\n{completed.stdout[-6000:]}")
    return found


def try_cases(mode, cases, base, rows, folder, timeout=600):
    """As `run_cases`, but failures are returned."""
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    cases = [{**case, "mode": mode} for case in cases]
    job.write_text(json.dumps({"base": str(base), "rows": rows, "cases": cases, "output_dir": str(folder)}))
    completed = accelerate_launch(mode, HERE / "worker.py", "--job", job, timeout=timeout)
    found = {}
    for case in cases:
        ranks = sorted(folder.glob(f"{case['name']}.[0-9].json"))
        if ranks:
            found[case["name"]] = [json.loads(path.read_text()) for path in ranks]
    return found, completed
