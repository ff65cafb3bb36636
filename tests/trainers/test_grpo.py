"""TinyLoRA under TRL's own GRPOTrainer: references, iterations, the weight transfer to vLLM. CPU, no network."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import use_adapter

from trl_tinylora import TinyLoraConfig


FIELDS = dict(n_tie=4, u=2)


@pytest.fixture
def trained_folder(make_model, tmp_path):
    """An adapter with clearly non-zero values, saved."""
    model = get_peft_model(make_model(), TinyLoraConfig(**FIELDS))
    with torch.no_grad():
        model.base_model.bank.trl_tinylora_v["default"].values_GK.copy_(torch.linspace(-0.35, 0.35, 8).reshape(4, 2))
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.fixture
def load_trained(make_model, trained_folder):
    def load(dtype=torch.float32):
        return PeftModel.from_pretrained(make_model(dtype), trained_folder, is_trainable=True)

    return load


@pytest.mark.parametrize(
    "fields, shape", [(dict(), (14, 1)), (dict(n_tie="all", u=3), (1, 3)), (dict(n_tie=2, tying="structured"), (7, 1))]
)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_trains_the_values_and_nothing_else(grpo, values, logged, assert_base_untouched, beta, fields, shape):
    trainer = grpo(TinyLoraConfig(**fields), beta=beta, max_steps=3)
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trainable] == [shape]
    trained = values(trainer.model)
    assert trained.dtype == torch.float32 and (trained != 0).all()
    assert_base_untouched(trainer.model)
    assert [len(batch) for batch in trainer.seen] == [4, 4, 4] and all(any(batch) for batch in trainer.seen)
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))
    if beta:
        # The reference is the model with its adapter disabled: at first the same, bit for bit.
        kl = logged(trainer, "kl")
        assert kl[0] == 0.0 and kl[2] > 1e-5
    assert set(trainer.model.peft_config) == {"default"}


def test_the_values_stay_float32_on_a_bfloat16_base(grpo, values, make_model, assert_base_untouched):
    trainer = grpo(TinyLoraConfig(), model=make_model(torch.bfloat16), beta=0.1)
    assert trainer.model.dtype == torch.bfloat16 and values(trainer.model).dtype == torch.float32
    assert (values(trainer.model) != 0).all()
    assert_base_untouched(trainer.model, torch.bfloat16)


def test_a_trained_adapter_is_its_own_reference(grpo, values, logged, load_trained, assert_base_untouched):
    model = load_trained()
    before = values(model)
    assert before.abs().min() > 0.01
    trainer = grpo(model=model, beta=0.1, train=False)
    assert torch.equal(values(trainer.model, "ref"), before)
    assert trainer.model.active_adapters == ["default"]
    assert [tuple(p.shape) for p in trainer.model.parameters() if p.requires_grad] == [(4, 2)]
    trainer.args.max_steps = 3
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == 0.0 and kl[2] > 1e-5
    assert (values(trainer.model) != before).all()
    assert torch.equal(values(trainer.model, "ref"), before)
    assert_base_untouched(trainer.model)


def test_the_first_kl_sees_a_reference_that_was_not_copied(grpo, logged, load_trained):
    trainer = grpo(model=load_trained(), beta=0.1, train=False)
    trainer.model.base_model.bank.trl_tinylora_v["ref"].values_GK.data.zero_()
    trainer.train()
    assert logged(trainer, "kl")[0] > 1e-3


def test_a_trained_adapter_without_a_reference_goes_on_training(grpo, values, load_trained):
    model = load_trained()
    before = values(model)
    trainer = grpo(model=model, beta=0.0)
    assert (values(trainer.model) != before).all() and set(trainer.model.peft_config) == {"default"}


def test_two_iterations_use_every_completion_twice(grpo, values, logged, load_trained, assert_base_untouched):
    trainer = grpo(model=load_trained(), beta=0.1, num_iterations=2, max_steps=4)
    assert len(trainer.seen) == 2
    # The second iteration steps on the completions of the first with other values, and so at another loss.
    assert logged(trainer, "kl")[0] == 0.0 and logged(trainer, "kl")[1] > 1e-6
    assert_base_untouched(trainer.model)


def test_the_completions_come_from_the_adapted_model(grpo, load_trained):
    # The same draws for the adapter, the model it makes when merged, and the base.
    adapted, merged = (
        grpo(model=load_trained(), max_steps=1),
        grpo(model=load_trained().merge_and_unload(), max_steps=1),
    )
    assert adapted.seen == merged.seen
    assert adapted.seen != grpo(max_steps=1).seen


CHECKPOINTING = {
    "off": dict(gradient_checkpointing=False),
    "TRL default": dict(),
    "non-reentrant": dict(gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant": dict(gradient_checkpointing_kwargs={"use_reentrant": True}),
}


def test_every_kind_of_checkpointing_trains_the_same_values(grpo, values, load_trained, reentrant_backwards):
    trained, seen, backwards = {}, {}, {}
    for kind, args in CHECKPOINTING.items():
        reentrant_backwards.clear()
        trainer = grpo(model=load_trained(), beta=0.1, num_iterations=2, max_steps=4, **args)
        trained[kind], seen[kind] = values(trainer.model), trainer.seen
        backwards[kind] = len(reentrant_backwards)
    # Two checkpointed blocks a step; without this the last case might compare nothing.
    assert backwards == {"off": 0, "TRL default": 0, "non-reentrant": 0, "reentrant": 8}
    for kind in trained:
        assert seen[kind] == seen["off"] and torch.equal(trained[kind], trained["off"]), kind


def test_accumulating_two_halves_equals_the_whole_batch(grpo, values):
    args = dict(max_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0, loss_type="grpo", beta=0.1)
    whole = grpo(TinyLoraConfig(n_tie="all", u=3), **args)
    parts = grpo(TinyLoraConfig(n_tie="all", u=3), per_device_train_batch_size=2, gradient_accumulation_steps=2, **args)
    assert parts.seen == whole.seen and values(whole.model).abs().max() > 1e-3
    # float32 sums in another order.
    torch.testing.assert_close(values(parts.model), values(whole.model), rtol=0, atol=2e-6)


def flags(model):
    return model.active_adapters, {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("reference", ["ref", None])
def test_the_reference_pass_leaves_the_model_as_it_was(grpo, make_model, load_trained, reference):
    model = grpo(model=load_trained(), beta=0.1, train=False).model.eval()
    with torch.no_grad():
        model.base_model.bank.trl_tinylora_v["default"].values_GK.add_(0.5)
    ids = torch.arange(12).reshape(2, 6)
    before, policy = flags(model), model(ids).logits
    with use_adapter(model, reference):
        inside = model(ids).logits
    assert flags(model) == before and sum(before[1].values()) == 1
    assert torch.equal(model(ids).logits, policy)
    expected = load_trained().eval() if reference else make_model().eval()
    assert torch.equal(inside, expected(ids).logits) and not torch.equal(inside, policy)


class Engine:
    """What TRL's weight transfer needs of vLLM: it takes tensors by name."""

    def __init__(self):
        self.weights, self.resets = {}, 0
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=self)))
        )

    def load_weights(self, pairs):
        for name, weight in pairs:
            assert name not in self.weights
            self.weights[name] = weight.clone()

    def update_named_params(self, metadata, pairs):
        pairs = list((name, weight.clone()) for name, weight in pairs)
        assert metadata == [(n, str(w.dtype).removeprefix("torch."), list(w.shape)) for n, w in pairs]
        self.load_weights(pairs)

    def reset_prefix_cache(self):
        self.resets += 1


