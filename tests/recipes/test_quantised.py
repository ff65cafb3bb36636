"""`load_in_4bit` and `load_in_8bit` in the recipes: trained, saved, evaluated on the toy. CPU, no network."""

import json
from pathlib import Path

import evaluate
import grpo
import pytest
import sft
import trl
import yaml
from comparison import runs
from comparison.arguments import CompareArguments
from comparison.plan import Plan
from training.launch import prepare

from trl_tinylora.tuner.weights import is_quantised


TOY = Path(__file__).parents[2] / "recipes" / "toy"
SCRIPTS = {"grpo": grpo, "sft": sft}
SHORT = {
    "grpo": {"max_steps": 2, "limit": 8, "per_device_train_batch_size": 8, "num_generations": 4}
    | {"max_completion_length": 8, "gradient_accumulation_steps": 1},
    "sft": {"max_steps": 2, "limit": 8, "per_device_train_batch_size": 4},
}


def parse(name, output_dir, **changes):
    settings = yaml.safe_load((TOY / f"{name}.yaml").read_text()) | changes
    settings |= {"model_name_or_path": str(TOY / "base"), "dataset_name": str(TOY / "data")}
    settings |= {"output_dir": str(output_dir), "use_cpu": True, "report_to": "none"}
    return trl.TrlParser(SCRIPTS[name].ARGUMENTS).parse_dict(settings)


def evaluation(folder, *changes):
    command = ["--model_name_or_path", TOY / "base", "--adapter_path", folder, "--dataset_name", TOY / "data"]
    command += ["--limit", 3, "--samples", 1, "--max_new_tokens", 8, "--dtype", "float32", *changes]
    return trl.TrlParser(evaluate.ARGUMENTS).parse_args_and_config([str(word) for word in command])


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_a_recipe_trains_on_a_quantised_base_and_its_adapter_is_evaluated_there(tmp_path, name, key):
    pytest.importorskip("bitsandbytes")
    trainer = SCRIPTS[name].main(*parse(name, tmp_path / "model", **{key: True}, **SHORT[name]))
    assert sum(map(is_quantised, trainer.model.modules())) == 28
    assert [tuple(p.shape) for p in trainer.model.parameters() if p.requires_grad] == [(1, 13)]
    assert trainer.state.global_step == 2
    # On the base that it was trained on.
    metrics = evaluate.main(*evaluation(tmp_path / "model", f"--{key}", "true", "--output_dir", tmp_path / "own"))
    assert metrics["n_problems"] == 3
    assert json.loads((tmp_path / "own" / "metrics.json").read_text())["arguments"][key] is True
    # On the full-precision one where that is asked for.
    with pytest.raises(ValueError, match="not the base model of the adapter.*other_base"):
        evaluate.main(*evaluation(tmp_path / "model", "--output_dir", tmp_path / "other"))
    with pytest.warns(UserWarning, match="another base than its own"):
        asked = evaluation(tmp_path / "model", "--output_dir", tmp_path / "other", "--other_base", "true")
        assert evaluate.main(*asked)["n_problems"] == 3


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_every_run_of_a_comparison_loads_the_quantised_base(tmp_path, monkeypatch, key):
    pytest.importorskip("bitsandbytes")
    recipe = yaml.safe_load((TOY / "sft.yaml").read_text()) | {key: True} | SHORT["sft"]
    recipe |= {"model_name_or_path": str(TOY / "base"), "dataset_name": str(TOY / "data"), "use_cpu": True}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    arguments = CompareArguments(
        arms={"sft": {"label": "SFT", "recipe": str(tmp_path / "sft.yaml")}},
        sizes={"13": {"label": "13 values", "arguments": {"n_values": 13}, "learning_rate": {"sft": 0.1}}},
        controls={"zero": {"label": "a zero adapter", "kind": "zero", "size": "13"}},
        seeds=[1],
        samples=0,
        eval_limit=2,
        max_new_tokens=4,
    )
    plan, quantised = Plan(arguments), []
    (final,), (zero,) = plan.final({"sft": {"13": {"learning_rate": 0.1}}}), plan.controls({})
    generate = runs.evaluate

    def counted(model, *args, **options):
        quantised.append(sum(map(is_quantised, model.modules())))
        return generate(model, *args, **options)

    monkeypatch.setattr(runs, "evaluate", counted)
    for run in (plan.untrained(), final, zero):
        folder = tmp_path / run.name
        folder.mkdir()
        assert run.run(folder)["metrics"]["n_problems"] == 2
    assert quantised == [28, 28, 28]


@pytest.mark.bad_input("a sampler's settings or server")
@pytest.mark.parametrize("changes", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_vllm_is_refused_on_a_quantised_base_before_anything_is_loaded(tmp_path, changes):
    pytest.importorskip("bitsandbytes")
    for rollouts in ("merged", "adapter"):
        with pytest.raises(ValueError, match="use_vllm with a quantised base.*Set use_vllm to false"):
            prepare(*parse("grpo", tmp_path, use_vllm=True, rollouts=rollouts, **changes))
    # Not refused: without vLLM, and for LoRA.
    prepare(*parse("grpo", tmp_path, **changes))
    script_args, training_args, model_args, adapter_args = parse("grpo", tmp_path, use_vllm=True, **changes)
    adapter_args.adapter = "lora"
    prepare(script_args, training_args, model_args, adapter_args)


@pytest.mark.bad_input("a sampler's settings or server")
def test_a_base_that_was_saved_quantised_is_told_by_its_configuration(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in (TOY / "base").iterdir():
        (base / file.name).symlink_to(file)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").unlink()
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    arguments = parse("grpo", tmp_path / "out", use_vllm=True)
    arguments[2].model_name_or_path = str(base)
    with pytest.raises(ValueError, match="use_vllm with a quantised base"):
        prepare(*arguments)


@pytest.mark.bad_input("a sampler's settings or server")
@pytest.mark.parametrize("key", ["--load_in_8bit", "--load_in_4bit"])
def test_vllm_is_refused_where_the_base_is_quantised_while_it_loads(tmp_path, key):
    with pytest.raises(ValueError, match="set backend to transformers"):
        evaluate.main(*evaluation(tmp_path, "--backend", "vllm", "--output_dir", tmp_path / "out", key, "true"))
    with pytest.raises(ValueError, match="other_base loads the adapter with transformers"):
        evaluation(tmp_path, "--backend", "vllm", "--other_base", "true")
