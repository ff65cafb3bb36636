"""
`python -m trl_tinylora`: what it prints, its exit status, and that errors are one line on stderr.

In this process, but for the tests of what is imported. CPU, no network.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import gguf
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import make_base
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import trl_tinylora.__main__
from trl_tinylora import TinyLoraConfig, export_gguf, export_lora
from trl_tinylora.__main__ import main
from trl_tinylora.tuner import build


@pytest.fixture(scope="module")
def adapter(base_folder, tmp_path_factory):
    """A saved adapter of 12 values on 14 modules."""
    folder = tmp_path_factory.mktemp("adapter") / "saved"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), TinyLoraConfig(n_tie=4, u=3))
    (values,) = (p for name, p in model.named_parameters() if "lora_magnitude_vector" in name)
    with torch.no_grad():
        values.copy_(torch.linspace(-1, 1, 12).reshape(4, 3))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(capfd):
    """`run(*arguments)`: exit status, lines on stdout, lines on stderr."""

    def call(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        return status, printed.out.splitlines(), printed.err.splitlines()

    return call


def assert_fails(result, *parts):
    status, out, err = result
    assert status == 1 and out == []
    assert len(err) == 1 and err[0].startswith("error: ")
    # What only a Python program could do is no way out here.
    assert not re.search(r"from_pretrained|\bpass `|\(\)`", err[0])
    for part in parts:
        assert part in err[0]


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 14)[None]).logits


# run


PROGRAM = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
print(type(model.base_model).__name__, sys.argv[3:], __name__)
"""


@pytest.mark.parametrize("is_module", [False, True])
def test_run_runs_a_program_that_has_not_heard_of_the_package(adapter, base_folder, tmp_path, is_module):
    (tmp_path / "program.py").write_text(PROGRAM)
    program = ["-m", "program"] if is_module else [str(tmp_path / "program.py")]
    command = [*program, base_folder, str(adapter), "--model", "hf"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}

    def call(*through):
        return subprocess.run([sys.executable, *through, *command], capture_output=True, text=True, env=environment)

    done = call("-m", "trl_tinylora", "run")
    assert done.stdout.splitlines() == ["TinyLoraModel ['--model', 'hf'] __main__"], done.stderr
    # Control: by itself it fails.
    assert "KeyError: 'TRL_TINYLORA'" in call().stderr


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["-m", "no_such_module"], "no module 'no_such_module'"),
        (["-m", "os.nope"], "no module 'os.nope'"),
        (["-m", "json.nope"], "no module 'json.nope'"),
        (["no/file.py"], "no file 'no/file.py'"),
        (["-m"], "-m"),
    ],
)
def test_run_says_what_there_is_not(run, command, message):
    assert_fails(run("run", *command), message)


# plan


def test_plan_makes_the_budgets_that_it_prints(run, base_folder):
    status, out, err = run("plan", base_folder)

    assert status == 0 and err == []
    assert out[0] == f"{base_folder}: 14 modules at r=2"
    assert out[1].split() == ["tying", "values", "bytes", "u", "n_tie", "groups", "config"]
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    rows = [line.split(maxsplit=6) for line in out[2:]]
    assert {row[0] for row in rows} == {"tiled", "structured"}
    for tying, values, n_bytes, u, n_tie, groups, line in rows:
        config = eval(line, {"TinyLoraConfig": TinyLoraConfig})
        assert (config.tying, str(config.u), str(config.n_tie)) == (tying, u, n_tie)
        trained = get_peft_model(model, config)
        assert trained.get_nb_trainable_parameters()[0] == int(values) == int(u) * int(groups) == int(n_bytes) // 4
        model = trained.unload()
    counts = [int(row[1]) for row in rows if row[0] == "tiled"]
    assert {1, 13, 14} <= set(counts) and counts == sorted(set(counts))


