"""What a run says at its start and its end, and where it stops. CPU, no network, seconds."""

import json
import re
from pathlib import Path

import grpo
import pytest
import torch
import trl
import yaml
from peft import LoraConfig
from training.callbacks import Watch
from transformers.trainer_utils import get_last_checkpoint

from trl_tinylora import TinyLoraConfig


ROOT = Path(__file__).parents[3]


def test_a_run_says_what_it_trains_and_what_came_of_it(sft, capsys):
    trainer = sft(TinyLoraConfig(n_tie=4, u=3), train=False, max_steps=3)
    trainer.add_callback(Watch("8 rows of somewhere"))
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Training ", "After "))]
    total = sum(p.numel() for p in trainer.model.parameters()) - 12
    assert lines[0] == (
        f"Training 12 values (TinyLoRA on 14 modules, r=2, u=3, n_tie=4, tiled) beside {total:,} frozen parameters: 3 "
        "steps, learning rate 0.02, on 8 rows of somewhere"
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (values,) = (p for name, p in trainer.model.named_parameters() if "lora_magnitude_vector" in name)
    assert values.norm() > 0.01
    assert lines[1:] == [
        f"After 3 steps: norm of v 0 -> {values.norm():.4g}, loss {losses[0]:.4g} -> {losses[-1]:.4g} (first -> last)"
    ]


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (None, r"Training all [\d,]+ parameters: 1 step,"),
        (LoraConfig(r=1, target_modules=["q_proj"]), r"Training 128 values \(LoRA, r=1\) beside [\d,]+ frozen"),
    ],
)
def test_other_adapters_say_it_too(sft, capsys, config, start):
    trainer = sft(config, train=False, max_steps=1)
    trainer.add_callback(Watch("rows"))
    trainer.train()
    printed = capsys.readouterr().out
    assert re.search(start, printed) and re.search(r"After 1 step: loss [\d.]+ -> ", printed)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (TinyLoraConfig(n_tie="all"), "1 of 1 values are not finite"),
        (LoraConfig(r=1, target_modules=["q_proj"]), "the (loss|grad_norm) is not finite"),
    ],
)
def test_a_run_stops_at_the_first_number_that_is_not_finite_and_keeps_what_was_saved(sft, config, what):
    trainer = sft(config, train=False, max_steps=6, learning_rate=1e30, save_strategy="steps", save_steps=1)
    trainer.add_callback(Watch("rows"))
    with pytest.raises(FloatingPointError, match=rf"step \d: {what}.*is from before. Lower --learning_rate"):
        trainer.train()
    last = Path(get_last_checkpoint(trainer.args.output_dir))
    assert int(last.name.rpartition("-")[2]) == trainer.state.global_step - 1 < 5
    assert not (last.parent / "adapter_config.json").exists()


def test_a_run_whose_rewards_never_differed_says_that_nothing_was_learned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load((ROOT / "recipes/toy/grpo.yaml").read_text())
    settings |= {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 1}
    settings |= {"output_dir": str(tmp_path / "out"), "limit": 8, "disable_tqdm": True, "use_cpu": True}
    trainer = grpo.main(*trl.TrlParser(grpo.ARGUMENTS).parse_dict(settings))
    printed = capsys.readouterr()
    assert "Training 13 values (TinyLoRA on 28 modules, r=2, u=13, n_tie=all, tiled)" in printed.out
    assert "on 8 rows of recipes/toy/data" in printed.out
    assert "After 2 steps: norm of v 0 -> 0, reward 0 -> 0 (first -> last)" in printed.out
    assert "warning: the adapter did not change: no group of completions had two different rewards" in printed.err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["u"] == 13
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
