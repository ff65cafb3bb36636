"""RL against SFT at matched budgets: plans the runs, does what is missing, and writes table, figure and JSON.

    python recipes/compare.py --config recipes/toy/compare.yaml        # sweeps learning rates, then several seeds
    python recipes/compare.py --config recipes/toy/compare_quick.yaml  # one seed, the rates that the full one chose

Each run is one JSON under `runs/` of the output folder, written when the run is done; a run whose JSON is there and
was made from the same settings is not done again. So an interrupted comparison continues with the same command.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path

import grpo
import report
import sft
import torch
import transformers
import trl
import yaml
from arguments import AdapterArguments
from evaluate import GenerationArguments, evaluate, write_text
from provenance import read_provenance

from trl_tinylora.tasks import gsm8k


# The comparison's definition: the recipes of the two arms agree on every other key.
ALLOWED_DIFFERENCES = {
    "per_device_train_batch_size": "RL counts completions, SFT demonstrations; problems a step are equal",
    "num_generations": "RL only: samples a problem",
    "max_completion_length": "RL only: limit of a sample",
    "temperature": "RL only: of the samples",
    "beta": "RL only: weight of the KL term",
    "scale_rewards": "RL only: scale of the advantages",
    "max_length": "SFT only: limit of prompt and demonstration",
    "completion_only_loss": "SFT only: the loss is on the demonstration, as RL's is on the sample",
    "loss_type": "each algorithm's own loss",
    "learning_rate": "chosen for each arm and size on the validation problems",
    "output_dir": "a folder each",
}
RECIPES = {"rl": grpo, "sft": sft}
# What a size replaces in a recipe, as a whole: half of one adapter and half of the other would be a third.
ADAPTER_KEYS = {item.name for item in fields(AdapterArguments)} | {
    item.name
    for item in fields(trl.ModelConfig)
    if item.name.startswith(("lora_", "use_peft", "use_rslora", "use_dora"))
}
MAX_RECORDED_VALUES = 256


@dataclass
class CompareArguments(GenerationArguments):
    """
    A comparison: two recipes, the sizes of the update, the seeds, and where things go.

    Args:
        rl (`str`): YAML of the RL arm.
        sft (`str`): YAML of the SFT arm.
        sizes (`dict`): By name: `label`, `arguments` (of the adapter) and the grids `rl_learning_rates` and
            `sft_learning_rates`, which only a sweep needs.
        seeds (`list[int]`): Seeds of the final runs: of the data's order, the samples, and the projections.
        sweep_seed (`int`, *optional*): Seed of the sweep of learning rates; without one, `learning_rates` is read.
        learning_rates (`str`, *optional*): A `learning_rates.json` that a sweep wrote.
        validation_split (`str`, *optional*, defaults to `"validation"`): Problems that choose the learning rates. The
            final ones are the recipes' `dataset_test_split`.
        eval_limit (`int`, *optional*): Evaluate on the first problems of a split only.
        output_dir (`str`, *optional*, defaults to `"results/compare"`): For table, figure, summary and a JSON a run.
        work_dir (`str`, *optional*): For models, completions and logs; defaults to `work` in the output folder.
        jobs (`int`, *optional*): Runs at a time: by default the number of CPU cores, or of GPUs where there are some.
        report_only (`bool`, *optional*, defaults to `False`): Rebuild the report from the JSON there is; train nothing.
        update_readme (`str`, *optional*): A Markdown file whose table, between the markers of `readme_section`, is
            renewed.
        readme_section (`str`, *optional*, defaults to `"toy"`): Name in the markers `<!-- results:toy -->`.
    Raises:
        ValueError: If something is missing or contradictory.
    """

    rl: str = field(default="", metadata={"help": "YAML of the RL arm."})
    sft: str = field(default="", metadata={"help": "YAML of the SFT arm."})
    sizes: dict | None = field(default=None, metadata={"help": "Sizes of the update; see recipes/toy/compare.yaml."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Seeds of the final runs."})
    sweep_seed: int | None = field(default=None, metadata={"help": "Seed of the sweep of learning rates."})
    learning_rates: str | None = field(default=None, metadata={"help": "A learning_rates.json, instead of a sweep."})
    validation_split: str = field(default="validation", metadata={"help": "Problems that choose the learning rates."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate on the first problems of a split only."})
    output_dir: str = field(default="results/compare", metadata={"help": "Folder for the report and a JSON a run."})
    work_dir: str | None = field(default=None, metadata={"help": "Folder for models, completions and logs."})
    jobs: int | None = field(default=None, metadata={"help": "Runs at a time."})
    report_only: bool = field(default=False, metadata={"help": "Rebuild the report from the JSON there is."})
    update_readme: str | None = field(default=None, metadata={"help": "A Markdown file whose table is renewed."})
    readme_section: str = field(default="toy", metadata={"help": "Name in the README's markers."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("rl", "sft", "sizes", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it in the YAML, as recipes/toy/compare.yaml does")
        if (self.sweep_seed is None) == (self.learning_rates is None):
            raise ValueError(
                f"exactly one of sweep_seed (got {self.sweep_seed}) and learning_rates (got "
                f"{self.learning_rates!r}) must be "
                "given: the rates are either swept or read from a file"
            )
        if self.sweep_seed in self.seeds:
            raise ValueError(
                f"sweep_seed={self.sweep_seed} is among seeds={self.seeds}: the final seeds must be new ones"
            )
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
        for name, size in self.sizes.items():
            unknown = set(size) - {"label", "arguments", "rl_learning_rates", "sft_learning_rates"}
            foreign = set(size.get("arguments", {})) - ADAPTER_KEYS
            if unknown or foreign or not size.get("arguments"):
                raise ValueError(
                    f"sizes[{name!r}] must hold label, arguments of the adapter, and grids of learning rates; got "
                    f"{sorted(size)} with arguments {sorted(size.get('arguments', {}))}"
                )

    def path(self, *names: str) -> Path:
        """A path in the output folder."""
        return Path(self.output_dir, *names)


@dataclass(frozen=True)
class Run:
    """
    One training and its evaluation, or the evaluation of the untrained model.

    Args:
        name (`str`): Names its JSON and its work folder.
        phase (`str`): `"sweep"`, `"final"` or `"untrained"`.
        size (`str` or `None`): A key of the comparison's `sizes`.
        label (`str`): For people.
        algorithm (`str` or `None`): `"rl"` or `"sft"`.
        settings (`dict`): Keys of the recipe's YAML, with the size, seed and learning rate in place.
        evaluation (`dict`): Split, limit, and the fields of [`~evaluate.GenerationArguments`].
        inputs (`dict`): SHA-256 of the local files that the run reads.
    """

    name: str
    phase: str
    size: str | None
    label: str
    algorithm: str | None
    settings: dict
    evaluation: dict
    inputs: dict

    @property
    def digest(self) -> str:
        """Equal for two runs exactly if they would do the same."""
        spec = {key: value for key, value in asdict(self).items() if key != "label"}
        return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()


def read_recipes(arguments: CompareArguments) -> dict[str, dict]:
    """
    The two recipes, once they are known to differ in nothing that is not allowed.

    Args:
        arguments (`CompareArguments`): Read for `rl` and `sft`.
    Returns:
        `dict[str, dict]`: Settings by algorithm.
    Raises:
        ValueError: If they differ in another key than those of `ALLOWED_DIFFERENCES`.
    """
    recipes = {name: yaml.safe_load(Path(getattr(arguments, name)).read_text(encoding="utf-8")) for name in RECIPES}
    absent = object()
    differing = {
        key
        for key in recipes["rl"].keys() | recipes["sft"].keys()
        if recipes["rl"].get(key, absent) != recipes["sft"].get(key, absent)
    }
    if not differing <= ALLOWED_DIFFERENCES.keys():
        raise ValueError(
            f"{arguments.rl} and {arguments.sft} differ in {sorted(differing - ALLOWED_DIFFERENCES.keys())}: make "
            "them agree, "
            "or say in ALLOWED_DIFFERENCES of recipes/compare.py why they may not"
        )
    return recipes


def plan_sweep(arguments: CompareArguments, recipes: dict[str, dict]) -> list[Run]:
    """
    The runs that choose the learning rates, on the validation problems; none where the rates come from a file.

    Args:
        arguments (`CompareArguments`): The comparison.
        recipes (`dict[str, dict]`): As [`read_recipes`] returns.
    Returns:
        `list[Run]`: RL first: its runs are the long ones.
    Raises:
        ValueError: If a size has no grid.
    """
    if arguments.sweep_seed is None:
        return []
    runs = []
    for algorithm in RECIPES:
        for size, described in arguments.sizes.items():
            grid = described.get(f"{algorithm}_learning_rates")
            if not grid:
                raise ValueError(f"sizes[{size!r}] has no {algorithm}_learning_rates, which a sweep needs")
            for rate in grid:
                name = f"sweep-{algorithm}-{size}-lr{float(rate):g}"
                runs.append(_plan_run(arguments, recipes, name, "sweep", algorithm, size, arguments.sweep_seed, rate))
    return runs


def plan_final(arguments: CompareArguments, recipes: dict[str, dict], rates: dict) -> list[Run]:
    """
    The runs that the report is about, on the test problems.

    Args:
        arguments (`CompareArguments`): The comparison.
        recipes (`dict[str, dict]`): As [`read_recipes`] returns.
        rates (`dict`): As [`choose_learning_rates`] returns.
    Returns:
        `list[Run]`: RL first, seed by seed.
    """
    return [
        _plan_run(
            arguments,
            recipes,
            f"final-{algorithm}-{size}-seed{seed}",
            "final",
            algorithm,
            size,
            seed,
            rates[algorithm][size]["learning_rate"],
        )
        for algorithm in RECIPES
        for seed in arguments.seeds
        for size in arguments.sizes
    ]


def plan_untrained(arguments: CompareArguments, recipes: dict[str, dict]) -> Run:
    """
    The evaluation of the untrained model on the test problems.

    Args:
        arguments (`CompareArguments`): The comparison.
        recipes (`dict[str, dict]`): As [`read_recipes`] returns.
    Returns:
        `Run`: With no algorithm and no size.
    """
    kept = ("model_name_or_path", "model_revision", "dtype", "dataset_name", "dataset_config", "dataset_test_split")
    settings = {key: recipes["rl"][key] for key in kept if key in recipes["rl"]}
    evaluation = _evaluation(arguments, settings, "untrained")
    return Run("untrained", "untrained", None, "untrained", None, settings, evaluation, _fingerprints(settings))


def _plan_run(arguments, recipes, name, phase, algorithm, size, seed, rate) -> Run:
    adapter = dict(arguments.sizes[size]["arguments"])
    if adapter.get("adapter", "tinylora") == "tinylora":
        # Seeds that shared one projection would hide how much depends on it.
        adapter.setdefault("projection_seed", seed)
    settings = {key: value for key, value in recipes[algorithm].items() if key not in ADAPTER_KEYS | {"output_dir"}}
    settings |= adapter | {"seed": seed, "learning_rate": float(rate)}
    evaluation = _evaluation(arguments, settings, phase)
    label = arguments.sizes[size].get("label", size)
    return Run(name, phase, size, label, algorithm, settings, evaluation, _fingerprints(settings))


def _evaluation(arguments, settings, phase) -> dict:
    split = arguments.validation_split if phase == "sweep" else settings.get("dataset_test_split", "test")
    generation = {item.name: getattr(arguments, item.name) for item in fields(GenerationArguments)}
    return {"split": split, "limit": arguments.eval_limit} | generation


def _fingerprints(settings) -> dict:
    """So that a result made from other weights or other problems is not taken for this one."""
    files = [*Path(settings["model_name_or_path"]).glob("*.safetensors")]
    dataset = Path(settings["dataset_name"])
    files += [dataset] if dataset.is_file() else dataset.glob("*.jsonl")
    return {path.as_posix(): _sha256(path, path.stat().st_mtime_ns) for path in sorted(files)}


_HASHES: dict[tuple, str] = {}


def _sha256(path, modified) -> str:
    if (path, modified) not in _HASHES:
        _HASHES[path, modified] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _HASHES[path, modified]


def stored(run: Run, arguments: CompareArguments) -> dict | None:
    """
    A run's JSON, if there is one made from the same settings.

    Args:
        run (`Run`): What was planned.
        arguments (`CompareArguments`): Read for `output_dir`.
    Returns:
        `dict` or `None`: The record.
    """
    try:
        record = json.loads(arguments.path("runs", f"{run.name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record if record["digest"] == run.digest else None


def choose_learning_rates(records: list[dict]) -> dict:
    """
    For each algorithm and size the rate with the best mean of greedy and sampled strict accuracy.

    The smaller one of equals.

    Args:
        records (`list[dict]`): Of the sweep.
    Returns:
        `dict`: By algorithm and size: `learning_rate`, `score`, `grid` (scores by rate) and `at_edge` (whether a rate
        outside of the grid might have been better).
    """
    scores: dict = {}
    for record in records:
        metrics = record["metrics"]
        parts = [metrics[kind]["strict"]["accuracy"] for kind in ("greedy", "sampled") if kind in metrics]
        by_size = scores.setdefault(record["algorithm"], {}).setdefault(record["size"], {})
        by_size[record["learning_rate"]] = sum(parts) / len(parts)
    chosen: dict = {}
    for algorithm, by_size in scores.items():
        for size, grid in by_size.items():
            best = max(sorted(grid), key=grid.get)
            chosen.setdefault(algorithm, {})[size] = {
                "learning_rate": best,
                "score": grid[best],
                "grid": {f"{rate:g}": grid[rate] for rate in sorted(grid)},
                "at_edge": best in (min(grid), max(grid)),
            }
    return chosen


def read_learning_rates(arguments: CompareArguments) -> dict:
    """
    The rates that an earlier sweep chose.

    Args:
        arguments (`CompareArguments`): Read for `learning_rates` and `sizes`.
    Returns:
        `dict`: As [`choose_learning_rates`].
    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it lacks a size of this comparison.
    """
    path = Path(arguments.learning_rates)
    if not path.is_file():
        raise FileNotFoundError(
            f"learning_rates={str(path)!r} does not exist: run a comparison with a sweep first "
            "(recipes/toy/compare.yaml), "
            "which writes learning_rates.json into its output folder, or name another file"
        )
    rates = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    missing = [(name, size) for name in RECIPES for size in arguments.sizes if size not in rates.get(name, {})]
    if missing:
        raise ValueError(f"{path} holds no learning rate for {missing}: sweep these sizes, or drop them")
    return rates


def execute(run: Run, arguments: CompareArguments, provenance: dict) -> str | None:
    """
    Does one run and writes its JSON. What it prints goes to `log.txt` in its work folder.

    Args:
        run (`Run`): What to do.
        arguments (`CompareArguments`): Where to write.
        provenance (`dict`): Commit, versions and machine, for the record.
    Returns:
        `str` or `None`: The error's last line if it failed.
    """
    folder = work_folder(run, arguments)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with _output_to(folder / "log.txt"):
        try:
            started = time.perf_counter()
            record = _evaluate_untrained(run, folder) if run.algorithm is None else _train(run, folder)
            record |= {"wall_seconds": round(time.perf_counter() - started, 1), **provenance}
            record["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}".splitlines()[0]
    spec = {key: value for key, value in asdict(run).items() if key != "settings"}
    record = spec | {"digest": run.digest} | record
    # A line a key: readable, and a change to one of them shows as one.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    write_text(arguments.path("runs", f"{run.name}.json"), "{\n" + ",\n".join(lines) + "\n}\n")
    return None


def work_folder(run: Run, arguments: CompareArguments) -> Path:
    """
    Where a run's model, completions and log lie.

    Args:
        run (`Run`): The run.
        arguments (`CompareArguments`): Read for `work_dir` and `output_dir`.
    Returns:
        `Path`: The folder.
    """
    return Path(arguments.work_dir or arguments.path("work")) / run.name


def _evaluate_untrained(run, folder) -> dict:
    name = run.settings["model_name_or_path"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=run.settings.get("dtype", "float32"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return {"seed": None, "trained_values": 0, "trained_bytes": 0, "metrics": _metrics(run, model, tokenizer, folder)}


def _train(run, folder) -> dict:
    recipe = RECIPES[run.algorithm]
    settings = run.settings | {"output_dir": str(folder / "model"), "disable_tqdm": True}
    parsed = trl.TrlParser(recipe.ARGUMENTS).parse_dict(settings)
    started = time.perf_counter()
    trainer = recipe.main(*parsed)
    train_seconds = time.perf_counter() - started
    args, state = trainer.args, trainer.state
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    count = sum(value.numel() for value in trained.values())

    curve_keys = {"rl": ("reward", "completions/mean_length", "frac_reward_zero_std"), "sft": ("loss",)}[run.algorithm]
    logs = [entry for entry in state.log_history if curve_keys[0] in entry]
    rows = state.global_step * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    generated = 0
    if run.algorithm == "rl":
        rows //= args.num_iterations
        lengths = [entry["completions/mean_length"] for entry in logs]
        generated = round(sum(lengths) / len(lengths) * rows)
        rows //= args.num_generations
    return {
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "config": _resolved(parsed),
        "trained_values": count,
        "trained_bytes": sum(value.numel() * value.element_size() for value in trained.values()),
        "trained": {name: value.tolist() for name, value in trained.items()} if count <= MAX_RECORDED_VALUES else None,
        "optimizer_steps": state.global_step,
        "examples": rows,
        "generated_tokens": generated,
        "train_seconds": round(train_seconds, 1),
        "curve": {"step": [entry["step"] for entry in logs]}
        | {key: [round(entry[key], 5) for entry in logs] for key in curve_keys},
        "metrics": _metrics(run, model, trainer.processing_class, folder),
    }


def _metrics(run, model, tokenizer, folder) -> dict:
    settings, evaluation = run.settings, dict(run.evaluation)
    split, limit = evaluation.pop("split"), evaluation.pop("limit")
    rows = gsm8k.load_rows(settings["dataset_name"], split, settings.get("dataset_config"), limit)
    return evaluate(model, tokenizer, rows, GenerationArguments(**evaluation), folder / "completions.jsonl")


def _resolved(parsed) -> dict:
    """Every argument of ours and TRL's that is not at its default, whatever it was that set it."""
    resolved = {}
    for item in parsed:
        for described in fields(item):
            value = getattr(item, described.name, None)
            value = value.value if isinstance(value, Enum) else value
            is_plain = value is None or isinstance(value, str | int | float | bool | list | dict)
            is_default = value == described.default and not isinstance(item, AdapterArguments)
            if is_plain and not is_default and described.name not in ("output_dir", "logging_dir", "disable_tqdm"):
                resolved[described.name] = value
    return json.loads(json.dumps(resolved, default=str))


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends also what libraries print to handles they took at import, hence the file descriptors."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(path, "w", encoding="utf-8") as log:
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def _start_worker(threads: int, counter) -> None:
    # The parent ends the workers; a traceback of each on Ctrl-C would bury its message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
    if torch.cuda.device_count() > 1:
        # A GPU each: a Trainer that sees several would spread one small run over all of them.
        with counter.get_lock():
            worker, counter.value = counter.value, counter.value + 1
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]


