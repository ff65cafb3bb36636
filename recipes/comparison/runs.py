"""The kinds of run that a comparison consists of; each is a piece of work with a JSON of its own."""

import hashlib
import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import es
import grpo
import numpy as np
import sft
import torch
import transformers
import trl
import yaml
from evaluation.arguments import GenerationArguments
from evaluation.completions import read_lines
from evaluation.generation import load_model
from evaluation.run import evaluate
from peft import PeftModel, get_peft_model
from records.files import digest_of, write_text
from training.arguments import AdapterArguments, build_peft_config
from training.callbacks import trained_values
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from comparison.arguments import RATE_KEYS
from comparison.records import resolved_settings, training_curve
from trl_tinylora.tasks import get_task


SCRIPTS: dict[str, ModuleType] = {"rl": grpo, "sft": sft, "es": es}
MAX_RECORDED_VALUES = 256
OWN_SAMPLES = "train.jsonl"
# Keys of a recipe that say how its model is loaded.
MODEL_KEYS = ("model_name_or_path", "model_revision", "dtype", "load_in_8bit", "load_in_4bit")
MODEL_KEYS += ("bnb_4bit_quant_type", "use_bnb_nested_quant")
# transformers' two names of one argument, of which the recipes have had both: a record by either is of the same run.
RENAMED = {"gradient_checkpointing": "activation_checkpointing"}


