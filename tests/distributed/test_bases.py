"""
Bases beside a plain stack of blocks under DDP, ZeRO-3 and FSDP2, two processes, against one process. CPU and gloo.

Fused experts, and linear layers outside the list of blocks, where v has two gradient sinks.
"""

import pytest
import torch
import worker
from cases import TOLERANCE, partitioned
from peft import PeftModel
from runs import run_cases
from tiny import MIXTURE, ROWS, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, Qwen3MoeConfig


# With a projection in front of the blocks and one behind them, as OPT-350m.
PROJECTIONS = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 2}
PROJECTIONS |= {"num_attention_heads": 4, "max_position_embeddings": 256, "dropout": 0.0, "init_std": 0.2}
BASES = {"experts": Qwen3MoeConfig(**MIXTURE), "projections": OPTConfig(**PROJECTIONS)}
# Of each base: the fields of the adapter, and arguments of the trainer.
CASES = {
    "experts": (
        {"n_tie": 4, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        # The router's own loss gives no gradient under reentrant checkpointing or ZeRO-3, for any adapter: transformers
        # takes the logits that it is made of by hooks, inside a pass without a graph.
        {"router_aux_loss_coef": 0.0},
    ),
    "projections": ({"n_tie": 4}, {}),
}


def cases_of(base, folder):
    fields, arguments = CASES[base]
    return [
        {
            "name": f"{base}-{checkpointing}",
            "base": str(folder),
            "trainer": "sft",
            "fields": fields,
            "checkpointing": checkpointing,
            "max_steps": 4,
            "save": True,
            "arguments": arguments,
        }
        for checkpointing in ("reentrant", "non-reentrant")
    ]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of each base."""
    made = {}
    for base, config in BASES.items():
        made[base] = tmp_path_factory.mktemp("bases") / base
        tokenizer = train_tokenizer(made[base])
        config.vocab_size = len(tokenizer)
        config.eos_token_id, config.pad_token_id, config.bos_token_id = (
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            None,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[base])
    return made


@pytest.fixture(scope="session")
def alone(folders, tmp_path_factory):
    """What each case finds in this one process."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for base in BASES:
        for case in cases_of(base, folders[base]):
            found[case["name"]] = worker.observe({**case, "mode": "single"}, case["base"], ROWS, folder)
            worker.forget_the_last_case()
    return found


# Of a mode, which bases; ZeRO-3 by default leaves parameters as small as the values whole.
MODES = {"ddp": [*BASES], "zero3": [*BASES], "fsdp2": [*BASES], "zero3, values partitioned": ["projections"]}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.xdist_group(mode.partition(",")[0])) for mode in MODES]
)
def test_two_processes_train_the_values_as_one_does(mode, folders, alone, tmp_path):
    cases = [case for base in MODES[mode] for case in cases_of(base, folders[base])]
    launcher, launched_cases = ("ddp", partitioned(cases)) if mode.endswith("partitioned") else (mode, cases)
    launched = run_cases(launcher, launched_cases, cases[0]["base"], ROWS, tmp_path)
    for case in cases:
        ranks, expected = launched[case["name"]], alone[case["name"]]["values"]
        assert len(ranks) == 2 and max(map(abs, expected)) > 100 * TOLERANCE
        for rank in ranks:
            assert max(abs(a - b) for a, b in zip(rank["values"], expected, strict=True)) <= TOLERANCE
            assert rank["most_whole_weights_while_building"] == mode.startswith("zero3")
        # What was saved loads in one process, on the whole weights.
        ids = torch.tensor(AutoTokenizer.from_pretrained(case["base"])("Anna has 3 pens")["input_ids"])[None]
        plain, base = (AutoModelForCausalLM.from_pretrained(case["base"]) for _ in range(2))
        loaded = PeftModel.from_pretrained(base, tmp_path / case["name"])
        assert worker.values_of(loaded).flatten().tolist() == ranks[0]["values"]
        with torch.no_grad():
            assert (loaded(ids).logits - plain(ids).logits).abs().max() > 1e-3
