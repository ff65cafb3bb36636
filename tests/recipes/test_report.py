"""The report of a comparison: its numbers against NumPy and SciPy, its words at their borders, its figures.

Every record here is made up: drawn from a seeded generator, and like a real one in its form only. CPU, seconds.
"""

import copy
import json
import re

import conclusions
import figures
import numpy as np
import pytest
import report
import statistical
from matplotlib.text import Text
from scipy import stats


N, SAMPLES, SEEDS = 80, 4, (1, 2, 3)
SIZES = {
    "1": ("TinyLoRA, 1 value", 1, {"adapter": "tinylora", "u": 1, "n_tie": 28}),
    "2": ("TinyLoRA, 2 values", 2, {"adapter": "tinylora", "u": 1, "n_tie": 14}),
    "13": ("TinyLoRA, 13 values", 13, {"adapter": "tinylora", "u": 13, "n_tie": 28}),
    "13-bf16": ("TinyLoRA, 13 values in bfloat16", 13, {"adapter": "tinylora", "kept_dtype": "bfloat16"}),
    "28-structured": ("TinyLoRA, structured", 28, {"adapter": "tinylora", "tying": "structured"}),
    "xs": ("LoRA-XS, rank 2", 112, {"adapter": "tinylora", "projection": "basis"}),
    "lora-r1": ("LoRA, rank 1", 9344, {"adapter": "lora"}),
    "full": ("full fine-tuning", 833280, {"adapter": "full"}),
}
ARMS = {
    "rl": (
        "RL",
        "rl",
        {
            "1": 0.3,
            "2": 0.45,
            "13": 0.9,
            "13-bf16": 0.85,
            "28-structured": 0.8,
            "xs": 0.93,
            "lora-r1": 0.97,
            "full": 0.98,
        },
    ),
    "sft": ("SFT on gold answers", "sft", {"1": 0.12, "2": 0.3, "13": 0.4, "lora-r1": 0.94, "full": 0.92}),
    "sft-own": ("SFT on own correct samples", "sft", {"1": 0.2, "2": 0.33, "13": 0.7, "lora-r1": 0.95, "full": 0.9}),
    "rl-format": ("RL, format-only reward", "rl", {"13": 0.35}),
    "rl-random": ("RL, random reward", "rl", {"13": 0.1}),
}
RATES = {
    arm: {
        size: {
            "learning_rate": 0.01,
            "score": share,
            "grid": {"0.003": share - 0.2 * share, "0.01": share, "0.03": share - 0.1 * share},
            "at_edge": False,
        }
        for size, share in shares.items()
    }
    for arm, (_, _, shares) in ARMS.items()
    if arm in ("rl", "sft", "sft-own")
}
RATES["rl"]["1"] |= {"learning_rate": 0.03, "at_edge": True, "grid": {"0.01": 0.2, "0.03": 0.3}}


def measured(generator, strict, flexible):
    """Greedy and sampled metrics: a problem that strict grading counts is counted by the others as well."""
    luck = generator.random(N)
    greedy, sampled = {}, {}
    for grading, share in (("strict", strict), ("last_number", flexible), ("flexible", flexible)):
        right = (luck < share).astype(int).tolist()
        drawn = generator.binomial(SAMPLES, 0.7 * share, N).tolist()
        greedy[grading] = {"accuracy": float(np.mean(right)), "interval": [0.0, 1.0], "correct": right}
        sampled[grading] = {"accuracy": float(np.mean(drawn)) / SAMPLES, "interval": [0.0, 1.0], "correct": drawn}
    around = {"mean_tokens": 20.0, "truncated": 0.01, "no_marker": 0.1, "tokens": 100}
    sampled["strict"]["pass_at"] = {"1": 0.5, "4": 0.8}
    return {
        "n_problems": N,
        "samples": SAMPLES,
        "temperature": 1.0,
        "greedy": greedy | around,
        "sampled": sampled | around,
    }


