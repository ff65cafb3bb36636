"""
vLLM engines that hold the base model and TinyLoRA adapters as LoRAs: one in this process, or a server by its URL.

vLLM adds `U S (R (V^T x))` to `W x`, as the tuner does (arXiv:2602.04118, section 4); no weight of the base is sent.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union
from urllib.parse import urlsplit

import torch

from ..convert.lora import export_lora


if TYPE_CHECKING:
    from peft import PeftModel


# vllm/config/lora.py, `MaxLoRARanks` (vLLM 0.31.0).
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SHARED_MEMORY = "/dev/shm"
# Of a request to a server: a batch of long completions takes minutes.
TIMEOUT = 3600.0
# Requests to a server at a time; vLLM's scheduler batches what they hold.
MAX_REQUESTS = 256


def max_lora_rank(rank: int) -> int:
    """Returns the smallest `max_lora_rank` of vLLM's that an adapter of this rank fits in."""
    return next(limit for limit in MAX_LORA_RANKS if limit >= rank)


def folder_for_adapters(parent: Union[str, os.PathLike, None] = None) -> tempfile.TemporaryDirectory:
    """Returns a new folder, removed with the object: in shared memory where there is such, unless `parent` is given."""
    in_memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="trl-tinylora-", dir=parent or in_memory)


def new_prefix() -> str:
    """Returns what the names of an engine's adapters begin with, which no other engine's do."""
    return f"trl-tinylora-{uuid.uuid4().hex[:8]}"


def engine_settings(model: PeftModel, adapter_name: str, max_loras: int = 1) -> dict[str, Any]:
    """
    Returns what `vllm.LLM` needs for a model's base and adapters of one plan.

    Args:
        model ([`~peft.PeftModel`]): With a TinyLoRA adapter.
        adapter_name (`str`): The adapter.
        max_loras (`int`, *optional*, defaults to `1`): Adapters in a batch.
    """
    plan = model.base_model.bank.vectors(adapter_name).plan
    return {
        "model": model.name_or_path,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "logprobs_mode": "processed_logprobs",
        "enable_lora": True,
        "max_loras": max_loras,
        "max_lora_rank": max_lora_rank(plan.rank),
        # No room for the output embedding, which is as large as all others together.
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in plan.index}),
    }


def dtype_of(model: PeftModel) -> torch.dtype:
    """Returns the dtype of the base's weights."""
    return model.get_base_model().dtype


def refuse_unfit_url(server_url: str) -> None:
    """Raises `ValueError` where an address has no scheme."""
    if urlsplit(server_url).scheme not in ("http", "https"):
        raise ValueError(f"server_url={server_url!r} has no scheme: write it as in http://localhost:8000.")


def refuse_unfit_server(server_url: str, model: str) -> None:
    """
    Raises where a server cannot sample from a model.

    Raises:
        ValueError: If it serves another model.
        ConnectionError: If it cannot be reached.
    """
    served = _ask(server_url.rstrip("/"), "/v1/models")["data"][0]
    # A folder on one machine and a name on the Hub end alike.
    if Path(served.get("root") or served["id"]).name != Path(model).name:
        raise ValueError(
            f"the server at {server_url} serves {served.get('root')!r}, and the adapter's base is {model!r}: "
            "completions would be another model's. Start `vllm serve` with the adapter's base."
        )


class Sampled(NamedTuple):
    """
    A completion.

    Args:
        token_ids (`list[int]`): Its tokens, with the one that ends a turn.
        logprobs (`list[float]`): Their log-probabilities, after temperature and filters; empty where none were asked
            for.
    """

    token_ids: list[int]
    logprobs: list[float]


class _Held(NamedTuple):
    """An adapter that the engine has: under which name and number, and with which values."""

    name: str
    number: int
    values: torch.Tensor


class Engine(ABC):
    """
    What samples: it holds the base model and adapters by name.

    vLLM takes an adapter from files alone, so they go through a folder, and each set of values gets a name of its own:
    vLLM keeps the keys and values of a prompt by the adapter's name.

    Args:
        folder (`tempfile.TemporaryDirectory`): Where the files go.
        prefix (`str`): What the adapters' names in the engine begin with.
    """

    def __init__(self, folder: tempfile.TemporaryDirectory, prefix: str):
        self._folder, self._prefix = folder, prefix
        self._held: dict[str, _Held] = {}
        self._n_sent = 0

    def send(self, model: PeftModel, adapter_name: str = "default", dtype: Optional[torch.dtype] = None) -> int:
        """
        Gives the engine an adapter as it is now, in place of the one of that name before.

        Args:
            model ([`~peft.PeftModel`]): With the adapter. All processes have to call this, for values that are sharded
                are gathered.
            adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.
            dtype (`torch.dtype`, *optional*): What the factors are sent in; by default that of the base's weights.

        Returns:
            `int`: The bytes of its files; 0 where the engine has these values already.
        """
        values = model.base_model.bank.vectors(adapter_name).whole_values()
        before = self._held.get(adapter_name)
        if before is not None and torch.equal(values, before.values):
            return 0
        self._n_sent += 1
        held = _Held(f"{self._prefix}-{self._n_sent}", self._n_sent, values)
        export_lora(model, self._files(held), adapter_name, dtype=dtype or dtype_of(model))
        if before is not None:
            self._unload(before)
            # Nobody reads them again, and memory is not a disk.
            shutil.rmtree(self._files(before), ignore_errors=True)
            del self._held[adapter_name]
        self._load(held)
        self._held[adapter_name] = held
        return sum(path.stat().st_size for path in self._files(held).iterdir())

    @abstractmethod
    def sample(
        self,
        prompt_ids: Sequence[list[int]],
        adapter_names: Sequence[str],
        parameters: dict[str, Any],
        seeds: Optional[Sequence[int]] = None,
    ) -> list[Sampled]:
        """
        Samples one completion for each prompt.

        Args:
            prompt_ids (`Sequence[list[int]]`): The prompts' tokens.
            adapter_names (`Sequence[str]`): The adapter of each, which was sent before.
            parameters (`dict`): As of vLLM's `SamplingParams`.
            seeds (`Sequence[int]`, *optional*): Of each completion.
        """

    def close(self) -> None:
        """Takes the adapters off the engine and removes the files."""
        for held in self._held.values():
            self._unload(held)
        self._held.clear()
        self._folder.cleanup()

    def _files(self, held: _Held) -> Path:
        return Path(self._folder.name, f"{held.number}")

    @abstractmethod
    def _load(self, held: _Held) -> None:
        """Takes an adapter from its files."""

    @abstractmethod
    def _unload(self, held: _Held) -> None:
        """Forgets an adapter."""