def run_all(runs: list[Run], arguments: CompareArguments, provenance: dict, progress: "Progress") -> None:
    """
    Does the runs that have no JSON yet, several at a time, each worker one after another.

    Args:
        runs (`list[Run]`): What was planned.
        arguments (`CompareArguments`): Where to write, and how many at a time.
        provenance (`dict`): For the records.
        progress (`Progress`): Told of every run that ends.
    """
    queue = deque(run for run in runs if stored(run, arguments) is None)
    jobs = min(worker_count(arguments), max(1, len(queue)))
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, cpu_cores() // jobs)))
    context = multiprocessing.get_context("spawn")
    attempts: Counter = Counter()
    while queue:
        setup = {"initializer": _start_worker, "initargs": (threads, context.Value("i", 0))}
        with ProcessPoolExecutor(jobs, mp_context=context, **setup) as pool:
            running: dict = {}
            try:
                while queue or running:
                    while queue and len(running) < jobs:
                        running[pool.submit(execute, queue[0], arguments, provenance)] = queue[0]
                        attempts[queue.popleft().name] += 1
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        error = future.result()
                        progress.ended(running.pop(future), error)
            except BrokenProcessPool:
                # A worker was killed (out of memory, say) and took the pool with it; which run it had is not told.
                for run in running.values():
                    if attempts[run.name] < 2:
                        queue.append(run)
                    else:
                        progress.ended(run, "its process was killed, twice")
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise


