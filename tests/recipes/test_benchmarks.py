"""The benchmarks on the smallest sizes: that they run, and write and print what they measured. CPU, seconds."""

import contextlib
import functools
import io
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benchmarks import build, fidelity, harness, imports, many_adapters, merge, quantised, saved, shared_batch, step
from records.files import replace_section


ROOT = Path(__file__).parents[2]
SMALL = {
    build: "--hidden 280 --intermediate 320 --key_values 270 --layers 1 --depths 1 --angles 270",
    merge: "--size 64 --values 0.01 0.1 --repeats 1 --drift_size 16 --cycles 20 --our_cycles 20",
    fidelity: "--rows 64 --columns 48 --weights 1 --entries 256 --repeats 1 --texts 2",
    step: "--hidden 64 --key_values 16 --head 16 --intermediate 96 --layers 1 --tokens 8 --repeats 2",
    imports: "--repeats 1",
    saved: "--tokens 8",
    shared_batch: "--runs 2 --rows 2 --repeats 1",
    quantised: "--steps 1 --completions 4 --problems 2 --tokens 4",
    many_adapters: "--hidden 64 --layers 1 --adapters 2 --thousands 1 --rows 3 --tokens 4 --new_tokens 2 --repeats 2",
}


def name_of(script):
    return script.__name__.rpartition(".")[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Runs a benchmark on its smallest sizes; returns its record and what it printed. Each runs once."""

    @functools.cache
    def measure(script):
        if script is quantised:
            pytest.importorskip("bitsandbytes")
        path = tmp_path_factory.mktemp("benchmark") / "results" / f"{name_of(script)}.json"
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", [script.__file__, *SMALL[script].split(), "--output", str(path)])
            script.main()
        return json.loads(path.read_text()), printed.getvalue()

    return measure


def in_one_worker(script):
    """Puts a test where the script's other tests are, so that it runs once."""
    return pytest.mark.xdist_group(script.__name__)


@pytest.mark.parametrize(
    "script", [pytest.param(script, id=name_of(script), marks=in_one_worker(script)) for script in SMALL]
)
def test_a_benchmark_writes_the_rows_that_it_prints(script, measured):
    record, printed = measured(script)
    assert record["rows"] and record["name"] == name_of(script)
    assert harness.table([record]) in printed
    assert record["provenance"]["versions"]["peft"] is not None and record["provenance"]["machine"]["cpu"]


@in_one_worker(many_adapters)
def test_one_more_adapter_is_weighed_in_both_libraries(measured):
    found = measured(many_adapters)[0]["details"]
    ours, theirs = found["adding"]["trl_tinylora"], found["adding"]["peft"]
    assert ours["trained_values"] == theirs["trained_values"] == 7
    # float32 values and nothing else.
    assert ours["tensor_bytes"] == 7 * 4 < theirs["tensor_bytes"]
    assert found["mixed_batch"]["largest_difference_from_alone"] < 1e-5
    assert found["mixed_batch"]["smallest_effect_of_an_adapter"] > 1e-3


@in_one_worker(merge)
def test_pefts_merges_drift_and_ours_do_not(measured):
    drift = measured(merge)[0]["details"]["drift"]["0.1"]
    assert drift["ours"] == 0 < drift["LoRA"]


def test_peak_bytes_are_those_that_exist_at_one_time():
    def work():
        first = torch.empty(1000, 100)
        second = first + 1
        del first
        return second, torch.empty(500, 100)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        assert harness.peak_bytes(work) == pytest.approx(2 * 400_000, rel=0.01)
        # The negative control: one more that stays.
        kept = []
        assert harness.peak_bytes(lambda: kept.append(torch.empty(1000, 100)) or work()) == pytest.approx(
            3 * 400_000, rel=0.01
        )


def test_actions_take_turns_in_changing_order():
    order = []
    times = harness.in_turns({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3, warmup=0)
    assert "".join(order) == "abcbcacab" and all(len(taken) == 3 for taken in times.values())


def test_the_tables_of_benchmarks_are_those_of_the_committed_records():
    for name, section, content in (
        ("docs/benchmarks.md", "benchmarks", harness.committed()),
        ("README.md", "costs", harness.committed_short()),
    ):
        document = (ROOT / name).read_text()
        assert replace_section(document, section, content) == document, f"{name}: run `make results`"
    for path in harness.RESULTS.glob("*.json"):
        assert not json.loads(path.read_text())["provenance"]["git"]["is_dirty"], path


def test_the_readmes_row_is_the_one_with_the_largest_ratio_and_a_bound_that_does_not_hold_is_said():
    def row(claim, ratio, holds):
        whose = "LoRA r=1" if "step" in claim else "the other"
        return asdict(harness.Row(claim, 1.0, 2.0, whose, "s", ratio, bound="at most 1", holds=holds))

    records = [
        {"name": script, "rows": [row(f"{script}: {part}, a", 0.5, True), row(f"{script}: {part}, b", 1.5, False)]}
        for script, part, _ in harness.IN_README
    ]
    shown = harness.short_table(records)
    assert shown.count(", b |") == len(harness.IN_README) == 5 and ", a |" not in shown
    assert harness.missed(records[0]) == [f"not within its bound (at most 1): {records[0]['rows'][1]['claim']}"]
    with pytest.raises(ValueError, match="step.json has no row of"):
        harness.short_table(records[2:])
