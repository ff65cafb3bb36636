"""Starts distributed runs of worker.py the way a user starts a recipe, and reads what they found."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
import yaml
from tiny import values_in


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCHERS = {mode: f"{mode}.yaml" for mode in ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")}
# transformers' own FSDP2 shards when the model is loaded, and needs a launcher only.
LAUNCHERS["fsdp2 at load"] = "ddp.yaml"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def accelerate_launch(mode, script, *arguments, processes=2, timeout=600, environment=None):
    """
    Runs `accelerate launch` and ends all that it started when time is up.

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
    return run_to_end(command, timeout, cwd=ROOT, env=variables)


def run_to_end(command, timeout, **options):
    """
    Runs a command; returns the completed process with stdout and stderr in one.

    Raises AssertionError with the end of the output where `timeout` seconds were not enough. Then, and where the test
    is interrupted, no process that the command started is left.
    """
    # A file, not a pipe: reading a pipe would go on for as long as any process holds it.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            output.seek(0)
            raise AssertionError(f"no end after {timeout} s: {command}\n{output.read()[-4000:]}") from None
        finally:
            end_with_descendants(process)
        output.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, output.read())


def end_with_descendants(process):
    """Kills a running process and all below it, and waits until they are dead."""
    if process.poll() is not None:
        return
    first = psutil.Process(process.pid)
    # Descendants, not the process group: torchrun's workers are in sessions of their own.
    started = first.children(recursive=True)
    for running in [first, *started]:
        with contextlib.suppress(psutil.NoSuchProcess):
            running.kill()
    process.wait()
    for killed in started:
        killed.wait(timeout=60)


def refuse_failure(completed):
    """Raises with a recipe's output if it failed before it had saved."""
    # gloo's threads abort one finished process in some thirty as Python ends (pytorch issue 190489, pull 179291):
    # everything is saved then, and the tests look at the values all the same.
    aborted_at_the_end = "terminate called without an active exception" in completed.stdout.partition("Saved to ")[2]
    assert completed.returncode == 0 or aborted_at_the_end, completed.stdout[-6000:]


def launch_recipe(mode, script, base, data, output_dir, **overrides):
    """
    Starts recipes/sft.py or recipes/grpo.py under a mode's launcher, as the README says; returns what it trained.

    The output folder must hold an adapter afterwards, and the launch have ended well.
    """
    processes = 1 if mode == "single" else 2
    keys = {
        "model_name_or_path": str(base),
        "dtype": "float32",
        "n_values": 4,
        "dataset_name": str(data),
        "dataset_train_split": "train",
        "shuffle_dataset": False,
        "train_sampling_strategy": "sequential",
        "max_steps": 3,
        "per_device_train_batch_size": 4 // processes,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "output_dir": str(output_dir),
        "save_strategy": "no",
        "bf16": False,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        **overrides,
    }
    if script == "grpo.py":
        keys |= {"num_generations": 4, "max_completion_length": 8, "beta": 0.1}
    if mode == "fsdp2 at load":
        keys["model_init_kwargs"] = {"distributed_config": {"fsdp_size": processes}}
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    config = output_dir.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(keys))
    completed = accelerate_launch(mode, ROOT / "recipes" / script, "--config", config, processes=processes, timeout=600)
    refuse_failure(completed)
    return values_in(output_dir)


def run_cases(mode, cases, base, rows, folder, timeout=600):
    """
    Runs cases in one launch; returns what each rank found, by case name.

    Raises AssertionError with the output where a case failed, or a launch ended well whose last case had to fail.
    """
    found, completed = try_cases(mode, cases, base, rows, folder, timeout)
    for case in cases:
        errors = [rank["error"] for rank in found.get(case["name"], []) if "error" in rank]
        if bool(errors) != case.get("fails", False) or case["name"] not in found:
            raise AssertionError(f"{mode} {case['name']}: {errors or 'no result'}\n{completed.stdout[-6000:]}")
    assert completed.returncode != 0 or not cases[-1].get("fails"), completed.stdout[-6000:]
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
