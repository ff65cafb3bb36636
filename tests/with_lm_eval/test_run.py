"""An adapter in lm-evaluation-harness by the commands of docs/lm-eval.md, beside `evaluate.py`. CPU, two minutes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
import yaml
from miniatures import RECIPES
from peft import get_peft_model
from sampled import set_values

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tasks import gsm8k


pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: `make test-lm-eval`")

ROOT = RECIPES.parent
TOY = RECIPES / "toy"
N_PROBLEMS = 40
GRADINGS = {"strict-match": "strict", "flexible-extract": "flexible"}


def page_command(start):
    """The first command of the page that starts with these words."""
    page = (ROOT / "docs" / "lm-eval.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return next(shlex.split(line, comments=True) for line in lines.splitlines() if line.startswith(start))


def run_command(words):
    """Runs a command in the repository's root, without a network."""
    command = [sys.executable, *words[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The toy's base, whose generation config asks for a repetition penalty, and an adapter that is right at times."""
    folder = tmp_path_factory.mktemp("models")
    base = folder / "base"
    shutil.copytree(TOY / "base", base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.5}))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, TinyLoraConfig(u=13, n_tie="all", task_type="CAUSAL_LM"))
    set_values(model, 0.2, seed=1)
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The first test problems of the toy, as a file."""
    path = tmp_path_factory.mktemp("rows") / "test.jsonl"
    lines = (TOY / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:N_PROBLEMS]) + "\n", encoding="utf-8")
    return path


def in_lm_eval(base, adapter, rows, folder, **generation):
    """Samples and results of the page's command on a local file, an adapter of `None` left out."""
    task = yaml.safe_load((RECIPES / "lm-eval" / "gsm8k.yaml").read_text(encoding="utf-8"))
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(rows)}}}
    task["task"][0] |= local | {"training_split": None, "fewshot_split": None}
    task["task"][0]["generation_kwargs"] |= generation | {"max_gen_toks": 64}
    (folder / "tasks").mkdir()
    (folder / "tasks" / "gsm8k.yaml").write_text(yaml.safe_dump(task))
    words = page_command("python -m trl_tinylora run -m lm_eval")
    changed = {
        "--model_args": f"pretrained={base},{'' if adapter is None else f'peft={adapter},'}dtype=float32",
        "--include_path": str(folder / "tasks"),
        "--output_path": str(folder / "results"),
    }
    for option, value in changed.items():
        words[words.index(option) + 1] = value
    run_command([*words, "--device", "cpu"])
    (results,) = (folder / "results").rglob("results_*.json")
    (samples,) = (folder / "results").rglob("samples_*.jsonl")
    by_problem = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        by_problem.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    return [by_problem[problem] for problem in sorted(by_problem)], json.loads(results.read_text())["results"]


def in_evaluate(base, adapter, rows, folder):
    """Completions, graded, and metrics of `evaluate.py` by the page's command."""
    words = page_command("python recipes/evaluate.py")
    for option, value in {"--model_name_or_path": base, "--adapter_path": adapter, "--dtype": "float32"}.items():
        words[words.index(option) + 1] = str(value)
    words[words.index("--benchmark") : words.index("--benchmark") + 2] = ["--dataset_name", str(rows)]
    run_command([*words, "--max_new_tokens", "64", "--output_dir", str(folder)])
    records = [json.loads(line) for line in (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    return records, json.loads((folder / "metrics.json").read_text())["metrics"]["greedy"]


@pytest.fixture(scope="module")
def adapted(models, rows, tmp_path_factory):
    return in_lm_eval(*models, rows, tmp_path_factory.mktemp("adapted"))


def completions_of(samples):
    return [sample["strict-match"]["resps"][0][0] for sample in samples]


def test_prompts_completions_and_gradings_are_those_of_evaluate(adapted, models, rows, tmp_path):
    samples, results = adapted
    records, metrics = in_evaluate(*models, rows, tmp_path / "evaluate")
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[0])
    assert len(samples) == len(records) == N_PROBLEMS
    for sample in samples:
        question = sample["strict-match"]["doc"]["question"]
        asked = tokenizer.apply_chat_template(gsm8k.build_prompt(question), tokenize=False, add_generation_prompt=True)
        assert sample["strict-match"]["arguments"]["gen_args_0"]["arg_0"] == asked
    # Float32 in batches of another size: where two tokens tie, either may come first.
    pairs = zip(completions_of(samples), (record["completion"] for record in records), strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
    for name, ours in GRADINGS.items():
        right = [sample[name]["exact_match"] for sample in samples]
        assert right == [float(record[ours]) for record in records]
        assert 0 < sum(right) < N_PROBLEMS
        assert results["gsm8k"][f"exact_match,{name}"] == pytest.approx(metrics[ours]["accuracy"])


def test_without_the_adapter_the_result_is_another(adapted, models, rows, tmp_path):
    samples, results = in_lm_eval(models[0], None, rows, tmp_path)
    assert completions_of(samples) != completions_of(adapted[0])
    for name in GRADINGS:
        assert results["gsm8k"][f"exact_match,{name}"] != adapted[1]["gsm8k"][f"exact_match,{name}"]


def test_with_the_models_own_repetition_penalty_the_completions_are_others(adapted, models, rows, tmp_path):
    samples, _ = in_lm_eval(*models, rows, tmp_path, repetition_penalty=1.5)
    assert completions_of(samples) != completions_of(adapted[0])