def worker_count(arguments: CompareArguments) -> int:
    """
    Runs at a time: as asked for, else one a GPU, else one a CPU core.

    Args:
        arguments (`CompareArguments`): Read for `jobs`.
    Returns:
        `int`: At least 1.
    """
    if arguments.jobs is not None:
        return arguments.jobs
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return cpu_cores()


def cpu_cores() -> int:
    """
    Cores that this process may use, which in a container can be fewer than the machine has.

    Returns:
        `int`: At least 1.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """
    One line for every run that ends: result, count, elapsed and remaining time.

    Args:
        arguments (`CompareArguments`): The comparison.
        algorithms (`dict[str, str | None]`): Algorithm of every run of the comparison, by name.
        stored_names (`set[str]`): Runs that were already done.
    """

    def __init__(self, arguments: CompareArguments, algorithms: dict[str, str | None], stored_names: set[str]):
        self.arguments = arguments
        self.algorithms = algorithms
        self.open = set(algorithms) - stored_names
        self.failed: list[str] = []
        self.seconds: dict = {}
        self.started = time.monotonic()

    def ended(self, run: Run, error: str | None) -> None:
        """
        Prints a run's line.

        Args:
            run (`Run`): What ended.
            error (`str`, *optional*): Why it failed, if it did.
        """
        self.open.discard(run.name)
        if error is not None:
            self.failed.append(run.name)
            result = f"FAILED: {error} (log: {work_folder(run, self.arguments) / 'log.txt'})"
        else:
            record = stored(run, self.arguments)
            self.seconds.setdefault(run.algorithm, []).append(record["wall_seconds"])
            kinds = [kind for kind in ("greedy", "sampled") if kind in record["metrics"]]
            shown = [f"{kind} {record['metrics'][kind]['strict']['accuracy']:.1%}" for kind in kinds]
            result = f"{', '.join(shown)} ({record['wall_seconds']:.0f} s)"
        elapsed = timedelta(seconds=round(time.monotonic() - self.started))
        done = len(self.algorithms) - len(self.open)
        print(f"[{done}/{len(self.algorithms)}] {run.name}: {result}; elapsed {elapsed}{self._left()}", flush=True)

    def _left(self) -> str:
        known = [seconds for values in self.seconds.values() for seconds in values]
        if not self.open or not known:
            return ""
        means = {algorithm: sum(values) / len(values) for algorithm, values in self.seconds.items()}
        total = sum(means.get(self.algorithms[name], sum(known) / len(known)) for name in self.open)
        return f", about {timedelta(seconds=math.ceil(total / min(worker_count(self.arguments), len(self.open))))} left"


def main(arguments: CompareArguments) -> int:
    """
    Plans, runs what is missing, reports.

    Args:
        arguments (`CompareArguments`): The comparison.
    Returns:
        `int`: Exit status: 1 if a run failed or is missing.
    """
    recipes = read_recipes(arguments)
    sweep = plan_sweep(arguments, recipes)
    untrained = plan_untrained(arguments, recipes)
    names = {run.name: run.algorithm for run in [untrained, *sweep]} | {
        f"final-{algorithm}-{size}-seed{seed}": algorithm
        for algorithm in RECIPES
        for size in arguments.sizes
        for seed in arguments.seeds
    }
    rates = None if sweep else read_learning_rates(arguments)
    provenance = read_provenance()

    def is_stored(name):
        # A final run's settings are known after the sweep only; until then its JSON counts as done.
        return arguments.path("runs", f"{name}.json").is_file()

    progress = Progress(arguments, names, {name for name in names if is_stored(name)})
    if not arguments.report_only:
        device = provenance["machine"]["gpu"] or provenance["machine"]["cpu"]
        print(
            f"{len(names)} runs, {len(names) - len(progress.open)} of them already there; "
            f"{worker_count(arguments)} at a time "
            f"on {device}. Results in {arguments.output_dir}, logs in {work_folder(untrained, arguments).parent}",
            flush=True,
        )
        progress.open |= {run.name for run in [untrained, *sweep] if stored(run, arguments) is None}
        run_all([untrained, *sweep], arguments, provenance, progress)

    if sweep:
        records = [record for run in sweep if (record := stored(run, arguments)) is not None]
        rates = choose_learning_rates(records)
        lacking = [(name, size) for name in RECIPES for size in arguments.sizes if size not in rates.get(name, {})]
        if lacking:
            print(f"No learning rate could be chosen for {lacking}: every run of their sweep is missing or failed.")
            return 1
        rule = "best mean of greedy and sampled strict accuracy on the validation problems; the smaller rate of equals"
        rates_text = json.dumps({"rule": rule, "sweep_seed": arguments.sweep_seed, "chosen": rates}, indent=1) + "\n"
        write_text(arguments.path("learning_rates.json"), rates_text)
    final = plan_final(arguments, recipes, rates)
    if not arguments.report_only:
        progress.open |= {run.name for run in final if stored(run, arguments) is None}
        run_all(final, arguments, provenance, progress)

    records = {run.name: stored(run, arguments) for run in [untrained, *final]}
    missing = [name for name, record in records.items() if record is None]
    swept = [record["wall_seconds"] for run in sweep if (record := stored(run, arguments)) is not None]
    summary = report.summarize(
        [record for record in records.values() if record is not None],
        rates,
        missing + [run.name for run in sweep if stored(run, arguments) is None],
        ALLOWED_DIFFERENCES,
        sum(swept),
    )
    report.write(summary, arguments.path())
    if arguments.update_readme is not None:
        report.update_readme(arguments.update_readme, arguments.readme_section, summary)
    print("\n" + report.table(summary))
    print(f"\nReport, figure and a JSON a run: {arguments.output_dir}")
    if summary["missing"]:
        print(f"Missing or failed: {', '.join(summary['missing'])}. The same command tries them again.")
    return 1 if summary["missing"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = main(*trl.TrlParser((CompareArguments,)).parse_args_and_config())
    except KeyboardInterrupt:
        status = "Interrupted. What is finished is kept: the same command continues."
    sys.exit(status)
