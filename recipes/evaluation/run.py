"""An evaluation: a greedy completion and some sampled ones of every problem, graded, and continued where it stopped."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import transformers
from records.files import digest_of
from tqdm.auto import tqdm

from evaluation.arguments import GenerationArguments
from evaluation.completions import KINDS, CompletionsFile
from evaluation.generation import Generator, TransformersGenerator
from evaluation.metrics import graded, summarize
from trl_tinylora.tasks import get_task


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
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Keeps its mode (training or evaluation).
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
            task.build_prompt(row["question"], arguments.system_prompt, arguments.instruction),
            tokenize=False,
            add_generation_prompt=True,
        )
        for row in rows
    ]
    golds = [task.gold_answer(row["answer"]) for row in rows]
    settings = arguments.generation_settings()
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
                asked = [prompts[problem] for problem in batch]
                generated = generator.generate(asked, samples, is_sampled=kind == "sampled", seed=seed)
                answers = zip(batch, generated, strict=True)
                kept.append([record for answer in answers for record in _records(task, kind, rows, golds, *answer)])
                progress.update(len(batch))
    kept.write()
    return kept.records()


def _records(task, kind, rows, golds, problem, completions) -> list[dict]:
    """A problem's completions, graded."""
    told = {"id": rows[problem]["id"]} if "id" in rows[problem] else {}
    return [
        {"kind": kind, "problem": problem, "sample": sample}
        | told
        | {"gold": golds[problem], "completion": answer.text, "tokens": answer.tokens, "truncated": answer.truncated}
        | graded(task, answer.text, golds[problem])
        for sample, answer in enumerate(completions)
    ]
