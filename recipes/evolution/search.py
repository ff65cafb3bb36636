"""
A search by CMA-ES (Hansen, arXiv:1604.00772) in the space of v, by the library `cma`, continued from its log.

The library keeps its state as a pickle. Here the log holds every candidate's fitness, and candidates follow from the
seed: telling the library both again brings it to the same state, in milliseconds.
"""

import json
import math
import warnings
from pathlib import Path

import cma
import numpy as np
from cma.evolution_strategy import InjectionWarning
from evaluation.completions import read_lines
from records.files import append_lines, changes, write_text


# Tolerance between a logged mean and the one computed again: processors differ in the last digits.
SAME_MEAN = 1e-6


class Search:
    """
    Candidates for v, better ones as it is told how good they are.

    Args:
        size (`int`): Number of values.
        sigma (`float`): First standard deviation of the candidates.
        population (`int`, *optional*): Candidates at a time; the library's default by default.
        seed (`int`): Of their random directions.
    """

    def __init__(self, size: int, sigma: float, population: int | None, seed: int):
        # A stream of its own, which nothing else draws from, so that candidates follow from the seed.
        options = {"seed": np.nan, "randn": np.random.RandomState(seed).randn, "verbose": -9, "verb_log": 0}
        options |= {} if population is None else {"popsize": population}
        self._strategy = cma.CMAEvolutionStrategy(np.zeros(size), sigma, options)

    @property
    def mean(self) -> np.ndarray:
        """The centre of the search, its estimate of the best values: shape `(values,)`, float64."""
        return np.asarray(self._strategy.mean)

    @property
    def sigma(self) -> float:
        """Overall standard deviation of the candidates."""
        return float(self._strategy.sigma)

    @property
    def population(self) -> int:
        """Candidates at a time."""
        return self._strategy.popsize

    def ask(self) -> np.ndarray:
        """The next candidates, shape `(population, values)`, float64."""
        with warnings.catch_warnings():
            # Of a direction that the library proposed in a step of which it was told nothing: see [`tell`].
            warnings.simplefilter("ignore", InjectionWarning)
            return np.stack(self._strategy.ask())

    def tell(self, candidates: np.ndarray, fitness: list[float]) -> None:
        """
        Learns how good the last candidates are.

        Args:
            candidates (`numpy.ndarray`): As [`ask`] returned them.
            fitness (`list[float]`): A number for each, the higher the better.

        Of candidates that are all equally good nothing is learnt: the library would take their order for a ranking.
        """
        if len(set(fitness)) > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", InjectionWarning)
                self._strategy.tell(list(candidates), [-value for value in fitness])


class Log:
    """
    A line a step of a search, behind one with its settings. Nothing is written before the first step is done.

    Args:
        path (`Path`): A file of JSON lines, there or not.
        settings (`dict`): What the candidates and their rewards follow from.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings
        self.steps: list[dict] = []
        self._has_written = False

    def replay(self, search: Search) -> None:
        """
        Brings a new search to where the logged one was.

        Args:
            search (`Search`): With nothing told.
        Raises:
            ValueError: If the file is no log, is of another search, or was changed; or if this version of `cma`
                computes other values.
        """
        lines = read_lines(self.path)
        before = lines[0].get("settings") if lines and isinstance(lines[0], dict) else None
        if not isinstance(before, dict):
            raise ValueError(f"{self.path} is no log of a search: choose another --output_dir")
        changed = changes(before, self.settings)
        if changed:
            raise ValueError(f"{self.path} is of a search with {', '.join(changed)}: choose another --output_dir")
        for number, step in enumerate(lines[1:], start=1):
            self._check(number, step, search)
            search.tell(search.ask(), step["fitness"])
            if not np.allclose(search.mean, step["mean"], rtol=SAME_MEAN, atol=SAME_MEAN * search.sigma):
                raise ValueError(
                    f"{self.path}, step {number}: its fitness leads to other values than are logged. The log was "
                    f"changed, or made by another version of cma than {cma.__version__}: choose another --output_dir"
                )
        self.steps = lines[1:]

    def add(self, step: dict) -> None:
        """Writes what a step found, behind those before."""
        self.steps.append(step)
        if self._has_written:
            append_lines(self.path, [step])
            return
        # A new file, or one that may end in a part of a line.
        lines = [{"settings": self.settings}, *self.steps]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._has_written = True

    def _check(self, number: int, step: object, search: Search) -> None:
        """Raises `ValueError` where a line is not what [`add`] wrote."""
        lists = {"fitness": search.population, "mean": len(search.mean)}
        numbers = ("reward", "sigma", "problems", "generated_tokens", "seconds")
        is_right = isinstance(step, dict) and step.get("step") == number
        is_right = is_right and all(
            isinstance(step.get(name), list) and len(step[name]) == size and all(map(_is_number, step[name]))
            for name, size in lists.items()
        )
        if not (is_right and all(_is_number(step.get(name)) for name in numbers)):
            raise ValueError(
                f"{self.path}, line {number + 1} is not what step {number} of this search wrote: the log was changed. "
                "Choose another --output_dir"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
