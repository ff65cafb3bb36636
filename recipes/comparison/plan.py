"""Which runs a comparison consists of."""

import hashlib
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import yaml
from evaluation.arguments import GenerationArguments

from comparison.arguments import ADAPTER_KEYS, CompareArguments
from comparison.records import flat_values
from comparison.runs import (
    MODEL_KEYS,
    SCRIPTS,
    Evolution,
    Launched,
    OwnSamples,
    Problems,
    RandomValues,
    Run,
    Training,
    Untrained,
    ZeroAdapter,
)


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
# A search without gradients has no trainer, and so fewer keys; of those that it knows it may differ in this one too.
OF_A_SEARCH = {"max_steps": "search only: as many as sample RL's number of completions"}
# Of completions, between a search and RL: a search samples whole populations.
SAME_BUDGET = 0.05


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
        for first, other in combinations(self.recipes, 2):
            self._refuse_other_differences(first, other)
        for arm in self.recipes:
            if arguments.algorithm_of(arm) == "es":
                self._refuse_unfit_search(arm)

    @property
    def allowed_differences(self) -> dict[str, str]:
        """Keys in which the arms' recipes may differ, and why."""
        is_searched = "es" in map(self.arguments.algorithm_of, self.recipes)
        return ALLOWED_DIFFERENCES | (OF_A_SEARCH if is_searched else {})

    def _refuse_other_differences(self, first, other):
        absent = object()
        mine, theirs = self.recipes[first], self.recipes[other]
        differing = {key for key in mine.keys() | theirs.keys() if mine.get(key, absent) != theirs.get(key, absent)}
        if "es" in (self.arguments.algorithm_of(first), self.arguments.algorithm_of(other)):
            known = (_known_to(SCRIPTS[self.arguments.algorithm_of(arm)]) for arm in (first, other))
            differing = differing.intersection(*known) - OF_A_SEARCH.keys()
        if not differing <= ALLOWED_DIFFERENCES.keys():
            raise ValueError(
                f"{self.arguments.arms[first]['recipe']} and {self.arguments.arms[other]['recipe']} differ in "
                f"{sorted(differing - ALLOWED_DIFFERENCES.keys())}: make them agree, or say in ALLOWED_DIFFERENCES of "
                "recipes/comparison/plan.py why they may not"
            )

    def _refuse_unfit_search(self, arm):
        for size in self.arguments.sizes_of(arm):
            adapter = self.arguments.sizes[size]["arguments"].get("adapter", "tinylora")
            if adapter != "tinylora":
                raise ValueError(
                    f"arms[{arm!r}] is a search, for which adapter={adapter!r} of sizes[{size!r}] has too many values: "
                    "list the arm's sizes"
                )
        search, path = self.recipes[arm], self.arguments.arms[arm]["recipe"]
        if "population" not in search or "problems_per_step" not in search:
            raise ValueError(f"{path} needs population and problems_per_step: its budget")
        sampled = search["max_steps"] * search["population"] * search["problems_per_step"]
        sampled *= search.get("num_generations", 1)
        for other in (name for name in self.recipes if self.arguments.algorithm_of(name) == "rl"):
            recipe = self.recipes[other]
            wanted = recipe["max_steps"] * recipe["per_device_train_batch_size"]
            wanted *= recipe.get("gradient_accumulation_steps", 1)
            if abs(sampled - wanted) > SAME_BUDGET * wanted:
                raise ValueError(
                    f"{path} samples {sampled:,} completions, and {self.arguments.arms[other]['recipe']} {wanted:,}: "
                    f"budgets differ by more than {SAME_BUDGET:.0%}. Change its max_steps"
                )

    def untrained(self) -> Untrained:
        """The evaluation of the untrained model on the test problems."""
        return Untrained(name="untrained", phase="untrained", arm="untrained", arm_label="untrained", **self._asked())

    def samples(self) -> list[OwnSamples]:
        """The drawing of the untrained model's own right answers, for each seed that trains on them."""
        counts = {arm["own_samples"] for arm in self.arguments.arms.values() if "own_samples" in arm}
        seeds = ([] if self.arguments.sweep_seed is None else [self.arguments.sweep_seed]) + self.arguments.seeds
        return [self._sampling(count, seed) for count in sorted(counts) for seed in seeds]

    def _sampling(self, count, seed) -> OwnSamples:
        asked = self._asked()
        settings, generation = asked["settings"], asked["generation"]
        split, limit = settings.pop("dataset_train_split", "train"), settings.pop("limit", None)
        batch = max(count, generation.eval_batch_size)
        asked["generation"] = replace(generation, samples=count, eval_seed=seed, eval_batch_size=batch)
        asked["problems"] = replace(asked["problems"], split=split, limit=limit)
        name = f"samples-{count}-seed{seed}"
        asked["grading"] = self.arguments.grading
        return OwnSamples(name=name, phase="samples", arm="samples", arm_label="own samples", **asked)

    def sweep(self) -> list[Training]:
        """
        The runs that choose the learning rates, on the validation problems; none without a `sweep_seed`.

        Returns:
            `list[Training]`: RL first: its runs are the long ones.
        """
        arguments, runs = self.arguments, []
        if arguments.sweep_seed is None:
            return []
        for arm, size in arguments.cells():
            if arguments.rates_from(arm) != arm:
                continue
            for rate in arguments.sizes[size]["learning_rates"][arm]:
                name = f"sweep-{arm}-{size}-lr{float(rate):g}"
                runs.append(self._training(name, "sweep", arm, size, arguments.sweep_seed, rate))
        return runs

    def final_names(self) -> dict[str, str]:
        """Algorithm of every final run, by name."""
        return {
            _final_name(arm, size, seed): self.arguments.algorithm_of(arm)
            for seed in self.arguments.seeds
            for arm, size in self.arguments.cells()
        }

    def final(self, rates: dict) -> list[Training]:
        """
        The runs that the report is about, on the test problems.

        Args:
            rates (`dict`): By arm and size, with `learning_rate`.
        Returns:
            `list[Training]`: Seed by seed, RL first.
        """
        runs = []
        for seed in self.arguments.seeds:
            for arm, size in self.arguments.cells():
                rate = rates[self.arguments.rates_from(arm)][size]["learning_rate"]
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
        return [run for run, *_ in self._controls()]

    def controls(self, finals: dict[str, dict]) -> list[Run]:
        """
        The evaluations that train nothing; those that need a missing final run are left out.

        Args:
            finals (`dict[str, dict]`): Records of the final runs, by name.
        Returns:
            `list[Run]`
        """
        runs = []
        for title, name, control, seed in self._controls():
            asked = {"name": title, "phase": "control", "arm": name, "arm_label": control["label"]} | self._asked()
            if control["kind"] == "prompted":
                told = replace(asked["generation"], system_prompt=control["system_prompt"])
                runs.append(Untrained(**asked | {"generation": told}))
                continue
            size = control["size"]
            asked |= self._sized(size) | {"seed": seed, "adapter": self._adapter(size, seed)}
            if control["kind"] == "zero":
                runs.append(ZeroAdapter(**asked))
            elif (trained := finals.get(_final_name(control["of"], size, seed))) is not None:
                runs.append(RandomValues(**asked, norm=float(np.linalg.norm(flat_values(trained)))))
        return runs

    def _training(self, name, phase, arm, size, seed, rate) -> Training:
        described = self.arguments.arms[arm]
        recipe = self.recipes[arm] | described.get("arguments", {})
        settings = {key: value for key, value in recipe.items() if key not in ADAPTER_KEYS | {"output_dir"}}
        algorithm = self.arguments.algorithm_of(arm)
        rate_key = self.arguments.rate_key(arm)
        if rate_key == "relative_kl":
            settings.pop("learning_rate", None)
        settings |= self._adapter(size, seed) | {"seed": seed, rate_key: float(rate)}
        asked = self._asked() | {"settings": settings, "inputs": _hashes(settings)}
        if phase == "sweep":
            asked["problems"] = replace(asked["problems"], split=self.arguments.validation_split)
        if "own_samples" in described:
            sampling = self._sampling(described["own_samples"], seed)
            asked |= {"own_samples": sampling.name, "own_samples_digest": sampling.digest}
        asked |= self._sized(size) | {"script": algorithm}
        kind = Evolution if algorithm == "es" else Training
        if "launcher" in described:
            kind, asked = Launched, asked | {"launcher": described["launcher"]}
        return kind(name=name, phase=phase, arm=arm, arm_label=described["label"], **asked)

    def _asked(self) -> dict:
        """What every run has: the model and the data, the test problems, and how they are answered."""
        names = (*MODEL_KEYS, "task", "system_prompt", "instruction", "limit")
        names += ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
        recipe = next(iter(self.recipes.values()))
        settings = {key: recipe[key] for key in names if key in recipe}
        generation = self.arguments.generation_settings()
        generation |= {key: recipe[key] for key in ("task", "system_prompt", "instruction") if key in recipe}
        problems = Problems(
            settings["dataset_name"],
            settings.get("dataset_test_split", "test"),
            settings.get("dataset_config"),
            self.arguments.eval_limit,
        )
        generation = GenerationArguments(**generation)
        return {"settings": settings, "problems": problems, "generation": generation, "inputs": _hashes(settings)}

    def _adapter(self, size, seed) -> dict:
        adapter = dict(self.arguments.sizes[size]["arguments"])
        if adapter.get("adapter", "tinylora") == "tinylora":
            # Seeds that shared one projection would hide how much depends on it.
            adapter.setdefault("projection_seed", seed)
        return adapter

    def _sized(self, size) -> dict:
        return {"size": size, "label": self.arguments.sizes[size]["label"]}


