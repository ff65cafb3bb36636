"""The arguments of `evaluate.py`, and those of them that a comparison has as well."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from trl_tinylora.tasks import get_task
from trl_tinylora.tasks.benchmarks import Benchmark, get_benchmark


@dataclass
class GenerationArguments:
    """
    How completions are asked for, generated and counted.

    Args:
        task (`str`, *optional*, defaults to `"gsm8k"`): Whose prompt and grading, `"gsm8k"` or `"math"`.
        system_prompt (`str`, *optional*): Instead of the task's own; by default there is none for GSM8K.
        instruction (`str`, *optional*): What follows the question, instead of the task's own.
        samples (`int`, *optional*, defaults to `4`): Samples a problem, beside the greedy completion; 0 for none.
        temperature (`float`, *optional*, defaults to `1.0`): Of the samples.
        max_new_tokens (`int`, *optional*, defaults to `512`): Limit of a completion.
        eval_batch_size (`int`, *optional*, defaults to `64`): Completions generated at once.
        eval_seed (`int`, *optional*, defaults to `0`): Seed of the samples and of the bootstrap.
    Raises:
        ValueError: If a value is out of its bounds.
    """

    task: str | None = field(default="gsm8k", metadata={"help": "Whose prompt and grading: gsm8k or math."})
    system_prompt: str | None = field(default=None, metadata={"help": "Instead of the task's own system prompt."})
    instruction: str | None = field(default=None, metadata={"help": "Instead of the task's own instruction."})
    samples: int = field(default=4, metadata={"help": "Samples a problem, beside the greedy completion; 0 for none."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples."})
    max_new_tokens: int = field(default=512, metadata={"help": "Limit of a completion, in tokens."})
    eval_batch_size: int = field(default=64, metadata={"help": "Completions generated at once."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the samples and of the bootstrap."})

    def __post_init__(self):
        if self.task is not None:
            get_task(self.task)
        bounds = {"samples": 0, "max_new_tokens": 1, "eval_batch_size": max(1, self.samples), "eval_seed": 0}
        for name, bound in bounds.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}: the greedy completion is always generated"
            )

    def generation_settings(self) -> dict:
        """What completions follow from; without an `instruction` as before there was one, which keeps digests valid."""
        settings = {item.name: getattr(self, item.name) for item in fields(GenerationArguments)}
        if self.instruction is None:
            del settings["instruction"]
        return settings


@dataclass
class EvaluationArguments(GenerationArguments):
    """
    Adds what is evaluated, on what, and where the answer goes.

    Args:
        task (`str`, *optional*): Whose prompt and grading; by default the benchmark's, `"gsm8k"` for a dataset.
        benchmark (`list[str]`, *optional*): Published data sets, also separated by commas; each gets its own folder.
        dataset_name (`str`, *optional*): Instead: a JSONL file, a folder of `{split}.jsonl` files or a name on the Hub.
        dataset_config (`str`, *optional*): Its configuration on the Hub.
        dataset_test_split (`str`, *optional*, defaults to `"test"`): Its split.
        limit (`int`, *optional*): Take only the first `limit` rows.
        adapter_path (`str`, *optional*): Folder or Hub name of an adapter of the model.
        other_base (`bool`, *optional*, defaults to `False`): Load a TinyLoRA adapter on a quantised or full-precision
            variant of its base.
        backend (`str`, *optional*, defaults to `"transformers"`): `"transformers"` or `"vllm"`.
        regrade (`bool`, *optional*, defaults to `False`): Grade the completions in `output_dir` anew; no model is read.
        output_dir (`str`, *optional*, defaults to `"results/evaluation"`): For `metrics.json` and `completions.jsonl`.
    Raises:
        ValueError: If two arguments contradict each other or a name is unknown.
    """

    task: str | None = field(default=None, metadata={"help": "Whose prompt and grading; the benchmark's by default."})
    benchmark: list[str] | None = field(default=None, metadata={"help": "Published data sets, by name."})
    dataset_name: str | None = field(default=None, metadata={"help": "JSONL file, folder or Hub name, instead."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    dataset_test_split: str = field(default="test", metadata={"help": "Its split."})
    limit: int | None = field(default=None, metadata={"help": "Take only the first `limit` rows."})
    adapter_path: str | None = field(default=None, metadata={"help": "Folder or Hub name of an adapter of the model."})
    other_base: bool = field(
        default=False,
        metadata={"help": "Load a TinyLoRA adapter on a quantised or full-precision variant of its base."},
    )
    backend: Literal["transformers", "vllm"] = field(default="transformers", metadata={"help": "What generates."})
    regrade: bool = field(default=False, metadata={"help": "Grade the completions in output_dir anew."})
    output_dir: str = field(
        default="results/evaluation", metadata={"help": "Folder for metrics.json and completions.jsonl."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.benchmark is not None:
            self.benchmark = [name for item in self.benchmark for name in item.split(",") if name] or None
        if self.regrade:
            return
        if (self.benchmark is None) == (self.dataset_name is None):
            raise ValueError(
                "name what to evaluate on: either --benchmark or --dataset_name, got "
                f"benchmark={self.benchmark!r} and dataset_name={self.dataset_name!r}"
            )
        if self.other_base and self.backend == "vllm":
            raise ValueError(
                "other_base loads the adapter with transformers, but backend is 'vllm': drop one of the two"
            )
        for benchmark in self.benchmarks():
            if self.task not in (None, benchmark.task):
                raise ValueError(
                    f"benchmark {benchmark.name!r} is of the task {benchmark.task!r}, but task is {self.task!r}: "
                    "drop --task"
                )

    def benchmarks(self) -> list[Benchmark]:
        """The benchmarks by their names, in the given order."""
        return [get_benchmark(name) for name in self.benchmark or ()]

    def of_task(self, task: str) -> GenerationArguments:
        """How completions of this task are generated."""
        return GenerationArguments(**self.generation_settings() | {"task": task})