def made_up(name, phase, arm, arm_label, **given):
    return {
        "name": name,
        "phase": phase,
        "arm": arm,
        "arm_label": arm_label,
        "algorithm": None,
        "size": None,
        "label": "",
        "seed": None,
        "trained_values": 0,
        "trained_bytes": 0,
        "git": {"commit": "0123456789abcdef", "is_dirty": False},
        "versions": {"torch": "2"},
        "machine": {"cpu": "a CPU", "cores": 2, "gpu": None},
        "inputs": {},
        "finished": "2026-01-02T03:04:05+00:00",
    } | given


def trained(generator, arm, size, seed):
    label, algorithm, shares = ARMS[arm]
    size_label, count, config = SIZES[size]
    share = float(np.clip(shares[size] + generator.normal(0, 0.03), 0, 1))
    steps = np.arange(1, 61)
    rising = (0.3 + (share - 0.3) * steps / 60 + generator.normal(0, 0.02, 60)).tolist()
    curve = {"loss": rising, "mean_token_accuracy": rising, "entropy": rising}
    if algorithm == "rl":
        curve = {key: rising for key in ("reward", "completions/mean_length", "entropy", "clip_ratio/region_mean")}
        curve["entropy"] = [None] + rising[1:]  # as a trainer that had nothing to log yet
    end = np.array([0.6, 0.4])[:count] if algorithm == "rl" else np.array([-0.3, 0.5])[:count]
    walk = (np.arange(61)[:, None] / 60) * (end + generator.normal(0, 0.02, (61, count))) if count <= 2 else None
    reward = {"rl-format": "format", "rl-random": "random"}.get(arm)
    item_bytes = 2 if config.get("kept_dtype") == "bfloat16" else 4
    return made_up(
        f"final-{arm}-{size}-seed{seed}",
        "final",
        arm,
        label,
        algorithm=algorithm,
        size=size,
        label=size_label,
        seed=seed,
        learning_rate=RATES.get(arm, RATES["rl"])[size]["learning_rate"],
        config=config | {"projection_seed": seed} | ({"reward": reward} if reward else {}),
        trained_values=count,
        trained_bytes=count * item_bytes,
        trained={"v": [[0.5] * count]} if count <= 256 else None,
        examples=1600,
        optimizer_steps=60,
        generated_tokens=70000 if algorithm == "rl" else 0,
        trained_tokens=90000,
        train_seconds=30.0 + seed,
        wall_seconds=40.0,
        curve={"step": steps.tolist()} | curve,
        **({} if walk is None else {"path": walk.tolist()}),
        metrics=measured(generator, share, max(share, 0.25)),
    )


def landscape(size, seed):
    label, count, _ = SIZES[size]
    axis = np.linspace(-1, 1, 21)
    mesh = np.stack(np.meshgrid(*[axis] * count, indexing="ij"), -1)
    heights = np.exp(-2 * ((mesh - 0.5) ** 2).sum(-1))
    return made_up(
        f"landscape-{size}-seed{seed}",
        "landscape",
        "landscape",
        "landscape",
        size=size,
        label=label,
        seed=seed,
        grid=[axis.tolist()] * count,
        reward=(0.8 * heights).tolist(),
        greedy=heights.tolist(),
        n_problems=N,
    )


def records(seeds=SEEDS):
    generator = np.random.default_rng(0)
    untrained = measured(generator, 0.08, 0.2)
    made = [made_up("untrained", "untrained", "untrained", "untrained", metrics=untrained)]
    made.append(
        made_up(
            "prompted",
            "control",
            "prompted",
            "untrained, format in the prompt",
            metrics=measured(generator, 0.22, 0.24),
        )
    )
    zero = {"size": "13", "label": SIZES["13"][0]}
    made.append(made_up("zero", "control", "zero", "zero adapter", metrics=copy.deepcopy(untrained), seed=1, **zero))
    drawn = {"examples": 900, "problems": 1000, "generated_tokens": 5000, "accuracy": 0.3, "seed": 1}
    made.append(made_up("samples", "samples", "samples", "own samples", **drawn))
    for seed in seeds:
        metrics = measured(generator, 0.1, 0.2)
        made.append(
            made_up(
                f"random-{seed}",
                "control",
                "random-values",
                "random values of the trained norm",
                metrics=metrics,
                seed=seed,
                **zero,
            )
        )
    made += [
        trained(generator, arm, size, seed) for arm, (_, _, shares) in ARMS.items() for size in shares for seed in seeds
    ]
    return made + [landscape("1", 1), landscape("2", 1)]


