"""RL without gradients: CMA-ES in the space of v, on problems with a checkable answer.

    python recipes/es.py --config recipes/toy/es.yaml --output_dir results/es-13
    python recipes/es.py --config recipes/toy/es.yaml --output_dir results/es-13 --resume_from_checkpoint true

A candidate is a v. Its fitness is the mean reward of its completions. All candidates of a step get the same problems,
in batches whose rows have adapters of their own, or by vLLM with a LoRA a candidate. There is no backward pass, no
trainer and no state of an optimiser: it takes the memory of inference, and works on every base that generates.
"""

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import cma
import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from evaluation.arguments import GenerationArguments
from evaluation.generation import TransformersGenerator, load_model
from evolution.arguments import EvolutionArguments
from evolution.candidates import Candidates
from evolution.sampling import make_sampler
from evolution.search import Log, Search
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm
from training.arguments import AdapterArguments, RLArguments, build_peft_config
from training.card import made_with
from training.launch import refuse_missing, refuse_unfit_folder, run

from trl_tinylora import TinyLoraConfig
from trl_tinylora.sources import ADAPTER_FILE, refuse_unfit_base
from trl_tinylora.storage.card import put_section
from trl_tinylora.tasks import get_task
from trl_tinylora.vllm.engine import refuse_unfit_server, refuse_unfit_url
from trl_tinylora.vllm.rollout import refuse_missing_vllm


ARGUMENTS = (RLArguments, EvolutionArguments, trl.ModelConfig, AdapterArguments)
LOG = "evolution.jsonl"
# Of the adapter, what its candidates mean.
CONFIG_FIELDS = ("r", "u", "n_tie", "tying", "projection", "projection_seed", "target_modules", "save_dtype")


@dataclass
class Evolved:
    """
    What came of a search.

    Args:
        model ([`~peft.PeftModel`]): With the search's mean as its adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        steps (`list[dict]`): A record a step, as in `evolution.jsonl`.
    """

    model: PeftModel
    tokenizer: transformers.PreTrainedTokenizerBase
    steps: list[dict]


