"""Pretrain the toy's base model: a small Qwen2 whose past holds several styles of answering (see README.md).

Run from the root of the repository; half an hour on two CPU cores, in two parts:

    python recipes/toy/pretrain.py --output_dir results/toy-base-1
    python recipes/toy/pretrain.py --init_from results/toy-base-1 --seed 1 --num_examples 64000 --max_steps 1000 \
        --learning_rate 1e-3 --warmup_steps 50 --output_dir results/toy-base

It writes the model, the tokenizer and `report.json`: what was run and what the base measures.
"""

import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
import world
from tokenizers import pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser, Qwen2Config
from transformers.models.qwen2 import Qwen2ForCausalLM, Qwen2Tokenizer

from trl_tinylora.tasks import gsm8k


HERE = Path(__file__).resolve().parent
PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Rows of a part of a batch, of like length to save padding; on a GPU, padding costs less than launches.
CPU_ROWS = 16


@dataclass
class PretrainConfig:
    seed: int = field(default=0, metadata={"help": "Seed of the texts, the weights, the batches and the sampling."})
    output_dir: str = field(default=str(HERE / "base"), metadata={"help": "Folder for the model and report.json."})
    init_from: str | None = field(
        default=None, metadata={"help": "Folder of an earlier base to go on from, instead of random weights."}
    )
    num_examples: int = field(default=320_000, metadata={"help": "Number of pretraining texts, made before training."})
    max_steps: int = field(default=5_000, metadata={"help": "Number of optimiser steps."})
    batch_size: int = field(default=64, metadata={"help": "Texts a step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak of the cosine schedule."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's weight decay."})
    vocab_size: int = field(default=800, metadata={"help": "Upper limit for the tokenizer's vocabulary."})
    num_samples: int = field(default=8, metadata={"help": "Sampled completions a validation problem in the report."})
    logging_steps: int = field(default=50, metadata={"help": "Steps between progress lines."})


def build_tokenizer(vocab_size: int, seed: int) -> Qwen2Tokenizer:
    """Trains Qwen2's own byte-level BPE on the toy's texts.

    `AutoTokenizer` beside a qwen2 config rebuilds any tokenizer with Qwen2's normaliser and pre-tokeniser (every digit
    apart), whatever was saved, so the merges are learned behind exactly those. The numbers up to `world.LARGEST` are
    added tokens, which it keeps: a model this small learns sums of digits too poorly.

    Args:
        vocab_size (`int`): Upper limit, bytes and special tokens included.
        seed (`int`): Seed of the texts.
    Returns:
        `Qwen2Tokenizer`: With chat template; pads with "<|endoftext|>" and ends a turn with "<|im_end|>".
    """
    corpus = ["system\n", "user\n", "assistant\n"] * 100
    for text in world.pretraining_texts(seed, 20_000):
        corpus += [text.request, gsm8k.build_prompt(text.question)[0]["content"], text.answer]
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, TURN_START, TURN_END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    learned = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=PAD,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
    tokenizer.add_tokens([str(number) for number in range(world.LARGEST + 1)])
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 of 4 layers: 28 linear modules, about 0.85 million float32 parameters."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        dtype="float32",
        **ids,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def as_conversation(request: str, question: str) -> list[dict[str, str]]:
    """The prompt of RL, SFT and evaluation, after a system message where a style is asked for."""
    return ([{"role": "system", "content": request}] if request else []) + gsm8k.build_prompt(question)


@dataclass(frozen=True)
class Texts:
    """Token ids of all texts, padded on the right, with the length of each prompt and of each whole text."""

    ids: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor


def tokenize_texts(tokenizer: Qwen2Tokenizer, seed: int, count: int) -> Texts:
    """Renders the texts with the chat template and encodes them, prompt and answer apart."""
    answer_slot = {"role": "assistant", "content": "<answer>"}
    templates = {}
    for request in ("", *world.REQUESTS.values()):
        turns = as_conversation(request, "<question>")
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*turns, answer_slot], tokenize=False)
        templates[request] = prompt, whole.removeprefix(prompt)
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    texts = world.pretraining_texts(seed, count)
    rows, prompt_lengths = [], []
    while chunk := list(islice(texts, 10_000)):
        prompts = [templates[text.request][0].replace("<question>", text.question) for text in chunk]
        answers = [templates[text.request][1].replace("<answer>", text.answer) for text in chunk]
        for prompt, answer in zip(
            encode(prompts, add_special_tokens=False), encode(answers, add_special_tokens=False), strict=True
        ):
            rows.append(np.array(prompt.ids + answer.ids, dtype=np.int16))
            prompt_lengths.append(len(prompt.ids))
    lengths = np.array([len(row) for row in rows])
    ids = np.full((count, lengths.max()), tokenizer.pad_token_id, dtype=np.int16)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return Texts(torch.from_numpy(ids), torch.tensor(prompt_lengths), torch.from_numpy(lengths))