def test_plan_reads_no_weights(run, base_folder, tmp_path):
    AutoConfig.from_pretrained(base_folder).save_pretrained(tmp_path)

    status, out, _ = run("plan", tmp_path, "--values", 6, "--r", 1, "--target_modules", "q_proj", "v_proj")

    assert status == 0 and [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert out[0].endswith(": 4 modules at r=1")
    tiled = [line for line in out if line.startswith("tiled")]
    assert [line.split(maxsplit=6)[1] for line in tiled] == ["4"]
    assert tiled[0].endswith("TinyLoraConfig(r=1, target_modules=['q_proj', 'v_proj'])")
    assert out[-2:] == [
        f"no configuration has 6 values with tying={tying!r}; the nearest has 4" for tying in ("tiled", "structured")
    ]


def test_plan_reproduces_the_papers_13_values(run, tmp_path):
    base = AutoConfig.for_model("qwen2", num_hidden_layers=28, hidden_size=64, intermediate_size=64, vocab_size=8)
    base.save_pretrained(tmp_path)

    _, out, _ = run("plan", tmp_path, "--values", 13)

    assert "196 modules" in out[0]
    assert out[2].split() == ["tiled", "13", "52", "1", "16", "13", "TinyLoraConfig(n_tie=16)"]


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
def test_plan_says_why_it_cannot(run, tmp_path, base_folder):
    assert_fails(run("plan", tmp_path))
    assert_fails(run("plan", base_folder, "--target_modules", "nothing"), "matches no module")
    assert_fails(run("plan", base_folder, "--r", 99), "r=99 exceeds the rank")
    assert_fails(run("plan", base_folder, "--target_modules", "q_proj", "k_porj"), "['k_porj'] in target_modules")


# inspect


def test_inspect_prints_values_sizes_and_configuration(run, adapter, base_folder):
    status, out, err = run("inspect", adapter)

    assert status == 0 and err == []
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert out[:2] == ["type: TRL_TINYLORA", f"base model: {base_folder}"]
    assert out[2] == f"file: {size} bytes, 48 of them tensors"
    assert out[3] == "values: 12 (groups: 4, u=3), r=2, n_tie=4, tying=tiled, on 14 modules"
    assert "projection_seed=0" in out[4] and "save_dtype='float32'" in out[4]
    assert "float32, shape (4, 3), values -1 -0.818182 " in out[5] and out[5].endswith(" 1")


def test_inspect_prints_no_base64(run, adapter):
    fields = json.loads((adapter / "adapter_config.json").read_text())

    _, out, _ = run("inspect", adapter)

    assert len(fields["base_fingerprint"]["probes"]) > 100
    assert not re.search(r"[A-Za-z0-9+]{40}", " ".join(out[2:]))


def test_inspect_shows_the_tensors_of_any_adapter(run, adapter, base_folder, tmp_path):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter)
    export_lora(model, tmp_path / "lora", dtype=torch.bfloat16)

    status, out, _ = run("inspect", tmp_path / "lora")

    assert status == 0 and out[0] == "type: LORA"
    assert len(out) == 4 + 2 * 14 and out[4].endswith(": bfloat16, shape (2, 64)")


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
def test_inspect_names_what_is_damaged(run, adapter, tmp_path):
    assert_fails(run("inspect", tmp_path), "has no adapter_config.json")
    assert_fails(run("inspect", "no/such"), "no/such is no folder, and not to be had from the Hub")
    shutil.copytree(adapter, tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert_fails(run("inspect", tmp_path / "cut"), "no complete safetensors file")
    weights.unlink()
    assert_fails(run("inspect", tmp_path / "cut"), "has no adapter_model.safetensors")
    (tmp_path / "cut" / "adapter_config.json").write_text('{"peft_type": ')
    assert_fails(run("inspect", tmp_path / "cut"), "no complete JSON")


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_fingerprint": "text"}, "`base_fingerprint` is damaged"),
        ({"base_fingerprint": [1]}, "`base_fingerprint` is damaged"),
        ({"checkpoint_format": 99}, "`checkpoint_format` is 99"),
        ({"checkpoint_digest": 5}, "`checkpoint_digest` must be a text"),
    ],
)
def test_every_command_names_a_damaged_configuration(run, adapter, base_folder, tmp_path, fields, message):
    shutil.copytree(adapter, tmp_path / "edited")
    path = tmp_path / "edited" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    name = tmp_path / "edited"
    for command in (["inspect", name], ["verify", name, base_folder], ["export", name, tmp_path / "out"]):
        assert_fails(run(*command), str(path), message)
    assert not (tmp_path / "out").exists()


