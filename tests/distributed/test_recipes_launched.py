"""recipes/sft.py and recipes/grpo.py through `accelerate launch`, as recipes/README.md says. CPU and gloo, a minute.

test_paper_recipes_zero3.py launches grpo.py, and test_matrix.py both in every mode.
"""

from types import SimpleNamespace

import pytest
import torch
from cases import TOLERANCE
from runs import launch_recipe
from tiny import write_split
from training.launch import refuse_miscounted_processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes") / "data"
    write_split(folder, "train")
    return folder


def test_the_sft_recipe_under_zero3_trains_what_one_process_trains(base_folder, data, tmp_path):
    alone = launch_recipe("single", "sft.py", base_folder, data, tmp_path / "single")
    sharded = launch_recipe("zero3", "sft.py", base_folder, data, tmp_path / "zero3")
    assert alone.shape == (4, 1) and alone.abs().min() > 100 * TOLERANCE
    torch.testing.assert_close(sharded, alone, rtol=0, atol=TOLERANCE)
    card = (tmp_path / "zero3" / "README.md").read_text()
    assert "4 trained values (16 bytes, float32)" in card and "SFTTrainer on" in card and "2 processes" in card


def test_a_number_of_processes_other_than_the_launcher_started_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_miscounted_processes(SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match="started 2 processes, but the trainer counts 1.*use_cpu: true"):
        refuse_miscounted_processes(SimpleNamespace(world_size=1))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate miscounts without a GPU only")
def test_processes_that_do_not_see_each_other_are_refused(base_folder, data, tmp_path):
    with pytest.raises(AssertionError, match="started 2 processes, but the trainer counts 1.*use_cpu: true"):
        launch_recipe("zero2", "sft.py", base_folder, data, tmp_path / "run", use_cpu=False)
    assert not (tmp_path / "run").exists()
