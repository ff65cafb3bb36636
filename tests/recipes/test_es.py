"""The search without gradients, `recipes/es.py`, on the toy: saved, continued, refused. CPU, seconds."""

from pathlib import Path

import es
import pytest
import torch
import trl
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_tinylora.tuner.values import Vectors


ROOT = Path(__file__).parents[2]
TOY = ROOT / "recipes" / "toy"
SHORT = {"max_steps": 3, "population": 4, "problems_per_step": 4, "max_completion_length": 12, "disable_tqdm": True}

SERVED = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://localhost:9"}


@pytest.fixture(autouse=True)
def in_the_repository_root(monkeypatch):
    # The paths in the YAML files are relative to it.
    monkeypatch.chdir(ROOT)


def search(output_dir, **changes):
    settings = yaml.safe_load((TOY / "es.yaml").read_text()) | SHORT | {"output_dir": str(output_dir)} | changes
    return es.main(*trl.TrlParser(es.ARGUMENTS).parse_dict(settings))


def values_of(model):
    (vectors,) = (module for module in model.modules() if isinstance(module, Vectors))
    return vectors.values_GK


def test_a_search_saves_an_adapter_with_its_mean_and_nothing_else(tmp_path, capsys):
    found = search(tmp_path)
    assert len(found.steps) == 3 and found.steps[-1]["mean"] == pytest.approx(values_of(found.model).flatten().tolist())
    assert {"reward", "fitness", "sigma", "generated_tokens", "seconds"} <= found.steps[0].keys()
    assert list(found.model.peft_config) == ["default"]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TOY / "base"), tmp_path)
    assert torch.equal(values_of(loaded), values_of(found.model)) and values_of(loaded).abs().max() > 0
    assert "CMA-ES" in (tmp_path / "README.md").read_text()
    said = capsys.readouterr().out
    assert "Searching 13 values" in said and "4 candidates x 4 problems" in said and "After 3 steps" in said


def test_a_search_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    whole = search(tmp_path / "whole")

    def interrupted(candidates, *arguments, rewards=es.Candidates.rewards):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return rewards(candidates, *arguments)

    calls = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(es.Candidates, "rewards", interrupted)
        search(tmp_path / "cut")
    assert not (tmp_path / "cut" / "adapter_config.json").exists()
    continued = search(tmp_path / "cut", resume_from_checkpoint=True)
    assert torch.equal(values_of(continued.model), values_of(whole.model))
    assert [step["fitness"] for step in continued.steps] == [step["fitness"] for step in whole.steps]


def test_more_steps_are_the_same_search(tmp_path):
    search(tmp_path / "a", max_steps=2)
    continued = search(tmp_path / "a", max_steps=3, resume_from_checkpoint=True)
    assert torch.equal(values_of(continued.model), values_of(search(tmp_path / "b").model))


def test_rows_are_taken_in_the_order_of_the_other_arms(tmp_path, monkeypatch):
    asked = []

    def rewards(candidates, tried, rows, *others):
        asked.extend(row["answer"] for row in rows)
        return tried.sum(1)[:, None, None], 1

    monkeypatch.setattr(es.Candidates, "rewards", rewards)
    search(tmp_path, limit=9)
    (script_args, *_) = trl.TrlParser(es.ARGUMENTS).parse_dict(
        yaml.safe_load((TOY / "es.yaml").read_text()) | {"limit": 9}
    )
    task = es.get_task("gsm8k")
    rows = task.for_rl(task.load_rows(script_args.dataset_name, "train", None, 9).shuffle(seed=0))
    # Of nine problems, four a step, one is left out before they begin anew: TRL drops what is no whole step.
    assert asked == [rows[place]["answer"] for place in (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3)]


def test_a_search_in_which_nothing_differs_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(es.Candidates, "rewards", lambda self, tried, *others: (0 * tried.sum(1)[:, None, None], 1))
    found = search(tmp_path)
    assert not values_of(found.model).any()
    assert "did not change: no step had two candidates of different fitness" in capsys.readouterr().err


