"""Accuracy of a model, with or without an adapter, on GSM8K, MATH-like benchmarks and files in their formats.

    python recipes/evaluate.py --model_name_or_path recipes/toy/base --adapter_path results/toy-grpo-13 \
        --dataset_name recipes/toy/data --output_dir results/toy-grpo-13/evaluation
    python recipes/evaluate.py --model_name_or_path Qwen/Qwen2.5-3B-Instruct --dtype bfloat16 --max_new_tokens 3072 \
        --benchmark gsm8k,math500,aime24 --output_dir results/qwen2.5-3b-untrained

Three gradings stand side by side. "Strict" counts an answer only where the prompt asks for it ("#### n" or a box) and
is the reward of training; "flexible" falls back on a box or what else there is; "last_number" reads the last number
whatever the format. What is gained in format alone can so be told from what is gained in answers.

Every completion is kept in `completions.jsonl`. The same command continues an interrupted evaluation; with `--regrade`
the completions are graded anew and nothing is generated. `metrics.json` holds settings, commit, versions and metrics.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import statistical
import torch
import transformers
import trl
from completions import KINDS, CompletionsFile, digest_of, read_lines, read_settings, stamp, write_text
from generation import (
    GenerationArguments,
    Generator,
    TransformersGenerator,
    VllmGenerator,
    load_model,
    refuse_missing_vllm,
)
from tqdm.auto import tqdm

import trl_tinylora  # noqa: F401 - PEFT loads a TinyLoRA adapter only once the package has registered it
from trl_tinylora.tasks import get_task
from trl_tinylora.tasks.benchmarks import Benchmark, get_benchmark


GRADINGS = ("strict", "last_number", "flexible")


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
    backend: Literal["transformers", "vllm"] = field(default="transformers", metadata={"help": "What generates."})
    regrade: bool = field(default=False, metadata={"help": "Grade the completions in output_dir anew."})
    output_dir: str = field(
        default="results/evaluation", metadata={"help": "Folder for metrics.json and completions.jsonl."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.benchmark is not None:
            self.benchmark = [name for item in self.benchmark for name in item.split(",") if name]
        if self.regrade:
            return
        if (self.benchmark is None) == (self.dataset_name is None):
            raise ValueError(
                "name what to evaluate on: either --benchmark or --dataset_name, got "
                f"benchmark={self.benchmark!r} and dataset_name={self.dataset_name!r}"
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
        values = {name: getattr(self, name) for name in GenerationArguments.__dataclass_fields__}
        return GenerationArguments(**values | {"task": task})


ARGUMENTS = (trl.ModelConfig, EvaluationArguments)


def evaluate(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Iterable[dict],
    arguments: GenerationArguments,
    completions_path: str | Path | None = None,
    kinds: Sequence[str] = KINDS,
) -> dict:
    """
    Accuracies with their 95% intervals, lengths, and shares of completions that went wrong in form.

    Greedy accuracy has Wilson's interval; the sampled one, a mean over problems of the mean over samples, a percentile
    bootstrap over problems. Both speak of other problems of the same kind, not of other training seeds.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Comes back in the mode it came in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        rows (iterable of `dict`): With `question` and `answer`, as the task's `load_rows` gives them.
        arguments (`GenerationArguments`): The task, and how to generate.
        completions_path (`str` or `Path`, *optional*): JSONL to keep every completion in. Those of the same model,
            problems and settings that it holds are not generated again.
        kinds (`Sequence[str]`, *optional*): Which of "greedy" and "sampled" to generate; both by default.
    Returns:
        `dict`: `n_problems`, `samples`, `temperature`, and `greedy` and `sampled` as of [`summarize`],
        as far as they were generated.
    Raises:
        FileExistsError: If that file holds completions of another model, other problems or other settings.
    """
    generator = TransformersGenerator(model, tokenizer, arguments)
    records = complete(generator, tokenizer, list(rows), arguments, completions_path, kinds)
    return summarize(records, arguments.temperature, arguments.eval_seed)


def complete(
    generator: Generator,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Sequence[dict],
    arguments: GenerationArguments,
    completions_path: str | Path | None = None,
    kinds: Sequence[str] = KINDS,
) -> list[dict]:
    """
    One greedy completion and `samples` sampled ones a problem, graded.

    Problems whose prompts are of like length share a batch, the longest first. A batch's samples follow from its own
    seed, so that those of an interrupted and continued evaluation are the same; with another batch size they are
    others. Greedy ones are the same but for rounding: in 16 bits, padding can turn a near tie.

    Args:
        generator (`Generator`): What generates.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        rows (`Sequence[dict]`): With `question` and `answer`, and `id` if they have one.
        arguments (`GenerationArguments`): The task, and how to generate.
        completions_path (`str` or `Path`, *optional*): As of [`evaluate`].
        kinds (`Sequence[str]`, *optional*): As of [`evaluate`].
    Returns:
        `list[dict]`: By kind, problem and sample; each with `gold`, `completion`, `tokens`, `truncated`, `marker` and
        the gradings.
    Raises:
        ValueError: If there are no rows.
        FileExistsError: As of [`evaluate`].
    """
    if not rows:
        raise ValueError("there are no rows to evaluate on")
    task = get_task(arguments.task)
    prompts = [
        tokenizer.apply_chat_template(
            task.build_prompt(row["question"], arguments.system_prompt), tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    golds = [task.gold_answer(row["answer"]) for row in rows]
    settings = {name: getattr(arguments, name) for name in GenerationArguments.__dataclass_fields__}
    settings |= {"n_problems": len(rows), "problems": digest_of([prompts, golds]), "model": generator.identity()}
    kept = CompletionsFile(completions_path, settings)

    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(rows)), key=lambda index: (-lengths[index], index))
    for kind, samples in (("greedy", 1), ("sampled", arguments.samples)):
        if samples == 0 or kind not in kinds:
            continue
        step = max(1, arguments.eval_batch_size // samples)
        batches = [order[start : start + step] for start in range(0, len(order), step)]
        open_batches = [batch for batch in batches if not kept.is_done(kind, batch, samples)]
        n_done = len(rows) - sum(map(len, open_batches))
        with tqdm(total=len(rows), initial=n_done, desc=kind, unit="problem", leave=False) as progress:
            for batch in open_batches:
                seed = int(np.random.SeedSequence([arguments.eval_seed, batch[0]]).generate_state(1)[0])
                generated = generator.generate(
                    [prompts[problem] for problem in batch], samples, is_sampled=kind == "sampled", seed=seed
                )
                kept.append(
                    [
                        {"kind": kind, "problem": problem, "sample": sample}
                        | ({"id": rows[problem]["id"]} if "id" in rows[problem] else {})
                        | {"gold": golds[problem], "completion": completion.text}
                        | {"tokens": completion.tokens, "truncated": completion.truncated}
                        | _graded(task, completion.text, golds[problem])
                        for problem, completions in zip(batch, generated, strict=True)
                        for sample, completion in enumerate(completions)
                    ]
                )
                progress.update(len(batch))
    kept.write()
    return kept.records()


def summarize(records: Sequence[dict], temperature: float, seed: int) -> dict:
    """
    The metrics of graded completions.

    Args:
        records (`Sequence[dict]`): As of [`complete`], all of them.
        temperature (`float`): At which they were sampled, for the record.
        seed (`int`): Of the bootstrap.
    Returns:
        `dict`: `n_problems`, `samples`, `temperature`, and `greedy` and `sampled` with, for each of "strict",
        "last_number" and "flexible", `accuracy` (pass@1, or mean@k of the samples), its `interval`, `correct` (right
        completions a problem) and, of the samples, `pass_at` by k; `mean_tokens`, `truncated` and `no_marker` (shares
        of completions) and `tokens` (generated in all).
    """
    metrics = {"n_problems": 1 + max(record["problem"] for record in records), "samples": 0, "temperature": temperature}
    for kind in KINDS:
        graded = [record for record in records if record["kind"] == kind]
        if not graded:
            continue
        samples = 1 + max(record["sample"] for record in graded)
        if kind == "sampled":
            metrics["samples"] = samples
        correct = {grading: np.zeros(metrics["n_problems"], dtype=int) for grading in GRADINGS}
        for record in graded:
            for grading in GRADINGS:
                correct[grading][record["problem"]] += record[grading]
        metrics[kind] = {
            grading: _accuracy(counts.tolist(), samples, kind == "sampled", seed) for grading, counts in correct.items()
        }
        metrics[kind] |= {
            "mean_tokens": float(np.mean([record["tokens"] for record in graded])),
            "truncated": float(np.mean([record["truncated"] for record in graded])),
            "no_marker": float(np.mean([not record["marker"] for record in graded])),
            "tokens": sum(record["tokens"] for record in graded),
        }
    return metrics


def regrade(folder: Path, task: str | None = None) -> dict:
    """
    Grades the completions of an evaluation anew, and writes them and the metrics in place of the earlier ones.

    Args:
        folder (`Path`): Holds `completions.jsonl` and `completions.settings.json`.
        task (`str`, *optional*): Whose grading; by default that of the evaluation.
    Returns:
        `dict`: As [`evaluate`].
    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the evaluation was interrupted.
    """
    path = folder / "completions.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the output_dir of an evaluation")
    made = read_settings(path)
    settings = made["settings"]
    records = read_lines(path)
    expected = settings["n_problems"] * (1 + settings["samples"])
    if len(records) != expected:
        raise ValueError(f"{path} holds {len(records)} of {expected} completions: continue the evaluation first")
    task = get_task(task or settings["task"])
    records = [record | _graded(task, record["completion"], record["gold"]) for record in records]
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    metrics = summarize(records, settings["temperature"], settings["eval_seed"])
    _write_metrics(folder, metrics)
    return metrics


def _graded(task, completion: str, gold: str) -> dict:
    """What a task says of a completion."""
    return {**task.grade(completion, gold), "marker": task.has_marker(completion)}


def _accuracy(correct: list[int], samples: int, is_sampled: bool, seed: int) -> dict:
    """Mean, 95% interval over problems, right completions a problem, and pass@k for k = 1, 2, 4, ... and all."""
    shares = np.array(correct) / samples
    result = {"accuracy": float(shares.mean())}
    if not is_sampled:
        return result | {"interval": statistical.wilson_interval(sum(correct), len(correct)), "correct": correct}
    powers = {2**power for power in range(samples.bit_length())} | {samples}
    result |= {"interval": statistical.bootstrap_interval(shares, seed), "correct": correct}
    return result | {
        "pass_at": {
            str(k): float(np.mean([statistical.pass_at(k, samples, count) for count in correct]))
            for k in sorted(powers)
        }
    }


def _write_metrics(folder: Path, metrics: dict, arguments: dict | None = None) -> None:
    """`metrics.json`: what was asked, what the completions follow from, what generated and what graded them."""
    path = folder / "metrics.json"
    if arguments is None and path.is_file():
        arguments = json.loads(path.read_text(encoding="utf-8"))["arguments"]
    record = {"arguments": arguments, **read_settings(folder / "completions.jsonl"), "graded": stamp()}
    write_text(path, json.dumps(record | {"metrics": metrics}, indent=2) + "\n")


def _print_metrics(name: str, metrics: dict) -> None:
    """One line a kind and grading."""
    for kind in KINDS:
        for grading in GRADINGS if kind in metrics else ():
            low, high = metrics[kind][grading]["interval"]
            accuracy = metrics[kind][grading]["accuracy"]
            print(f"{name:15} {kind:8} {grading:12} {accuracy:.1%}  (95%: {low:.1%} to {high:.1%})")


def main(model_args: trl.ModelConfig, evaluation_args: EvaluationArguments) -> dict:
    """
    Loads, evaluates, writes, prints.

    Args:
        model_args ([`~trl.ModelConfig`]): The model.
        evaluation_args (`EvaluationArguments`): On what, the adapter, how to generate, where to write.
    Returns:
        `dict`: As [`evaluate`]; of several benchmarks, by their names.
    Raises:
        FileExistsError: If the output folder already holds a finished evaluation, or one of other settings.
        ValueError: If no model is named.
        ImportError: If vLLM is asked for and not installed.
    """
    args = evaluation_args
    output_dir = Path(args.output_dir)
    if args.regrade:
        folders = [output_dir / name for name in args.benchmark or ()] or [output_dir]
        results = {folder.name: regrade(folder, args.task) for folder in folders}
        for name, metrics in results.items():
            _print_metrics(name, metrics)
        return results if args.benchmark else results[output_dir.name]
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name the model to evaluate")
    if args.backend == "vllm":
        refuse_missing_vllm()

    jobs = {}
    for benchmark in args.benchmarks():
        source = (benchmark.dataset_name, benchmark.split, benchmark.config, args.limit)
        jobs[benchmark.name] = output_dir / benchmark.name, args.of_task(benchmark.task), source
    if args.dataset_name is not None:
        source = (args.dataset_name, args.dataset_test_split, args.dataset_config, args.limit)
        jobs[Path(args.dataset_name).stem] = output_dir, args.of_task(args.task or "gsm8k"), source
    finished = [folder for folder, _, _ in jobs.values() if (folder / "metrics.json").exists()]
    if len(finished) == len(jobs):
        raise FileExistsError(
            f"output_dir={str(output_dir)!r} already holds an evaluation: choose another --output_dir, or grade it "
            "anew with --regrade"
        )
    # Before the model, which takes longer to load.
    rows = {name: get_task(how.task).load_rows(*source) for name, (_, how, source) in jobs.items()}

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision
    )
    generator = _load_generator(model_args, args, tokenizer)
    results = {}
    for name, (folder, how, source) in jobs.items():
        records = complete(generator, tokenizer, list(rows[name]), how, folder / "completions.jsonl")
        results[name] = summarize(records, how.temperature, how.eval_seed)
        asked = {"model": model_args.model_name_or_path, "revision": model_args.model_revision, "source": source}
        _write_metrics(folder, results[name], asked | {"dtype": model_args.dtype} | asdict(args))
        _print_metrics(name, results[name])
    print(f"Saved to {output_dir}")
    return results if args.benchmark else next(iter(results.values()))


def _load_generator(model_args, args, tokenizer) -> Generator:
    """What generates, with the adapter."""
    if args.backend == "vllm":
        return VllmGenerator(model_args, tokenizer, args.adapter_path, args)
    model = load_model(model_args, "auto" if torch.cuda.is_available() else None)
    if args.adapter_path is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter_path)
    return TransformersGenerator(model, tokenizer, args)


if __name__ == "__main__":
    main(*trl.TrlParser(ARGUMENTS).parse_args_and_config())