def summarized(made=None, rates=RATES, missing=()):
    return report.summarize(records() if made is None else made, rates, list(missing), {"beta": "RL only"}, 60.0)


@pytest.fixture(scope="module", autouse=True)
def few_resamples_and_small_figures():
    """What is tested here is what is made of intervals; the intervals themselves have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistical, "RESAMPLES", 999)
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
def summary(made):
    return summarized(made)


def cell_of(summary, arm, size=None):
    return next(cell for cell in summary["cells"] if cell["arm"] == arm and cell["size"] == size)


def pair_of(summary, other, size):
    return next(pair for pair in summary["pairs"] if pair["other"] == other and pair["size"] == size)


def answers(made, arm, size, kind="greedy", grading="strict"):
    """Shape `(seeds, problems)`."""
    chosen = [record for record in made if (record["arm"], record["size"], record["phase"]) == (arm, size, "final")]
    return np.array([record["metrics"][kind][grading]["correct"] for record in chosen], dtype=float)


def without(made, is_left_out):
    return [record for record in copy.deepcopy(made) if not is_left_out(record)]


# Numbers


def test_a_cell_holds_mean_and_spread_over_seeds(made, summary):
    for kind, samples in (("greedy", 1), ("sampled", SAMPLES)):
        shares = answers(made, "rl", "13", kind).mean(1) / samples
        spread = cell_of(summary, "rl", "13")["accuracy"][kind]["strict"]
        np.testing.assert_allclose(spread["values"], shares, rtol=1e-5)
        assert spread["mean"] == pytest.approx(shares.sum() / 3, rel=1e-5)
        assert spread["std"] == pytest.approx(np.sqrt(((shares - shares.mean()) ** 2).sum() / 2), rel=1e-5)


def test_a_gain_is_reasoning_plus_format(made, summary):
    (untrained,) = (record["metrics"]["greedy"] for record in made if record["phase"] == "untrained")
    for cell in summary["cells"]:
        if cell["role"] != "arm":
            continue
        gains = {measure: found["difference"] for measure, found in cell["gains"]["greedy"].items()}
        for grading in ("strict", "flexible"):
            right = answers(made, cell["arm"], cell["size"], grading=grading)
            assert gains[grading] == pytest.approx(right.mean() - np.mean(untrained[grading]["correct"]), abs=1e-6)
        assert gains["format"] == pytest.approx(gains["strict"] - gains["flexible"], abs=1e-6)


def test_an_interval_holds_the_one_over_seeds_and_the_one_over_problems(made, summary):
    first, second = answers(made, "rl", "13"), answers(made, "sft", "13")
    found = pair_of(summary, "sft", "13")["greedy"]["strict"]
    seeds = first.mean(1) - second.mean(1)
    half = 4.302653 * seeds.std(ddof=1) / np.sqrt(3)  # Student's t, 97.5%, 2 degrees of freedom
    np.testing.assert_allclose(found["over_seeds"], [seeds.mean() - half, seeds.mean() + half], rtol=1e-4)
    assert found["over_problems"] == pytest.approx(statistical.paired_bootstrap(first, second)["interval"], rel=1e-5)
    assert found["interval"][0] == min(found["over_seeds"][0], found["over_problems"][0])
    assert found["interval"][1] == max(found["over_seeds"][1], found["over_problems"][1])
    t_test = stats.ttest_rel(first.mean(1), second.mean(1)).pvalue
    permuted = statistical.paired_bootstrap(first, second)["p_value"]
    assert found["p"] == pytest.approx(max(t_test, permuted), rel=1e-5)
    assert found["difference"] == pytest.approx(seeds.mean(), rel=1e-5) and found["n_seeds"] == 3


def test_an_interval_ends_where_shares_end(made):
    kept = [record for record in copy.deepcopy(made) if record["size"] == "13" and record["arm"] in ("rl", "sft")]
    for record in kept:
        right = int(record["arm"] == "rl" and record["seed"] != 2)
        record["metrics"]["greedy"]["strict"]["correct"] = [right] * N
    found = pair_of(summarized(kept), "sft", "13")["greedy"]["strict"]
    assert found["over_seeds"][1] > 1 and found["interval"] == [pytest.approx(found["over_seeds"][0]), 1.0]


def test_what_a_recipe_leaves_open_is_the_configs_default():
    config = {"adapter": "tinylora", "tying": None, "projection": None}
    assert report.family(config) == "TinyLoRA"
    assert report.family(config | {"tying": "structured"}) == "TinyLoRA, structured"
    assert report.family(config | {"projection": "basis"}) == "LoRA-XS"
    assert report.family({"adapter": "lora"}) == "LoRA" and report.family({"adapter": "full"}) == "full fine-tuning"


def test_mcnemars_counts_are_those_of_each_seed(made, summary):
    first, second = answers(made, "rl", "2"), answers(made, "sft-own", "2")
    found = pair_of(summary, "sft-own", "2")["greedy"]["strict"]["by_seed"]
    for index, seed in enumerate(found):
        only_first = int(((first[index] == 1) & (second[index] == 0)).sum())
        only_other = int(((first[index] == 0) & (second[index] == 1)).sum())
        assert (seed["seed"], seed["only_first"], seed["only_other"]) == (SEEDS[index], only_first, only_other)
        assert seed["p"] == pytest.approx(stats.binomtest(only_first, only_first + only_other).pvalue, rel=1e-5)


def test_p_values_are_corrected_over_the_comparisons_of_their_question(summary):
    family = [pair["greedy"]["strict"] for pair in summary["pairs"] if pair["question"] == "arm"]
    assert len(family) == 10 and all(item["corrected_for"] == 10 for item in family)
    order = sorted(family, key=lambda item: item["p"])
    highest = 0.0
    for rank, item in enumerate(order):
        highest = max(highest, min(1.0, (10 - rank) * item["p"]))
        assert item["p_corrected"] == pytest.approx(highest, rel=1e-4)
    assert {cell_of(summary, "zero", "13")["gains"]["greedy"]["strict"]["corrected_for"]} == {5}


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


def test_the_share_of_full_fine_tunings_gain_is_the_papers_measure(made, summary):
    start = np.mean(next(r for r in made if r["phase"] == "untrained")["metrics"]["greedy"]["strict"]["correct"])
    gain = answers(made, "sft", "13").mean() - start
    expected = gain / (answers(made, "rl", "full").mean() - start)
    assert cell_of(summary, "sft", "13")["recovered"] == pytest.approx(expected, rel=1e-4)
    assert cell_of(summary, "zero", "13")["recovered"] is None


def test_the_first_page_is_about_the_sizes_that_every_arm_has(summary):
    assert summary["main_sizes"] == ["1", "2", "13", "lora-r1", "full"]


def test_a_curve_is_the_mean_and_range_over_seeds_of_stretches_of_steps(made, summary):
    logged = [r["curve"] for r in made if (r["arm"], r["size"], r["phase"]) == ("rl", "13", "final")]
    drawn = cell_of(summary, "rl", "13")["curve"]
    assert len(drawn["step"]) == report.CURVE_POINTS
    first = np.array([np.mean(curve["reward"][:2]) for curve in logged])
    assert drawn["step"][0] == pytest.approx(1.5)
    assert drawn["reward"]["mean"][0] == pytest.approx(first.mean(), rel=1e-4)
    assert drawn["entropy"]["mean"][0] == pytest.approx(np.mean([curve["reward"][1] for curve in logged]), rel=1e-4)
    assert [drawn["reward"][side][0] for side in ("low", "high")] == pytest.approx([first.min(), first.max()], rel=1e-4)


def test_a_landscape_has_the_paths_of_its_own_projections_only(summary):
    one, two = summary["landscapes"]
    assert (len(one["grid"]), len(two["grid"])) == (1, 2)
    for item in (one, two):
        assert [(path["arm"], path["seed"]) for path in item["paths"]] == [("rl", 1), ("sft", 1), ("sft-own", 1)]


# Words


def difference(low, high, p=0.01, n_seeds=3, **more):
    found = {"difference": (low + high) / 2, "interval": [low, high], "p_corrected": p, "corrected_for": 7}
    return found | {"n_seeds": n_seeds, "is_identical": False} | more


@pytest.mark.parametrize(
    "low, high, p, expected",
    [
        (0.0001, 0.2, 0.05, "higher"),
        (0.0001, 0.2, 0.0501, "suggested"),
        (0.0, 0.2, 0.0001, "open"),
        (-0.2, -0.0001, 0.05, "lower"),
        (-0.2, 0.0, 0.0001, "open"),
        (-0.2, -0.0001, 0.06, "suggested"),
        (-0.05, 0.05, 1.0, "level"),
        (-0.0501, 0.05, 1.0, "open"),
        (-0.05, 0.0501, 1.0, "open"),
        (0.0, 0.0, 1.0, "level"),
    ],
)
def test_a_claim_ends_where_its_interval_or_its_p_value_ends(low, high, p, expected):
    assert conclusions.verdict(difference(low, high, p)) == expected


def test_two_models_are_told_apart_in_the_words_that_the_interval_carries():
    numbers = "difference +1.2 points, 95% interval -2.0 to 4.4"
    found = difference(-0.02, 0.044)
    assert conclusions.compared("RL", "SFT", found) == f"RL and SFT do not differ by more than 5.0 points: {numbers}."
    wide = conclusions.compared("RL", "SFT", difference(-0.2, 0.224))
    assert wide == "The data do not tell RL from SFT: difference +1.2 points, 95% interval -20.0 to 22.4."
    assert conclusions.compared("RL", "SFT", difference(0.1, 0.2)).startswith("RL scores higher than SFT: ")
    assert conclusions.compared("RL", "SFT", difference(-0.2, -0.1)).startswith("RL scores lower than SFT: ")
    assert conclusions.compared("RL", "SFT", difference(-0.2, -0.1, p=0.2)).startswith(
        "Before correction only, RL scores lower than SFT (p = 0.2 when corrected for 7 comparisons): "
    )
    assert conclusions.compared("RL", "SFT", difference(0.1, 0.2, n_seeds=1)).endswith(
        "(one seed: nothing is known of others)."
    )
    assert "cannot be compared" in conclusions.compared("RL", "SFT", None)


@pytest.mark.parametrize(
    "value, shown",
    [
        (0.012, "+1.2"),
        (-0.02, "-2.0"),
        (0.0004, "+0.04"),
        (-0.00004, "-0.004"),
        (-0.0, "0.0"),
        (0.0, "0.0"),
        (1.0, "+100.0"),
    ],
)
def test_points_never_show_a_difference_as_none(value, shown):
    assert conclusions.points(value) == shown


def gains(strict, flexible, form=None):
    return {"strict": strict, "flexible": flexible, "format": form or difference(0.1, 0.2)}


def test_a_gain_in_format_alone_is_called_that():
    said = conclusions.gained(gains(difference(0.1, 0.2), difference(-0.1, 0.1)))
    assert said.startswith("a gain of 15.0 points (10.0 to 20.0), of it reasoning 0.0 (-10.0 to 10.0) and format +15.0")
    assert said.endswith(": no gain in reasoning is shown.")
    assert "no gain" not in conclusions.gained(gains(difference(0.1, 0.2), difference(0.1, 0.2)))
    assert conclusions.gained(gains(difference(0.1, 0.2), difference(-0.2, -0.1))).endswith(": reasoning is lost.")


def test_gains_and_losses_are_claimed_as_far_as_they_are_shown():
    unsplit = {"flexible": None, "format": None}
    for found, words in (
        (difference(-0.2, -0.1), "a loss of 15.0 points (-20.0 to -10.0)"),
        (difference(0.1, 0.2, p=0.3), "before correction only, a gain of 15.0 points (10.0 to 20.0; p = 0.3"),
        (difference(-0.1, 0.2), "neither a gain nor a loss is shown (+5.0, -10.0 to 20.0)"),
        (difference(-0.02, 0.04), "no change of more than 5.0 points (+1.0, -2.0 to 4.0)"),
    ):
        assert conclusions.gained({"strict": found} | unsplit).startswith(words)
    assert "cannot be split" in conclusions.gained({"strict": found} | unsplit)
    assert conclusions.gained(None) == "not compared with the untrained model."
    same = difference(0.0, 0.0, is_identical=True)
    assert conclusions.gained(gains(same, same)) == "graded as the untrained model on every problem."


def test_parts_that_cancel_are_told_though_their_sum_is_nothing():
    said = conclusions.gained(gains(difference(-0.02, 0.02), difference(-0.3, -0.2), difference(0.2, 0.3)))
    assert "no change of more than 5.0 points" in said and "reasoning is lost" in said


def test_no_sentence_of_a_report_claims_more_than_its_interval(summary):
    said = " ".join(conclusions.headline(summary))
    for pair in summary["pairs"]:
        sentence = conclusions.compared(pair["first_label"], pair["other_label"], pair["greedy"]["strict"])
        if pair["size"] in summary["main_sizes"] and (pair["question"] == "arm" or pair["other"] != "prompted"):
            assert sentence in said
        low, high = pair["greedy"]["strict"]["interval"]
        claimed = re.match(r"(\S+) scores (higher|lower)", sentence)
        if claimed:
            assert low > 0 if claimed[2] == "higher" else high < 0
    assert {"higher", "suggested", "open"} <= {
        conclusions.verdict(pair["greedy"]["strict"]) for pair in summary["pairs"]
    }


# The report


def test_the_table_has_arms_and_controls_with_the_gain_in_two_parts(summary):
    lines = report.table(summary).splitlines()
    assert lines[0] == "| trained | values | arm or control | strict | sampled | gain | = reasoning | + format |"
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in lines[2:]]
    assert len(cells) == 3 * 5 + 6 and len({len(row) for row in cells}) == 1
    for row in (row for row in cells if row[5] != "-"):
        total, reasoning, form = (float(part.strip("*")) for part in row[5:])
        assert total == pytest.approx(reasoning + form, abs=0.11)
    bold = cell_of(summary, "rl", "13")["gains"]["greedy"]["strict"]
    assert conclusions.verdict(bold) == "higher" and f"**{conclusions.points(bold['difference'])}**" in lines[8]
    assert lines[-6].startswith("| nothing | 0 | untrained |") and lines[-4].endswith(
        "| zero adapter | 8.8% | 7.8% | 0.0 | 0.0 | 0.0 |"
    )


def test_the_report_states_what_makes_it_believable(made):
    text = report.text(summarized(made, missing=["final-sft-1-seed3"]))
    for stated in (
        f"{N} test problems",
        "over 3 seeds (1, 2, 3)",
        "**Missing or failed runs:** final-sft-1-seed3.",
        "so that a rate outside might be better: RL, TinyLoRA, 1 value (0.03).",
        "| RL | 1,600 | 60 | 70,000 | 90,000 | 31 to 33 |",
        "| SFT on gold answers | 1,600 | 60 | 0 |",
        "- `beta`: RL only",
        "| RL | 2 | 0.01 | 4.5, 9.0 |",
        "commit 0123456789ab",
        "Wilson",
        "| RL | TinyLoRA, 1 value | 2 | 2 | 0.5 | 0.5 |",
        "in the run's JSON",
        "right ones were found of 900 of 1,000 problems a seed, with 5,000 generated tokens",
        "| TinyLoRA, 13 values | 13 | zero adapter |",
        "1: 50.0%, 4: 80.0%",
    ):
        assert stated in text, stated
    for label in [label for label, _, _ in ARMS.values()] + ["zero adapter", "random values of the trained norm"]:
        assert text.count(label) > 3, label


def test_every_table_is_as_wide_as_its_header(summary):
    tables = re.findall(r"(?:^\|.*\n)+", report.text(summary), flags=re.MULTILINE)
    assert len(tables) >= 7
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table.splitlines()[0]


def test_rebuilding_gives_the_same_bytes_from_the_summary_alone(tmp_path, summary):
    report.write(summary, tmp_path / "first")
    report.write(json.loads((tmp_path / "first" / "summary.json").read_text()), tmp_path / "second")
    names = {"summary.json", "report.md", *figures.FIGURES}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    for name in names:
        first = (tmp_path / "first" / name).read_bytes()
        assert first == (tmp_path / "second" / name).read_bytes(), name
        if name.endswith(".png"):
            assert first.startswith(b"\x89PNG") and b"tIME" not in first and b"Software" not in first


def lacking_figures(folder):
    return set(figures.FIGURES) - {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "change, left_out, said",
    [
        (lambda r: r["arm"] == "sft-own", set(), "| RL |"),
        (lambda r: r["seed"] in (2, 3), set(), "**One seed** for"),
        (lambda r: r["phase"] == "landscape", {"landscape.png"}, "Not drawn: no landscape of one or two values was"),
        (lambda r: r["phase"] == "untrained", set(), "not compared with the untrained model"),
        (
            lambda r: r["size"] not in (None, "13-bf16"),
            {"accuracy.png", "accuracy_sampled.png", "landscape.png"},
            "Not drawn: no values were kept in float32",
        ),
        (lambda r: r["arm"] == "rl", set(), "None: no RL arm, or nothing beside it."),
        (lambda r: r["phase"] != "untrained", set(figures.FIGURES), "Not drawn: nothing was trained."),
        (lambda r: True, set(figures.FIGURES), "No run has ended yet."),
    ],
    ids=[
        "an arm",
        "all but one seed",
        "landscapes",
        "untrained",
        "all but a precision",
        "RL",
        "all but untrained",
        "everything",
    ],
)
def test_what_is_missing_is_left_out_and_said(tmp_path, few, change, left_out, said):
    report.write(summarized(without(few, change)), tmp_path)
    assert lacking_figures(tmp_path) == left_out
    assert said in (tmp_path / "report.md").read_text()


def stripped(made, kinds=("greedy", "sampled"), gradings=report.GRADINGS):
    """The records as an evaluation with fewer kinds of decoding, or of grading, would have left them."""
    made = copy.deepcopy(made)
    for metrics in (record["metrics"] for record in made if "metrics" in record):
        for kind in ("greedy", "sampled"):
            for grading in report.GRADINGS:
                if grading not in gradings:
                    del metrics[kind][grading]
            if kind not in kinds:
                del metrics[kind]
        metrics["samples"] = SAMPLES if "sampled" in kinds else 0
    return made


def test_without_samples_the_report_speaks_of_greedy_answers_only(tmp_path, few):
    report.write(summarized(stripped(few, kinds=("greedy",))), tmp_path)
    assert lacking_figures(tmp_path) == {"accuracy_sampled.png"}
    text = (tmp_path / "report.md").read_text()
    assert "Not drawn: nothing was sampled." in text and "at temperature" not in text


def test_without_flexible_grading_nothing_is_split(tmp_path, few):
    report.write(summarized(stripped(few, gradings=("strict",))), tmp_path)
    assert lacking_figures(tmp_path) == set()
    text = (tmp_path / "report.md").read_text()
    assert "without flexible grading it cannot be split" in text and "of it reasoning +" not in text


def test_without_curves_and_rates_their_figures_are_left_out_and_former_ones_removed(tmp_path, few):
    report.write(summarized(few), tmp_path)
    bare = copy.deepcopy(few)
    for record in bare:
        record.pop("curve", None)
    report.write(summarized(bare, rates={}), tmp_path)
    assert lacking_figures(tmp_path) == {"curves.png", "rates.png"}
    assert "Not drawn: no run has a training curve." in (tmp_path / "report.md").read_text()


def test_variants_of_precision_are_drawn_by_bytes_and_not_by_values(summary):
    def points(drawing):
        lines = drawing.axes[0].get_lines()
        return {(x, y) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}

    mean = 100 * cell_of(summary, "rl", "13-bf16")["accuracy"]["greedy"]["strict"]["mean"]
    aside = 10**-0.09
    assert (26 * aside, mean) in points(figures.by_bytes(summary))
    assert (13 * aside, mean) not in points(figures.accuracy(summary))
    assert (13 * aside, 100 * cell_of(summary, "rl", "13")["accuracy"]["greedy"]["strict"]["mean"]) in points(
        figures.accuracy(summary)
    )


def test_every_precision_of_every_family_has_a_marker_of_its_own(summary):
    summary = copy.deepcopy(summary)
    cell = cell_of(summary, "rl", "28-structured")
    summary["cells"] += [cell | {"kept_dtype": dtype, "trained_bytes": 56} for dtype in ("bfloat16", "float16")]
    (legend,) = figures.by_bytes(summary).legends
    markers = {
        text.get_text(): line.get_marker()
        for line, text in zip(legend.get_lines(), legend.get_texts(), strict=True)
        if line.get_marker() not in ("", "None", None)
    }
    assert {f"TinyLoRA, structured, {dtype}" for dtype in ("float32", "bfloat16", "float16")} < set(markers)
    assert len(set(markers.values())) == len(markers)


def ticks_in_view(axis):
    low, high = sorted(axis.get_view_interval())
    shown = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label for label in shown if label.get_visible() and label.get_text()]


@pytest.mark.parametrize("is_narrow", [False, True], ids=["many panels", "few panels"])
@pytest.mark.parametrize("name", figures.FIGURES)
def test_no_word_of_a_figure_is_cut_off_or_lies_on_another(name, is_narrow, summary):
    if is_narrow:
        summary = copy.deepcopy(summary)
        summary["cells"] = [cell for cell in summary["cells"] if cell["role"] == "control" or cell["arm"] == "rl"]
        for cell in summary["cells"]:
            cell["curve"] = {key: cell["curve"][key] for key in ("step", "reward") if key in cell["curve"]}
            for kind in cell["accuracy"]:
                del cell["accuracy"][kind]["flexible"]
        summary["learning_rates"] = {"rl": summary["learning_rates"]["rl"]}
        summary["learning_rates"]["rl"]["full"]["grid"]["1e-06"] = 0.9
        for item in summary["landscapes"]:
            item["paths"] = [path for path in item["paths"] if path["arm"] == "rl"]
    drawing = figures.FIGURES[name](summary)
    drawing.canvas.draw()
    renderer = drawing.canvas.get_renderer()
    whole = drawing.bbox
    for panel in drawing.axes:
        words = [child for child in panel.get_children() if isinstance(child, Text)]
        words += [panel.xaxis.label, panel.yaxis.label]
        ticks = {axis: ticks_in_view(axis) for axis in (panel.xaxis, panel.yaxis)}
        for word in words + [label for labels in ticks.values() for label in labels]:
            box = word.get_window_extent(renderer)
            is_inside = box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1
            assert is_inside or not word.get_text(), word.get_text()
        boxes = sorted((label.get_window_extent(renderer) for label in ticks[panel.xaxis]), key=lambda box: box.x0)
        assert all(left.x1 <= right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    for part in drawing.legends:
        box = part.get_window_extent(renderer)
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0


# A README


def test_a_readme_shows_table_figure_and_conclusions_and_is_renewed_once(tmp_path, summary):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:toy -->\na former one\n<!-- /results:toy -->\nafter\n")
    report.update_readme(path, "toy", summary)
    text = path.read_text()
    assert text.startswith("before\n<!-- results:toy -->\n| trained |") and text.endswith("\nafter\n")
    assert "a former one" not in text and "](recipes/toy/results/accuracy.png)" in text
    assert all(f"- {line}\n" in text for line in conclusions.headline(summary))
    assert report.renewed_readme(text, "toy", summary) == text
    with pytest.raises(ValueError, match="lacks the markers"):
        report.renewed_readme("no markers", "toy", summary)
