"""The trainers of docs/trainers.md, one entry each: how a test makes it small, and what a user must know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pkgutil import resolve_name

import stand_ins
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import PAIRS, ROWS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


PROMPTS = [{"prompt": row["prompt"]} for row in ROWS]
MESSAGES = [{"messages": row["prompt"] + row["completion"]} for row in ROWS]
PREFERENCES = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "No."}]}
    for row in ROWS
]
TRIPLES = [{**row, "reference": [{"role": "assistant", "content": "#### 7"}]} for row in PREFERENCES]
LABELLED = [{**row, "label": index % 2 == 0} for index, row in enumerate(ROWS)]
HINTS = [{**row, "privileged_context": answer} for row, (_, answer) in zip(PROMPTS, PAIRS, strict=True)]
CLASSES = [{"input_ids": [3 + index, 40, 50 - 2 * index], "label": index % 3} for index in range(8)]

SAMPLED = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
# One sample a step and process, from a queue that holds them all.
QUEUED = {"per_device_train_batch_size": 1, "token_budget": 0, "max_staleness": 9}
TEACHERS = {"teacher_server_urls": {"default": "http://localhost"}}


def graded(completions, **columns):
    """Rewards between 0 and 1 that differ from completion to completion."""
    return [sum(map(ord, str(completion))) % 7 / 7 for completion in completions]


def right_or_wrong(completions, **columns):
    """Rewards of 0 and 1."""
    return [float(sum(map(ord, str(completion))) % 2) for completion in completions]


def with_tokenizer(base):
    return {"processing_class": AutoTokenizer.from_pretrained(base)}


def with_teacher(base):
    """A teacher with other weights than the base."""
    teacher = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return {"teacher_model": teacher, **with_tokenizer(base)}


def with_sampler(samples):
    def others(base):
        sampler = samples(base)
        return {"rollout_worker": sampler, "weight_transfer": sampler}

    return others


@dataclass(frozen=True)
class Listed:
    """
    A trainer of the table.

    Args:
        trainer (`str`): Its class.
        rows (`list[dict]`): What it trains on.
        remark (`str`): What a user must know, in the table.
        runs (`str`): Whether it runs, in the table.
        since (`str`): The first version of TRL with which it is run.
        config (`str`, *optional*): The class of its arguments, where that is not the trainer's with another ending.
        args (`dict`): Arguments beside those of every trainer.
        others (`Callable`): From the base's folder, what its constructor takes beside.
        labels (`int`): Outputs of a classifier, or 0 for a language model.
        fields (`dict`): Of its `TinyLoraConfig`.
        takes_config (`bool`): Whether it takes a `peft_config`; else it is given the `PeftModel`.
        stands_in (`Callable`): From the base's folder, what takes the place of what a CPU lacks, by dotted name.
    """

    trainer: str
    rows: list
    remark: str = ""
    runs: str = "yes"
    since: str = "1.11"
    config: str | None = None
    args: dict = field(default_factory=dict)
    others: Callable = lambda base: {}
    labels: int = 0
    fields: dict = field(default_factory=dict)
    takes_config: bool = True
    stands_in: Callable = lambda base: {}

    def load(self, base):
        """The base model as the trainer has it, the head of a classifier drawn from torch's generator."""
        if not self.labels:
            return AutoModelForCausalLM.from_pretrained(base)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=self.labels)

    def make(self, base, args, peft_config=None, model=None):
        """
        The trainer of the base in a folder with a new adapter, or of `model`, which has one.

        Args:
            base (`str`): Folder of a language model and its tokenizer.
            args (`dict`): The fields of its arguments.
            peft_config (`PeftConfig`, *optional*): The new adapter.
            model (`PeftModel`, *optional*): Instead of it.
        """
        adapter = {}
        if model is None and self.takes_config:
            adapter, model = {"peft_config": peft_config}, base
        elif model is None:
            model = get_peft_model(self.load(base), peft_config)
        arguments = resolve_name(self.config or self.trainer.replace("Trainer", "Config"))
        return resolve_name(self.trainer)(
            model=model,
            args=arguments(**args),
            train_dataset=Dataset.from_list(self.rows),
            **adapter,
            **self.others(base),
        )


