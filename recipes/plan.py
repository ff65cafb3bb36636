"""What a comparison consists of: its arms, sizes and controls, and the runs that follow from them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import grpo
import numpy as np
import sft
import trl
import yaml
from arguments import AdapterArguments
from completions import digest_of
from generation import GenerationArguments


# The comparison's definition: the recipes of its arms agree on every other key.
ALLOWED_DIFFERENCES = {
    "per_device_train_batch_size": "RL counts completions, SFT demonstrations; problems a step are equal",
    "num_generations": "RL only: samples a problem",
    "max_completion_length": "RL only: limit of a sample",
    "temperature": "RL only: of the samples",
    "beta": "RL only: weight of the KL term",
    "scale_rewards": "RL only: scale of the advantages",
    "entropy_coef": "RL only: weight of the entropy",
    "use_bias_correction_kl": "RL only: estimate of the KL term",
    "reward": "RL only: what is rewarded",
    "use_vllm": "RL only: what generates the samples",
    "vllm_mode": "RL only: where vLLM runs",
    "vllm_gpu_memory_utilization": "RL only: vLLM's share of the memory",
    "vllm_max_model_length": "RL only: vLLM's limit of prompt and sample",
    "vllm_importance_sampling_correction": "RL only: weighs what another engine sampled",
    "vllm_importance_sampling_mode": "RL only: where that weight is bounded",
    "vllm_importance_sampling_clip_max": "RL only: its bound",
    "max_length": "SFT only: limit of prompt and demonstration",
    "completion_only_loss": "SFT only: the loss is on the demonstration, as RL's is on the sample",
    "loss_type": "each algorithm's own loss",
    "learning_rate": "chosen for each arm and size on the validation problems",
    "output_dir": "a folder each",
}
# The file's name says the script that runs it.
RECIPES = {"grpo": ("rl", grpo), "sft": ("sft", sft)}
SCRIPTS = dict(RECIPES.values())
# What a size replaces in a recipe, as a whole: half of one adapter and half of the other would be a third.
ADAPTER_KEYS = {item.name for item in fields(AdapterArguments)} | {
    item.name
    for item in fields(trl.ModelConfig)
    if item.name.startswith(("lora_", "use_peft", "use_rslora", "use_dora"))
}
ARM_KEYS = {"label", "recipe", "arguments", "own_samples", "rates_of", "sizes"}
SIZE_KEYS = {"label", "arguments", "learning_rates", "rates_of"}
# Keys of a control, by kind.
CONTROLS = {"zero": {"size"}, "random-values": {"size", "of"}, "prompted": {"system_prompt"}}


@dataclass
class CompareArguments(GenerationArguments):
    """
    A comparison: its arms, the sizes of the update, controls, the seeds, and where things go.

    Args:
        arms (`dict`): By name: `label`, `recipe` (the YAML, named after its script: `grpo.yaml` or `sft.yaml`), and
            optionally `arguments` (of the recipe, that this arm changes), `own_samples` (train on the untrained model's
            own right answers, out of so many samples a problem), `rates_of` (an arm whose learning rates are taken,
            instead of a sweep) and `sizes` (of all, by default).
        sizes (`dict`): By name: `label`, `arguments` (of the adapter) and `learning_rates` (a grid by arm, which only a
            sweep needs) or `rates_of` (a size whose rates are taken).
        controls (`dict`): By name: `label`, `kind` and its keys: `"zero"` (`size`: that adapter, untrained),
            `"random-values"` (`size`, `of`: values of random direction, as long as those that this arm trained) or
            `"prompted"` (`system_prompt`: the untrained model, told so).
        landscape (`dict`, *optional*): `sizes` (of one or two values), `of` (arms whose paths it has to hold), `points`
            (an axis) and `limit` (problems): the reward over the values themselves.
        seeds (`list[int]`): Seeds of the final runs: of the data's order, the samples, and the projections.
        sweep_seed (`int`, *optional*): Seed of the sweep of learning rates; without one, `learning_rates` is read.
        learning_rates (`str`, *optional*): A `learning_rates.json` that a sweep wrote.
        validation_split (`str`, *optional*, defaults to `"validation"`): Problems that choose the learning rates. The
            final ones are the recipes' `dataset_test_split`.
        eval_limit (`int`, *optional*): Evaluate on the first problems of a split only.
        output_dir (`str`, *optional*, defaults to `"results/compare"`): For report, summary and a JSON a run.
        work_dir (`str`, *optional*): For models, completions and logs; defaults to `work` in the output folder.
        jobs (`int`, *optional*): Runs at a time: by default the number of CPU cores, or of GPUs where there are some.
        report_only (`bool`, *optional*, defaults to `False`): Rebuild the report from the JSON there is; train nothing.
        update_readme (`str`, *optional*): A Markdown file whose table, between the markers of `readme_section`, is
            renewed.
        readme_section (`str`, *optional*, defaults to `"toy"`): Name in the markers `<!-- results:toy -->`.
    Raises:
        ValueError: If something is missing or contradictory.
    """

    arms: dict | None = field(default=None, metadata={"help": "What is compared; see recipes/toy/compare.yaml."})
    sizes: dict | None = field(default=None, metadata={"help": "Sizes of the update; see recipes/toy/compare.yaml."})
    controls: dict | None = field(default=None, metadata={"help": "Controls that train nothing."})
    landscape: dict | None = field(default=None, metadata={"help": "The reward over one or two values."})
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
        for name in ("arms", "sizes", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it in the YAML, as recipes/toy/compare.yaml does")
        if (self.sweep_seed is None) == (self.learning_rates is None):
            raise ValueError(
                f"exactly one of sweep_seed (got {self.sweep_seed}) and learning_rates (got {self.learning_rates!r}) "
                "must be given: the rates are either swept or read from a file"
            )
        if self.sweep_seed in self.seeds:
            raise ValueError(
                f"sweep_seed={self.sweep_seed} is among seeds={self.seeds}: the final seeds must be new ones"
            )
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
        for name, size in self.sizes.items():
            foreign = set(size.get("arguments", {})) - ADAPTER_KEYS
            if set(size) - SIZE_KEYS or foreign or not size.get("arguments"):
                raise ValueError(
                    f"sizes[{name!r}] must hold label, arguments of the adapter, and grids of learning rates; got "
                    f"{sorted(size)} with arguments {sorted(size.get('arguments', {}))}"
                )
            self._check_known("sizes", name, "rates_of", [size["rates_of"]] if "rates_of" in size else [], self.sizes)
        for name, arm in self.arms.items():
            self._check_keys("arms", name, arm, ARM_KEYS, {"label", "recipe"})
            if Path(arm.get("recipe", "")).stem not in RECIPES:
                raise ValueError(
                    f"arms[{name!r}].recipe must be a grpo.yaml or an sft.yaml, got {arm.get('recipe')!r}: the name "
                    "says the script"
                )
            self._check_known("arms", name, "sizes", arm.get("sizes", []), self.sizes)
            self._check_known("arms", name, "rates_of", [arm["rates_of"]] if "rates_of" in arm else [], self.arms)
        for name, control in (self.controls or {}).items():
            kind = control.get("kind")
            if kind not in CONTROLS:
                raise ValueError(f"controls[{name!r}].kind must be one of {sorted(CONTROLS)}, got {kind!r}")
            needed = {"label", "kind"} | CONTROLS[kind]
            self._check_keys("controls", name, control, needed, needed)
            self._check_known("controls", name, "size", [control["size"]] if "size" in control else [], self.sizes)
            self._check_known("controls", name, "of", [control["of"]] if "of" in control else [], self.arms)
        if self.landscape:
            keys = {"sizes", "of", "points", "limit"}
            self._check_keys("landscape", "", self.landscape, keys, keys)
            self._check_known("landscape", "", "sizes", self.landscape["sizes"], self.sizes)
            self._check_known("landscape", "", "of", self.landscape["of"], self.arms)

    @staticmethod
    def _check_keys(kind, name, given, known, needed):
        if set(given) - set(known) or set(needed) - set(given):
            where = f"{kind}[{name!r}]" if name else kind
            raise ValueError(f"{where} may hold {sorted(known)} and needs {sorted(needed)}; got {sorted(given)}")

    @staticmethod
    def _check_known(kind, name, key, given, known):
        unknown = [item for item in given if item not in known]
        if unknown:
            where = f"{kind}[{name!r}]" if name else kind
            raise ValueError(f"{where}.{key} names {unknown}, of which there are only {sorted(known)}")

    def path(self, *names: str) -> Path:
        """A path in the output folder."""
        return Path(self.output_dir, *names)

    @property
    def work(self) -> Path:
        """Where models, completions and logs lie."""
        return Path(self.work_dir or self.path("work"))

    def sizes_of(self, arm: str) -> list[str]:
        """The sizes that an arm is run at."""
        return [size for size in self.sizes if size in self.arms[arm].get("sizes", self.sizes)]

    def algorithm_of(self, arm: str) -> str:
        """`"rl"` or `"sft"`, as the name of the arm's recipe says."""
        return RECIPES[Path(self.arms[arm]["recipe"]).stem][0]

    def rates_from(self, arm: str, size: str) -> tuple[str, str]:
        """The arm and the size whose learning rates these take: themselves, where nothing else is said."""
        return self.arms[arm].get("rates_of", arm), self.sizes[size].get("rates_of", size)


