"""Runs side by side: what waits, what is tried again, what an interrupt ends."""

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest
from comparison import workers
from comparison.plan import Plan
from toy_comparison import (
    InlinePool,
    comparison,
    final_runs,
)


def team(tmp_path, monkeypatch, outcome, jobs=2):
    """Workers whose pools answer with `outcome(run)`, the names in the order of their start, and the pools made."""
    started, pools = [], []

    class Pool(InlinePool):
        def __init__(self, *args, **kwargs):
            pools.append(self)

        def submit(self, function, run, *args):
            started.append(run.name)
            return outcome(run)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    arguments = comparison(tmp_path, jobs=jobs)
    runs = [*Plan(arguments).samples(), *final_runs(arguments).values()]
    progress = workers.Progress(arguments, dict.fromkeys(run.name for run in runs), set())
    monkeypatch.setattr(progress, "ended", lambda run, error: progress.seconds.setdefault(run.name, error))
    return workers.Workers(arguments, {}, progress), runs, started, pools


def answered(value=None, error=None):
    future = Future()
    future.set_result(value) if error is None else future.set_exception(error)
    return future


def test_a_run_waits_for_the_samples_it_trains_on_and_others_go_ahead(tmp_path, monkeypatch):
    drawing = Future()
    outcome = {"samples-8-seed1": drawing}

    def start(run):
        if run.name == "final-sft-13-seed1":
            drawing.set_result(None)
        return outcome.get(run.name, answered())

    group, runs, started, pools = team(tmp_path, monkeypatch, start)
    by_name = {run.name: run for run in runs}
    names = ["samples-8-seed1", "final-sft-own-13-seed1", "final-sft-full-seed1", "final-sft-13-seed1"]
    with group:
        group.do([by_name[name] for name in names])
        group.do([by_name["final-rl-13-seed1"]])
    assert started == [names[0], names[2], names[3], names[1], "final-rl-13-seed1"]
    assert len(pools) == 1, "the workers stay from one list of runs to the next"


def test_a_run_whose_worker_is_killed_is_tried_once_more_and_the_others_go_on(tmp_path, monkeypatch):
    def start(run):
        return answered(error=BrokenProcessPool()) if run.name == "final-rl-13-seed1" else answered()

    group, runs, started, pools = team(tmp_path, monkeypatch, start, jobs=1)
    with group:
        group.do(runs[4:])
    assert len(pools) == 2 and started.count("final-rl-13-seed1") == 2
    ended = group.progress.seconds
    assert {name for name, error in ended.items() if error} == {"final-rl-13-seed1"}
    assert "killed, twice" in ended["final-rl-13-seed1"] and set(ended) == {run.name for run in runs[4:]}


def test_an_interrupt_ends_the_processes_at_once(tmp_path, monkeypatch):
    class Child:
        is_ended = False

        def terminate(self):
            self.is_ended = True

    children = [Child(), Child()]
    monkeypatch.setattr(workers.multiprocessing, "active_children", lambda: children)
    group, runs, started, pools = team(tmp_path, monkeypatch, lambda run: answered(error=KeyboardInterrupt()), jobs=1)
    with pytest.raises(KeyboardInterrupt), group:
        group.do(runs)
    assert all(child.is_ended for child in children) and len(started) == 1
    # The negative control: where nothing happens, they end by themselves.
    quiet = [Child()]
    monkeypatch.setattr(workers.multiprocessing, "active_children", lambda: quiet)
    with team(tmp_path, monkeypatch, lambda run: answered())[0]:
        pass
    assert not quiet[0].is_ended
