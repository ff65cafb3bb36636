"""The adapter that a recipe's arguments describe, and what of them is refused."""

import pytest
import trl
from peft import LoraConfig
from training.arguments import AdapterArguments, build_peft_config

from trl_tinylora import TinyLoraConfig


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"n_values": 13, "u": 1}, "n_values=13 finds u and n_tie itself, but u=1 is given too: drop n_values"),
        ({"n_values": 13, "n_tie": "all"}, "n_tie='all' is given too"),
        ({"adapter": "lora", "r": 2}, "r=2 belongs to adapter='tinylora', but adapter is 'lora'"),
        ({"adapter": "full", "n_values": 13}, "n_values=13 belongs to adapter='tinylora', but adapter is 'full'"),
        ({"n_tie": "most"}, "n_tie must be an integer or 'all', got 'most'"),
        ({"adapter": "dora"}, "got 'dora'"),
        ({"adapter": "full", "kept_dtype": "float16"}, "belongs to adapter='tinylora', but adapter is 'full'"),
        ({"kept_dtype": "int8"}, "kept_dtype must be one of .*, got 'int8'"),
    ],
)
def test_contradictory_adapter_arguments_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        AdapterArguments(**chosen)


@pytest.mark.parametrize("adapter", ["tinylora", "full"])
@pytest.mark.parametrize("lora", [{"lora_r": 1}, {"lora_target_modules": ["all-linear"]}, {"use_peft": True}])
def test_arguments_of_lora_are_refused_elsewhere_before_a_model_is_touched(adapter, lora):
    (name,) = lora
    with pytest.raises(ValueError, match=f"{name}=.* belongs to adapter='lora', but adapter is '{adapter}'"):
        build_peft_config(AdapterArguments(adapter=adapter), trl.ModelConfig("no/such-model", **lora))


def test_each_adapter_gives_its_peft_config():
    model = trl.ModelConfig("no/such-model", lora_r=1, lora_target_modules=["all-linear"])
    lora = build_peft_config(AdapterArguments(adapter="lora"), model)
    assert isinstance(lora, LoraConfig) and lora.r == 1 and lora.target_modules == "all-linear"
    assert build_peft_config(AdapterArguments(adapter="full"), trl.ModelConfig("no/such-model")) is None
    tiny = build_peft_config(AdapterArguments(n_tie="4", projection_seed=7), trl.ModelConfig("no/such-model"))
    assert isinstance(tiny, TinyLoraConfig) and (tiny.n_tie, tiny.projection_seed) == (4, 7)
    assert tiny.u == TinyLoraConfig().u, "what is not given keeps the tuner's default"
