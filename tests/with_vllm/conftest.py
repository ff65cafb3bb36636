"""The real vLLM on a CPU, in the environment of `make test-vllm`; elsewhere these tests are skipped.

The folder is not named after the package, which it would hide from TRL's check whether vLLM is installed.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest


# Before vLLM is imported. An engine in this process, so that a test can read the weights it holds; 1 GiB for its cache.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

TOY = Path(__file__).parents[2] / "recipes" / "toy"
STARTS_WITHIN = 300


@pytest.fixture(scope="session")
def toy():
    """The folder of the toy, a Qwen2 of 0.8M parameters in float32, whose q, k, v and gate, up vLLM fuses."""
    return TOY / "base"


@pytest.fixture(scope="session")
def server_url(toy, tmp_path_factory):
    """A server on the toy in float32 that loads adapters while it runs, with TRL's development endpoints."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # What `vllm serve` starts; the command itself asks for a distribution named vllm, which the CPU build is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(toy), "--port", str(port)]
    command += "--dtype float32 --enforce-eager --max-model-len 512 --enable-lora --max-lora-rank 8".split()
    command += "--max-loras 64 --logprobs-mode processed_logprobs".split()
    command += ["--weight-transfer-config", '{"backend": "nccl"}']
    switches = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | switches, start_new_session=True
        )
    url = f"http://localhost:{port}"
    try:
        began = time.monotonic()
        while not is_up(url):
            assert server.poll() is None and time.monotonic() < began + STARTS_WITHIN, log.read_text()[-5000:]
            time.sleep(1)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def is_up(url):
    """Whether a server answers."""
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False
