"""What of a comparison's YAML is refused."""

import pytest
from toy_comparison import comparison


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
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"sizes": {"13": {"label": "", "arguments": {"n_value": 13}}}}, "sizes\\['13'\\] must hold"),
        ({"arms": {}}, "arms is missing"),
        ({"arms": {"rl": {"label": "RL", "recipe": "rl.yaml"}}}, "must be a grpo.yaml or an sft.yaml, got 'rl.yaml'"),
        ({"arms": {"rl": {"recipe": "grpo.yaml", "reward": "format"}}}, r"arms\['rl'\] may hold"),
        ({"arms": {"rl": {"label": "", "recipe": "grpo.yaml", "sizes": ["14"]}}}, r"arms\['rl'\].sizes names \['14'\]"),
        (
            {"arms": {"rl": {"label": "", "recipe": "grpo.yaml", "rates_of": "r"}}},
            r"arms\['rl'\].rates_of names \['r'\]",
        ),
        ({"controls": {"a": {"kind": "none"}}}, r"controls\['a'\].kind must be one of .*, got 'none'"),
        ({"controls": {"a": {"kind": "zero"}}}, r"controls\['a'\] may hold .* and needs .*'size'"),
        ({"controls": {"a": {"label": "", "kind": "zero", "size": "5"}}}, r"controls\['a'\].size names \['5'\]"),
    ],
)
def test_impossible_comparisons_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(tmp_path, **changes)