# export


def test_export_writes_a_lora_of_equal_logits(run, adapter, base_folder, tmp_path):
    status, out, err = run("export", adapter, tmp_path / "lora", "--base", base_folder)

    assert status == 0 and err == []
    size = (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert out == [f"wrote {tmp_path / 'lora'}: {size} bytes"]
    ours, plain = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
        for folder in (adapter, tmp_path / "lora")
    )
    assert plain.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits_of(plain), logits_of(ours), rtol=1e-5, atol=1e-5)


def test_export_converts_an_adapter_of_pefts_own_tinylora(run, base_folder, tmp_path):
    fields = {"target_modules": ["q_proj", "down_proj"], "u": 3, "init_weights": "uniform", "init_v_bound": 0.5}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), peft.TinyLoraConfig(**fields))
    model.save_pretrained(tmp_path / "tinylora")

    status, _, err = run("export", tmp_path / "tinylora", tmp_path / "lora", "--dtype", "float32")

    assert status == 0 and err == []
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "lora")
    assert plain.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits_of(plain), logits_of(model), rtol=1e-5, atol=1e-5)


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
def test_export_refuses_an_adapters_folder_unless_told(run, adapter, base_folder, tmp_path):
    assert run("export", adapter, tmp_path / "lora")[0] == 0
    before = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()

    assert_fails(
        run("export", adapter, tmp_path / "lora", "--dtype", "bfloat16"), "holds an adapter already", "--overwrite"
    )
    assert (tmp_path / "lora" / "adapter_model.safetensors").read_bytes() == before
    assert run("export", adapter, tmp_path / "lora", "--dtype", "bfloat16", "--overwrite")[0] == 0
    assert len((tmp_path / "lora" / "adapter_model.safetensors").read_bytes()) < len(before)


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
def test_export_never_writes_over_what_it_reads(run, adapter, base_folder, tmp_path):
    shutil.copytree(adapter, tmp_path / "saved")
    shutil.copytree(base_folder, tmp_path / "base")
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}

    for out in (tmp_path / "saved", tmp_path / "saved" / ".." / "saved", tmp_path / "base"):
        command = ("export", tmp_path / "saved", out, "--base", tmp_path / "base", "--overwrite")
        assert_fails(run(*command), f"{out} is read, and would be written over", "Name another folder")

    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
