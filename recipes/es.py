"""RL without gradients: CMA-ES in the space of v, on problems with a checkable answer.

    python recipes/es.py --config recipes/toy/es.yaml --output_dir results/es-13
    python recipes/es.py --config recipes/toy/es.yaml --output_dir results/es-13 --resume_from_checkpoint true

A candidate is a v. Its fitness is the mean reward of its completions, and all candidates of a step complete the same
problems, in batches whose rows have adapters of their own. There is no backward pass, no trainer and no state of an
optimiser: it takes the memory of inference, and works on every base that generates.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cma
import numpy as np
import torch
import transformers
import trl
from evaluation.arguments import GenerationArguments
from evaluation.generation import TransformersGenerator, load_model
from evolution.arguments import EvolutionArguments
from evolution.candidates import Candidates
from evolution.search import Log, Search
from peft import PeftModel, get_peft_model
from records.provenance import read_provenance
from tqdm.auto import tqdm
from training.arguments import AdapterArguments, RLArguments, build_peft_config
from training.launch import refuse_unfit_folder, run

from trl_tinylora import TinyLoraConfig
from trl_tinylora.sources import ADAPTER_FILE, refuse_unfit_base
from trl_tinylora.storage.card import put_section
from trl_tinylora.tasks import get_task


ARGUMENTS = (RLArguments, EvolutionArguments, trl.ModelConfig, AdapterArguments)
LOG = "evolution.jsonl"


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
        ValueError: If arguments contradict each other, one is missing, or the run to be continued is another one.
        FileExistsError: If the output folder already holds a run.
        FileNotFoundError: If there is no run to be continued.
    """
    log = _log_of(args)
    for name, given in (
        ("model_name_or_path", model_args.model_name_or_path),
        ("dataset_name", script_args.dataset_name),
    ):
        if given is None:
            raise ValueError(f"{name} is missing: give --{name}, or a recipe that names it by --config")
    refuse_unfit_base(model_args.model_name_or_path, model_args.model_revision)
    config = build_peft_config(adapter_args, model_args)
    if not isinstance(config, TinyLoraConfig):
        raise ValueError(f"adapter={adapter_args.adapter!r} has too many values to search for: set it to 'tinylora'")

    task, rewards = get_task(script_args.task), script_args.reward_functions()
    rows = task.load_rows(
        script_args.dataset_name, script_args.dataset_train_split, script_args.dataset_config, script_args.limit
    )
    # In the order in which RL and SFT see them with `train_sampling_strategy: sequential`.
    rows = task.for_rl(rows.shuffle(seed=args.seed), script_args.system_prompt, script_args.instruction)
    if len(rows) < args.problems_per_step:
        raise ValueError(f"problems_per_step={args.problems_per_step}, but there are {len(rows)} problems: lower it")

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision
    )
    model = load_model(model_args, device_map="auto" if torch.cuda.is_available() else None)
    model = get_peft_model(model, config).eval()
    generation = GenerationArguments(
        task=script_args.task, temperature=args.temperature, max_new_tokens=args.max_completion_length
    )
    size = model.base_model.bank.vectors("default").values_GK.numel()
    search = Search(size, args.sigma, args.population, args.seed)
    candidates = Candidates(
        model, TransformersGenerator(model, tokenizer, generation), search.population, args.generation_batch_size
    )
    settings = _settings(script_args, args, model_args, config)
    if args.resume_from_checkpoint:
        log.replay(search, settings)
    else:
        log.begin(settings)

    print(
        f"Searching {size} value{'s' if size > 1 else ''} (TinyLoRA, r={config.r}, u={config.u}, n_tie={config.n_tie}, "
        f"{config.tying}): {args.max_steps} steps of {search.population} candidates x {args.problems_per_step} "
        f"problems x {args.num_generations}",
        flush=True,
    )
    per_epoch = len(rows) // args.problems_per_step
    bar = tqdm(range(len(log.steps), args.max_steps), disable=args.disable_tqdm, unit="step")
    for step in bar:
        began = time.perf_counter()
        start = step % per_epoch * args.problems_per_step
        asked = [rows[place] for place in range(start, start + args.problems_per_step)]
        tried = search.ask()
        found, tokens = candidates.rewards(tried, asked, args.num_generations, rewards, _seed_of(args.seed, step))
        fitness = found.mean(axis=(1, 2))
        search.tell(tried, fitness.tolist())
        log.add(
            {
                "step": step + 1,
                "reward": round(float(fitness.mean()), 6),
                "fitness": fitness.tolist(),
                "sigma": search.sigma,
                "mean": search.mean.tolist(),
                "generated_tokens": tokens,
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        bar.set_postfix(reward=f"{fitness.mean():.3f}", best=f"{fitness.max():.3f}", sigma=f"{search.sigma:.3g}")

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


def _log_of(args: EvolutionArguments) -> Log:
    """The log in the output folder, which is to be there or not."""
    refuse_unfit_folder(args.output_dir)
    folder = Path(args.output_dir)
    path = folder / LOG
    if args.resume_from_checkpoint:
        if not path.is_file():
            raise FileNotFoundError(f"resume_from_checkpoint is true, but {path} is not there: start anew without it")
        if (folder / ADAPTER_FILE).exists():
            raise FileExistsError(f"{args.output_dir!r} holds a finished run: choose another --output_dir")
    elif path.exists() or (folder / ADAPTER_FILE).exists():
        raise FileExistsError(
            f"output_dir={args.output_dir!r} already holds a run: choose another --output_dir, delete the folder, or "
            "continue with --resume_from_checkpoint true"
        )
    return Log(path)


def _settings(script_args, args, model_args, config: TinyLoraConfig) -> dict:
    """What candidates and rewards follow from; more steps are the same run."""
    names = ("task", "system_prompt", "instruction", "limit", "dataset_name", "dataset_train_split", "reward")
    found = {name: getattr(script_args, name) for name in names}
    names = ("population", "sigma", "problems_per_step", "num_generations", "temperature", "max_completion_length")
    found |= {name: getattr(args, name) for name in (*names, "generation_batch_size", "seed")}
    found |= {name: getattr(model_args, name) for name in ("model_name_or_path", "model_revision", "dtype")}
    found |= {name: getattr(model_args, name) for name in ("load_in_4bit", "load_in_8bit")}
    found |= {name: getattr(config, name) for name in ("r", "u", "n_tie", "tying", "projection", "projection_seed")}
    return found | {"cma": cma.__version__}


def _seed_of(seed: int, step: int) -> int:
    """Of a step's sampling, far from those of other steps and runs."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _described(script_args, args: EvolutionArguments, search: Search, log: Log) -> str:
    """For the model card."""
    versions = read_provenance()["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    return (
        f"## Training\n\nCMA-ES (cma {cma.__version__}) on `{script_args.dataset_name}`: {len(log.steps)} steps of "
        f"{search.population} candidates, {args.problems_per_step} problems a step, sigma {args.sigma:g}, seed "
        f"{args.seed}, {sum(step['generated_tokens'] for step in log.steps):,} generated tokens. {names}."
    )


if __name__ == "__main__":
    run(main, ARGUMENTS)
