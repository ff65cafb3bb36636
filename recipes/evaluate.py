"""Accuracy on problems with GSM8K's columns: of a model, with or without an adapter, greedy and sampled.

    python recipes/evaluate.py --model_name_or_path recipes/toy/base --adapter_path results/toy-grpo-13 \
        --dataset_name recipes/toy/data --output_dir results/toy-grpo-13/evaluation

Writes `metrics.json` and, one line a completion, `completions.jsonl`. "Strict" counts a number after "####" only and
is the reward of training; "flexible" falls back on a boxed or the last number, so that what is gained in format alone
can be told from what is gained in answers.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from arguments import RecipeArguments
from scipy import stats
from tqdm.auto import tqdm

import trl_tinylora  # noqa: F401 - PEFT loads a TinyLoRA adapter only once the package has registered it
from trl_tinylora.files import written_whole
from trl_tinylora.tasks import gsm8k


@dataclass
class GenerationArguments:
    """
    How completions are generated and counted.

    Args:
        samples (`int`, *optional*, defaults to `4`): Samples a problem, beside the greedy completion; 0 for none.
        temperature (`float`, *optional*, defaults to `1.0`): Of the samples.
        max_new_tokens (`int`, *optional*, defaults to `512`): Limit of a completion.
        eval_batch_size (`int`, *optional*, defaults to `64`): Completions generated at once.
        eval_seed (`int`, *optional*, defaults to `0`): Seed of the samples and of the bootstrap.
    Raises:
        ValueError: If a value is out of its bounds.
    """

    samples: int = field(default=4, metadata={"help": "Samples a problem, beside the greedy completion; 0 for none."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the samples."})
    max_new_tokens: int = field(default=512, metadata={"help": "Limit of a completion, in tokens."})
    eval_batch_size: int = field(default=64, metadata={"help": "Completions generated at once."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the samples and of the bootstrap."})

    def __post_init__(self):
        for name, bound in (("samples", 0), ("max_new_tokens", 1), ("eval_batch_size", max(1, self.samples))):
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}: the greedy completion is always generated"
            )


@dataclass
class EvaluationArguments(GenerationArguments):
    """
    Adds what is evaluated and where the answer goes.

    Args:
        adapter_path (`str`, *optional*): Folder or Hub name of an adapter of the model.
        output_dir (`str`, *optional*, defaults to `"results/evaluation"`): For `metrics.json` and `completions.jsonl`.
    """

    adapter_path: str | None = field(default=None, metadata={"help": "Folder or Hub name of an adapter of the model."})
    output_dir: str = field(
        default="results/evaluation", metadata={"help": "Folder for metrics.json and completions.jsonl."}
    )


ARGUMENTS = (RecipeArguments, trl.ModelConfig, EvaluationArguments)


def evaluate(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: Iterable[dict],
    arguments: GenerationArguments,
    completions_path: str | Path | None = None,
) -> dict:
    """
    Accuracies with their 95% intervals, lengths, and shares of completions that went wrong in form.

    Greedy accuracy has Wilson's interval; the sampled one, a mean over problems of the mean over samples, a percentile
    bootstrap over problems. Both speak of other problems of the same kind, not of other training seeds.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Comes back in the mode it came in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        rows (iterable of `dict`): With `question` and `answer`.
        arguments (`GenerationArguments`): How to generate.
        completions_path (`str` or `Path`, *optional*): JSONL to write every completion to.
    Returns:
        `dict`: `n_problems`, and `greedy` and `sampled` with `strict` and `flexible` (each `accuracy` and `interval`,
        fractions in [0, 1]), `mean_tokens`, `truncated` and `no_marker` (shares of completions) and `tokens`
        (generated in all).
    """
    rows = list(rows)
    was_training = model.training
    model.eval()
    kinds = {"greedy": 1} | ({"sampled": arguments.samples} if arguments.samples else {})
    # Its own stream: evaluating between two training runs must not change the second one.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(arguments.eval_seed)
        completions = {kind: _generate(model, tokenizer, rows, kind, k, arguments) for kind, k in kinds.items()}
    model.train(was_training)

    metrics = {"n_problems": len(rows), "samples": arguments.samples, "temperature": arguments.temperature}
    for kind, graded in completions.items():
        metrics[kind] = {
            grading: _accuracy([item[grading] for item in graded], kinds[kind], arguments.eval_seed)
            for grading in ("strict", "flexible")
        }
        metrics[kind] |= {
            "mean_tokens": float(np.mean([item["tokens"] for item in graded])),
            "truncated": float(np.mean([item["truncated"] for item in graded])),
            "no_marker": float(np.mean(["####" not in item["completion"] for item in graded])),
            "tokens": sum(item["tokens"] for item in graded),
        }
    if completions_path is not None:
        lines = (json.dumps({"kind": kind} | item) for kind, graded in completions.items() for item in graded)
        write_text(completions_path, "\n".join(lines) + "\n")
    return metrics


def _generate(model, tokenizer, rows, kind, samples, arguments) -> list[dict]:
    """`samples` graded completions a row, in the order of the rows."""
    end_tokens = model.generation_config.eos_token_id
    end_tokens = set(end_tokens if isinstance(end_tokens, list) else [end_tokens]) | {tokenizer.eos_token_id}
    end_tokens.discard(None)
    pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Every value is spelled out, since what is left open comes from the model's own generation config (Qwen's samples
    # with top_k 20 and a repetition penalty).
    chosen = transformers.GenerationConfig(
        do_sample=kind == "sampled",
        temperature=arguments.temperature if kind == "sampled" else 1.0,
        top_k=0 if kind == "sampled" else 50,
        top_p=1.0,
        repetition_penalty=1.0,
        num_return_sequences=samples,
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=sorted(end_tokens),
        pad_token_id=pad_token,
        use_cache=True,
        disable_compile=True,
    )
    step = max(1, arguments.eval_batch_size // samples)
    graded = []
    with tqdm(total=len(rows), desc=kind, unit="problem", leave=False) as progress:
        for start in range(0, len(rows), step):
            batch = rows[start : start + step]
            texts = [
                tokenizer.apply_chat_template(
                    gsm8k.build_prompt(row["question"]), tokenize=False, add_generation_prompt=True
                )
                for row in batch
            ]
            inputs = tokenizer(
                texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            ).to(model.device)
            with torch.no_grad():
                output = model.generate(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=chosen
                )
            for index, tokens in enumerate(output[:, inputs["input_ids"].shape[1] :].tolist()):
                length = next((n for n, token in enumerate(tokens, start=1) if token in end_tokens), None)
                text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
                row = batch[index // samples]
                gold = gsm8k.gold_answer(row["answer"])
                graded.append(
                    {
                        "problem": start + index // samples,
                        "completion": text,
                        "gold": gold,
                        "strict": gsm8k.is_correct(gsm8k.extract_strict(text), gold),
                        "flexible": gsm8k.is_correct(gsm8k.extract_flexible(text), gold),
                        "tokens": length if length is not None else len(tokens),
                        "truncated": length is None,
                    }
                )
            progress.update(len(batch))
    return graded


def _accuracy(correct: list[bool], samples: int, seed: int) -> dict:
    """Mean and 95% interval over problems."""
    if len(correct) == samples > 1:
        return {"accuracy": float(np.mean(correct)), "interval": [0.0, 1.0]}  # one problem says nothing about others
    if samples == 1:
        interval = stats.binomtest(sum(correct), len(correct)).proportion_ci(method="wilson")
    else:
        means = np.reshape(correct, (-1, samples)).mean(axis=1)
        interval = stats.bootstrap(
            (means,), np.mean, method="percentile", batch=500, rng=np.random.default_rng(seed)
        ).confidence_interval
    return {"accuracy": float(np.mean(correct)), "interval": [float(interval.low), float(interval.high)]}


def write_text(path: str | Path, text: str) -> None:
    """
    Writes a file that is whole or absent, never half.

    Args:
        path (`str` or `Path`): Its folder is made where needed.
        text (`str`): The content.
    """
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def main(script_args: RecipeArguments, model_args: trl.ModelConfig, evaluation_args: EvaluationArguments) -> dict:
    """
    Loads, evaluates, writes, prints.

    Args:
        script_args (`RecipeArguments`): The rows: `dataset_test_split` of `dataset_name`.
        model_args ([`~trl.ModelConfig`]): The model.
        evaluation_args (`EvaluationArguments`): The adapter, how to generate, where to write.
    Returns:
        `dict`: As [`evaluate`].
    Raises:
        FileExistsError: If the output folder already holds an evaluation.
    """
    output_dir = Path(evaluation_args.output_dir)
    if (output_dir / "metrics.json").exists():
        raise FileExistsError(
            f"output_dir={str(output_dir)!r} already holds an evaluation: choose another --output_dir"
        )
    rows = gsm8k.load_rows(
        script_args.dataset_name, script_args.dataset_test_split, script_args.dataset_config, script_args.limit
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=trl.get_quantization_config(model_args),
        device_map="auto" if torch.cuda.is_available() else None,
    )
    if evaluation_args.adapter_path is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, evaluation_args.adapter_path)
    metrics = evaluate(model, tokenizer, rows, evaluation_args, output_dir / "completions.jsonl")
    record = {"model": model_args.model_name_or_path, "dataset": asdict(script_args), **asdict(evaluation_args)}
    write_text(output_dir / "metrics.json", json.dumps({"arguments": record, "metrics": metrics}, indent=2) + "\n")
    for kind in ("greedy", "sampled"):
        for grading in ("strict", "flexible") if kind in metrics else ():
            low, high = metrics[kind][grading]["interval"]
            print(f"{kind:8} {grading:9} {metrics[kind][grading]['accuracy']:.1%}  (95%: {low:.1%} to {high:.1%})")
    print(f"Saved to {output_dir}")
    return metrics


if __name__ == "__main__":
    main(*trl.TrlParser(ARGUMENTS).parse_args_and_config())