def main(
    script_args: RLArguments, args: EvolutionArguments, model_args: trl.ModelConfig, adapter_args: AdapterArguments
) -> Evolved:
    """
    Searches, and saves the adapter and the tokenizer into `args.output_dir`.

    Args:
        script_args (`RLArguments`): The rows and the reward.
        args (`EvolutionArguments`): The search.
        model_args ([`~trl.ModelConfig`]): The model.
        adapter_args (`AdapterArguments`): What is searched for.
    Returns:
        `Evolved`
    Raises:
        ValueError: If arguments contradict each other, one is missing, the search to be continued is another one, a
            launcher started several processes, or a server serves another model.
        ImportError: If vLLM is not installed.
        ConnectionError: If a server cannot be reached.
        FileExistsError: If the output folder already holds a run.
        FileNotFoundError: If there is no search to be continued.
        FloatingPointError: If the logits of a candidate or a reward are not finite.
    """
    _refuse(script_args, args, model_args)
    refuse_missing(script_args, model_args)
    refuse_unfit_base(model_args.model_name_or_path, model_args.model_revision)
    if args.is_served:
        refuse_unfit_server(args.vllm_server_base_url, model_args.model_name_or_path)
    config = build_peft_config(adapter_args, model_args)
    if not isinstance(config, TinyLoraConfig):
        raise ValueError(f"adapter={adapter_args.adapter!r} has too many values to search for: set it to 'tinylora'")

    # Before the adapter is made, which puts the modules' names into the configuration.
    log = Log(Path(args.output_dir, LOG), _settings(script_args, args, model_args, config))
    rows, rewards = _rows(script_args, args), script_args.reward_functions()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision
    )
    # With vLLM the model here gives the factors of its weights; a GPU's memory is the engine's.
    uses_gpu = torch.cuda.is_available() and not args.use_vllm
    model = load_model(model_args, device_map="auto" if uses_gpu else None)
    model = get_peft_model(model, config).eval()
    generation = GenerationArguments(
        task=script_args.task, temperature=args.temperature, max_new_tokens=args.max_completion_length
    )
    size = model.base_model.bank.vectors("default").values_GK.numel()
    search = Search(size, args.sigma, args.population, args.seed)
    dtype = getattr(torch, adapter_args.kept_dtype or "float32")
    generator = TransformersGenerator(model, tokenizer, generation)
    if args.resume_from_checkpoint:
        log.replay(search)
        if len(log.steps) >= args.max_steps:
            raise ValueError(
                f"{log.path} has {len(log.steps)} steps, and max_steps is {args.max_steps}: nothing is left to search. "
                "Raise max_steps to go on"
            )

    print(
        f"Searching {size} value{'s' if size > 1 else ''} (TinyLoRA, r={config.r}, u={config.u}, n_tie={config.n_tie}, "
        f"{config.tying}): {args.max_steps} steps of {search.population} candidates x {args.problems_per_step} "
        f"problems x {args.num_generations}",
        flush=True,
    )
    sampler = make_sampler(args, model, generator, search.population, model_args.model_revision)
    candidates = Candidates(model, tokenizer, sampler, search.population, dtype)
    bar = tqdm(range(len(log.steps), args.max_steps), disable=args.disable_tqdm, unit="step")
    try:
        for step in bar:
            log.add(_take_step(step, search, candidates, rows, rewards, args))
            found = log.steps[-1]
            best = max(found["fitness"])
            bar.set_postfix(reward=f"{found['reward']:.3f}", best=f"{best:.3f}", sigma=f"{search.sigma:.3g}")
    finally:
        sampler.close()

    for name in candidates.names:
        model.delete_adapter(name)
    candidates.set_values("default", search.mean)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    put_section(args.output_dir, "training", _described(script_args, args, search, log))
    first, last = log.steps[0]["reward"], log.steps[-1]["reward"]
    print(
        f"After {len(log.steps)} steps: norm of v {np.linalg.norm(search.mean):.4g}, reward {first:.4g} -> {last:.4g}"
    )
    if not search.mean.any():
        print(
            "warning: the adapter did not change: no step had two candidates of different fitness. Take problems that "
            "the base model solves sometimes, or a higher --sigma",
            file=sys.stderr,
        )
    print(f"Saved to {args.output_dir}", flush=True)
    return Evolved(model, tokenizer, log.steps)