def shuffled_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields index batches without end, reshuffled each epoch; an epoch's incomplete last batch is dropped.

    A batch is a random draw, not texts of one length: length tells the style, and a batch of one style would pull at
    the styles' shares.
    """
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % batch_size].split(batch_size)


def train(model: Qwen2ForCausalLM, texts: Texts, config: PretrainConfig, device: torch.device) -> float:
    """Trains on the assistant's tokens; returns the mean loss (nats a token) over the last logging interval."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / config.warmup_steps)
        return warmup * 0.5 * (1.0 + math.cos(math.pi * step / config.max_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    ids_on_device = texts.ids.to(device)
    prompt_lengths, lengths = texts.prompt_lengths.to(device), texts.lengths.to(device)
    batches = shuffled_batches(len(texts.ids), config.batch_size, torch.Generator().manual_seed(config.seed))
    model.train()
    started, since_log, loss_sum, mean_loss = time.perf_counter(), 0, torch.zeros((), device=device), float("nan")
    for step in range(1, config.max_steps + 1):
        rows = next(batches)
        rows = rows[texts.lengths[rows].argsort()]
        num_answer_tokens = int((texts.lengths[rows] - texts.prompt_lengths[rows]).sum())
        optimizer.zero_grad(set_to_none=True)
        for part in rows.split(len(rows) if device.type == "cuda" else CPU_ROWS):
            longest = int(texts.lengths[part].max())
            part = part.to(device)
            ids = ids_on_device[part, :longest].long()
            positions = torch.arange(longest, device=device)
            is_answer = (positions >= prompt_lengths[part, None]) & (positions < lengths[part, None])
            # Padding is on the right and not scored, so causal attention needs no mask; the prompt is not scored
            # either, which spares most of the output layer's work.
            scored = is_answer[:, 1:]
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][scored]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][scored], reduction="sum")
            loss = loss / num_answer_tokens
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        since_log += 1
        if step % config.logging_steps == 0 or step == config.max_steps:
            mean_loss = loss_sum.item() / since_log
            seconds = time.perf_counter() - started
            print(f"step {step}/{config.max_steps}  loss {mean_loss:.4f}  {seconds:.0f} s", flush=True)
            since_log, loss_sum = 0, torch.zeros((), device=device)
    return mean_loss


