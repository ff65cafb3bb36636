"""An arm of a comparison in two processes by `accelerate launch`. CPU and gloo, a minute."""

import pytest
import torch
from cases import TOLERANCE
from comparison.arguments import CompareArguments
from comparison.runs import Launched
from toy_comparison import SHORT, TOY, final_runs


ROOT = TOY.parents[1]


@pytest.mark.parametrize("arm", ["sft", "rl"])
def test_a_launched_arm_trains_on_the_same_rows_and_its_record_has_the_same_keys(arm, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = f"recipes/toy/{'grpo' if arm == 'rl' else 'sft'}.yaml"
    arms = {arm: {"label": arm, "recipe": recipe}}
    arms["launched"] = arms[arm] | {"launcher": "recipes/accelerate/zero3.yaml", "rates_of": arm}
    sizes = {"13": {"label": "", "arguments": {"n_values": 13}, "learning_rate": {arm: 0.01}}}
    how = {"seeds": [1], "eval_limit": 8, "samples": 1, "max_new_tokens": 12}
    arguments = CompareArguments(arms=arms, sizes=sizes, output_dir=str(tmp_path), **how)
    runs = final_runs(arguments, **SHORT)
    alone, launched = (runs[f"final-{name}-13-seed1"] for name in (arm, "launched"))
    assert isinstance(launched, Launched) and launched.digest != alone.digest
    records = []
    for run in (alone, launched):
        (tmp_path / run.name).mkdir()
        records.append(run.run(tmp_path / run.name))
    first, second = records
    assert first.keys() == second.keys() and first["curve"].keys() == second["curve"].keys()
    for key in ("optimizer_steps", "examples", "trained_values", "learning_rate"):
        assert first[key] == second[key], key
    (one,), (other,) = (torch.tensor(list(record["trained"].values())) for record in records)
    assert one.abs().min() > 100 * TOLERANCE
    if arm == "sft":
        # RL samples otherwise in two processes.
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
        assert first["trained_tokens"] == second["trained_tokens"]
        assert first["metrics"]["greedy"]["strict"] == second["metrics"]["greedy"]["strict"]
