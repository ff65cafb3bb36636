"""The toy's profile: that looks are put down to the right part, shares to whole runs, and a comparison to its time."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks import toy_profile


def stack(*calls):
    """The innermost frame of calls in that order, each a module's name and a function's."""
    frame = None
    for module, name in calls:
        code = SimpleNamespace(co_name=name)
        frame = SimpleNamespace(f_globals={"__name__": module}, f_code=code, f_back=frame)
    return frame


TRAINING = ("transformers.trainer", "train")
BACKWARD = ("accelerate.accelerator", "backward")
GENERATION = ("transformers.generation.utils", "generate")


@pytest.mark.parametrize(
    ("calls", "found"),
    [
        ([("comparison.runs", "run"), TRAINING, BACKWARD], "backward"),
        ([TRAINING, GENERATION, ("torch.nn.modules.module", "forward")], "generation"),
        ([TRAINING, BACKWARD, ("importlib._bootstrap", "_find_and_load")], "imports"),
        ([TRAINING, ("elsewhere", "backward")], "rest"),
    ],
)
def test_a_look_is_put_down_to_the_innermost_part_that_has_a_name(calls, found):
    assert toy_profile.place(stack(*calls)) == ("training", found)


def test_generation_of_an_evaluation_is_not_that_of_training():
    assert toy_profile.place(stack(("evaluation.run", "evaluate"), GENERATION)) == ("evaluation", "generation")
    assert toy_profile.place(stack(GENERATION)) == ("set-up", "generation")


@pytest.mark.parametrize(("module", "name"), [*toy_profile.PARTS, *toy_profile.STAGES])
def test_every_named_function_is_there(module, name):
    # A renamed one would silently become part of the rest.
    source = importlib._bootstrap if module == "importlib._bootstrap" else importlib.util.find_spec(module).origin
    assert hasattr(source, name) or f"def {name}(" in Path(source).read_text()


def test_looks_find_where_the_time_is_spent():
    seconds = toy_profile.profiled(lambda: [json.loads("[" + "0," * 100_000 + "0]") for _ in range(50)])
    assert sum(seconds.values()) > 0 and set(seconds) == {("set-up", "rest")}
    # The negative control: the same work under a name.
    named = {"__name__": BACKWARD[0], "json": json}
    exec("def backward(): [json.loads('[' + '0,' * 100_000 + '0]') for _ in range(50)]", named)
    assert next(iter(toy_profile.profiled(named["backward"]))) == ("set-up", "backward")


def test_shares_are_those_of_all_steps():
    seconds = {("training", "forward"): 2.0, ("training", "rest"): 1.0, ("evaluation", "generation"): 10.0}
    shares = toy_profile.whole(seconds, factor=10)
    assert shares == {"training: forward": 0.5, "training: rest": 0.25, "evaluation: generation": 0.25}
    assert list(shares)[0] == "training: forward"


def test_a_comparison_took_from_its_first_start_to_its_last_end(tmp_path):
    (tmp_path / "runs").mkdir()
    ends = {"a": ("2026-01-01T00:01:40+00:00", 100), "b": ("2026-01-01T00:08:00+00:00", 370)}
    for name, (finished, seconds) in ends.items():
        record = {"name": name, "finished": finished, "wall_seconds": seconds}
        record |= {"machine": {"gpu": None, "cores": 2}, "git": None}
        (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(record))
    (row,), details = toy_profile.of_comparison(tmp_path, start=10)
    assert row.ours == 8 * 60 + 2 * 10 and row.holds and "2 runs, 2 cores" in row.claim
    assert details["runs_at_a_time"] == pytest.approx(470 / 500)
    # The negative control: a process that took two minutes to begin.
    assert not toy_profile.of_comparison(tmp_path, start=120)[0][0].holds
    assert toy_profile.of_comparison(tmp_path / "none", start=10) == ([], {})
