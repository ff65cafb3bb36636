"""
One process of a distributed run: TRL's own trainers on a tiny Qwen2, case after case.

Started by `accelerate launch --config_file recipes/accelerate/<mode>.yaml` (see runs.py), so that mode, precision and
DeepSpeed's settings come from where users take them. For each case rank 0 writes what `observe` returns.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointFunction
from transformers import DistributedConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import trl_tinylora.model
from trl_tinylora import TinyLoraConfig
from trl_tinylora.bank import Vectors
from trl_tinylora.decomposition import mix
from trl_tinylora.distributed import gathered, whole
from trl_tinylora.layer import Linear


STEPS = 20
# Rows of a step, over all processes and accumulated micro-batches; GRPO: two groups of four completions.
ROWS = 8
GROUP = 4

CHECKPOINTING = {
    "off": {"activation_checkpointing": False},
    "default": {},
    "reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": False}},
}


def rollouts(prompts, trainer):
    """Completions that depend on prompt, place in the group and step alone, not on which process asks."""
    tokenizer = trainer.processing_class
    prompt_ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
    completion_ids = []
    for place, ids in enumerate(prompt_ids):
        draw = random.Random(f"{ids} {place % GROUP} {trainer.state.global_step}")
        completion_ids.append([draw.randrange(10, 250) for _ in range(draw.randrange(3, 7))])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def reward(completion_ids, **kwargs):
    """A number in [0, 1] from the tokens alone."""
    return [sum(ids) % 11 / 10 for ids in completion_ids]


def make_trainer(case, base, rows, output_dir):
    """A trainer of TRL's, unmodified, for one case."""
    processes = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    accumulation = case.get("accumulation", 1)
    arguments = {
        "output_dir": str(output_dir),
        "max_steps": case.get("max_steps", STEPS),
        "per_device_train_batch_size": ROWS // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": case.get("bf16", False),
        "use_cpu": not torch.cuda.is_available(),
        "seed": 0,
        **CHECKPOINTING[case.get("checkpointing", "off")],
        **case.get("arguments", {}),
    }
    model_init_kwargs = {"dtype": case.get("dtype", "float32")}
    if case["mode"] == "fsdp2":
        # FSDP2 by transformers itself, at load time: accelerate's needs a GPU.
        model_init_kwargs["distributed_config"] = DistributedConfig(fsdp_size=processes)
    peft_config = TinyLoraConfig(**case.get("fields", {}))
    if case["trainer"] == "sft":
        config = SFTConfig(**arguments, model_init_kwargs=model_init_kwargs)
        return SFTTrainer(base, config, train_dataset=Dataset.from_list(rows), peft_config=peft_config)
    config = GRPOConfig(
        **{"num_generations": GROUP, "shuffle_dataset": False, "beta": 0.1, **arguments},
        model_init_kwargs=model_init_kwargs,
    )
    return GRPOTrainer(
        base,
        reward,
        config,
        train_dataset=Dataset.from_list(rows).remove_columns("completion"),
        peft_config=peft_config,
        rollout_func=rollouts,
    )


def plain_autograd():
    """Control: the tied values used in every layer, gradients by autograd alone."""

    def update(layer, x, adapter_name):
        index, rank = layer.trl_tinylora_place[adapter_name]
        vectors = layer._vectors(adapter_name)
        left_OR, right_RI = layer.factors(rank)
        one = slice(index, index + 1)
        mixing_RR = mix(vectors.values_GK, vectors.groups_M[one], vectors.projections_MKRR[one])[0]
        return x @ right_RI.mT @ mixing_RR.mT @ left_OR.mT

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(Linear, "_update", update))
    stack.enter_context(mock.patch.object(Vectors, "forward", lambda vectors, hidden: hidden))
    return stack


def no_gather():
    """Control: weights are decomposed without being gathered."""
    return mock.patch.object(trl_tinylora.model, "gathered", lambda parameters: contextlib.nullcontext())


def own_gradients():
    """Control: every process keeps the gradient of its own rows."""
    return mock.patch.object(Vectors, "collect", lambda vectors, collect=Vectors.collect: collect(vectors) * skew())


def skew():
    return 1.0 if not dist.is_initialized() or dist.get_rank() == 0 else 0.0


CONTROLS = {None: contextlib.nullcontext, "plain autograd": plain_autograd, "no gather": no_gather, "one rank": own_gradients}


class DtypeInForward(TrainerCallback):
    """Notes the dtype in which the values are used."""

    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.add(str(values_of(model).dtype))


def values_of(model):
    return next(parameter for name, parameter in model.named_parameters() if ".default.lora_magnitude_vector" in name)


def observe(case, base, rows, output_dir):
    """Trains, and returns the values and what else a test looks at."""
    reentrant, plain = [], CheckpointFunction.backward

    def counted(*args):
        reentrant.append(1)
        return plain(*args)

    dtypes = set()
    with CONTROLS[case.get("control")](), mock.patch.object(CheckpointFunction, "backward", staticmethod(counted)):
        trainer = make_trainer(case, base, rows, output_dir)
        trainer.add_callback(DtypeInForward(dtypes))
        trainer.train(resume_from_checkpoint=case.get("resume"))
    if case.get("save"):
        trainer.save_model(str(output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model)
    values = values_of(model)
    with gathered([values]):
        final = whole(values.detach()).float().flatten().tolist()
    factors = [buffer for name, buffer in model.named_buffers() if "trl_tinylora_left" in name or "_right" in name]
    checksum = sum(buffer.double().abs().sum().item() for buffer in factors)
    spread = sum(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())
    return {
        "values": final,
        "dtypes_in_forward": sorted(dtypes),
        "reentrant_backwards": len(reentrant),
        "factor_checksum": checksum,
        "spread_parameters": spread,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "engine": type(trainer.model_wrapped).__name__,
        "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def forget_the_last_case():
    """Accelerate keeps the state of one run a process; the process group stays."""
    AcceleratorState._reset_state(False)
    GradientState._reset_state()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True, help="JSON: base, rows, cases, output_dir")
    job = json.loads(parser.parse_args().job.read_text())
    output_dir = Path(job["output_dir"])
    failed = False
    for case in job["cases"]:
        try:
            found = observe(case, job["base"], job["rows"], output_dir / case["name"])
        except Exception as error:
            failed = True
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        rank = int(os.environ.get("RANK", 0))
        (output_dir / f"{case['name']}.{rank}.json").write_text(json.dumps(found))
        print(f"[{rank}] {case['name']}: {found.get('error', 'done')}", flush=True)
        if failed:
            # After an error the processes need not be in step any more.
            sys.exit(1)
        forget_the_last_case()


if __name__ == "__main__":
    main()
