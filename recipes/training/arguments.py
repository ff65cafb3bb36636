"""The arguments that `grpo.py`, `sft.py` and `evaluate.py` share, and the adapter they describe.

They stand beside TRL's own `GRPOConfig`, `SFTConfig` and `ModelConfig`; nothing of those is repeated here.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

import trl
from peft import PeftConfig
from transformers import AutoConfig

from trl_tinylora import AdapterRollout, TinyLoraConfig
from trl_tinylora.tasks import controls, get_task
from trl_tinylora.validation import SAVE_DTYPES


REWARDS = ("strict", "flexible", "format", "random")


@dataclass
class RecipeArguments(trl.ScriptArguments):
    """
    TRL's script arguments, and how many rows to take.

    `dataset_name` is a JSONL file, a folder of `{split}.jsonl` files or a name on the Hub, with the task's columns.

    Args:
        task (`str`, *optional*, defaults to `"gsm8k"`): Prompt, gold answer and grading: one of
            `trl_tinylora.tasks.TASKS`.
        system_prompt (`str`, *optional*): A system message before every problem, instead of the task's own.
        instruction (`str`, *optional*): What follows every problem's question, instead of the task's own.
        limit (`int`, *optional*): Take only the first `limit` rows of the split.
        relative_kl (`float`, *optional*): Find the learning rate, in place of `learning_rate`: the one at which Adam's
            first step moves the policy by this share of its entropy ([`~trl_tinylora.find_learning_rate`]).
    """

    task: str = field(default="gsm8k", metadata={"help": "Prompt, gold answer and grading: gsm8k or math."})
    system_prompt: str | None = field(default=None, metadata={"help": "A system message before every problem."})
    instruction: str | None = field(default=None, metadata={"help": "What follows every question."})
    limit: int | None = field(default=None, metadata={"help": "Take only the first `limit` rows of the split."})
    relative_kl: float | None = field(
        default=None, metadata={"help": "Find the learning rate: KL divergence of a step over the policy's entropy."}
    )


@dataclass
class RLArguments(RecipeArguments):
    """
    Adds what RL is rewarded for.

    Args:
        reward (`list[str]`, *optional*, defaults to `["strict"]`): One or more, whose sum is the reward (TRL's
            `reward_weights` weighs them): `"strict"`, the right answer in the asked-for form; `"flexible"`, the right
            answer in any form; `"format"`, any answer in the asked-for form; `"random"`, a fair coin; or the dotted
            path of a reward function, as in `"my_lib.rewards.short_reward"`.
        rollouts (`str`, *optional*, defaults to `"merged"`): What vLLM samples from, where `use_vllm` is set:
            `"merged"`, TRL's transfer of all merged weights; or `"adapter"`, [`~trl_tinylora.AdapterRollout`] in place
            of TRL's engine, by the server at `vllm_server_base_url` where `vllm_mode` is `"server"`.
    Raises:
        ValueError: If a reward is neither one of these names nor a dotted path, or `rollouts` is none of these.
    """

    reward: list[str] = field(
        default_factory=lambda: ["strict"],
        metadata={"help": "What RL is rewarded for: strict, flexible, format, random or dotted paths; the sum of all."},
    )

    rollouts: Literal["merged", "adapter"] = field(
        default="merged", metadata={"help": "What vLLM gets with use_vllm: all merged weights, or the adapter alone."}
    )

    def __post_init__(self):
        if self.rollouts not in ("merged", "adapter"):
            raise ValueError(f"rollouts must be 'merged' or 'adapter', got {self.rollouts!r}")
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward
        if not isinstance(self.reward, list):
            raise ValueError(f"reward must be a name or a list of names, got {self.reward!r}")
        for name in self.reward:
            if name not in REWARDS and "." not in name:
                raise ValueError(
                    f"reward must be one of {', '.join(REWARDS)}, or a dotted path as in my_lib.rewards.my_reward; "
                    f"got {name!r}"
                )

    def reward_functions(self) -> list[Callable[..., list[float]]]:
        """
        The rewards, as TRL's trainers take them.

        Raises:
            ValueError: If nothing can be imported by a dotted path.
        """
        return [self._reward_function(name) for name in self.reward]

    def rollout_function(
        self, training_args: trl.GRPOConfig, adapter_args: "AdapterArguments"
    ) -> AdapterRollout | None:
        """
        What samples in place of TRL's engine, or `None`; TRL's `use_vllm` is then unset, which would start that.

        Raises:
            ValueError: If `rollouts` is `"adapter"` without `use_vllm`, or for another adapter than TinyLoRA.
            ImportError: If vLLM is not installed.
        """
        if self.rollouts == "merged":
            return None
        if not training_args.use_vllm:
            raise ValueError("rollouts='adapter' samples with vLLM, but use_vllm is false: set it, or drop rollouts")
        if adapter_args.adapter != "tinylora":
            raise ValueError(
                f"rollouts='adapter' sends a TinyLoRA adapter, but adapter is {adapter_args.adapter!r}: drop rollouts"
            )
        training_args.use_vllm = False
        if training_args.vllm_mode != "server":
            return AdapterRollout()
        host, port = training_args.vllm_server_host, training_args.vllm_server_port
        return AdapterRollout(training_args.vllm_server_base_url or f"http://{host}:{port}")

    def _reward_function(self, name: str) -> Callable[..., list[float]]:
        """The function of one name."""
        if name == "random":
            return controls.random_reward
        if name in REWARDS:
            return getattr(get_task(self.task), f"{name}_reward")
        module, _, function = name.rpartition(".")
        # As TRL's own scripts do it: a module of the working folder is found.
        sys.path.insert(0, os.getcwd())
        try:
            return getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"reward={name!r} cannot be imported from {os.getcwd()!r}: {error}") from error


@dataclass
class AdapterArguments:
    """
    What is trained: TinyLoRA, LoRA (through TRL's `lora_*` arguments) or every weight.

    What is left at `None` keeps [`~trl_tinylora.TinyLoraConfig`]'s default.

    Args:
        adapter (`str`, *optional*, defaults to `"tinylora"`): `"tinylora"`, `"lora"` or `"full"`.
        n_values (`int`, *optional*): Number of trained values; `u` and `n_tie` are found for it.
        r (`int`, *optional*): Rank of the frozen singular factors.
        u (`int`, *optional*): Trained values of a group of modules.
        n_tie (`int` or `"all"`, *optional*): Modules that share one group of values.
        tying (`str` or `dict`, *optional*): `"tiled"`, `"structured"`, or regular expressions by a name of their
            modules: a mapping in YAML, JSON on the command line.
        projection (`str`, *optional*): `"gaussian"` or `"basis"`.
        projection_seed (`int`, *optional*): Seed of the fixed random projections.
        target_modules (`list[str]`, *optional*): Names of the modules that TinyLoRA adapts.
        kept_dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`: the values are rounded to it after
            every step, and saved in it.
    Raises:
        ValueError: If two arguments contradict each other; the text names both and the way out.
    """

    adapter: Literal["tinylora", "lora", "full"] = field(
        default="tinylora", metadata={"help": "What is trained: TinyLoRA, LoRA or every weight."}
    )
    n_values: int | None = field(
        default=None, metadata={"help": "Number of values that TinyLoRA trains; `u` and `n_tie` are found for it."}
    )
    r: int | None = field(default=None, metadata={"help": "Rank of TinyLoRA's frozen singular factors."})
    u: int | None = field(default=None, metadata={"help": "Trained values of a group of modules."})
    n_tie: str | None = field(default=None, metadata={"help": "Modules that share one group of values, or 'all'."})
    tying: str | None = field(default=None, metadata={"help": "'tiled', 'structured' or a mapping."})
    projection: str | None = field(default=None, metadata={"help": "'gaussian' or 'basis'."})
    projection_seed: int | None = field(default=None, metadata={"help": "Seed of the fixed random projections."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Modules that TinyLoRA adapts."})
    kept_dtype: str | None = field(
        default=None, metadata={"help": "Dtype that the values are rounded to at each step."}
    )

    def __post_init__(self):
        if self.adapter not in ("tinylora", "lora", "full"):
            raise ValueError(f"adapter must be 'tinylora', 'lora' or 'full', got {self.adapter!r}")
        if self.n_tie is not None and self.n_tie != "all":
            try:
                self.n_tie = int(self.n_tie)
            except ValueError as error:
                raise ValueError(f"n_tie must be an integer or 'all', got {self.n_tie!r}") from error
        if isinstance(self.tying, str) and self.tying.startswith("{"):
            try:
                self.tying = json.loads(self.tying)
            except ValueError as error:
                raise ValueError(f"tying={self.tying!r} is no JSON: {error}") from error
        chosen = self.tinylora_fields()
        if self.adapter != "tinylora":
            given = {("kept_dtype" if name == "save_dtype" else name): value for name, value in chosen.items()}
            given |= {"n_values": self.n_values} if self.n_values is not None else {}
            if given:
                raise ValueError(
                    f"{_listed(given)} belongs to adapter='tinylora', but adapter is {self.adapter!r}: drop it, or set "
                    "adapter to 'tinylora'"
                )
        if self.kept_dtype not in (None, *SAVE_DTYPES):
            raise ValueError(f"kept_dtype must be one of {SAVE_DTYPES}, got {self.kept_dtype!r}")
        clash = {name: chosen[name] for name in ("u", "n_tie") if name in chosen}
        if self.n_values is not None and clash:
            raise ValueError(
                f"n_values={self.n_values} finds u and n_tie itself, but {_listed(clash)} is given too: drop "
                "n_values, or "
                f"drop {' and '.join(clash)}"
            )

    def tinylora_fields(self) -> dict:
        """The fields of [`~trl_tinylora.TinyLoraConfig`] that were given."""
        names = {item.name: item.name for item in fields(AdapterArguments) if item.name not in ("adapter", "n_values")}
        names["kept_dtype"] = "save_dtype"
        return {target: value for name, target in names.items() if (value := getattr(self, name)) is not None}


def build_peft_config(adapter_args: AdapterArguments, model_args: trl.ModelConfig) -> PeftConfig | None:
    """
    The `peft_config` for TRL's trainers. Reads the model's configuration, never its weights.

    Args:
        adapter_args (`AdapterArguments`): What is trained.
        model_args ([`~trl.ModelConfig`]): The model, and the `lora_*` arguments.
    Returns:
        [`~peft.PeftConfig`] or `None`: `None` for full fine-tuning.
    Raises:
        ValueError: If an argument of LoRA is given for another adapter, or no configuration has `n_values` values.
    """
    changed = {
        item.name: getattr(model_args, item.name)
        for item in fields(trl.ModelConfig)
        if item.name.startswith(("lora_", "use_rslora", "use_dora", "use_peft"))
        and getattr(model_args, item.name) != item.default
    }
    if adapter_args.adapter == "lora":
        model_args.use_peft = True
        return trl.get_peft_config(model_args)
    if changed:
        raise ValueError(
            f"{_listed(changed)} belongs to adapter='lora', but adapter is {adapter_args.adapter!r}: drop it, or set "
            "adapter to 'lora'"
        )
    if adapter_args.adapter == "full":
        return None
    if adapter_args.n_values is None:
        return TinyLoraConfig(task_type="CAUSAL_LM", **adapter_args.tinylora_fields())
    model_config = AutoConfig.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    return TinyLoraConfig.for_budget(
        model_config, adapter_args.n_values, exact=True, task_type="CAUSAL_LM", **adapter_args.tinylora_fields()
    )


def _listed(values: dict) -> str:
    """`a=1 and b=2`."""
    return " and ".join(f"{name}={value!r}" for name, value in values.items())
