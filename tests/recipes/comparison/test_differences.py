"""The difference of two models and how sure it is, against NumPy and SciPy."""

import copy

import numpy as np
import pytest
from comparison import report, statistics
from made_up_records import (
    SEEDS,
    N,
    answers,
    pair_of,
    summarized,
)
from scipy import stats


pytestmark = pytest.mark.usefixtures("few_resamples_and_small_figures")


def test_an_interval_holds_the_one_over_seeds_and_the_one_over_problems(made, summary):
    first, second = answers(made, "rl", "13"), answers(made, "sft", "13")
    found = pair_of(summary, "sft", "13")["greedy"]["strict"]
    seeds = first.mean(1) - second.mean(1)
    half = 4.302653 * seeds.std(ddof=1) / np.sqrt(3)  # Student's t, 97.5%, 2 degrees of freedom
    np.testing.assert_allclose(found["over_seeds"], [seeds.mean() - half, seeds.mean() + half], rtol=1e-4)
    assert found["over_problems"] == pytest.approx(statistics.paired_bootstrap(first, second)["interval"], rel=1e-5)
    assert found["interval"][0] == min(found["over_seeds"][0], found["over_problems"][0])
    assert found["interval"][1] == max(found["over_seeds"][1], found["over_problems"][1])
    t_test = stats.ttest_rel(first.mean(1), second.mean(1)).pvalue
    permuted = statistics.paired_bootstrap(first, second)["p_value"]
    assert found["p"] == pytest.approx(max(t_test, permuted), rel=1e-5)
    assert found["difference"] == pytest.approx(seeds.mean(), rel=1e-5) and found["n_seeds"] == 3


def test_an_interval_ends_where_shares_end(made):
    kept = [record for record in copy.deepcopy(made) if record["size"] == "13" and record["arm"] in ("rl", "sft")]
    for record in kept:
        right = int(record["arm"] == "rl" and record["seed"] != 2)
        record["metrics"]["greedy"]["strict"]["correct"] = [right] * N
    found = pair_of(summarized(kept), "sft", "13")["greedy"]["strict"]
    assert found["over_seeds"][1] > 1 and found["interval"] == [pytest.approx(found["over_seeds"][0]), 1.0]


def test_mcnemars_counts_are_those_of_each_seed(made, summary):
    first, second = answers(made, "rl", "2"), answers(made, "sft-own", "2")
    found = pair_of(summary, "sft-own", "2")["greedy"]["strict"]["by_seed"]
    for index, seed in enumerate(found):
        only_first = int(((first[index] == 1) & (second[index] == 0)).sum())
        only_other = int(((first[index] == 0) & (second[index] == 1)).sum())
        assert (seed["seed"], seed["only_first"], seed["only_other"]) == (SEEDS[index], only_first, only_other)
        assert seed["p"] == pytest.approx(stats.binomtest(only_first, only_first + only_other).pvalue, rel=1e-5)


def test_runs_are_compared_with_the_seed_they_share_and_else_not_at_all(made):
    def pair(missing_of_sft, missing_of_rl=()):
        missing = {"sft": missing_of_sft, "rl": missing_of_rl}
        kept = [record for record in made if record["size"] == "13" and record["arm"] in missing]
        return pair_of(summarized([r for r in kept if r["seed"] not in missing[r["arm"]]]), "sft", "13")["greedy"]

    assert pair([3])["strict"]["n_seeds"] == 2 and len(pair([3])["strict"]["by_seed"]) == 2
    assert pair([2, 3])["strict"]["over_seeds"] is None
    assert pair([2, 3], [1])["strict"] is None


def test_answers_that_were_not_kept_are_not_compared(made):
    bare = copy.deepcopy([record for record in made if record["size"] in (None, "13")])
    for record in bare:
        for grading in ("strict", "flexible") if record["phase"] == "final" else ():
            del record["metrics"]["greedy"][grading]["correct"]
    found = summarized(bare)
    assert pair_of(found, "sft", "13")["greedy"]["strict"] is None
    assert "cannot be compared" in report.text(found)
