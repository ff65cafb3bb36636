"""TRL's own trainers on quantised base models, which they load themselves. CPU; skipped where a library is missing."""

import pytest
import torch
from quantisations import quantisation
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tuner.weights import is_quantised


KINDS = ["nf4", "nf4 twice", "8 bits", "torchao int8"]


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
@pytest.mark.parametrize("trainer", ["sft", "grpo"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_loads_a_quantised_base_and_trains_the_values_in_float32(
    request, kind, trainer, checkpointing, values, logged, reentrant_backwards
):
    trainer = request.getfixturevalue(trainer)(
        TinyLoraConfig(n_tie=4, u=2),
        max_steps=3,
        model_init_kwargs={"quantization_config": quantisation(kind)},
        gradient_checkpointing=checkpointing is not None,
        gradient_checkpointing_kwargs=checkpointing,
    )
    trained = values(trainer.model)
    assert trained.dtype == torch.float32 and (trained != 0).all()
    assert [p.dtype for p in trainer.model.parameters() if p.requires_grad] == [torch.float32]
    assert sum(map(is_quantised, trainer.model.modules())) == 14
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    assert bool(reentrant_backwards) == (checkpointing == {"use_reentrant": True})


@pytest.mark.parametrize("kind", ["nf4", "8 bits"])
def test_the_trainers_own_argument_quantises_as_well(base_folder, arguments, rows, kind, values):
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        base_folder,
        args=SFTConfig(**arguments()),
        train_dataset=rows,
        quantization_config=quantisation(kind),
        peft_config=TinyLoraConfig(),
    )
    trainer.train()
    assert (values(trainer.model) != 0).all() and sum(map(is_quantised, trainer.model.modules())) == 14


def test_checkpointing_changes_no_step(sft, values):
    def trained(**args):
        return values(
            sft(TinyLoraConfig(), model_init_kwargs={"quantization_config": quantisation("nf4")}, **args).model
        )

    without = trained(gradient_checkpointing=False)
    for use_reentrant in (True, False):
        kwargs = {"use_reentrant": use_reentrant}
        found = trained(gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        torch.testing.assert_close(found, without, rtol=1e-4, atol=1e-6)


def test_trls_transfer_to_vllm_fails_at_the_first_one_and_before_the_first_step(grpo, values):
    trainer = grpo(TinyLoraConfig(), train=False, model_init_kwargs={"quantization_config": quantisation("nf4")})
    # TRL's transfer begins with this call, before the first completion is sampled.
    with pytest.raises(NotImplementedError, match="AdapterRollout"):
        trainer.model.merge_adapter()
    assert (values(trainer.model) == 0).all()
    assert isinstance(trainer.model.unload(), AutoModelForCausalLM._model_mapping[type(trainer.model.config)])
