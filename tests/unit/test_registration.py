"""
The package beside PEFT's own methods in one process, whichever is imported first.

Import order and imported modules are a fresh process's matter; three are started.
"""

import os
import subprocess
import sys
from enum import Enum
from pathlib import Path

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import trl_tinylora
from trl_tinylora import TinyLoraConfig, TinyLoraModel, TinyLoraPeftType, register


NAME = TinyLoraPeftType.TRL_TINYLORA
REGISTRIES = {
    "config": (PEFT_TYPE_TO_CONFIG_MAPPING, TinyLoraConfig),
    "tuner": (PEFT_TYPE_TO_TUNER_MAPPING, TinyLoraModel),
    "prefix": (PEFT_TYPE_TO_PREFIX_MAPPING, "trl_tinylora_"),
}


def test_registering_twice_changes_nothing():
    before = {key: dict(registry) for key, (registry, _) in REGISTRIES.items()}

    register()
    register()

    assert {key: dict(registry) for key, (registry, _) in REGISTRIES.items()} == before
    for registry, entry in REGISTRIES.values():
        assert registry[NAME] == entry


@pytest.mark.parametrize("key", REGISTRIES)
def test_another_holder_of_the_name_is_an_error(monkeypatch, key):
    registry, _ = REGISTRIES[key]
    monkeypatch.setitem(registry, NAME, "somebody else's")

    with pytest.raises(
        RuntimeError, match="'TRL_TINYLORA' is already registered by \"somebody else's\".*Import one of"
    ):
        register()

    assert registry[NAME] == "somebody else's"


def test_a_foreign_enumeration_of_the_same_name_is_noticed(monkeypatch):
    class Foreign(str, Enum):
        TRL_TINYLORA = "TRL_TINYLORA"

    for registry, _ in REGISTRIES.values():
        monkeypatch.delitem(registry, NAME)
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, Foreign.TRL_TINYLORA, peft.LoraConfig)

    with pytest.raises(RuntimeError, match="already registered by .*LoraConfig"):
        register()


def test_pefts_own_method_of_a_similar_name_is_left_alone():
    assert peft.PeftType.TINYLORA != NAME
    assert PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.TINYLORA] is peft.TinyLoraConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING[peft.PeftType.TINYLORA] == "tinylora_"
    assert not hasattr(peft.PeftType, "TRL_TINYLORA")


def test_the_type_is_what_transformers_expects_of_it():
    # transformers derives the prefix of a method's parameters from the name of its type.
    assert NAME.value.lower() + "_" == TinyLoraModel.prefix


# Every order of imports runs this: PEFT's methods and ours are made, saved, and loaded from each other's files.
STEPS = """
import sys
import torch
{imports}
from peft import LoraConfig, PeftModel, TinyLoraConfig as PeftTinyLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

FOLDER = {folder!r}


def base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2,
    )).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 11)[None]).logits


def save(name, config):
    model = get_peft_model(base(), config)
    torch.manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    model.eval().save_pretrained(f"{{FOLDER}}/{{name}}")
    torch.save(logits(model), f"{{FOLDER}}/{{name}}.pt")


def load(name):
    loaded = logits(PeftModel.from_pretrained(base(), f"{{FOLDER}}/{{name}}").eval())
    torch.testing.assert_close(loaded, torch.load(f"{{FOLDER}}/{{name}}.pt"), rtol=0, atol=1e-5)
    assert (loaded - logits(base())).abs().max() > 1e-3, "the adapter does nothing: the comparison proves nothing"


def pefts_own():
    return {{
        "tinylora": PeftTinyLoraConfig(r=2, u=4, target_modules=["q_proj", "v_proj"]),
        "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    }}
"""

PEFT_FIRST = """
for name, config in pefts_own().items():
    save(name + "_before", config)
before = set(sys.modules)
import trl_tinylora
BANNED = ("deepspeed", "vllm", "matplotlib", "datasets", "trl")


def added(name):
    return sorted(m for m in sys.modules if m not in before and m.split(".")[0] == name)


for name in BANNED:
    assert not added(name), f"import trl_tinylora imports {added(name)}"
# What takes time is importing: PEFT's own imports, a few modules of the standard library at most, and ours.
others = [m for m in sys.modules if m not in before and m.split(".")[0] != "trl_tinylora"]
foreign = {m.split(".")[0] for m in others} - sys.stdlib_module_names
assert not foreign and len(others) <= 10, f"import trl_tinylora imports {sorted(others)}"
assert 0 < len(added("trl_tinylora")) <= 40, added("trl_tinylora")
# Negative control: the check does see such an import.
sys.path.insert(0, FOLDER)
open(f"{FOLDER}/vllm.py", "w").close()
import vllm
assert added("vllm") == ["vllm"]

for name, config in pefts_own().items():
    load(name + "_before")
    save(name + "_after", config)
    load(name + "_after")
save("ours_after", trl_tinylora.TinyLoraConfig(n_tie=3))
load("ours_after")
print("DONE")
"""

OURS_FIRST = """
import trl_tinylora
for name, config in pefts_own().items():
    for stage in ("_before", "_after"):
        load(name + stage)
    save(name + "_again", config)
    load(name + "_again")
load("ours_after")
print("DONE")
"""


def test_every_public_name_is_listed_and_there():
    assert set(trl_tinylora.__all__) <= set(dir(trl_tinylora))
    assert all(getattr(trl_tinylora, name) is not None for name in trl_tinylora.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'TinyLoraConfg'"):
        trl_tinylora.TinyLoraConfg  # noqa: B018


def run(script, *flags):
    root = Path(__file__).parents[2]
    path = f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, *flags, "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0 and done.stdout.rstrip().endswith("DONE"), done.stderr[-3000:]


def test_pefts_methods_and_ours_load_whichever_was_imported_first(tmp_path):
    # Deprecations are errors where our modules cause them, not where PEFT or transformers do.
    flag = "-Werror::DeprecationWarning:trl_tinylora"

    run(STEPS.format(imports="import peft", folder=str(tmp_path)) + PEFT_FIRST, flag)
    run(STEPS.format(imports="import trl_tinylora", folder=str(tmp_path)) + OURS_FIRST, flag)


def test_a_program_that_is_run_as_a_module_finds_the_type_registered(tmp_path):
    # Only `python -m trl_tinylora` itself leaves it to its commands.
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__init__.py").write_text("import trl_tinylora\n")
    mapping = "peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING"
    code = f"import peft\nassert 'TRL_TINYLORA' in {mapping}, {mapping}\nprint('DONE')\n"
    (tmp_path / "program" / "__main__.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-m", "program", "-m", "trl_tinylora"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.stdout == "DONE\n", done.stderr[-3000:]


def test_such_a_run_can_fail(tmp_path):
    # Negative control of the test above.
    with pytest.raises(AssertionError, match="no such thing"):
        run("raise SystemExit('no such thing')")
