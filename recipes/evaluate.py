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

from dataclasses import asdict
from pathlib import Path

import torch
import transformers
import trl
from evaluation.arguments import EvaluationArguments, GenerationArguments
from evaluation.completions import KINDS
from evaluation.generation import Generator, TransformersGenerator, VllmGenerator, load_model
from evaluation.metrics import GRADINGS, regrade, summarize, write_metrics
from evaluation.run import complete
from training.launch import refuse_unfit_folder, run

from trl_tinylora import TinyLoraConfig, TinyLoraPeftType
from trl_tinylora.sources import ADAPTER_FILE, refuse_unfit_adapter, refuse_unfit_base
from trl_tinylora.storage.checkpoint import read_fields
from trl_tinylora.tasks import get_task
from trl_tinylora.vllm.rollout import refuse_missing_vllm


ARGUMENTS = (trl.ModelConfig, EvaluationArguments)


def main(model_args: trl.ModelConfig, evaluation_args: EvaluationArguments) -> dict:
    """
    Loads, evaluates, writes, prints.

    Args:
        model_args ([`~trl.ModelConfig`]): The model.
        evaluation_args (`EvaluationArguments`): On what, the adapter, how to generate, where to write.
    Returns:
        `dict`: As [`evaluate`]; of several benchmarks, by their names.
    Raises:
        FileExistsError: If the output folder is a file, or holds a finished evaluation or one of other settings.
        ValueError: If no model is named, or model or adapter is none.
        ImportError: If vLLM is asked for and not installed.
    """
    args = evaluation_args
    refuse_unfit_folder(args.output_dir)
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
        if model_args.load_in_8bit or model_args.load_in_4bit:
            raise ValueError(
                "vLLM would not load the quantised weights: set backend to transformers, or drop load_in_*bit"
            )
        refuse_missing_vllm()
    refuse_unfit_base(model_args.model_name_or_path, model_args.model_revision)
    if args.adapter_path is not None:
        refuse_unfit_adapter(args.adapter_path)
        _refuse_damaged(Path(args.adapter_path))

    jobs = _jobs(args)
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
        asked |= {name: getattr(model_args, name) for name in ("load_in_4bit", "load_in_8bit")}
        write_metrics(folder, results[name], asked | {"dtype": model_args.dtype} | asdict(args))
        _print_metrics(name, results[name])
    print(f"Saved to {output_dir}")
    return results if args.benchmark else next(iter(results.values()))


def _refuse_damaged(folder: Path) -> None:
    """Raises `ValueError` where an adapter's folder on this machine is damaged: before the model is loaded."""
    if folder.is_dir() and read_fields(folder / ADAPTER_FILE).get("peft_type") == TinyLoraPeftType.TRL_TINYLORA:
        TinyLoraConfig.from_pretrained(str(folder))


def _jobs(args) -> dict[str, tuple[Path, GenerationArguments, tuple]]:
    """By name of the benchmark or the file: where to write, how to generate, and where the rows are."""
    output_dir = Path(args.output_dir)
    jobs = {}
    for benchmark in args.benchmarks():
        source = (benchmark.dataset_name, benchmark.split, benchmark.config, args.limit)
        jobs[benchmark.name] = output_dir / benchmark.name, args.of_task(benchmark.task), source
    if args.dataset_name is not None:
        source = (args.dataset_name, args.dataset_test_split, args.dataset_config, args.limit)
        jobs[Path(args.dataset_name).stem] = output_dir, args.of_task(args.task or "gsm8k"), source
    return jobs


def _load_generator(model_args, args, tokenizer) -> Generator:
    """What generates, with the adapter."""
    if args.backend == "vllm":
        return VllmGenerator(model_args, tokenizer, args.adapter_path, args)
    model = load_model(model_args, "auto" if torch.cuda.is_available() else None)
    if args.adapter_path is not None:
        from peft import PeftModel

        # Of other kinds of adapters nobody would read it.
        model = PeftModel.from_pretrained(model, args.adapter_path, **({"other_base": True} if args.other_base else {}))
    return TransformersGenerator(model, tokenizer, args)


def _print_metrics(name: str, metrics: dict) -> None:
    """One line a kind and grading."""
    for kind in KINDS:
        for grading in GRADINGS if kind in metrics else ():
            low, high = metrics[kind][grading]["interval"]
            accuracy = metrics[kind][grading]["accuracy"]
            print(f"{name:15} {kind:8} {grading:12} {accuracy:.1%}  (95%: {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    run(main, ARGUMENTS)