@dataclass(frozen=True)
class Run:
    """
    One piece of work with a JSON of its own: a training and its evaluation, or an evaluation alone.

    Args:
        name (`str`): Names its JSON and its work folder.
        phase (`str`): `"samples"`, `"sweep"`, `"final"`, `"untrained"`, `"control"` or `"landscape"`.
        arm (`str`): Name of the arm or the control.
        arm_label (`str`): For people.
        size (`str` or `None`): A key of the comparison's `sizes`.
        label (`str`): For people.
        algorithm (`str` or `None`): `"rl"` or `"sft"`.
        settings (`dict`): Keys of the recipe's YAML, with the size, seed and learning rate in place.
        evaluation (`dict`): Data set, split, limit, and the fields of [`~evaluate.GenerationArguments`].
        inputs (`dict`): SHA-256 of the local files that the run reads.
        options (`dict`): What else its phase needs.
    """

    name: str
    phase: str
    arm: str
    arm_label: str
    size: str | None
    label: str
    algorithm: str | None
    settings: dict
    evaluation: dict
    inputs: dict
    options: dict = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Equal for two runs exactly if they would do the same."""
        spec = {key: value for key, value in asdict(self).items() if key not in ("label", "arm_label")}
        return digest_of(spec)

    def kept(self, arguments: CompareArguments) -> dict | None:
        """
        Its JSON, if there is one made from the same settings.

        Args:
            arguments (`CompareArguments`): Read for `output_dir`.
        Returns:
            `dict` or `None`: The record.
        """
        try:
            record = json.loads(arguments.path("runs", f"{self.name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return record if record["digest"] == self.digest else None


class Plan:
    """
    The runs of a comparison.

    Args:
        arguments (`CompareArguments`): The comparison.
    Raises:
        ValueError: If the arms' recipes differ in a key that is not among `ALLOWED_DIFFERENCES`.
        FileNotFoundError: If a recipe does not exist.
    """

    def __init__(self, arguments: CompareArguments):
        self.arguments = arguments
        self.recipes = {
            name: yaml.safe_load(Path(arm["recipe"]).read_text(encoding="utf-8"))
            for name, arm in arguments.arms.items()
        }
        first, *others = self.recipes
        for other in others:
            self._refuse_other_differences(first, other)

    def _refuse_other_differences(self, first, other):
        absent = object()
        mine, theirs = self.recipes[first], self.recipes[other]
        differing = {key for key in mine.keys() | theirs.keys() if mine.get(key, absent) != theirs.get(key, absent)}
        if not differing <= ALLOWED_DIFFERENCES.keys():
            raise ValueError(
                f"{self.arguments.arms[first]['recipe']} and {self.arguments.arms[other]['recipe']} differ in "
                f"{sorted(differing - ALLOWED_DIFFERENCES.keys())}: make them agree, or say in ALLOWED_DIFFERENCES of "
                "recipes/plan.py why they may not"
            )

    def untrained(self) -> Run:
        """The evaluation of the untrained model on the test problems."""
        return self._evaluation("untrained", "untrained", "untrained")

    def samples(self) -> list[Run]:
        """The drawing of the untrained model's own right answers, for each seed that trains on them."""
        counts = {arm["own_samples"] for arm in self.arguments.arms.values() if "own_samples" in arm}
        seeds = ([] if self.arguments.sweep_seed is None else [self.arguments.sweep_seed]) + self.arguments.seeds
        return [self._sampling(count, seed) for count in sorted(counts) for seed in seeds]

    def _sampling(self, count, seed) -> Run:
        settings = self._model_and_data()
        split = settings.pop("dataset_train_split", "train")
        evaluation = self._generation() | {"samples": count, "eval_seed": seed, "limit": settings.pop("limit", None)}
        evaluation |= {"dataset_name": settings["dataset_name"], "split": split}
        evaluation["eval_batch_size"] = max(count, evaluation["eval_batch_size"])
        name = f"samples-{count}-seed{seed}"
        return Run(name, "samples", "samples", "own samples", None, "", None, settings, evaluation, _hashes(settings))

    def sweep(self) -> list[Run]:
        """
        The runs that choose the learning rates, on the validation problems; none where the rates come from a file.

        Returns:
            `list[Run]`: RL first: its runs are the long ones.
        Raises:
            ValueError: If a size has no grid for an arm.
        """
        arguments, runs = self.arguments, []
        if arguments.sweep_seed is None:
            return []
        for arm, size in self._cells():
            if arguments.rates_from(arm, size) != (arm, size):
                continue
            grid = arguments.sizes[size].get("learning_rates", {}).get(arm)
            if not grid:
                raise ValueError(f"sizes[{size!r}].learning_rates has no grid for {arm!r}, which a sweep needs")
            for rate in grid:
                name = f"sweep-{arm}-{size}-lr{float(rate):g}"
                runs.append(self._training(name, "sweep", arm, size, arguments.sweep_seed, rate))
        return runs

    def final_names(self) -> dict[str, str]:
        """Algorithm of every final run, by name."""
        return {
            _final_name(arm, size, seed): self.arguments.algorithm_of(arm)
            for seed in self.arguments.seeds
            for arm, size in self._cells()
        }

    def final(self, rates: dict) -> list[Run]:
        """
        The runs that the report is about, on the test problems.

        Args:
            rates (`dict`): As [`choose_learning_rates`] returns.
        Returns:
            `list[Run]`: Seed by seed, RL first.
        """
        runs = []
        for seed in self.arguments.seeds:
            for arm, size in self._cells():
                from_arm, from_size = self.arguments.rates_from(arm, size)
                rate = rates[from_arm][from_size]["learning_rate"]
                runs.append(self._training(_final_name(arm, size, seed), "final", arm, size, seed, rate))
        return runs

    def _controls(self) -> Iterator[tuple[str, str, dict, int]]:
        """Of each control's runs: its name, the control's name, what it is, and the seed."""
        seeds = self.arguments.seeds
        for name, control in (self.arguments.controls or {}).items():
            if control["kind"] == "random-values":
                yield from ((f"control-{name}-seed{seed}", name, control, seed) for seed in seeds)
            else:
                yield f"control-{name}", name, control, seeds[0]

    def control_names(self) -> list[str]:
        """Names of the runs that train nothing, in their order."""
        landscapes = (self.arguments.landscape or {}).get("sizes", [])
        return [run for run, *_ in self._controls()] + [f"landscape-{size}" for size in landscapes]

    def controls(self, finals: dict[str, dict]) -> list[Run]:
        """
        The evaluations that train nothing, and the landscapes; those whose final runs are missing are left out.

        Args:
            finals (`dict[str, dict]`): Records of the final runs, by name.
        Returns:
            `list[Run]`
        """
        runs = []
        for title, name, control, seed in self._controls():
            options, size = {"kind": control["kind"]}, control.get("size")
            if size is not None:
                options |= {"seed": seed, "adapter": self._adapter(size, seed)}
            if control["kind"] == "random-values":
                trained = finals.get(_final_name(control["of"], size, seed))
                if trained is None:
                    continue
                options["norm"] = _norm(_flat(trained["trained"]))
            run = self._evaluation(title, name, control["label"], options, size)
            if control["kind"] == "prompted":
                run.evaluation["system_prompt"] = control["system_prompt"]
            runs.append(run)
        return runs + list(self._landscapes(finals))

    def _landscapes(self, finals) -> Iterator[Run]:
        described = self.arguments.landscape or {"sizes": []}
        for size in described["sizes"]:
            seed = self.arguments.seeds[0]
            paths = [finals.get(_final_name(arm, size, seed), {}).get("path") for arm in described["of"]]
            if not all(paths):
                continue
            reach = [max(abs(point[axis]) for path in paths for point in path) for axis in range(len(paths[0][0]))]
            # Round, so that a rerun of the paths that differs in the last digit finds the same grid.
            options = {
                "seed": seed,
                "adapter": self._adapter(size, seed),
                "points": described["points"],
                "reach": [float(f"{1.5 * length:.1g}") for length in reach],
            }
            run = self._evaluation(f"landscape-{size}", "landscape", "landscape", options, size, "landscape")
            run.evaluation.update(split=self.arguments.validation_split, limit=described["limit"])
            yield run

    def _cells(self) -> list[tuple[str, str]]:
        """Arm and size of the training runs, RL first."""
        arms = sorted(self.arguments.arms, key=self.arguments.algorithm_of)
        return [(arm, size) for arm in arms for size in self.arguments.sizes_of(arm)]

    def _training(self, name, phase, arm, size, seed, rate) -> Run:
        described = self.arguments.arms[arm]
        recipe = self.recipes[arm] | described.get("arguments", {})
        settings = {key: value for key, value in recipe.items() if key not in ADAPTER_KEYS | {"output_dir"}}
        settings |= self._adapter(size, seed) | {"seed": seed, "learning_rate": float(rate)}
        split = self.arguments.validation_split if phase == "sweep" else settings.get("dataset_test_split", "test")
        evaluation = self._generation() | {"dataset_name": settings["dataset_name"], "split": split}
        inputs, options = _hashes(settings), {}
        if "own_samples" in described:
            sampling = self._sampling(described["own_samples"], seed)
            options |= {"samples": sampling.name, "samples_digest": sampling.digest}
        return Run(
            name,
            phase,
            arm,
            described["label"],
            size,
            self.arguments.sizes[size].get("label", size),
            self.arguments.algorithm_of(arm),
            settings,
            evaluation,
            inputs,
            options,
        )

    def _evaluation(self, name, arm, label, options=None, size=None, phase=None) -> Run:
        settings = self._model_and_data()
        evaluation = self._generation() | {
            "dataset_name": settings["dataset_name"],
            "split": settings.get("dataset_test_split", "test"),
        }
        phase = phase or ("control" if options else "untrained")
        size_label = self.arguments.sizes[size].get("label", size) if size else ""
        hashes = _hashes(settings)
        return Run(name, phase, arm, label, size, size_label, None, settings, evaluation, hashes, options or {})

    def _adapter(self, size, seed) -> dict:
        adapter = dict(self.arguments.sizes[size]["arguments"])
        if adapter.get("adapter", "tinylora") == "tinylora":
            # Seeds that shared one projection would hide how much depends on it.
            adapter.setdefault("projection_seed", seed)
        return adapter

    def _model_and_data(self) -> dict:
        names = ("model_name_or_path", "model_revision", "dtype", "task", "system_prompt", "limit")
        names += ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
        recipe = next(iter(self.recipes.values()))
        return {key: recipe[key] for key in names if key in recipe}

    def _generation(self) -> dict:
        generation = {item.name: getattr(self.arguments, item.name) for item in fields(GenerationArguments)}
        recipe = next(iter(self.recipes.values()))
        told = {key: recipe[key] for key in ("task", "system_prompt") if key in recipe}
        return generation | told | {"limit": self.arguments.eval_limit}