def test_export_refuses_adapters_of_other_methods(run, adapter, base_folder, tmp_path):
    run("export", adapter, tmp_path / "lora")

    assert_fails(run("export", tmp_path / "lora", tmp_path / "again"), "type LORA, not TRL_TINYLORA")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_writes_a_gguf_file(run, adapter, base_folder, tmp_path, dtype):
    out = tmp_path / "adapter.gguf"

    status, printed, err = run("export", adapter, out, "--format", "gguf", "--base", base_folder, "--dtype", dtype)

    assert status == 0 and err == []
    assert printed == [f"wrote {out}: {out.stat().st_size} bytes"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), adapter)
    export_gguf(model, tmp_path / "expected.gguf", dtype=getattr(torch, dtype))
    assert out.read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    assert len(gguf.GGUFReader(out).tensors) == 2 * 14


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
def test_export_refuses_what_is_not_written_as_gguf(run, adapter, base_folder, tmp_path, monkeypatch):
    out = tmp_path / "adapter.gguf"
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    gpt2.save_pretrained(tmp_path / "gpt2")
    get_peft_model(gpt2, TinyLoraConfig()).save_pretrained(tmp_path / "other")
    as_gguf = ("--format", "gguf")
    assert_fails(
        run("export", tmp_path / "other", out, *as_gguf, "--base", tmp_path / "gpt2"),
        "GPT2LMHeadModel is none of",
        "convert_hf_to_gguf.py",
    )
    tinylora = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), peft.TinyLoraConfig())
    tinylora.save_pretrained(tmp_path / "tinylora")
    assert_fails(run("export", tmp_path / "tinylora", out, *as_gguf), "PEFT's own TinyLoRA", "convert_lora_to_gguf.py")

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    # What is wrong with OUT is said before the model is loaded.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    (tmp_path / "there.gguf").touch()
    assert_fails(run("export", adapter, tmp_path / "there.gguf", *as_gguf), "is there already", "--overwrite")
    weights = adapter / "adapter_model.safetensors"
    before = weights.read_bytes()
    assert_fails(run("export", adapter, weights, *as_gguf, "--overwrite"), "does not end in .gguf")
    assert weights.read_bytes() == before
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_fails(run("export", adapter, out, *as_gguf), "pip install 'trl-tinylora[gguf]'")
    assert not out.exists()


def test_export_asks_for_a_base_that_nobody_names(run, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "anonymous")
    path = tmp_path / "anonymous" / "adapter_config.json"
    for name in (None, 5):
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
        assert_fails(
            run("export", tmp_path / "anonymous", tmp_path / "lora"), f"names no base model (got {name})", "--base"
        )
    assert_fails(run("export", adapter, tmp_path / "lora", "--base", ""), "'' is no folder")


# verify


def test_verify_counts_what_it_loaded(run, adapter, base_folder):
    assert run("verify", adapter, base_folder) == (0, [f"OK: 12 values on 14 modules of {base_folder}"], [])


def test_verify_passes_on_why_an_adapter_does_not_load(run, adapter, base_folder, tmp_path):
    assert_fails(run("verify", adapter, tmp_path))
    assert_fails(run("verify", tmp_path, base_folder), "has no adapter_config.json")
    run("export", adapter, tmp_path / "lora")
    assert_fails(run("verify", tmp_path / "lora", base_folder), "type LORA, not TRL_TINYLORA")

    make_base(tmp_path / "deeper", num_hidden_layers=3)
    shutil.copytree(adapter, tmp_path / "any modules")
    path = tmp_path / "any modules" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "all-linear"}))
    shutil.copytree(base_folder, tmp_path / "cut base")
    (tmp_path / "cut base" / "model.safetensors").write_bytes(b"")
    assert_fails(run("verify", adapter, tmp_path / "cut base"), f"weights of {tmp_path / 'cut base'} are no complete")
    # What is wrong with the base is for the loader to say.
    assert_fails(run("verify", tmp_path / "any modules", tmp_path / "deeper"), "base model")


def test_verify_compares_names_and_weights_before_it_computes_singular_vectors(
    run, adapter, base_folder, tmp_path, monkeypatch
):
    def computed(*args):
        raise AssertionError("a singular vector was computed")

    monkeypatch.setattr(build, "truncated_svd", computed)
    make_base(tmp_path / "wider", intermediate_size=96)
    assert_fails(run("verify", adapter, tmp_path / "wider"), "is not the base model of", "other shapes", base_folder)
    make_base(tmp_path / "others", initializer_range=0.1)
    assert_fails(run("verify", adapter, tmp_path / "others"), "is not the base model of", "other weights", base_folder)
    # Negative control: with its own base it gets there.
    with pytest.raises(AssertionError, match="a singular vector was computed"):
        run("verify", adapter, base_folder)


