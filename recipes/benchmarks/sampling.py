"""How far what vLLM samples is from the policy: TRL's transfer of merged weights beside `AdapterRollout`.

    make bench-vllm SMOLLM2=FOLDER

In float32 and bfloat16, and for values of several sizes:

* of what each sampler draws itself, mean |log p_sampler - log p_trainer| and KL(sampler, trainer), beside KL(sampler,
  base), by the estimator that is never negative, mean(exp(d) - 1 - d) with d = log p_trainer - log p_sampler;
* of completions that are the same for all, the share of the update that arrives: the slope of how the sampler's
  log-probabilities move away from those at v = 0 on how the exact policy's do, in float32 on the same base weights.
  1 where the sampler follows the policy, 0 where it stays the base; noise of the sampler's dtype averages out.

Both samplers get the same prompts. The transfer is TRL's own class with its defaults: `dtype="auto"` makes bfloat16 of
a float32 checkpoint. Bytes and seconds of an update, in turns. Needs vLLM, as in the environment of `make test-vllm`.
"""

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path

import torch
from benchmarks.fidelity import set_values
from benchmarks.harness import Row, in_turns, parser_of, ratio_of, run
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_tinylora import AdapterRollout, TinyLoraConfig
from trl_tinylora.tasks import gsm8k


SIZES = [0.0, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1]
DTYPES = ("float32", "bfloat16")
# Of a share that arrives: beyond it, the noise of the sampler's dtype hides the update.
LARGEST_ERROR = 0.2


def copy_in(dtype: str, model: str, folder: Path) -> str:
    """The model's folder, or a copy in another dtype: vLLM reads files."""
    if dtype == "float32":
        return model
    AutoModelForCausalLM.from_pretrained(model, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def make_trainer(model: str, dtype: str, arguments: argparse.Namespace, rollout: AdapterRollout):
    """TRL's trainer with 13 values; it is not trained, it is what both samplers ask."""
    from trl import GRPOConfig, GRPOTrainer

    rows = gsm8k.load_rows(arguments.data, "test").select(range(arguments.prompts))
    settings = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=arguments.tokens,
        vllm_max_model_length=512,
        vllm_gpu_memory_utilization=0.3,
        model_init_kwargs={"dtype": dtype},
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=gsm8k.strict_reward,
        args=settings,
        train_dataset=gsm8k.for_rl(rows),
        peft_config=TinyLoraConfig(u=13, n_tie="all"),
        rollout_func=rollout,
    )
    trainer.model.eval()
    return trainer


def transfer_of(trainer):
    """TRL's own engine and transfer, as its trainer makes them."""
    from trl.generation.vllm_generation import VLLMGeneration

    settings = trainer.args
    return VLLMGeneration(
        trainer.model,
        trainer.accelerator,
        trainer.processing_class,
        gpu_memory_utilization=settings.vllm_gpu_memory_utilization,
        max_model_length=settings.vllm_max_model_length,
        max_num_seqs=settings.per_device_train_batch_size * settings.steps_per_generation,
        temperature=settings.temperature,
        max_completion_length=settings.max_completion_length,
    )


@torch.no_grad()
def logprobs_of(model, prompt_ids: list[int], completion_ids: list[int]) -> torch.Tensor:
    """The model's log-probability of each token of a completion."""
    ids = torch.tensor([prompt_ids + completion_ids], device=model.device)
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].double()
    chosen = torch.tensor(completion_ids, device=model.device)[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].cpu()


def distances(model, sampled: dict[str, list]) -> dict[str, float]:
    """Of the sampler from the trainer's policy and from its base."""
    rows = list(zip(sampled["prompt_ids"], sampled["completion_ids"], strict=True))
    sampler = torch.cat([torch.tensor(logs, dtype=torch.float64) for logs in sampled["logprobs"]])
    policy = torch.cat([logprobs_of(model, *row) for row in rows])
    with model.disable_adapter():
        base = torch.cat([logprobs_of(model, *row) for row in rows])

    def divergence(logs):
        difference = logs - sampler
        return (difference.exp() - 1 - difference).mean().item()

    return {
        "tokens": len(sampler),
        "mean_difference": (policy - sampler).abs().mean().item(),
        "kl_from_policy": divergence(policy),
        "kl_from_base": divergence(base),
    }


def scored(llm, rows: list[tuple[list[int], list[int]]], request=None) -> torch.Tensor:
    """An engine's log-probabilities of given completions."""
    from vllm import SamplingParams

    asked = [{"prompt_token_ids": prompt + completion} for prompt, completion in rows]
    outputs = llm.generate(asked, SamplingParams(max_tokens=1, prompt_logprobs=0), lora_request=request, use_tqdm=False)
    logs = [
        output.prompt_logprobs[len(prompt) + place][token].logprob
        for output, (prompt, completion) in zip(outputs, rows, strict=True)
        for place, token in enumerate(completion)
    ]
    return torch.tensor(logs, dtype=torch.float64)


def name_of(model: str) -> str:
    """What a folder's model is called."""
    folder = Path(model)
    return "the toy" if folder.parent.name == "toy" else folder.name


