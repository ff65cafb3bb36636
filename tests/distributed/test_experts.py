"""Adapters on fused experts under DDP, ZeRO-3 and FSDP2, two processes, against one process. CPU and gloo."""

import pytest
import torch
import worker
from cases import TOLERANCE
from peft import PeftModel
from runs import run_cases
from tiny import MIXTURE, ROWS, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig


CASES = [
    {
        "name": f"experts-{checkpointing}",
        "trainer": "sft",
        "fields": {"n_tie": 4, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "checkpointing": checkpointing,
        "max_steps": 4,
        "save": True,
        # The router's own loss gives no gradient under reentrant checkpointing or ZeRO-3, for any adapter: transformers
        # takes the logits that it is made of by hooks, inside a pass without a graph.
        "arguments": {"router_aux_loss_coef": 0.0},
    }
    for checkpointing in ("reentrant", "non-reentrant")
]


@pytest.fixture(scope="session")
def mixture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "mixture"
    tokenizer = train_tokenizer(folder)
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3MoeConfig(**MIXTURE | {"vocab_size": len(tokenizer)} | tokens)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def alone(mixture_folder, tmp_path_factory):
    """What each case finds in this one process."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for case in CASES:
        found[case["name"]] = worker.observe({**case, "mode": "single"}, mixture_folder, ROWS, folder)
        worker.forget_the_last_case()
    return found


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.xdist_group(mode)) for mode in ("ddp", "zero3", "fsdp2")]
)
def test_two_processes_train_the_values_of_experts_as_one_does(mode, mixture_folder, alone, tmp_path):
    launched = run_cases(mode, CASES, mixture_folder, ROWS, tmp_path)
    for name, ranks in launched.items():
        expected = alone[name]
        assert len(ranks) == 2 and max(map(abs, expected["values"])) > 100 * TOLERANCE
        for rank in ranks:
            found = rank["values"]
            assert max(abs(a - b) for a, b in zip(found, expected["values"], strict=True)) <= TOLERANCE
            assert rank["most_whole_weights_while_building"] == (1 if mode == "zero3" else 0)
    # What was saved loads in one process, on the whole experts.
    ids = torch.tensor(AutoTokenizer.from_pretrained(mixture_folder)("Anna has 3 pens")["input_ids"])[None]
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(mixture_folder), tmp_path / CASES[0]["name"]
    )
    assert worker.values_of(loaded).flatten().tolist() == launched[CASES[0]["name"]][0]["values"]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(mixture_folder)
        assert (loaded(ids).logits - base(ids).logits).abs().max() > 1e-3