@pytest.mark.bad_input("a recipe's arguments and files")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "lora"}, "adapter='lora' has too many values.*'tinylora'"),
        ({"adapter": "full", "n_values": None}, "adapter='full' has too many values.*'tinylora'"),
        ({"population": 2}, "population must be an integer of at least 3, got 2"),
        ({"population": 4.5}, "population must be an integer of at least 3, got 4.5"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32, got 4294967296"),
        ({"rollouts": "adapter"}, "es.py has adapters sampled in any case, and rollouts is 'adapter'"),
        ({"relative_kl": 1e-3}, "relative_kl is of a gradient's step, and a search has none: drop it"),
        ({"vllm_mode": "both"}, "vllm_mode must be 'colocate' or 'server', got 'both'"),
        ({"use_vllm": True, "vllm_mode": "server"}, "needs an address: --vllm_server_base_url http://localhost:8000"),
        ({"vllm_server_base_url": "http://localhost:9"}, "is not used: set use_vllm to true and vllm_mode to 'server'"),
        (SERVED | {"vllm_server_base_url": "localhost:9"}, "'localhost:9' has no scheme.*http://localhost:8000"),
        ({"reward": 3}, "reward must be a name or a list of names, got 3"),
        ({"sigma": 0.0}, "sigma must be finite and above 0, got 0.0"),
        ({"sigma": float("inf")}, "sigma must be finite"),
        ({"temperature": -1.0}, "temperature must be finite and above 0"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
        ({"problems_per_step": 5, "limit": 4}, "problems_per_step=5, but there are 4 problems: lower it"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"model_name_or_path": "recipes/toy/data"}, "recipes/toy/data"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_refused_before_a_file_is_written(tmp_path, changes, message):
    # `n_values` belongs to TinyLoRA.
    changes = {"n_values": None, **changes} if "adapter" in changes else changes
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.bad_input("a run to be continued")
def test_neither_a_finished_nor_an_interrupted_search_is_written_over(tmp_path):
    search(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds a finished run.*--resume_from_checkpoint true and a higher --max"):
        search(tmp_path)
    with pytest.raises(ValueError, match="has 3 steps, and max_steps is 3: nothing is left.*Raise max_steps"):
        search(tmp_path, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"seed=0 \(now 1\)"):
        search(tmp_path, resume_from_checkpoint=True, seed=1)
    with pytest.raises(ValueError, match=r"target_modules='all-linear' \(now \['q_proj'\]\)"):
        search(tmp_path, resume_from_checkpoint=True, target_modules=["q_proj"], n_values=None, u=13, n_tie="all")
    # Where it was interrupted before it saved.
    (tmp_path / "adapter_config.json").rename(tmp_path / "aside")
    with pytest.raises(FileExistsError, match="holds an interrupted search.*--resume_from_checkpoint true$"):
        search(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "adapter_config.json")
    assert all(path.read_bytes() == before[path] for path in tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint is true.*start anew without it"):
        search(tmp_path / "new", resume_from_checkpoint=True)


def test_the_committed_recipe_samples_as_many_completions_as_that_of_rl():
    rl, search = (yaml.safe_load((TOY / f"{name}.yaml").read_text()) for name in ("grpo", "es"))
    assert search["population"] == es.Search(13, 0.1, None, 0).population
    sampled = search["max_steps"] * search["population"] * search["problems_per_step"] * search["num_generations"]
    assert sampled == pytest.approx(rl["max_steps"] * rl["per_device_train_batch_size"], rel=0.02)
    shared = rl.keys() & search.keys() - {"max_steps", "num_generations", "output_dir"}
    assert len(shared) > 8 and all(rl[key] == search[key] for key in shared)


def test_a_reward_that_draws_is_drawn_alike_by_a_run_of_the_same_seed(tmp_path):
    first, second = (search(tmp_path / name, reward="random", max_steps=2) for name in ("a", "b"))
    assert first.steps[1]["fitness"] == second.steps[1]["fitness"]
    assert len(set(first.steps[0]["fitness"])) > 1


@pytest.mark.bad_input("a recipe's arguments and files")
def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="searches in one process, and the launcher started 2"):
        search(tmp_path / "out")
    assert not (tmp_path / "out").exists()
