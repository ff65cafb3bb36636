"""
A search by CMA-ES (Hansen, arXiv:1604.00772) in the space of v, of the library `cma`, continued from its log.

The library's state is a pickle, which another program could have written. Here a run is continued by what it was told:
every candidate's fitness is in the log, candidates follow from the seed, and telling them again takes milliseconds.
"""

import json
from pathlib import Path

import cma
import numpy as np
from evaluation.completions import read_lines


# Between a mean that was logged and the one that the log leads to again: processors differ in the last digits.
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
        return np.stack(self._strategy.ask())

    def tell(self, candidates: np.ndarray, fitness: list[float]) -> None:
        """
        Learns how good the last candidates are.

        Args:
            candidates (`numpy.ndarray`): As [`ask`] returned them.
            fitness (`list[float]`): A number for each, the higher the better.
        """
        # Where all are equal nothing is known, and the library would take them for a ranking.
        if len(set(fitness)) > 1:
            self._strategy.tell(list(candidates), [-value for value in fitness])


class Log:
    """
    A line a step of a search, behind one with its settings.

    Args:
        path (`Path`): A file of JSON lines, there or not.
    """

    def __init__(self, path: Path):
        self.path = path
        self.steps: list[dict] = []

    def begin(self, settings: dict) -> None:
        """Writes the settings, into a new file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")

    def replay(self, search: Search, settings: dict) -> None:
        """
        Brings a new search to where the logged one was.

        Args:
            search (`Search`): With nothing told.
            settings (`dict`): What this run's candidates and completions follow from.
        Raises:
            ValueError: If the file is no log, is of another run, or leads somewhere else with this version of `cma`.
        """
        lines = read_lines(self.path)
        if not lines or "settings" not in lines[0]:
            raise ValueError(f"{self.path} is no log of a search: choose another --output_dir")
        before = lines[0]["settings"]
        changed = [
            f"{name}={before.get(name)!r} (now {settings.get(name)!r})"
            for name in sorted(before.keys() | settings.keys())
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(f"{self.path} is of a run with {', '.join(changed)}: choose another --output_dir")
        self.steps = lines[1:]
        for step in self.steps:
            search.tell(search.ask(), step["fitness"])
            if not np.allclose(search.mean, step["mean"], rtol=SAME_MEAN, atol=SAME_MEAN * search.sigma):
                raise ValueError(
                    f"{self.path}: step {step['step']} leads to other values with cma {cma.__version__} than it did "
                    "when it was logged. Continue with the version that its settings name, or start anew"
                )
        # Without the part of a line at which it was interrupted.
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def add(self, step: dict) -> None:
        """Appends what a step found."""
        self.steps.append(step)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(step) + "\n")
