"""
Completions of the policy itself: vLLM gets the adapter as a LoRA, and never a weight of the base model.

Where TRL's own transfer rounds `W + U S R V^T` to the sampler's dtype (arXiv:2602.04118, section 4), here vLLM adds
`U S (R (V^T x))` to `W x`, as the trainer does: an update far below the rounding of W reaches the sampler whole.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from accelerate.utils import broadcast_object_list

from ..tuner.model import TinyLoraModel
from .engine import (
    Engine,
    LocalEngine,
    ServerEngine,
    engine_settings,
    folder_for_adapters,
    new_prefix,
    refuse_unfit_server,
    refuse_unfit_url,
)


if TYPE_CHECKING:
    from peft import PeftModel
    from trl import GRPOTrainer


def refuse_missing_vllm() -> None:
    """
    Raises where vLLM is not installed.

    Raises:
        ImportError: With the command to install it.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError("vLLM is not installed: pip install 'trl[vllm]', or sample with transformers.")


class AdapterRollout:
    """
    Samples GRPO's completions with vLLM from the base model and the adapter as it is now, for `rollout_func=`.

    Before it samples, the values that have changed are sent as a LoRA, `lora_A = V^T` and `lora_B = U S R`
    (arXiv:2602.04118, section 4): `r * (in_features + out_features)` numbers a module, in a file in shared memory that
    is written whole, for vLLM takes an adapter from files only. What does not change are vLLM's base weights and the
    trainer's.

    The trainer keeps `use_vllm=False`, so that nothing else is sent and its importance-sampling correction, which is
    for samplers that are not the policy, is not applied. Temperature, top-p, top-k, min-p, repetition penalty, length
    and `generation_kwargs` are the trainer's; one completion is returned for each prompt that the trainer passes, which
    holds each as often as `num_generations` (`num_generations_eval` in evaluation) says.

    Example:

    ```python
    trainer = GRPOTrainer(..., peft_config=TinyLoraConfig(u=13, n_tie="all"), rollout_func=AdapterRollout())
    ```

    Args:
        server_url (`str`, *optional*): A server's address, as in `"http://localhost:8000"`, started by
            `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank 8 --logprobs-mode
            processed_logprobs`. By default an engine in this process is made at the first call; with several processes
            each has its own, on its own device.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.
        dtype (`torch.dtype`, *optional*): What the factors are sent in, float32, bfloat16 or float16; by default that
            of the trainer's base weights. vLLM casts them to its weights' dtype.
        folder (`str` or `os.PathLike`, *optional*): Where the factors' files go; a server must be able to read it. By
            default shared memory, or the folder of temporary files where there is none.
        engine_options: For `vllm.LLM`, as in `enforce_eager=True`; they come before what follows from the trainer.

    Raises:
        ValueError: If both a server and options of an engine are given.
        ImportError: If vLLM is not installed and no server is named.
    """

    def __init__(
        self,
        server_url: Optional[str] = None,
        *,
        adapter_name: str = "default",
        dtype: Optional[torch.dtype] = None,
        folder: Union[str, os.PathLike, None] = None,
        **engine_options: Any,
    ):
        if server_url is not None:
            if engine_options:
                raise ValueError(
                    f"{', '.join(sorted(engine_options))}: options of an engine in this process, but server_url="
                    f"{server_url!r} is given too. Give them to `vllm serve`."
                )
            refuse_unfit_url(server_url)
        else:
            refuse_missing_vllm()
        self.server_url = server_url
        self.adapter_name = adapter_name
        self.dtype = dtype
        self.engine_options = engine_options
        self._engine: Optional[Engine] = None
        # Made here, so that a folder that is not there is refused before work starts.
        self._folder = folder_for_adapters(folder)

    def __call__(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        """
        Returns one completion for each prompt.

        Args:
            prompts (`list`): Of this process, as the trainer passes them: texts or conversations.
            trainer ([`~trl.GRPOTrainer`]): Read for its model, tokenizer and settings.

        Returns:
            `dict`: `prompt_ids` and `completion_ids`, lists of token ids, and `logprobs`, of each token of a
            completion after temperature and filters.

        Raises:
            ValueError: If the trainer asks for what this cannot do, the model has no such adapter, or the server serves
                another model.
            ConnectionError: If the server cannot be reached.
        """
        if self._engine is None:
            _refuse_settings(trainer)
            _refuse_model(trainer.model, self.adapter_name)
            self._engine = self._start(trainer)
        self.send(trainer.model)
        # The main process sends to a server; nobody samples before it has.
        trainer.accelerator.wait_for_everyone()
        prompt_ids = _tokenize(prompts, trainer)
        names = [self.adapter_name] * len(prompt_ids)
        sampled = self._engine.sample(prompt_ids, names, _sampling_parameters(trainer.args))
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [one.token_ids for one in sampled],
            "logprobs": [one.logprobs for one in sampled],
        }

    def send(self, model: PeftModel) -> int:
        """
        Gives the engine the adapter as it is now, and returns the bytes of its file; 0 where it has it already.

        All processes have to call it, for values that are sharded are gathered.
        """
        return self._engine.send(model, self.adapter_name, self.dtype)

    def close(self) -> None:
        """
        Takes the adapter off a server and removes the files.

        An engine in this process stays until this object goes: vLLM ends torch's process group with its engine, and a
        trainer that saves still needs that.
        """
        if self._engine is not None:
            self._engine.close()
        self._folder.cleanup()

    def _start(self, trainer: GRPOTrainer) -> Engine:
        # One adapter on a server serves all processes.
        (prefix,) = broadcast_object_list([new_prefix()])
        model, accelerator = trainer.model, trainer.accelerator
        if self.server_url is not None:
            refuse_unfit_server(self.server_url, model.name_or_path)
            return ServerEngine(self.server_url, self._folder, prefix, loads=accelerator.is_main_process)
        return LocalEngine(_engine_settings(trainer, self.adapter_name, self.engine_options), self._folder, prefix)


