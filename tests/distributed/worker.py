"""
One process of a distributed run: TRL's own trainers on a tiny Qwen2, case after case.

Started by `accelerate launch --config_file recipes/accelerate/<mode>.yaml` (see runs.py), so that mode, precision and
DeepSpeed's settings come from where users take them. For each case every rank writes what `observe` returns.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointFunction
from training.launch import resume_point
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

import trl_tinylora.tuner.build
import trl_tinylora.tuner.model
from trl_tinylora import TinyLoraConfig
from trl_tinylora.distributed import gathered, whole
from trl_tinylora.maths.decomposition import mix
from trl_tinylora.tuner.build import compute_factors
from trl_tinylora.tuner.gradient import columns
from trl_tinylora.tuner.layer import Linear
from trl_tinylora.tuner.values import Vectors


STEPS = 8
# Rows of a step, over all processes and accumulated micro-batches; GRPO: two groups of four completions.
ROWS = 8
GROUP = 4

CHECKPOINTING = {
    "off": {"gradient_checkpointing": False},
    "default": {},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
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
    processes = int(os.environ.get("WORLD_SIZE", 1))
    accumulation = case.get("accumulation", 1)
    arguments = {
        "output_dir": str(output_dir / case["name"]),
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
    if case["mode"] == "fsdp2 at load":
        model_init_kwargs["distributed_config"] = {"fsdp_size": processes}
    peft_config = LoraConfig(**case["lora"]) if "lora" in case else TinyLoraConfig(**case.get("fields", {}))
    if case["trainer"] == "sft":
        config = SFTConfig(**arguments, model_init_kwargs=model_init_kwargs)
        return SFTTrainer(
            base,
            config,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]) if config.eval_strategy != "no" else None,
            peft_config=peft_config,
        )
    config = GRPOConfig(
        **{"num_generations": GROUP, "shuffle_dataset": False, "beta": 0.1, **arguments},
        model_init_kwargs=model_init_kwargs,
    )
    if "given" in case:
        # A saved adapter, loaded onto the base as this mode shards it: TRL keeps a copy of it as the reference.
        model = AutoModelForCausalLM.from_pretrained(base, **model_init_kwargs)
        base = PeftModel.from_pretrained(model, case["given"], is_trainable=True)
        peft_config = config.model_init_kwargs = None
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

    def updates(layer, x):
        found = []
        for vectors, index in filter(None, map(layer.place, layer.active_adapters)):
            left_OR, right_RI = layer.factors_of(vectors.plan)
            one = slice(index, index + 1)
            mixing_RR = mix(vectors.values_GK, vectors.plan.groups_M[one], vectors.plan.projections_MKRR[one])[0]
            found.append((mixing_RR @ right_RI @ columns(x), left_OR))
        return found

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(Linear, "_updates", updates))
    stack.enter_context(mock.patch.object(Vectors, "begin_pass", lambda vectors, hidden: hidden))
    return stack


def no_gather():
    """Control: weights are decomposed without being gathered."""
    return mock.patch.object(trl_tinylora.tuner.build, "gathered", lambda parameters: contextlib.nullcontext())


def lost_gradient():
    """Control: the gradient of the second process's rows is lost."""

    def collect(vectors, collect=Vectors.collect):
        return collect(vectors) * (1 - dist.get_rank())

    return mock.patch.object(Vectors, "collect", collect)


def one_rank_fails():
    """Control: the second process fails in the third backward pass."""
    passes = []

    def collect(vectors, collect=Vectors.collect):
        passes.append(1)
        if len(passes) == 3 and dist.get_rank() == 1:
            raise RuntimeError("this process was told to fail")
        return collect(vectors)

    return mock.patch.object(Vectors, "collect", collect)


def fsdp_without_a_gpu():
    """On a CPU accelerate makes FSDP2 DDP. That choice alone is undone: how it shards, trains and saves is its own."""

    def initialise(state, *args, initialise=AcceleratorState.__init__, fsdp_plugin=None, **kwargs):
        initialise(state, *args, **kwargs)
        if fsdp_plugin is not None:
            state.fsdp_plugin = fsdp_plugin
        if getattr(state, "fsdp_plugin", None) is not None:
            state.distributed_type = DistributedType.FSDP

    return mock.patch.object(AcceleratorState, "__init__", initialise)