def slope(moved: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Of what moved on what should have, by least squares through the origin, with its standard error."""
    square = exact @ exact
    found = moved @ exact / square
    return {"slope": found.item(), "error": (((moved - found * exact).square().mean() / square).sqrt()).item()}


def measure_model(model: str, dtype: str, arguments: argparse.Namespace) -> dict:
    """Both samplers at every size, and what an update costs."""
    with tempfile.TemporaryDirectory() as folder:
        source = copy_in(dtype, model, Path(folder) / "copy")
        rollout = AdapterRollout(enforce_eager=True)
        trainer = make_trainer(source, dtype, arguments, rollout)
        prompts = [row["prompt"] for row in trainer.train_dataset]
        given = rollout(prompts, trainer)
        prompt_ids, rows = given["prompt_ids"], list(zip(given["prompt_ids"], given["completion_ids"], strict=True))
        transfer = transfer_of(trainer)
        adapted, sizes, before = trainer.model, [], {}
        exact_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        exact_model = get_peft_model(exact_model.to(adapted.device), trainer.model.peft_config["default"]).eval()
        for size in SIZES:
            for each in (adapted, exact_model):
                set_values(each, size)
            transfer.sync_weights()
            _, completion_ids, logprobs, _ = transfer.generate(prompt_ids, images=None, num_generations=1)
            merged = {
                "prompt_ids": prompt_ids,
                "completion_ids": completion_ids,
                "logprobs": [[place[0] for place in one] for one in logprobs],
            }
            found = {"merged": merged, "adapter": rollout(prompts, trainer)}
            logs = {
                "merged": scored(transfer.llm, rows),
                "adapter": scored(rollout._engine.llm, rows, rollout._engine.request("default")),
                "exact": torch.cat([logprobs_of(exact_model, *row) for row in rows]),
            }
            before = before or logs
            moved = {path: logs[path] - before[path] for path in logs}
            at = {"size": size} | {path: distances(adapted, sampled) for path, sampled in found.items()}
            for path in found:
                at[path]["arrives"] = slope(moved[path], moved["exact"]) if size else None
            sizes.append(at)
            print(f"{name_of(model)} {dtype} |v| {size:g}: {at}", flush=True)

        count = itertools.count(1)

        def send():
            # Values that were not sent before.
            set_values(adapted, 1e-3 + 1e-6 * next(count))
            return rollout.send(adapted)

        n_bytes = {"adapter": send(), "merged": sum(weight.nbytes for _, weight in transfer._iter_named_params())}
        times = in_turns({"adapter": send, "merged": transfer.sync_weights}, arguments.repeats)
        rollout.close()
    return {"model": name_of(model), "dtype": dtype, "sizes": sizes, "bytes": n_bytes, "seconds": times}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Each dtype."""
    found = [measure_model(arguments.model, dtype, arguments) for dtype in arguments.dtypes]
    # The record names the model, not a machine's folder.
    arguments.model = name_of(arguments.model)
    rows = []
    for one in found:
        of, sizes = f"{one['model']} in {one['dtype']}", one["sizes"]
        noise = sizes[0]["adapter"]["mean_difference"]
        worst = max(at["adapter"]["mean_difference"] for at in sizes[1:])
        rows.append(
            Row(
                f"{of}: mean |log p_sampler - log p_trainer| by `AdapterRollout`, at the worst size of the values",
                worst,
                noise,
                "with v = 0",
                ratio=worst / noise,
                bound="at most the noise of v = 0",
                holds=worst <= noise,
            )
        )
        over, spread = ratio_of(one["seconds"]["adapter"], one["seconds"]["merged"])
        rows.append(
            Row(
                f"{of}: one update of vLLM by `AdapterRollout`",
                statistics.median(one["seconds"]["adapter"]),
                statistics.median(one["seconds"]["merged"]),
                "merged weights",
                "s",
                over,
                spread,
            )
        )
        share = one["bytes"]["adapter"] / one["bytes"]["merged"]
        rows.append(
            Row(
                f"{of}: bytes of it",
                one["bytes"]["adapter"],
                one["bytes"]["merged"],
                "merged weights",
                "bytes",
                share,
                bound="under 1% of the weights",
                holds=share < 0.01,
            )
        )
    return rows, {"models": found}


def table(records: list[dict]) -> str:
    """The distances of records as Markdown, for docs/merging-and-vllm.md."""
    lines = [
        "| model | trainer's dtype | size of v | merged: arrives | mean difference | KL | adapter: arrives "
        "| mean difference | KL | KL from the base |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in (found for record in records for found in record["details"]["models"]):
        for at in one["sizes"]:
            merged, adapter = at["merged"], at["adapter"]
            figures = [adapter["kl_from_base"]]
            for path in (adapter, merged):
                figures = [path["arrives"], path["mean_difference"], path["kl_from_policy"], *figures]
            written = [_written(figure) for figure in figures]
            cells = [one["model"], one["dtype"], f"{at['size']:g}", *written]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _written(figure: float | dict | None) -> str:
    """A cell: a number, or a slope that is told from noise."""
    if figure is None:
        return ""
    if isinstance(figure, dict):
        return f"{figure['slope']:.2f} ± {figure['error']:.2f}" if figure["error"] < LARGEST_ERROR else "noise"
    return f"{figure:.2g}"


def main() -> None:
    """Measures and writes the record."""
    parser = parser_of(__doc__, "sampling")
    parser.add_argument("--model", default="recipes/toy/base", help="folder of a model in float32")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="dtypes of the trainer's model")
    parser.add_argument("--data", default="recipes/toy/data", help="folder of the prompts' rows")
    parser.add_argument("--prompts", type=int, default=64, help="how many prompts")
    parser.add_argument("--tokens", type=int, default=16, help="limit of a completion")
    parser.add_argument("--repeats", type=int, default=5, help="updates of each kind, in turns")
    run("sampling", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