class LocalEngine(Engine):
    """
    An engine in this process; it ends with this object.

    Args:
        settings (`dict`): Of `vllm.LLM`; [`engine_settings`] has those that adapters need.
        folder, prefix: As of [`Engine`].
    """

    def __init__(self, settings: dict[str, Any], folder: tempfile.TemporaryDirectory, prefix: str):
        from vllm import LLM

        super().__init__(folder, prefix)
        self.llm = LLM(**settings)

    def sample(self, prompt_ids, adapter_names, parameters, seeds=None):
        """As of [`Engine`]."""
        from vllm import SamplingParams

        asked = [parameters] * len(prompt_ids)
        if seeds is not None:
            asked = [parameters | {"seed": seed} for seed in seeds]
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompt_ids],
            [SamplingParams(**each) for each in asked],
            lora_request=[self.request(name) for name in adapter_names],
            use_tqdm=False,
        )
        return [self._read(output.outputs[0]) for output in outputs]

    def request(self, adapter_name: str) -> Any:
        """Returns the `vllm.lora.request.LoRARequest` of an adapter that was sent."""
        return self._request(self._held[adapter_name])

    @staticmethod
    def _read(output: Any) -> Sampled:
        token_ids = list(output.token_ids)
        if output.logprobs is None:
            return Sampled(token_ids, [])
        return Sampled(token_ids, [at[token].logprob for token, at in zip(token_ids, output.logprobs, strict=True)])

    def _request(self, held: _Held) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(held.name, held.number, str(self._files(held)))

    def _load(self, held: _Held) -> None:
        self.llm.llm_engine.add_lora(self._request(held))

    def _unload(self, held: _Held) -> None:
        self.llm.llm_engine.remove_lora(held.number)


class ServerEngine(Engine):
    """
    A server of vLLM's, which loads adapters by name while it runs.

    Args:
        url (`str`): Its address, as in `"http://localhost:8000"`.
        folder, prefix: As of [`Engine`]; the server must be able to read the folder.
        loads (`bool`, *optional*, defaults to `True`): Whether this process loads adapters; of several, one does.
    """

    def __init__(self, url: str, folder: tempfile.TemporaryDirectory, prefix: str, loads: bool = True):
        super().__init__(folder, prefix)
        self.url, self.loads = url.rstrip("/"), loads

    def sample(self, prompt_ids, adapter_names, parameters, seeds=None):
        """As of [`Engine`]. A request has one adapter and one seed: with seeds there is one a completion."""
        requests: dict[tuple, list[int]] = {}
        for place, name in enumerate(adapter_names):
            requests.setdefault((name, None if seeds is None else place), []).append(place)

        def ask(places: list[int]) -> list[dict]:
            body = {"model": self._held[adapter_names[places[0]]].name, "return_token_ids": True, **parameters}
            body |= {"prompt": [prompt_ids[place] for place in places]}
            body |= {} if seeds is None else {"seed": seeds[places[0]]}
            return sorted(_ask(self.url, "/v1/completions", body)["choices"], key=lambda choice: choice["index"])

        found: dict[int, Sampled] = {}
        with ThreadPoolExecutor(min(len(requests), MAX_REQUESTS)) as pool:
            for places, choices in zip(requests.values(), pool.map(ask, requests.values()), strict=True):
                for place, choice in zip(places, choices, strict=True):
                    logprobs = (choice["logprobs"] or {}).get("token_logprobs", [])
                    found[place] = Sampled(choice["token_ids"], logprobs)
        return [found[place] for place in range(len(prompt_ids))]

    def _load(self, held: _Held) -> None:
        if self.loads:
            _ask(self.url, "/v1/load_lora_adapter", {"lora_name": held.name, "lora_path": str(self._files(held))})

    def _unload(self, held: _Held) -> None:
        if self.loads:
            _ask(self.url, "/v1/unload_lora_adapter", {"lora_name": held.name})


def _ask(url: str, path: str, body: Optional[dict] = None) -> Any:
    """A server's answer, from JSON where it is an object; a GET request without a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            answer = response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404 and path == "/v1/load_lora_adapter":
            raise ValueError(
                f"the server at {url} loads no adapters: start it with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 "
                "vllm serve MODEL --enable-lora --max-lora-rank 8`, the rank at least the adapter's."
            ) from error
        said = error.read().decode(errors="replace").strip()
        raise RuntimeError(f"the vLLM server refused {path} ({error.code}): {said}") from error
    except OSError as error:
        raise ConnectionError(
            f"the vLLM server at {url} cannot be reached: {error}. Start it with `vllm serve MODEL "
            "--enable-lora`, and wait until it answers."
        ) from error
    return json.loads(answer) if answer.startswith("{") else answer