def _engine_settings(trainer: GRPOTrainer, adapter_name: str, options: dict[str, Any]) -> dict[str, Any]:
    """What `vllm.LLM` gets in a trainer's process."""
    from trl.trainer import ensure_master_addr_port

    args, accelerator = trainer.args, trainer.accelerator
    if "model" not in options:
        _refuse_quantised(trainer.model)
    # As TRL starts its own (trl v1.16.0, trl/generation/vllm_generation.py:330-360): vLLM's launcher for processes that
    # are there already reads these, and starts no process, which a script without a main guard could not.
    os.environ["RANK"] = str(accelerator.process_index)
    os.environ["LOCAL_RANK"] = str(accelerator.local_process_index)
    os.environ["WORLD_SIZE"] = str(accelerator.num_processes)
    ensure_master_addr_port()
    settings = {
        "revision": (args.model_init_kwargs or {}).get("revision"),
        "distributed_executor_backend": "external_launcher",
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "max_model_len": args.vllm_max_model_length,
        "max_num_seqs": args.per_device_train_batch_size * args.steps_per_generation,
        "max_num_batched_tokens": 4096,
        "model_impl": args.vllm_model_impl,
        "trust_remote_code": getattr(args, "trust_remote_code", False),
        # Each process and each of the runs that differ in their seed samples otherwise.
        "seed": args.seed * accelerator.num_processes + accelerator.process_index,
    }
    return engine_settings(trainer.model, adapter_name) | settings | options


def _refuse_settings(trainer: GRPOTrainer) -> None:
    """Raises `ValueError` where the trainer's settings ask for what [`AdapterRollout`] does not do."""
    args = trainer.args
    refused = {
        "use_vllm": "TRL would start an engine of its own and send it every weight: set use_vllm to false",
        "vllm_structured_outputs_regex": "leave it out, or give `structured_outputs` in generation_kwargs",
        "vllm_enable_sleep_mode": "the engine would drop base weights that nobody sends again: leave it out",
    }
    for name, way_out in refused.items():
        if getattr(args, name, None):
            raise ValueError(f"AdapterRollout does not take {name}={getattr(args, name)!r}: {way_out}.")
    if getattr(args, "vllm_tensor_parallel_size", 1) != 1:
        raise ValueError(
            f"AdapterRollout does not take vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}: an engine in "
            "this process has one device. Start `vllm serve --tensor-parallel-size`, and give its server_url."
        )
    if (args.generation_kwargs or {}).get("n", 1) != 1:
        raise ValueError("AdapterRollout does not take n in generation_kwargs: set num_generations.")
    if getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None):
        raise ValueError("AdapterRollout samples one turn: tools and environments need use_vllm and no rollout_func.")


def _refuse_model(model: Any, adapter_name: str) -> None:
    """Raises `ValueError` where a model has no TinyLoRA adapter of this name."""
    if not isinstance(getattr(model, "base_model", None), TinyLoraModel) or adapter_name not in model.peft_config:
        raise ValueError(
            f"the trainer's {type(model).__name__} has no TinyLoRA adapter {adapter_name!r} to send. Make the trainer "
            "with `peft_config=TinyLoraConfig(...)`."
        )
    if model.peft_config[adapter_name].target_parameters:
        raise ValueError(
            "the adapter is on fused experts too, and sampling from those as a LoRA has not been tried with vLLM. "
            "Sample from merged weights (use_vllm), or train without `target_parameters`."
        )


def _refuse_quantised(model: PeftModel) -> None:
    """Raises `ValueError` where the weights were quantised while they were loaded, which vLLM would not do."""
    quantizer = getattr(model.get_base_model(), "hf_quantizer", None)
    # What was saved quantised vLLM reads as such, or refuses.
    if quantizer is not None and not quantizer.pre_quantized:
        raise ValueError(
            f"the trainer's weights are quantised by {quantizer.quantization_config.quant_method} while they load, and "
            "vLLM would sample from the others. Save what they stand for, `model.dequantize().save_pretrained(folder)` "
            "of the model loaded in the same way and its tokenizer, and give `AdapterRollout(model=folder)`."
        )


def _tokenize(prompts: list, trainer: GRPOTrainer) -> list[list[int]]:
    """The prompts' tokens, as the trainer makes them where it samples itself."""
    from trl import is_conversational

    processing_class = trainer.processing_class
    if not is_conversational({"prompt": prompts[0]}):
        return processing_class(text=prompts)["input_ids"]
    return processing_class.apply_chat_template(
        conversation=prompts,
        chat_template=getattr(trainer, "chat_template", None),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **(trainer.args.chat_template_kwargs or {}),
    )["input_ids"]


def _sampling_parameters(args: Any) -> dict:
    """What vLLM is asked for, under names that its `SamplingParams` and its server share."""
    return {
        "n": 1,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
        "max_tokens": args.max_completion_length,
        "logprobs": 0,
        **(args.generation_kwargs or {}),
    }