def _known_to(script) -> set[str]:
    """The keys that a script takes in its YAML."""
    return {item.name for described in script.ARGUMENTS for item in fields(described)}


def _final_name(arm, size, seed) -> str:
    return f"final-{arm}-{size}-seed{seed}"


def _hashes(settings) -> dict:
    """So that a result made from other weights or other problems is not taken for this one."""
    model, dataset = Path(settings["model_name_or_path"]), Path(settings["dataset_name"])
    files = [*model.glob("*.safetensors")]
    hashes = {} if files else _stated_hashes(model)
    files += [dataset] if dataset.is_file() else dataset.glob("*.jsonl")
    return hashes | {path.as_posix(): _sha256(path, path.stat().st_mtime_ns) for path in sorted(files)}


def _stated_hashes(model) -> dict:
    """Of weights that the repository does not hold, as a file beside their folder states them: for the report alone."""
    beside = model.with_name(f"{model.name}.sha256")
    lines = beside.read_text(encoding="utf-8").splitlines() if beside.is_file() else []
    return {(model / name).as_posix(): digest for digest, name in map(str.split, lines)}


_KNOWN_HASHES: dict[tuple, str] = {}


def _sha256(path, modified) -> str:
    if (path, modified) not in _KNOWN_HASHES:
        _KNOWN_HASHES[path, modified] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _KNOWN_HASHES[path, modified]