def fp16_on_any_cpu():
    """DeepSpeed takes fp16 only from processors with such instructions; PyTorch computes it on every one."""
    from deepspeed.accelerator import get_accelerator

    return mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda accelerator: True)


CONTROLS = {
    None: contextlib.nullcontext,
    "plain autograd": plain_autograd,
    "no gather": no_gather,
    "lost gradient": lost_gradient,
    "one rank fails": one_rank_fails,
}


@contextlib.contextmanager
def whole_weights_while_building(most):
    """Appends to `most` how many of the model's sharded weights were whole whenever singular vectors were taken."""
    models, compute, decompose = [], trl_tinylora.tuner.model.compute_factors, trl_tinylora.tuner.build.truncated_svd

    def computing(model, *args):
        models.append(model)
        return compute(model, *args)

    def decomposing(weight, rank):
        most.append(sum(hasattr(p, "ds_shape") and p.shape == p.ds_shape for p in models[-1].parameters()))
        return decompose(weight, rank)

    with (
        mock.patch.object(trl_tinylora.tuner.model, "compute_factors", computing),
        mock.patch.object(trl_tinylora.tuner.build, "truncated_svd", decomposing),
    ):
        yield


class DtypeInForward(TrainerCallback):
    """Notes the dtype in which the values are used."""

    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.add(str(values_of(model).dtype))


