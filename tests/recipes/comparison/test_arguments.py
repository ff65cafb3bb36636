"""What of a comparison's YAML is refused."""

import pytest
from comparison.plan import Plan
from toy_comparison import comparison


LAUNCHED = {"label": "RL", "recipe": "grpo.yaml", "launcher": "recipes/accelerate/zero2.yaml"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sizes": {"13": {"label": "", "arguments": {"n_values": 13}}}},
            r"\['13'\].learning_rates has no grid for 'rl'",
        ),
        (
            {
                "sweep_seed": None,
                "sizes": {"13": {"label": "", "arguments": {"n_values": 13}, "learning_rate": {"rl": 0.1}}},
            },
            r"\['13'\].learning_rate has no rate for 'sft': without a sweep_seed each arm needs a learning_rate",
        ),
        ({"seeds": [0, 1]}, "sweep_seed=0 is among seeds"),
        ({"grading": "lenient"}, "grading must be 'strict' or 'flexible', got 'lenient'"),
        ({"only_sizes": ["14"]}, r"the comparison.only_sizes names \['14'\]"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"sizes": {"13": {"label": "", "arguments": {"n_value": 13}}}}, "sizes\\['13'\\] must hold"),
        ({"arms": {}}, "arms is missing"),
        (
            {"arms": {"rl": {"label": "RL", "recipe": "rl.yaml"}}},
            "must be a grpo.yaml, an sft.yaml or an es.yaml, got 'rl.yaml'",
        ),
        ({"arms": {"rl": {"recipe": "grpo.yaml", "reward": "format"}}}, r"arms\['rl'\] may hold"),
        ({"arms": {"rl": {"label": "", "recipe": "grpo.yaml", "sizes": ["14"]}}}, r"arms\['rl'\].sizes names \['14'\]"),
        (
            {"arms": {"rl": {"label": "", "recipe": "grpo.yaml", "rates_of": "r"}}},
            r"arms\['rl'\].rates_of names \['r'\]",
        ),
        (
            {"arms": {"rl": {"label": "", "recipe": "grpo.yaml", "rate_key": "sigma"}}},
            r"arms\['rl'\].rate_key must be one of learning_rate, relative_kl, got 'sigma'",
        ),
        (
            {"arms": {"rl": LAUNCHED | {"launcher": "zero.yaml"}}},
            "'zero.yaml' is not there: name one of recipes",
        ),
        ({"arms": {"rl": LAUNCHED}}, "leave full fine-tuning out of its sizes"),
        (
            {"arms": {"rl": LAUNCHED | {"rate_key": "relative_kl"}}},
            "is for a grpo.yaml or sft.yaml with a learning",
        ),
        ({"controls": {"a": {"kind": "none"}}}, r"controls\['a'\].kind must be one of .*, got 'none'"),
        ({"controls": {"a": {"kind": "zero"}}}, r"controls\['a'\] may hold .* and needs .*'size'"),
        ({"controls": {"a": {"label": "", "kind": "zero", "size": "5"}}}, r"controls\['a'\].size names \['5'\]"),
    ],
)
def test_impossible_comparisons_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **changes)


def test_a_part_of_the_sizes_has_their_controls_and_the_same_runs(tmp_path):
    whole, part = comparison(tmp_path), comparison(tmp_path, only_sizes=["full"])
    assert set(part.sizes) == {"full"} and set(part.controls) == {"prompted"}
    assert ("rl-format", "13") not in part.cells() and ("rl", "full") in part.cells()
    runs = {run.name: run.digest for run in Plan(whole).sweep()}
    assert {run.name: run.digest for run in Plan(part).sweep()}.items() <= runs.items()
