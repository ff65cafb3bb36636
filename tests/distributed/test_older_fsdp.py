"""torch's older FSDP, `FullyShardedDataParallel`, in two processes against one model. CPU and gloo, half a minute."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from runs import free_port, run_to_end
from tiny import DECODER
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tuner.bank import TinyLoraBank
from trl_tinylora.tuner.values import Vectors


WRAPPED = {
    "whole": None,
    "blocks": {Qwen2DecoderLayer},
    # Between the model and the values stands one more unit.
    "model and blocks": {Qwen2ForCausalLM, Qwen2DecoderLayer},
}
REFUSED = {"values": {Vectors}, "all values": {nn.ModuleDict}, "bank": {TinyLoraBank}}
# Reentrant, FSDP itself finds the weights of a block sharded that is no unit of its own.
CHECKPOINTED = {"whole": [None, False], "blocks": [None, False, True], "model and blocks": [None]}


def adapted(use_reentrant=None):
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**DECODER)).train()
    if use_reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        base.enable_input_require_grads()
    return get_peft_model(base, TinyLoraConfig(n_tie=2, init_weights=False))


def sharded(model, classes):
    policy = None if classes is None else ModuleWrapPolicy(classes)
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy)


def trained(model):
    """The adapter's state after two steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(3, 21).view(2, 9)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return get_peft_model_state_dict(model)


def difference(state, other):
    """The largest one between the values of two states, which name the same adapter."""
    assert state.keys() == other.keys()
    ((values, others),) = ((state[name], other[name]) for name in state if name.endswith("lora_magnitude_vector"))
    return (values - others).abs().max().item()


def work():
    """What one of the processes does: prints the differences, and the refusals."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    expected, found = trained(adapted()), {}
    before = get_peft_model_state_dict(adapted())
    assert difference(expected, before) > 1e-3
    for name, classes in WRAPPED.items():
        for use_reentrant in CHECKPOINTED[name]:
            state = trained(sharded(adapted(use_reentrant), classes))
            found[f"{name}, {use_reentrant}"] = difference(state, expected)
    for name, classes in REFUSED.items():
        try:
            trained(sharded(adapted(), classes))
            found[name] = "trained"
        except NotImplementedError as error:
            found[name] = str(error)
    if distributed.get_rank() == 0:
        print(f"\nFOUND {json.dumps(found)}", flush=True)
    distributed.destroy_process_group()


def environment():
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), str(root / "tests" / "distributed"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def found():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), __file__]
    result = run_to_end(command, timeout=240, env=environment())
    line = next((line for line in result.stdout.splitlines() if line.startswith("FOUND ")), None)
    assert line is not None, result.stdout[-4000:]
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.parametrize("case", [f"{name}, {way}" for name in WRAPPED for way in CHECKPOINTED[name]])
def test_two_processes_train_and_save_the_values_of_one(found, case):
    assert found[case] < 1e-7


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_are_a_unit_of_their_own_are_refused(found, case):
    assert "the trained values are wrapped by themselves" in found[case] and "use FSDP2" in found[case]


if __name__ == "__main__":
    work()