def _final_name(arm, size, seed) -> str:
    return f"final-{arm}-{size}-seed{seed}"


def _flat(trained: dict) -> list[float]:
    return [number for tensor in trained.values() for number in np.ravel(tensor).tolist()]


def _norm(numbers: list[float]) -> float:
    return sum(number**2 for number in numbers) ** 0.5


def _hashes(settings) -> dict:
    """So that a result made from other weights or other problems is not taken for this one."""
    files = [*Path(settings["model_name_or_path"]).glob("*.safetensors")]
    dataset = Path(settings["dataset_name"])
    files += [dataset] if dataset.is_file() else dataset.glob("*.jsonl")
    return {path.as_posix(): _sha256(path, path.stat().st_mtime_ns) for path in sorted(files)}


_KNOWN_HASHES: dict[tuple, str] = {}


def _sha256(path, modified) -> str:
    if (path, modified) not in _KNOWN_HASHES:
        _KNOWN_HASHES[path, modified] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _KNOWN_HASHES[path, modified]


def choose_learning_rates(records: list[dict]) -> dict:
    """
    For each arm and size the rate with the best mean of greedy and sampled strict accuracy.

    The smaller one of equals.

    Args:
        records (`list[dict]`): Of the sweep.
    Returns:
        `dict`: By arm and size: `learning_rate`, `score`, `grid` (scores by rate) and `at_edge` (whether a rate outside
        of the grid might have been better).
    """
    scores: dict = {}
    for record in records:
        metrics = record["metrics"]
        parts = [metrics[kind]["strict"]["accuracy"] for kind in ("greedy", "sampled") if kind in metrics]
        by_size = scores.setdefault(record["arm"], {}).setdefault(record["size"], {})
        by_size[record["learning_rate"]] = sum(parts) / len(parts)
    chosen: dict = {}
    for arm, by_size in scores.items():
        for size, grid in by_size.items():
            best = max(sorted(grid), key=grid.get)
            chosen.setdefault(arm, {})[size] = {
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
        arguments (`CompareArguments`): Read for `learning_rates`, `arms` and `sizes`.
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
            "(recipes/toy/compare.yaml), which writes learning_rates.json into its output folder, or name another file"
        )
    rates = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    missing = lacking_rates(arguments, rates)
    if missing:
        raise ValueError(f"{path} holds no learning rate for {missing}: sweep these sizes, or drop them")
    return rates


def lacking_rates(arguments: CompareArguments, rates: dict) -> list[tuple[str, str]]:
    """
    Arm and size of what cannot be trained for want of a learning rate.

    Args:
        arguments (`CompareArguments`): Read for `arms` and `sizes`.
        rates (`dict`): As [`choose_learning_rates`] returns.
    Returns:
        `list[tuple[str, str]]`: Empty where nothing is lacking.
    """
    wanted = {arguments.rates_from(arm, size) for arm in arguments.arms for size in arguments.sizes_of(arm)}
    return sorted((arm, size) for arm, size in wanted if size not in rates.get(arm, {}))