# Base models and adapters that are none


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
@pytest.mark.parametrize("base", ["nothing", "./nothing", "an adapter", "an empty folder", "a file", "nobody/nothing"])
def test_every_command_refuses_at_once_what_is_no_base_model(run, adapter, tmp_path, monkeypatch, base):
    def loaded(*args, **kwargs):
        raise AssertionError("something was loaded")

    for loader in (AutoConfig, AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", loaded)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    places = {"an adapter": adapter, "an empty folder": tmp_path / "empty", "a file": tmp_path / "file"}
    base = str(places.get(base, base))
    for command in (["plan", base], ["verify", adapter, base], ["export", adapter, tmp_path / "out", "--base", base]):
        assert_fails(run(*command), base)
    assert not (tmp_path / "out").exists()


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
@pytest.mark.parametrize("name", ["nothing", "./nothing", "a base model", "a file", "nobody/nothing"])
def test_every_command_refuses_at_once_what_is_no_adapter(run, base_folder, tmp_path, name):
    (tmp_path / "file").touch()
    name = {"a base model": base_folder, "a file": str(tmp_path / "file")}.get(name, name)
    for command in (["inspect", name], ["verify", name, base_folder], ["export", name, tmp_path / "out"]):
        assert_fails(run(*command), name)
    assert not (tmp_path / "out").exists()


# Usage


@pytest.mark.bad_input("a command line of `python -m trl_tinylora`")
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate"],
        ["plan"],
        ["plan", "model", "--values", "0"],
        ["plan", "model", "--values", "many"],
        ["plan", "model", "--r", "2.5"],
        ["export", "adapter"],
        ["export", "adapter", "out", "--dtype", "int8"],
        ["export", "adapter", "out", "--format", "onnx"],
        ["verify", "adapter"],
    ],
)
def test_wrong_usage_exits_with_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: python -m trl_tinylora" in capsys.readouterr().err


def test_a_bug_is_not_hidden(monkeypatch, adapter):
    def broken(folder):
        raise AssertionError("a bug")

    monkeypatch.setattr(trl_tinylora.__main__, "refuse_unfit_adapter", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["inspect", str(adapter)])


def modules_imported_by(*arguments):
    """Exit status, and every module that a process of the command imported."""
    command = [sys.executable, "-X", "importtime", "-m", "trl_tinylora", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    rows = [line.split("|") for line in finished.stderr.splitlines() if line.startswith("import time:")]
    rest = [line for line in finished.stderr.splitlines() if not line.startswith("import time:")]
    return finished.returncode, rest, {row[2].strip() for row in rows if len(row) == 3}


HEAVY = {"torch", "transformers", "peft", "numpy", "huggingface_hub"}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 0), (["verify", "--help"], 0), (["plan"], 2), (["inspect", "./no"], 1), (["plan", "./no"], 1)],
)
def test_help_and_wrong_arguments_import_nothing_that_takes_seconds(arguments, status):
    found, _, imported = modules_imported_by(*arguments)

    assert found == status
    assert "trl_tinylora.sources" in imported and not imported & HEAVY


def test_a_command_that_needs_them_imports_them_and_ends_in_one_line(adapter, tmp_path):
    # Negative control of the test above, too.
    shutil.copytree(adapter, tmp_path / "cut")
    (tmp_path / "cut" / "adapter_config.json").write_text("{")

    status, printed, imported = modules_imported_by("inspect", tmp_path / "cut")

    assert status == 1 and len(printed) == 1 and printed[0].startswith(f"error: {tmp_path / 'cut'}")
    assert "no complete JSON" in printed[0] and imported & HEAVY


def test_inspect_imports_neither_peft_nor_transformers(adapter, base_folder, tmp_path):
    status, printed, imported = modules_imported_by("inspect", adapter)
    assert status == 0 and printed == [] and not imported & {"peft", "transformers", "huggingface_hub"}
    # Negative control.
    _, _, imported = modules_imported_by("verify", adapter, tmp_path / "nothing")
    assert not imported & HEAVY
    status, _, imported = modules_imported_by("plan", base_folder)
    assert status == 0 and imported >= {"peft", "transformers"}