# The order is the table's.
TRAINERS = [
    Listed("trl.SFTTrainer", ROWS),
    Listed(
        "trl.GRPOTrainer",
        PROMPTS,
        "the reference (`beta` above 0) is the model without the adapter, or a `PeftModel` as it was given",
        args={**SAMPLED, "beta": 0.1},
        others=lambda base: {"reward_funcs": graded},
    ),
    Listed(
        "trl.RLOOTrainer",
        PROMPTS,
        "reference as GRPO's",
        args={**SAMPLED, "beta": 0.1},
        others=lambda base: {"reward_funcs": graded},
    ),
    Listed("trl.DPOTrainer", PREFERENCES, "reference as GRPO's"),
    Listed("trl.KTOTrainer", LABELLED, "reference as GRPO's"),
    Listed(
        "trl.RewardTrainer",
        PREFERENCES,
        '`modules_to_save=["score"]` trains and saves the new head; without it the head stays random and is lost',
        labels=1,
        fields={"modules_to_save": ["score"]},
    ),
    Listed("trl.DistillationTrainer", PROMPTS, args={"max_completion_length": 6}, others=with_teacher),
    Listed(
        "transformers.Trainer",
        CLASSES,
        'a classifier: `task_type="SEQ_CLS"` trains and saves its head, and so does `modules_to_save`',
        config="transformers.TrainingArguments",
        labels=3,
        fields={"task_type": "SEQ_CLS"},
        takes_config=False,
        others=with_tokenizer,
    ),
    Listed(
        "trl.experimental.a2po.A2POTrainer",
        PROMPTS,
        "takes no `peft_config`: give it the `PeftModel`; its reference is a copy of the whole model",
        args={"max_completion_length": 6, "num_value_samples": 2},
        others=lambda base: {"reward_funcs": right_or_wrong},
        takes_config=False,
    ),
    Listed(
        "trl.experimental.async_distillation.AsyncDistillationTrainer",
        PROMPTS,
        "needs vLLM's servers and a GPU, for LoRA too: tested with stand-ins, which get the merged weights",
        runs="with stand-ins",
        since="1.16",
        args={**QUEUED, **TEACHERS, "model_init_kwargs": {"attn_implementation": "sdpa"}},
        others=with_sampler(stand_ins.distillation_samples),
        stands_in=lambda base: stand_ins.on_a_cpu("trl.experimental.async_distillation.async_distillation_trainer"),
    ),
    Listed(
        "trl.experimental.async_grpo.AsyncGRPOTrainer",
        PROMPTS,
        "the same",
        runs="with stand-ins",
        since="1.16",
        args=QUEUED,
        others=with_sampler(stand_ins.grpo_samples),
        stands_in=lambda base: stand_ins.on_a_cpu("trl.experimental.async_grpo.async_grpo_trainer"),
    ),
    Listed(
        "trl.experimental.bema_for_ref_model.DPOTrainer",
        PREFERENCES,
        "as DPO; `BEMACallback` fails, with LoRA too: it builds a second model, which it cannot of a `PeftModel`",
        config="trl.DPOConfig",
    ),
    Listed("trl.experimental.cpo.CPOTrainer", PREFERENCES, others=with_tokenizer),
    Listed("trl.experimental.gkd.GKDTrainer", MESSAGES, args={"max_new_tokens": 6}, others=with_teacher),
    Listed(
        "trl.experimental.gmpo.GMPOTrainer",
        PROMPTS,
        "reference as GRPO's",
        args={**SAMPLED, "beta": 0.1},
        others=lambda base: {"reward_funcs": graded},
    ),
    Listed("trl.experimental.gold.GOLDTrainer", MESSAGES, args={"max_completion_length": 6}, others=with_teacher),
    Listed("trl.experimental.iw_opd.IWOPDTrainer", MESSAGES, args={"max_completion_length": 6}, others=with_teacher),
    Listed(
        "trl.experimental.online_dpo.OnlineDPOTrainer",
        PROMPTS,
        "the reference is the model without the adapter, or a copy of the whole `PeftModel` that was given",
        args={"max_new_tokens": 6},
        others=lambda base: {"reward_funcs": graded, **with_tokenizer(base)},
    ),
    Listed("trl.experimental.orpo.ORPOTrainer", PREFERENCES, others=with_tokenizer),
    Listed(
        "trl.experimental.sdft.SDFTTrainer",
        HINTS,
        '`teacher_model_kind` "base" or "live"; TRL refuses "ema" for every method but LoRA',
        args={"max_completion_length": 6, "num_generations": 2},
    ),
    Listed(
        "trl.experimental.sdpo.SDPOTrainer",
        HINTS,
        '`teacher_model_kind="base"` or "live" must be set; TRL refuses "ema", the default, for every method but LoRA',
        args={**SAMPLED, "teacher_model_kind": "base"},
        others=lambda base: {"reward_funcs": right_or_wrong},
    ),
    Listed(
        "trl.experimental.server_distillation.ServerDistillationTrainer",
        PROMPTS,
        "needs a teacher on a vLLM server: tested with a stand-in",
        runs="with stand-ins",
        args={"max_completion_length": 6, "teacher_model_server_url": "http://localhost"},
        stands_in=lambda base: {
            "trl.generation.vllm_client.VLLMClient": lambda **settings: stand_ins.TeacherServer(base)
        },
    ),
    Listed("trl.experimental.tpo.TPOTrainer", TRIPLES),
]
# Where TRL still finds trainers that stand elsewhere by now.
MOVED = ("trl.experimental.distillation.DistillationTrainer", "trl.experimental.kto.KTOTrainer")
