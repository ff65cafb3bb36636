"""Made-up records and their summary; the paths in the YAML files are relative to the root of the repository."""

import pytest
from comparison import figures
from evaluation import intervals
from made_up_records import records, summarized
from toy_comparison import ROOT


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def few_resamples_and_small_figures():
    """What is tested here is what is made of intervals; the intervals themselves have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", 999)
        patch.setattr(figures, "DPI", 50)
        yield


@pytest.fixture(scope="module")
def made():
    return records()


@pytest.fixture(scope="module")
def few(made):
    """Enough for every figure."""
    return [record for record in made if record["size"] in (None, "2", "13", "13-bf16")]


@pytest.fixture(scope="module")
def summary(made, few_resamples_and_small_figures):
    return summarized(made)
