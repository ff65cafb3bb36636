"""What a comparison's YAML may say, and what of it is refused before anything runs."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import trl
from evaluation.arguments import GenerationArguments
from training.arguments import AdapterArguments


# The file's name says the script that runs it.
ALGORITHMS = {"grpo": "rl", "es": "es", "sft": "sft"}
# The long runs first.
ORDER = list(ALGORITHMS.values())
# What a size replaces in a recipe, as a whole: half of one adapter and half of the other would be a third.
ADAPTER_KEYS = {item.name for item in fields(AdapterArguments)} | {
    item.name
    for item in fields(trl.ModelConfig)
    if item.name.startswith(("lora_", "use_peft", "use_rslora", "use_dora"))
}
ARM_KEYS = {"label", "recipe", "arguments", "launcher", "own_samples", "rate_key", "rates_of", "sizes"}
# The argument that the rates of an arm set, by algorithm, the first by default: a rate, how far a step shall go, or the
# first deviation of a search.
RATE_KEYS = {
    "rl": ("learning_rate", "relative_kl"),
    "sft": ("learning_rate", "relative_kl"),
    "es": ("sigma",),
}
SIZE_KEYS = {"label", "arguments", "learning_rate", "learning_rates"}
# Keys of a control, by kind.
CONTROLS = {"zero": {"size"}, "random-values": {"size", "of"}, "prompted": {"system_prompt"}}


@dataclass
class CompareArguments(GenerationArguments):
    """
    A comparison: its arms, the sizes of the update, controls, the seeds, and where things go.

    Args:
        arms (`dict`): By name: `label`, `recipe` (the YAML, named after its script: `grpo.yaml`, `sft.yaml` or
            `es.yaml`), and optionally `arguments` (of the recipe, that this arm changes), `own_samples` (train on the
            untrained model's own right answers, out of so many samples a problem), `rate_key` (`"relative_kl"`, where
            the arm's rates are those, and the learning rate is found), `rates_of` (an arm whose learning rates are
            taken), `launcher` (YAML of `accelerate launch`, to train in several processes) and `sizes` (of all, by
            default).
        sizes (`dict`): By name: `label`, `arguments` (of the adapter) and `learning_rate` (by arm; used without a
            sweep) or `learning_rates` (a grid by arm; used by a sweep).
        controls (`dict`): By name: `label`, `kind` and its keys: `"zero"` (`size`: that adapter, untrained),
            `"random-values"` (`size`, `of`: values of random direction, as long as those that this arm trained) or
            `"prompted"` (`system_prompt`: the untrained model, told so).
        seeds (`list[int]`): Seeds of the final runs: of the data's order, the samples, and the projections.
        sweep_seed (`int`, *optional*): Seed of a sweep that chooses the learning rates from the sizes' grids; without
            one they are those of `learning_rate`.
        grading (`str`, *optional*, defaults to `"strict"`): What counts as right, in the report and where learning
            rates and own answers are chosen: `"strict"`, or `"flexible"` for models that do not know the marker.
        only_sizes (`list[str]`, *optional*): These of `sizes` alone: what is most wanted goes first, and the same
            command without this adds the rest.
        validation_split (`str`, *optional*, defaults to `"validation"`): Problems that choose the learning rates. The
            final ones are the recipes' `dataset_test_split`.
        eval_limit (`int`, *optional*): Evaluate on the first problems of a split only.
        output_dir (`str`, *optional*, defaults to `"results/compare"`): For report, summary and a JSON a run.
        work_dir (`str`, *optional*): For models, completions and logs; defaults to `work` in the output folder.
        jobs (`int`, *optional*): Runs at a time: by default the number of CPU cores, or of GPUs where there are some.
        report_only (`bool`, *optional*, defaults to `False`): Rebuild the report from the JSON there is; train nothing.
        update_readme (`str`, *optional*): A Markdown file whose table, between the markers `<!-- results:toy -->`, is
            renewed.
    Raises:
        ValueError: If something is missing or contradictory.
    """

    arms: dict | None = field(default=None, metadata={"help": "What is compared; see recipes/toy/compare.yaml."})
    sizes: dict | None = field(default=None, metadata={"help": "Sizes of the update; see recipes/toy/compare.yaml."})
    controls: dict | None = field(default=None, metadata={"help": "Controls that train nothing."})
    seeds: list[int] = field(default_factory=list, metadata={"help": "Seeds of the final runs."})
    sweep_seed: int | None = field(default=None, metadata={"help": "Seed of a sweep of learning rates."})
    grading: Literal["strict", "flexible"] = field(default="strict", metadata={"help": "What counts as right."})
    only_sizes: list[str] | None = field(default=None, metadata={"help": "These of the sizes alone, for now."})
    validation_split: str = field(default="validation", metadata={"help": "Problems that choose the learning rates."})
    eval_limit: int | None = field(default=None, metadata={"help": "Evaluate on the first problems of a split only."})
    output_dir: str = field(default="results/compare", metadata={"help": "Folder for the report and a JSON a run."})
    work_dir: str | None = field(default=None, metadata={"help": "Folder for models, completions and logs."})
    jobs: int | None = field(default=None, metadata={"help": "Runs at a time."})
    report_only: bool = field(default=False, metadata={"help": "Rebuild the report from the JSON there is."})
    update_readme: str | None = field(default=None, metadata={"help": "A Markdown file whose table is renewed."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("arms", "sizes", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give it in the YAML, as recipes/toy/compare.yaml does")
        if self.sweep_seed in self.seeds:
            raise ValueError(
                f"sweep_seed={self.sweep_seed} is among seeds={self.seeds}: the final seeds must be new ones"
            )
        if self.grading not in ("strict", "flexible"):
            raise ValueError(f"grading must be 'strict' or 'flexible', got {self.grading!r}")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"jobs must be at least 1, got {self.jobs}")
        self._check_sizes()
        self._check_arms()
        self._check_controls()
        self._check_rates()
        self._take_only()

    def _take_only(self):
        """Drops the sizes that are not asked for, and the controls of them."""
        if self.only_sizes is None:
            return
        _check_names("the comparison", "only_sizes", {"only_sizes": self.only_sizes}, self.sizes)
        self.controls = {
            name: control
            for name, control in (self.controls or {}).items()
            if control.get("size") in (None, *self.only_sizes)
        }
        self.sizes = {name: size for name, size in self.sizes.items() if name in self.only_sizes}

    def _check_sizes(self):
        for name, size in self.sizes.items():
            foreign = set(size.get("arguments", {})) - ADAPTER_KEYS
            if set(size) - SIZE_KEYS or foreign or not {"label", "arguments"} <= set(size):
                raise ValueError(
                    f"sizes[{name!r}] must hold label, arguments of the adapter, and learning rates; got "
                    f"{sorted(size)} with arguments {sorted(size.get('arguments', {}))}"
                )

    def _check_arms(self):
        for name, arm in self.arms.items():
            where = f"arms[{name!r}]"
            _check_keys(where, arm, ARM_KEYS, {"label", "recipe"})
            if Path(arm["recipe"]).stem not in ALGORITHMS:
                raise ValueError(
                    f"{where}.recipe must be a grpo.yaml, an sft.yaml or an es.yaml, got {arm['recipe']!r}"
                )
            keys = RATE_KEYS[self.algorithm_of(name)]
            if arm.get("rate_key", keys[0]) not in keys:
                raise ValueError(f"{where}.rate_key must be one of {', '.join(keys)}, got {arm['rate_key']!r}")
            _check_names(where, "sizes", arm, self.sizes)
            _check_names(where, "rates_of", arm, self.arms)
            if "launcher" in arm:
                self._check_launcher(name, where, arm)

    def _check_launcher(self, name: str, where: str, arm: dict) -> None:
        if arm.get("rate_key") or self.algorithm_of(name) == "es":
            raise ValueError(f"{where}.launcher is for a grpo.yaml or sft.yaml with a learning rate: drop it")
        if not Path(arm["launcher"]).is_file():
            raise ValueError(f"{where}.launcher={arm['launcher']!r} is not there: name one of recipes/accelerate")
        if any(self.sizes[size]["arguments"].get("adapter") == "full" for size in self.sizes_of(name)):
            raise ValueError(f"{where}.launcher is for adapters: leave full fine-tuning out of its sizes")

    def _check_controls(self):
        for name, control in (self.controls or {}).items():
            where, kind = f"controls[{name!r}]", control.get("kind")
            if kind not in CONTROLS:
                raise ValueError(f"{where}.kind must be one of {sorted(CONTROLS)}, got {kind!r}")
            needed = {"label", "kind"} | CONTROLS[kind]
            _check_keys(where, control, needed, needed)
            _check_names(where, "size", control, self.sizes)
            _check_names(where, "of", control, self.arms)

    def _check_rates(self):
        key = "learning_rate" if self.sweep_seed is None else "learning_rates"
        for arm, size in self.cells():
            arm = self.rates_from(arm)
            if not self.sizes[size].get(key, {}).get(arm):
                missing = "rate" if self.sweep_seed is None else "grid"
                raise ValueError(
                    f"sizes[{size!r}].{key} has no {missing} for {arm!r}: without a sweep_seed each arm "
                    "needs a learning_rate, with one a grid of learning_rates"
                )

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
        """`"rl"`, `"sft"` or `"es"`, as the name of the arm's recipe says."""
        return ALGORITHMS[Path(self.arms[arm]["recipe"]).stem]

    def rate_key(self, arm: str) -> str:
        """The argument that an arm's rates set."""
        return self.arms[arm].get("rate_key", RATE_KEYS[self.algorithm_of(arm)][0])

    def cells(self) -> list[tuple[str, str]]:
        """Arm and size of everything that is trained, RL first: its runs are the long ones."""
        arms = sorted(self.arms, key=lambda arm: ORDER.index(self.algorithm_of(arm)))
        return [(arm, size) for arm in arms for size in self.sizes_of(arm)]

    def rates_from(self, arm: str) -> str:
        """The arm whose learning rates this one takes: its own, where nothing else is said."""
        return self.arms[arm].get("rates_of", arm)


def _check_keys(where: str, given: dict, known: Iterable[str], needed: Iterable[str]) -> None:
    if set(given) - set(known) or set(needed) - set(given):
        raise ValueError(f"{where} may hold {sorted(known)} and needs {sorted(needed)}; got {sorted(given)}")


def _check_names(where: str, key: str, given: dict, known: Iterable[str]) -> None:
    """That what stands under a key, a name or a list of them, is known."""
    names = given.get(key, [])
    unknown = [name for name in ([names] if isinstance(names, str) else names) if name not in known]
    if unknown:
        raise ValueError(f"{where}.{key} names {unknown}, of which there are only {sorted(known)}")