def _refuse(script_args: RLArguments, args: EvolutionArguments, model_args: trl.ModelConfig) -> None:
    """Raises where a search cannot be made, or would write over another one."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        raise ValueError(f"es.py searches in one process, and the launcher started {processes}: start it without one")
    if script_args.rollouts != "merged":
        raise ValueError(f"es.py has adapters sampled in any case, and rollouts is {script_args.rollouts!r}: drop it")
    if script_args.relative_kl is not None:
        raise ValueError("relative_kl is of a gradient's step, and a search has none: drop it, and give --sigma")
    if args.use_vllm and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError(
            "load_in_4bit and load_in_8bit quantise the weights while they load, and vLLM would sample from the "
            "others: drop use_vllm, or save what they stand for, `model.dequantize().save_pretrained(folder)`, and "
            "name that folder as model_name_or_path"
        )
    if args.is_served:
        refuse_unfit_url(args.vllm_server_base_url)
    elif args.use_vllm:
        refuse_missing_vllm()
    refuse_unfit_folder(args.output_dir)
    folder = Path(args.output_dir)
    has_log, is_finished = (folder / LOG).is_file(), (folder / ADAPTER_FILE).exists()
    if args.resume_from_checkpoint and not has_log:
        raise FileNotFoundError(
            f"resume_from_checkpoint is true, but {folder / LOG} is not there: start anew without it"
        )
    if not args.resume_from_checkpoint and (has_log or is_finished):
        state = "a finished run" if is_finished else "an interrupted search"
        way_out = f"continue with --resume_from_checkpoint true{' and a higher --max_steps' if is_finished else ''}"
        raise FileExistsError(
            f"output_dir={args.output_dir!r} already holds {state}: choose another --output_dir, delete the folder"
            + (f", or {way_out}" if has_log else "")
        )


def _settings(
    script_args: RLArguments, args: EvolutionArguments, model_args: trl.ModelConfig, config: TinyLoraConfig
) -> dict:
    """All settings that candidates and rewards follow from; `max_steps` is not among them."""
    others = {"output_dir", "max_steps", "resume_from_checkpoint", "disable_tqdm", "dataset_test_split"}
    others |= {"rollouts", "relative_kl", "vllm_server_base_url", "vllm_gpu_memory_utilization"}
    found = asdict(script_args) | asdict(args) | asdict(model_args)
    found |= {name: getattr(config, name) for name in CONFIG_FIELDS}
    # What JSON makes of them, which is what the log holds.
    kept = {name: value for name, value in found.items() if name not in others and not name.startswith("lora_")}
    return json.loads(json.dumps(kept | {"cma": cma.__version__}, default=_as_json, sort_keys=True))


def _as_json(value: object) -> list | str:
    return sorted(value) if isinstance(value, set) else str(value)


def _rows(script_args: RLArguments, args: EvolutionArguments) -> Dataset:
    """The problems, in the order in which RL and SFT see them with `train_sampling_strategy: sequential`."""
    task = get_task(script_args.task)
    rows = task.load_rows(
        script_args.dataset_name, script_args.dataset_train_split, script_args.dataset_config, script_args.limit
    )
    if len(rows) < args.problems_per_step:
        raise ValueError(f"problems_per_step={args.problems_per_step}, but there are {len(rows)} problems: lower it")
    return task.for_rl(rows.shuffle(seed=args.seed), script_args.system_prompt, script_args.instruction)


def _take_step(
    step: int, search: Search, candidates: Candidates, rows: Dataset, rewards: list, args: EvolutionArguments
) -> dict:
    """Tries the next candidates on the next problems, and returns the step's record."""
    began = time.perf_counter()
    start = step % (len(rows) // args.problems_per_step) * args.problems_per_step
    asked = [rows[place] for place in range(start, start + args.problems_per_step)]
    # Far from the seeds of other steps and runs.
    seed = int(np.random.SeedSequence([args.seed, step]).generate_state(1)[0])
    tried = search.ask()
    found, tokens = candidates.rewards(tried, asked, args.num_generations, rewards, seed)
    fitness = found.mean(axis=(1, 2))
    search.tell(tried, fitness.tolist())
    return {
        "step": step + 1,
        "reward": round(float(fitness.mean()), 6),
        "fitness": fitness.tolist(),
        "sigma": search.sigma,
        "mean": search.mean.tolist(),
        "problems": len(asked),
        "generated_tokens": tokens,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _described(script_args: RLArguments, args: EvolutionArguments, search: Search, log: Log) -> str:
    """For the model card."""
    tokens = sum(step["generated_tokens"] for step in log.steps)
    return (
        f"## Training\n\nA search without gradients, by CMA-ES (cma {cma.__version__}), on "
        f"`{script_args.dataset_name}` ({script_args.dataset_train_split}, task {script_args.task}, reward "
        f"{' + '.join(script_args.reward)}): {len(log.steps)} steps of {search.population} candidates x "
        f"{args.problems_per_step} problems x {args.num_generations}, sigma {args.sigma:g}, temperature "
        f"{args.temperature:g}, at most {args.max_completion_length} tokens, seed {args.seed}. {made_with()}."
        f"\n\nLast record: reward {log.steps[-1]['reward']:.4g}, {tokens:,} tokens generated in all."
    )


if __name__ == "__main__":
    run(main, ARGUMENTS)
