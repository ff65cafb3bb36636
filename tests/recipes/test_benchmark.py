"""The command that runs one benchmark."""

import sys

import benchmark
import pytest


@pytest.mark.parametrize("arguments", [[], ["speed"]])
def test_an_unknown_benchmark_is_answered_with_the_names(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    names = "one of build, .*, merge, quantised, sampling, saved, shared_batch, step; got"
    with pytest.raises(SystemExit, match=names):
        benchmark.main()


def test_a_benchmark_gets_the_remaining_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "imports", "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 0 and "processes that are timed" in capsys.readouterr().out
