"""The adapter and the rewards that a recipe's arguments describe, and what of them is refused."""

import sys

import pytest
import trl
from peft import LoraConfig
from training.arguments import AdapterArguments, RLArguments, build_peft_config
from trl.rewards import think_format_reward

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tasks import controls, gsm8k, math


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


# The reward


def test_a_reward_is_one_name_or_several_and_a_yaml_or_a_command_line_gives_either(tmp_path):
    def rewards(yaml, *arguments):
        (tmp_path / "run.yaml").write_text(f"dataset_name: none\n{yaml}\n")
        parser = trl.TrlParser((RLArguments,))
        (parsed,) = parser.parse_args_and_config(["--config", str(tmp_path / "run.yaml"), *arguments])
        return parsed.reward_functions()

    assert rewards("task: gsm8k") == [gsm8k.strict_reward]
    assert rewards("reward: format") == [gsm8k.format_reward]
    assert rewards("task: math\nreward: [format, flexible]") == [math.format_reward, math.flexible_reward]
    assert rewards("reward: format", "--reward", "strict", "random") == [gsm8k.strict_reward, controls.random_reward]
    (parsed,) = trl.TrlParser((RLArguments,)).parse_dict({"dataset_name": "none", "reward": "format"})
    assert parsed.reward_functions() == [gsm8k.format_reward]


def test_a_reward_by_its_dotted_path_is_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_this_test.py").write_text("def short(completions, **kwargs): return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = ["my_rewards_of_this_test.short", "trl.rewards.think_format_reward"]
    mine, trls = RLArguments("none", reward=names).reward_functions()
    assert mine(completions=["a"]) == [1.0] and trls is think_format_reward


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("exact", "reward must be one of strict, flexible, format, random, or a dotted path .*; got 'exact'"),
        ("nowhere.at_all", "reward='nowhere.at_all' cannot be imported from .*: No module named 'nowhere'"),
        ("json.no_such", "reward='json.no_such' cannot be imported from .*: module 'json' has no attribute 'no_such'"),
    ],
)
def test_a_reward_that_there_is_not_is_refused(reward, message, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match=message):
        RLArguments("none", reward=reward).reward_functions()


def test_rollouts_are_trls_own_unless_the_adapter_is_asked_for(tmp_path):
    training_args = trl.GRPOConfig(str(tmp_path), use_vllm=True, use_cpu=True, bf16=False)
    assert RLArguments("rows").rollout_function(training_args, AdapterArguments()) is None
    assert training_args.use_vllm is True


@pytest.mark.parametrize(
    ("given", "url"),
    [({}, "http://0.0.0.0:8000"), ({"vllm_server_base_url": "http://gpu:1"}, "http://gpu:1")],
)
def test_a_server_is_found_where_trl_would_look_for_it(tmp_path, given, url):
    training_args = trl.GRPOConfig(str(tmp_path), use_vllm=True, vllm_mode="server", use_cpu=True, bf16=False, **given)
    rollout = RLArguments("rows", rollouts="adapter").rollout_function(training_args, AdapterArguments())
    assert rollout.server_url == url
    # TRL would start an engine and send it every weight.
    assert training_args.use_vllm is False


@pytest.mark.bad_input("a sampler's settings or server")
@pytest.mark.parametrize(
    ("rollouts", "use_vllm", "adapter", "message"),
    [
        ("adapters", True, "tinylora", "must be 'merged' or 'adapter', got 'adapters'"),
        ("adapter", False, "tinylora", "use_vllm is false: set it, or drop rollouts"),
        ("adapter", True, "lora", "adapter is 'lora': drop rollouts"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(tmp_path, rollouts, use_vllm, adapter, message):
    training_args = trl.GRPOConfig(str(tmp_path), use_vllm=use_vllm, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=message):
        RLArguments("rows", rollouts=rollouts).rollout_function(training_args, AdapterArguments(adapter=adapter))


def test_tying_by_expressions_comes_from_yaml_or_from_json_on_the_command_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("tying: {attention: self_attn, mlp: mlp}\n")
    parser = trl.TrlParser([AdapterArguments])
    (of_yaml,) = parser.parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])
    (given,) = parser.parse_args_and_config(["--tying", '{"attention": "self_attn", "mlp": "mlp"}'])
    assert of_yaml.tying == given.tying == {"attention": "self_attn", "mlp": "mlp"}
    assert build_peft_config(given, trl.ModelConfig("any")).tying == given.tying
    with pytest.raises(ValueError, match="is no JSON"):
        AdapterArguments(tying="{attention")