def generation_for(model, mode="colocate"):
    """TRL's weight transfer without a vLLM to transfer to."""
    transfer = object.__new__(VLLMGeneration)
    transfer.model, transfer.mode, transfer.enable_sleep_mode = model, mode, False
    transfer.accelerator = Accelerator(cpu=True)
    transfer._dist = DistributedBackend(transfer.accelerator)
    transfer._weight_metadata = None
    transfer.llm = transfer.vllm_client = Engine()
    return transfer


def push(transfer):
    transfer.llm.weights.clear()
    transfer.sync_weights()
    return dict(transfer.llm.weights)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_gets_the_merged_model(make_model, load_trained, assert_base_untouched, dtype, mode):
    model = load_trained(dtype)
    ids, before = torch.arange(12).reshape(2, 6), flags(model)
    adapted = model(ids).logits
    weights = push(generation_for(model, mode))
    merged = load_trained(dtype).merge_and_unload()
    expected = dict(merged.named_parameters())
    assert weights.keys() == expected.keys() == dict(make_model().named_parameters()).keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    # The adapted weights differ from the base's, and only they.
    base = dict(make_model(dtype).named_parameters())
    assert sum(not torch.equal(weights[name], base[name]) for name in base) == 14
    assert_base_untouched(model, dtype)
    assert flags(model) == before and torch.equal(model(ids).logits, adapted)


def test_twenty_transfers_in_bfloat16_leave_no_trace_in_the_base(load_trained, values, assert_base_untouched):
    model = load_trained(torch.bfloat16)
    transfer, trained = generation_for(model), values(model)
    first = push(transfer)
    for cycle in range(1, 20):
        with torch.no_grad():
            model.base_model.bank.trl_tinylora_v["default"].values_GK.copy_(trained * (1 + cycle))
        last = push(transfer)
        assert_base_untouched(model, torch.bfloat16)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    with torch.no_grad():
        model.base_model.bank.trl_tinylora_v["default"].values_GK.copy_(trained)
    again = push(transfer)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_check_for_traces_sees_the_drift_of_lora(make_model, base_weights):
    model = get_peft_model(
        make_model(torch.bfloat16), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    transfer = generation_for(model)
    for _ in range(20):
        push(transfer)
    found = {name: w for name, w in base_weights(model).items() if "lora_" not in name}
    expected = dict(make_model(torch.bfloat16).named_parameters())
    assert found.keys() == expected.keys()
    assert any(not torch.equal(found[name], expected[name]) for name in expected)


def test_vllm_gets_the_policy_and_not_its_reference(grpo, load_trained):
    trainer = grpo(model=load_trained(), beta=0.1)
    weights = push(generation_for(trainer.model))
    trainer.model.delete_adapter("ref")
    expected = dict(trainer.model.merge_and_unload().named_parameters())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_vllm_gets_the_trained_copy_of_a_module_to_save(sft, make_model):
    model = make_model(tie_word_embeddings=False)
    names = set(dict(model.named_parameters()))
    trainer = sft(TinyLoraConfig(n_tie=4, modules_to_save=["lm_head"]), model=model)
    original = trainer.model.base_model.model.lm_head.original_module.weight.detach().clone()
    weights = push(generation_for(trainer.model))
    expected = dict(trainer.model.merge_and_unload().named_parameters())
    assert weights.keys() == expected.keys() == names
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert not torch.equal(weights["lm_head.weight"], original)
