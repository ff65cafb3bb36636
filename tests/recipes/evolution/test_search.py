"""The search for values: what it finds, that its candidates follow from the seed, and that its log continues it."""

import json

import numpy as np
import pytest
from evolution.search import Log, Search


BEST = np.linspace(-0.5, 0.5, 13)
SETTINGS = {"sigma": 0.3, "seed": 0}


def fitness_of(candidates):
    return [-float(((candidate - BEST[: len(candidate)]) ** 2).sum()) for candidate in candidates]


def advance(search, steps, log=None):
    for step in range(steps):
        candidates = search.ask()
        fitness = fitness_of(candidates)
        search.tell(candidates, fitness)
        if log is not None:
            log.add({"step": step + 1, "fitness": fitness, "mean": search.mean.tolist()})
    return search


@pytest.mark.parametrize("size", [1, 2, 13])
def test_the_mean_goes_where_fitness_is_highest(size):
    search = advance(Search(size, 0.3, None, seed=0), 120)
    np.testing.assert_allclose(search.mean, BEST[:size], atol=1e-3)


def test_candidates_are_normal_around_zero_with_the_given_deviation():
    candidates = Search(13, 0.2, 4000, seed=0).ask()
    assert candidates.shape == (4000, 13)
    assert abs(candidates.mean()) < 0.01 and candidates.std() == pytest.approx(0.2, rel=0.03)


def test_candidates_follow_from_the_seed_whatever_else_is_drawn():
    first = advance(Search(13, 0.3, None, seed=1), 5).ask()
    np.random.seed(7)
    second = advance(Search(13, 0.3, None, seed=1), 5)
    np.random.standard_normal(100)
    assert np.array_equal(first, second.ask())
    assert not np.array_equal(first, advance(Search(13, 0.3, None, seed=2), 5).ask())


def test_of_candidates_that_are_equally_good_nothing_is_learnt():
    search = Search(13, 0.3, None, seed=0)
    for _ in range(5):
        search.tell(search.ask(), [0.25] * search.population)
    assert not search.mean.any()


def test_a_search_of_which_the_log_was_cut_off_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = advance(Search(13, 0.3, None, seed=3), 9)
    log = Log(tmp_path / "log.jsonl")
    log.begin(SETTINGS)
    advance(Search(13, 0.3, None, seed=3), 5, log)
    with log.path.open("a") as file:
        file.write('{"step": 6, "fitn')

    continued, again = Search(13, 0.3, None, seed=3), Log(log.path)
    again.replay(continued, SETTINGS)
    assert [step["step"] for step in again.steps] == [1, 2, 3, 4, 5]
    advance(continued, 4)
    assert np.array_equal(continued.ask(), whole.ask())
    # The part of a line is gone.
    assert len(log.path.read_text().splitlines()) == 6


@pytest.mark.bad_input("a run to be continued")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[0]["settings"].update(sigma=0.1), r"sigma=0.1 \(now 0.3\).*choose another --output_dir"),
        (
            lambda lines: lines[2].update(fitness=[0.0, *lines[2]["fitness"][1:]]),
            r"step 2 leads to other values with cma",
        ),
        (lambda lines: lines.pop(0), "is no log of a search"),
    ],
    ids=["other settings", "altered", "without settings"],
)
def test_a_log_that_is_not_of_this_search_is_refused(tmp_path, change, message):
    log = Log(tmp_path / "log.jsonl")
    log.begin(SETTINGS)
    advance(Search(13, 0.3, None, seed=0), 3, log)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    change(lines)
    log.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = log.path.read_text()
    with pytest.raises(ValueError, match=message):
        Log(log.path).replay(Search(13, 0.3, None, seed=0), SETTINGS)
    assert log.path.read_text() == before