@dataclass(frozen=True)
class Problems:
    """
    The problems that a run's model answers.

    Args:
        dataset_name (`str`): JSONL file, folder or name on the Hub.
        split (`str`): Its split.
        dataset_config (`str`, *optional*): Its configuration on the Hub.
        limit (`int`, *optional*): The first so many only.
    """

    dataset_name: str
    split: str
    dataset_config: str | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run(ABC):
    """
    One piece of work.

    Args:
        name (`str`): Names its JSON and its work folder.
        phase (`str`): `"samples"`, `"sweep"`, `"final"`, `"untrained"` or `"control"`.
        arm (`str`): Name of the arm or the control.
        arm_label (`str`): For people.
        size (`str`, *optional*): A key of the comparison's `sizes`.
        label (`str`, *optional*): For people.
        settings (`dict`): Keys of the recipe's YAML, with the size, seed and learning rate in place.
        problems (`Problems`): What its model answers.
        generation (`GenerationArguments`): How.
        inputs (`dict`): SHA-256 of the local files that the run reads.
    """

    name: str
    phase: str
    arm: str
    arm_label: str
    size: str | None = None
    label: str = ""
    settings: dict
    problems: Problems
    generation: GenerationArguments
    inputs: dict

    @property
    def algorithm(self) -> str | None:
        """`"rl"`, `"sft"` or `"es"`; `None` for what trains nothing."""
        return None

    @property
    def needs(self) -> str | None:
        """Name of the run whose rows this one trains on."""
        return None

    def plan(self) -> dict:
        """Its fields, as JSON has them."""
        return asdict(self) | {"generation": self.generation.generation_settings()}

    @property
    def digest(self) -> str:
        """Equal for two runs exactly if they would do the same."""
        plan = {key: value for key, value in self.plan().items() if key not in ("label", "arm_label")}
        plan["settings"] = {RENAMED.get(key, key): value for key, value in self.settings.items()}
        return digest_of(plan | {"kind": type(self).__name__, "algorithm": self.algorithm})

    def described(self) -> dict:
        """What its record says of the plan."""
        plan = {key: value for key, value in self.plan().items() if key != "settings"}
        return plan | {"algorithm": self.algorithm, "digest": self.digest}

    def kept(self, folder: Path) -> dict | None:
        """
        Its record, if there is one made from the same settings.

        Args:
            folder (`Path`): Where the comparison's records lie.
        Returns:
            `dict` or `None`
        """
        try:
            record = json.loads((folder / f"{self.name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record if record["digest"] == self.digest else None

    @abstractmethod
    def run(self, folder: Path) -> dict:
        """
        Does the work.

        Args:
            folder (`Path`): For its model, completions and samples.
        Returns:
            `dict`: What its record says beside the plan.
        """

    def load(self):
        """The model as the recipe loads it, and its tokenizer."""
        model_args = self.model_args()
        name, revision = model_args.model_name_or_path, model_args.model_revision
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        return load_model(model_args, device_map="auto" if torch.cuda.is_available() else None), tokenizer

    def model_args(self) -> trl.ModelConfig:
        """The recipe's arguments of the model."""
        return trl.ModelConfig(**{key: self.settings[key] for key in MODEL_KEYS if key in self.settings})

    def rows(self) -> list[dict]:
        """The problems, read."""
        asked = self.problems
        rows = get_task(self.generation.task).load_rows(
            asked.dataset_name, asked.split, asked.dataset_config, asked.limit
        )
        return list(rows)

    def metrics(self, model, tokenizer, folder: Path | None, **options) -> dict:
        """What [`~evaluation.run.evaluate`] says of a model on the problems; without a folder nothing is kept."""
        path = None if folder is None else folder / "completions.jsonl"
        return evaluate(model, tokenizer, self.rows(), self.generation, path, **options)


@dataclass(frozen=True, kw_only=True)
class Untrained(Run):
    """The base model as it is, or asked in other words."""

    def run(self, folder: Path) -> dict:
        metrics = self.metrics(*self.load(), folder)
        return {"seed": None, "trained_values": 0, "trained_bytes": 0, "metrics": metrics}


@dataclass(frozen=True, kw_only=True)
class ZeroAdapter(Run):
    """
    The base model with an adapter that adds nothing: the machinery's own effect.

    Args:
        adapter (`dict`): Arguments of the adapter.
        seed (`int`): Of its projections.
    """

    adapter: dict
    seed: int

    def run(self, folder: Path) -> dict:
        model, tokenizer = self.load()
        model = get_peft_model(model, build_peft_config(AdapterArguments(**self.adapter), self.model_args()))
        values = self.set_values(model)
        metrics = self.metrics(model, tokenizer, folder)
        return {"seed": self.seed, "trained_values": 0, "trained_bytes": 0, "values": values, "metrics": metrics}

    def set_values(self, model: torch.nn.Module) -> list[float]:
        """The adapter's values, after they were set."""
        (values,) = trained_values(model)
        return values.flatten().tolist()


@dataclass(frozen=True, kw_only=True)
class RandomValues(ZeroAdapter):
    """
    The base model with values of random direction: whether the one that training found matters, or its length alone.

    Args:
        norm (`float`): Length of the values.
    """

    norm: float

    def set_values(self, model: torch.nn.Module) -> list[float]:
        (values,) = trained_values(model)
        direction = np.random.default_rng(self.seed).standard_normal(values.numel())
        direction *= self.norm / np.linalg.norm(direction)
        with torch.no_grad():
            values.copy_(torch.tensor(direction, dtype=values.dtype).reshape(values.shape))
        return direction.tolist()


@dataclass(frozen=True, kw_only=True)
class OwnSamples(Run):
    """
    The untrained model's own right answers, one a problem at most: the task's rows, with them as `demonstration`.

    The first right sample of each problem, so that easy problems are not in it more often than hard ones.

    Args:
        grading (`str`): By which they are right, `"strict"` or `"flexible"`.
    """

    grading: str = "strict"

    def plan(self) -> dict:
        plan = super().plan()
        if self.grading == "strict":
            # As before there was another one, which keeps digests valid.
            del plan["grading"]
        return plan

    def run(self, folder: Path) -> dict:
        rows = self.rows()
        metrics = self.metrics(*self.load(), folder, kinds=("sampled",))
        kept: dict[int, dict] = {}
        for line in read_lines(folder / "completions.jsonl"):
            if line[self.grading] and line["problem"] not in kept:
                asked = {name: rows[line["problem"]][name] for name in ("question", "answer")}
                kept[line["problem"]] = asked | {"demonstration": line["completion"]}
        if not kept:
            raise ValueError(
                f"none of {metrics['samples']} samples of {len(rows)} problems is right: there is nothing of its own "
                "to train on. Raise own_samples, or drop the arm"
            )
        text = "".join(json.dumps(kept[problem]) + "\n" for problem in sorted(kept))
        write_text(folder / OWN_SAMPLES, text)
        return {
            "seed": self.generation.eval_seed,
            "examples": len(kept),
            "problems_asked": len(rows),
            "generated_tokens": metrics["sampled"]["tokens"],
            "accuracy": metrics["sampled"][self.grading]["accuracy"],
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }


@dataclass(frozen=True, kw_only=True)
class Training(Run):
    """
    A recipe's training, and the evaluation of what it trained.

    Args:
        script (`str`): `"rl"`, `"sft"` or `"es"`.
        own_samples (`str`, *optional*): Name of the run whose rows it trains on, instead of the recipe's.
        own_samples_digest (`str`, *optional*): That run's digest.
    """

    script: str
    own_samples: str | None = None
    own_samples_digest: str | None = None

    @property
    def algorithm(self) -> str:
        return self.script

    @property
    def needs(self) -> str | None:
        return self.own_samples

    def run(self, folder: Path) -> dict:
        settings = self.settings | {"output_dir": str(folder / "model"), "disable_tqdm": True}
        if self.own_samples is not None:
            # Drawn from the training problems; the test problems stay those of the comparison. A file, for the recipe's
            # split may be a part of one, "train[500:]".
            settings["dataset_name"] = str(folder.parent / self.own_samples / OWN_SAMPLES)
        parsed = trl.TrlParser(SCRIPTS[self.script].ARGUMENTS).parse_dict(settings)
        model, tokenizer, course = self._outcome(settings, parsed)
        rate = next(settings[key] for key in RATE_KEYS[self.script] if key in settings)
        record = {"seed": settings["seed"], "learning_rate": rate}
        record["config"] = resolved_settings(parsed)
        if self.own_samples is not None:
            # Where they lay says nothing to others.
            record["config"]["dataset_name"] = self.own_samples
        return (
            record
            | _trained(model, parsed[-1].kept_dtype)
            | course
            | {"metrics": self.metrics(model, tokenizer, folder)}
        )

    def _outcome(self, settings: dict, parsed: tuple) -> tuple:
        """Trains; returns the model, its tokenizer, and what the record says of the course."""
        trainer = SCRIPTS[self.script].main(*parsed)
        model = trainer.accelerator.unwrap_model(trainer.model)
        return model, trainer.processing_class, self._course(trainer.args, trainer.state)

    def _course(self, args: transformers.TrainingArguments, state: TrainerState, processes: int = 1) -> dict:
        """Steps, problems, tokens and seconds of a training, and what was logged of it."""
        logs = [entry for entry in state.log_history if "loss" in entry or "reward" in entry]
        rows = state.global_step * args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        generated = 0
        if self.script == "rl":
            rows //= args.num_iterations
            lengths = [entry["completions/mean_length"] for entry in logs]
            generated = round(sum(lengths) / len(lengths) * rows)
            rows //= args.num_generations
        return {
            "optimizer_steps": state.global_step,
            "examples": rows,
            "generated_tokens": generated,
            "trained_tokens": round(max(entry.get("num_tokens", 0) for entry in logs)),
            "train_seconds": round(state.log_history[-1]["train_runtime"], 1),
        } | training_curve(state.log_history)


@dataclass(frozen=True, kw_only=True)
class Launched(Training):
    """
    A recipe's training in several processes by `accelerate launch`, with the same rows a step, and its evaluation here.

    Args:
        launcher (`str`): The launcher's YAML.
    """

    launcher: str

    def _outcome(self, settings: dict, parsed: tuple) -> tuple:
        processes = yaml.safe_load(Path(self.launcher).read_text(encoding="utf-8"))["num_processes"]
        has_gpu = torch.cuda.is_available()
        if has_gpu and torch.cuda.device_count() < processes:
            raise ValueError(
                f"{self.launcher} starts {processes} processes, and a run of a comparison has "
                f"{torch.cuda.device_count()} GPU: launch the recipe by itself"
            )
        shared = _shared_out(parsed[1], processes)
        output_dir = Path(settings["output_dir"])
        recipe = output_dir.with_name("recipe.yaml")
        write_text(recipe, yaml.safe_dump(settings | shared | {"use_cpu": not has_gpu}))
        script = Path(SCRIPTS[self.script].__file__)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", self.launcher]
        # Another port for each, since several may run at a time.
        command += ["--main_process_port", "0", str(script), "--config", str(recipe)]
        # DeepSpeed compiles with the ninja that stands beside this Python.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        subprocess.run(command, check=True, env=os.environ | {"PATH": path})
        model, tokenizer = self.load()
        model = PeftModel.from_pretrained(model, output_dir, is_trainable=True)
        state = TrainerState.load_from_json(str(output_dir / TRAINER_STATE_NAME))
        return model, tokenizer, self._course(parsed[1], state)


def _shared_out(args: transformers.TrainingArguments, processes: int) -> dict:
    """The batch's keys with the same rows a step in several processes: fewer micro-batches, or smaller ones."""
    for name in ("gradient_accumulation_steps", "per_device_train_batch_size"):
        count, rest = divmod(getattr(args, name), processes)
        if not rest:
            return {name: count}
    raise ValueError(
        f"{processes} processes cannot share {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} "
        "rows: change per_device_train_batch_size or gradient_accumulation_steps"
    )


@dataclass(frozen=True, kw_only=True)
class Evolution(Training):
    """A recipe's search without gradients, and the evaluation of what it found."""

    def _outcome(self, settings: dict, parsed: tuple) -> tuple:
        evolved = es.main(*parsed)
        steps = evolved.steps
        budget = {
            "optimizer_steps": len(steps),
            "examples": sum(step["problems"] for step in steps),
            "generated_tokens": sum(step["generated_tokens"] for step in steps),
            "trained_tokens": 0,
            "train_seconds": round(sum(step["seconds"] for step in steps), 1),
        }
        return evolved.model, evolved.tokenizer, budget | training_curve(steps)


def _trained(model: torch.nn.Module, kept_dtype: str | None) -> dict:
    """Number, bytes and, where they are few, values of what was trained."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    count = sum(value.numel() for value in trained.values())
    itemsize = getattr(torch, kept_dtype).itemsize if kept_dtype else None
    return {
        "trained_values": count,
        "trained_bytes": sum(value.numel() * (itemsize or value.element_size()) for value in trained.values()),
        "trained": {name: value.tolist() for name, value in trained.items()} if count <= MAX_RECORDED_VALUES else None,
    }
