"""Intruder dimensions: counted on weights of which they are known. CPU, seconds."""

import json

import pytest
import torch
from benchmarks import intruders
from benchmarks.harness import parser_of
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig


def orthogonal(rows, columns, seed=0):
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


@pytest.fixture
def weight():
    """24 x 16, with singular values from 16 down to 1."""
    return orthogonal(24, 16) @ torch.diag(torch.arange(16, 0, -1, dtype=torch.float64)) @ orthogonal(16, 16, 1).mT


def test_a_weight_has_no_intruders_in_itself_nor_where_it_is_scaled_or_its_values_change_order(weight):
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for changed in (weight, 3 * weight, left @ torch.diag(values.flip(0)) @ right):
        assert intruders.best_cosines(changed, intruders.left_vectors(weight)).min() > 1 - 1e-9


def test_a_large_update_in_a_new_direction_is_one_intruder(weight):
    left = torch.linalg.svd(weight, full_matrices=True).U
    changed = weight + 100 * torch.outer(left[:, 20], orthogonal(16, 16, 2)[:, 0])
    cosines = intruders.best_cosines(changed, intruders.left_vectors(weight))
    assert cosines[0] < 0.2 and (cosines < 0.5).sum() == 1


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_an_update_in_the_span_of_singular_vectors_has_none_below_the_root_of_one_over_the_rank(weight, rank):
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    mixing = torch.randn(rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 5
    changed = weight + (left[:, :rank] * values[:rank]) @ mixing @ right[:rank]
    assert intruders.best_cosines(changed, intruders.left_vectors(weight)).min() > rank**-0.5 - 1e-9


def test_the_models_of_a_comparison_are_read_and_its_seeds_averaged(base_folder, tmp_path):
    settings = {"13": TinyLoraConfig(u=3, n_tie="all"), "lora-r1": LoraConfig(r=1, target_modules="all-linear")}
    for size, config in settings.items():
        for seed in (1, 2):
            name = f"final-rl-{size}-seed{seed}"
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
            with torch.no_grad():
                for parameter in (p for p in model.parameters() if p.requires_grad):
                    parameter.normal_(generator=torch.Generator().manual_seed(seed))
            model.save_pretrained(tmp_path / "work" / name / "model")
            record = {"name": name, "arm": "rl", "arm_label": "RL", "size": size, "label": size, "seed": seed}
            record |= {"trained_values": 3, "metrics": {"greedy": {"strict": {"accuracy": 0.25 * seed}}}}
            (tmp_path / "runs").mkdir(exist_ok=True)
            (tmp_path / "runs" / f"{name}.json").write_text(json.dumps(record))
    arguments = parser_of("", "intruders").parse_args([])
    arguments.results, arguments.base = str(tmp_path), base_folder
    rows, details = intruders.measure(arguments)
    tiny, lora = details["cells"]
    assert tiny["intruders"]["0.7"] == [0, 0] and min(lora["intruders"]["0.7"]) > 0.3
    assert tiny["accuracy"] == [0.25, 0.5] and min(tiny["moved"]) > 0.01
    assert rows[0].ours == 0 < rows[0].theirs
    shown = intruders.table({"details": details})
    assert "37.5%" in shown and "2 seeds" in shown


def test_without_models_the_comparison_is_asked_for(base_folder, tmp_path):
    arguments = parser_of("", "intruders").parse_args([])
    arguments.results, arguments.base = str(tmp_path), base_folder
    with pytest.raises(SystemExit, match="holds no model of a final run: run the comparison here first"):
        intruders.measure(arguments)