def loopback_bytes():
    """Bytes that this machine has sent to itself so far: all that gloo's processes exchange."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])


class StepCost(TrainerCallback):
    """Seconds and bytes between processes of every step."""

    def __init__(self):
        self.seconds, self.bytes = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = time.perf_counter(), loopback_bytes()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.before[0])
        self.bytes.append(loopback_bytes() - self.before[1])


class KilledAfter(TrainerCallback):
    """SIGKILL to this process at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(file_name, occurrence):
    """SIGKILL to this process when a file of that name is half written for the n-th time."""
    save, seen = torch.save, []

    def half(content, file, *args, **kwargs):
        if os.path.basename(str(file)) == file_name:
            seen.append(file)
            if len(seen) == occurrence:
                whole_file = io.BytesIO()
                save(content, whole_file, *args, **kwargs)
                with open(file, "wb") as half_written:
                    half_written.write(whole_file.getvalue()[: whole_file.tell() // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        save(content, file, *args, **kwargs)

    return mock.patch.object(torch, "save", half)


def build_seconds(model, base, turns):
    """Seconds to find the factors of the model as this mode shards it, and of the same model whole, in turns."""
    names = [module.name for module in model.modules() if isinstance(module, Linear)]
    # No rank that the layers hold already.
    rank = 3
    plain = Qwen2ForCausalLM(Qwen2Config.from_pretrained(base))
    plain.load_state_dict(load_file(Path(base) / "model.safetensors"), strict=False)
    found = {"sharded": [], "whole": []}
    for _ in range(turns):
        for kind, given in (("whole", plain), ("sharded", model.get_base_model())):
            started = time.perf_counter()
            compute_factors(given, None, names, rank)
            found[kind].append(time.perf_counter() - started)
    return found


def values_of(model):
    return next(parameter for name, parameter in model.named_parameters() if ".default.lora_magnitude_vector" in name)


def digest(tensor):
    """SHA-256 of a tensor's bytes."""
    as_bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(as_bytes.numpy().tobytes()).hexdigest()


def transfer_to_vllm(trainer, cycles):
    """Drives TRL's own weight transfer; digests of what it yields, first and last, and of the base before and after."""
    transfer = object.__new__(VLLMGeneration)
    transfer.model, transfer.accelerator = trainer.model, trainer.accelerator
    transfer._dist = DistributedBackend(trainer.accelerator)
    if any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        # Sharded by transformers, the model is no FSDP model to accelerate, which is what TRL asks.
        transfer._dist = SimpleNamespace(is_fsdp=True, fsdp_version=2, gather_params=lambda _: contextlib.nullcontext())

    def yielded():
        # Read at once, as vLLM does: behind the loop the weights are the base's again.
        return {name: digest(whole(weight)) for name, weight in transfer._iter_named_params()}

    def base():
        weights = {name: p for name, p in trainer.model.named_parameters() if "trl_tinylora_" not in name}
        found = {}
        for name, weight in weights.items():
            with gathered([weight]):
                found[name] = digest(whole(weight.detach()))
        return found

    before, first = base(), yielded()
    for _ in range(cycles - 2):
        for _ in transfer._iter_named_params():
            pass
    return {"yielded": first, "yielded_last": yielded(), "base_kept": before == base(), "base": before}


def observe(case, base, rows, output_dir):
    """Trains, and returns the values and what else a test looks at."""
    reentrant, plain = [], CheckpointFunction.backward

    def counted(*args):
        reentrant.append(1)
        return plain(*args)

    dtypes, whole_weights = set(), []
    with contextlib.ExitStack() as stack:
        stack.enter_context(CONTROLS[case.get("control")]())
        if case["mode"] == "fsdp2":
            stack.enter_context(fsdp_without_a_gpu())
        if case.get("arguments", {}).get("fp16"):
            stack.enter_context(fp16_on_any_cpu())
        stack.enter_context(mock.patch.object(CheckpointFunction, "backward", staticmethod(counted)))
        stack.enter_context(whole_weights_while_building(whole_weights))
        started = time.perf_counter()
        trainer = make_trainer(case, base, rows, output_dir)
        if "lora" not in case:
            trainer.add_callback(DtypeInForward(dtypes))
        cost = StepCost()
        trainer.add_callback(cost)
        if "kill_after" in case:
            trainer.add_callback(KilledAfter(case["kill_after"]))
        if "kill_while_writing" in case:
            stack.enter_context(killed_while_writing(*case["kill_while_writing"]))
        trainer.train(resume_from_checkpoint=resume_point(trainer.args))
        seconds = time.perf_counter() - started
    if case.get("save"):
        trainer.save_model()
    costs = {"step_seconds": cost.seconds, "step_bytes": cost.bytes, "seconds": seconds}
    if "lora" in case:
        return costs
    model = trainer.accelerator.unwrap_model(trainer.model)
    values = values_of(model)
    with gathered([values]):
        final = whole(values.detach()).float().flatten().tolist()
    factors = {
        name: [digest(factor) for rank in (1, 2) for factor in layer.factors((rank, None)) or ()]
        for name, layer in model.named_modules()
        if isinstance(layer, Linear)
    }
    found = {
        "values": final,
        "dtypes_in_forward": sorted(dtypes),
        "reentrant_backwards": len(reentrant),
        "factors": factors,
        "most_whole_weights_while_building": max(whole_weights),
        "sharded_parameters": sum(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "engine": type(trainer.model_wrapped).__name__,
        "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    } | costs
    if found["zero_stage"]:
        from deepspeed.utils import safe_get_full_fp32_param

        found["master"] = safe_get_full_fp32_param(values).flatten().tolist()
    if case.get("builds"):
        found["build_seconds"] = build_seconds(model, base, case["builds"])
    if case.get("transfers"):
        found |= transfer_to_vllm(trainer, case["transfers"])
    return found


def forget_the_last_case():
    """Accelerate keeps the state of one run a process; the process group stays."""
    AcceleratorState._reset_state(False)
    GradientState._reset_state()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True, help="JSON: base, rows, cases, output_dir")
    job = json.loads(parser.parse_args().job.read_text())
    output_dir = Path(job["output_dir"])
    for case in job["cases"]:
        try:
            found = observe(case, case.get("base", job["base"]), job["rows"], output_dir)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        found["ended"] = time.time()
        rank = int(os.environ.get("RANK", 0))
        (output_dir / f"{case['name']}.{rank}.json").write_text(json.dumps(found))
        print(f"[{rank}] {case['name']}: {found.get('error', 'done')}", flush=True)
        # After an error the processes need not be in step any more, unless it strikes all of them at the same point.
        if "error" in found and not case.get("fails_together"):
            sys.exit(1)
        forget_the_last_case()


if __name__ == "__main__":
    main()