@torch.inference_mode()
def complete(model, tokenizer, problems: list[world.Problem], prefixes: list[str], is_sampled: bool) -> list[str]:
    """Completions that each begin with the given prefix; greedy, or sampled at temperature 1."""
    asked = [gsm8k.build_prompt(problem.question) for problem in problems]
    prompts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    prompts = [prompt + prefix for prompt, prefix in zip(prompts, prefixes, strict=True)]
    # top_k=0: transformers samples from the 50 likeliest tokens unless told otherwise.
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if is_sampled else {}
    padding = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
    completions = []
    for start in range(0, len(prompts), 400):
        batch = tokenizer(prompts[start : start + 400], **padding).to(model.device)
        generated = model.generate(**batch, do_sample=is_sampled, **sampling, max_new_tokens=80)
        new_tokens = generated[:, batch["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    return [prefix + completion for prefix, completion in zip(prefixes, completions, strict=True)]


def accuracy(problems: list[world.Problem], completions: list[str], extract=gsm8k.extract_strict) -> float:
    """Fraction of the completions whose extracted number is the problem's answer."""
    right = [
        gsm8k.is_correct(extract(completion), str(problem.answer))
        for problem, completion in zip(problems, completions, strict=True)
    ]
    return sum(right) / len(right)


def measure(model, tokenizer, problems: list[world.Problem], num_samples: int, seed: int) -> dict:
    """What the base does on problems it was not pretrained on: fractions in [0, 1].

    Args:
        model (`Qwen2ForCausalLM`): The base.
        tokenizer (`Qwen2Tokenizer`): Its tokenizer.
        problems (`list[world.Problem]`): Problems to answer.
        num_samples (`int`): Sampled completions a problem.
        seed (`int`): Seed of the sampling.
    Returns:
        `dict`: Accuracies (greedy, sampled, forced into a style), style shares and example completions.
    """
    model.eval()
    free, repeated = [""] * len(problems), problems * num_samples
    torch.manual_seed(seed)
    answers = {
        "greedy": complete(model, tokenizer, problems, free, is_sampled=False),
        "sampled": complete(model, tokenizer, repeated, free * num_samples, is_sampled=True),
    }
    for style, begins in (("worked", ["Work:\n"] * len(problems)), ("gold", [f"{item.name} has" for item in problems])):
        answers[style] = complete(model, tokenizer, problems, begins, is_sampled=False)
    styles = {kind: [world.style_of(text) for text in answers[kind]] for kind in ("greedy", "sampled")}
    by_style = {
        style: [index for index, found in enumerate(styles["sampled"]) if found == style] for style in world.STYLES
    }
    return {
        "num_problems": len(problems),
        "num_samples": num_samples,
        "greedy_strict": accuracy(problems, answers["greedy"]),
        "greedy_flexible": accuracy(problems, answers["greedy"], gsm8k.extract_flexible),
        "sampled_strict": accuracy(repeated, answers["sampled"]),
        "sampled_flexible": accuracy(repeated, answers["sampled"], gsm8k.extract_flexible),
        "forced_worked_greedy_strict": accuracy(problems, answers["worked"]),
        "forced_gold_greedy_strict": accuracy(problems, answers["gold"]),
        "sampled_style_shares": {style: len(found) / len(repeated) for style, found in by_style.items()},
        "sampled_strict_by_style": {
            style: accuracy([repeated[index] for index in found], [answers["sampled"][index] for index in found])
            for style, found in by_style.items()
            if found
        },
        "greedy_style_shares": {style: styles["greedy"].count(style) / len(problems) for style in world.STYLES},
        "examples": [
            {"question": problem.question} | {kind: texts[index] for kind, texts in answers.items()}
            for index, problem in enumerate(problems[:4])
        ],
    }


def _without_examples(report: Path) -> dict:
    """An earlier run's report, as the first part of this one's."""
    content = json.loads(report.read_text(encoding="utf-8"))
    content["validation"].pop("examples")
    return content


def main() -> None:
    (config,) = HfArgumentParser(PretrainConfig).parse_args_into_dataclasses()
    if config.batch_size > config.num_examples:
        raise ValueError(f"batch_size {config.batch_size} exceeds num_examples {config.num_examples}")
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"pretraining on {machine}", flush=True)

    started = time.perf_counter()
    earlier = None if config.init_from is None else Path(config.init_from)
    if earlier is None:
        tokenizer = build_tokenizer(config.vocab_size, config.seed)
    else:
        tokenizer = AutoTokenizer.from_pretrained(earlier)
    texts = tokenize_texts(tokenizer, config.seed, config.num_examples)
    answer_tokens = texts.lengths - texts.prompt_lengths
    data_seconds = time.perf_counter() - started
    print(
        f"{config.num_examples} texts in {data_seconds:.0f} s: vocabulary {len(tokenizer)}, "
        f"prompts up to {int(texts.prompt_lengths.max())} tokens, answers up to {int(answer_tokens.max())}",
        flush=True,
    )

    model = build_model(tokenizer) if earlier is None else AutoModelForCausalLM.from_pretrained(earlier)
    model.to(device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters} parameters", flush=True)
    started = time.perf_counter()
    final_loss = train(model, texts, config, device)
    train_seconds = time.perf_counter() - started

    output_dir = Path(config.output_dir)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    saved_model = AutoModelForCausalLM.from_pretrained(output_dir).to(device)
    saved_tokenizer = AutoTokenizer.from_pretrained(output_dir)
    validation = world.make_splits()["validation"]
    packages = (torch, transformers, tokenizers, np)
    report = {
        "config": {**asdict(config), "output_dir": output_dir.name, "init_from": earlier and earlier.name},
        "continued_from": earlier and _without_examples(earlier / "report.json"),
        "num_parameters": num_parameters,
        "vocab_size": len(tokenizer),
        "final_loss_nats_per_token": final_loss,
        "data_seconds": round(data_seconds, 1),
        "train_seconds": round(train_seconds, 1),
        "validation": measure(saved_model, saved_tokenizer, validation, config.num_samples, config.seed),
        "machine": machine,
        "versions": {"python": platform.python_version()} | {each.__name__: each.__version__ for each in packages},
    }
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["validation"], indent=2))


if __name__ == "__main__":
    main()
