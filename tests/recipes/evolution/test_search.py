"""The search for values: what it finds, that its candidates follow from the seed, and that its log continues it."""

import json
import warnings

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
            counted = {"reward": 0.1, "sigma": search.sigma, "problems": 4, "generated_tokens": 9, "seconds": 0.5}
            log.add({"step": step + 1, "fitness": fitness, "mean": search.mean.tolist(), **counted})
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


def test_a_flat_step_brings_no_warning_of_the_library():
    search = Search(4, 0.3, 4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(12):
            candidates = search.ask()
            search.tell(candidates, [0.0] * 4 if step % 2 else fitness_of(candidates))


def test_a_search_of_which_the_log_was_cut_off_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = advance(Search(13, 0.3, None, seed=3), 9)
    log = Log(tmp_path / "log.jsonl", SETTINGS)
    assert not log.path.exists()
    advance(Search(13, 0.3, None, seed=3), 5, log)
    with log.path.open("a") as file:
        file.write('{"step": 6, "fitn')
    before = log.path.read_bytes()

    continued, again = Search(13, 0.3, None, seed=3), Log(log.path, SETTINGS)
    again.replay(continued)
    assert [step["step"] for step in again.steps] == [1, 2, 3, 4, 5] and log.path.read_bytes() == before
    for step in range(5, 9):
        candidates = continued.ask()
        continued.tell(candidates, fitness_of(candidates))
        again.add({**again.steps[-1], "step": step + 1, "mean": continued.mean.tolist()})
    assert np.array_equal(continued.ask(), whole.ask())
    # The part of a line is gone.
    assert [json.loads(line).get("step") for line in log.path.read_text().splitlines()] == [None, *range(1, 10)]


ALTERED = {
    "other settings": (lambda lines: lines[0]["settings"].update(sigma=0.1), r"sigma=0.1 \(now 0.3\).*--output_dir"),
    "settings of another kind": (lambda lines: lines[0].update(settings=3), "is no log of a search"),
    "without settings": (lambda lines: lines.pop(0), "is no log of a search"),
    "a number": (lambda lines: lines.insert(0, 5), "is no log of a search"),
    "empty": (lambda lines: lines.clear(), "is no log of a search"),
    "another order": (lambda lines: lines[2]["fitness"].reverse(), "step 2: its fitness leads to other values"),
    "another mean": (lambda lines: lines[2]["mean"].__setitem__(0, 9.0), "step 2: its fitness leads to other values"),
    "a list": (lambda lines: lines.__setitem__(2, [1, 2]), "line 3 is not what step 2 of this search wrote"),
    "without fitness": (lambda lines: lines[2].pop("fitness"), "line 3 is not what step 2"),
    "fitness of a text": (lambda lines: lines[2].update(fitness=["1"] * 11), "line 3 is not what step 2"),
    "too few": (lambda lines: lines[2]["fitness"].pop(), "line 3 is not what step 2"),
    "not finite": (lambda lines: lines[2]["fitness"].__setitem__(0, float("nan")), "line 3 is not what step 2"),
    "a mean of another size": (lambda lines: lines[2]["mean"].pop(), "line 3 is not what step 2"),
    "a line twice": (lambda lines: lines.insert(2, lines[2]), "line 4 is not what step 3"),
    "a line less": (lambda lines: lines.pop(2), "line 3 is not what step 2"),
    "without tokens": (lambda lines: lines[3].pop("generated_tokens"), "line 4 is not what step 3"),
}


@pytest.mark.bad_input("a run to be continued")
@pytest.mark.parametrize("how", ALTERED)
def test_a_log_that_is_not_of_this_search_is_refused(tmp_path, how):
    change, message = ALTERED[how]
    log = Log(tmp_path / "log.jsonl", SETTINGS)
    advance(Search(13, 0.3, None, seed=0), 3, log)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    change(lines)
    log.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = log.path.read_text()
    with pytest.raises(ValueError, match=message):
        Log(log.path, SETTINGS).replay(Search(13, 0.3, None, seed=0))
    assert log.path.read_text() == before
