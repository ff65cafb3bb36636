"""
The gradient sink against plain autograd in float64, in every order of passes that a trainer can produce.

Reentrant backward passes are counted, since asking for them does not mean to get them. CPU, seconds.
"""

from collections import Counter

import pytest
import torch
from peft import get_peft_model
from plain_autograd import checkpointed, expected_gradients, set_values, values_of
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from trl_tinylora import TinyLoraConfig


# transformers 5.23 renamed `gradient_checkpointing_enable`; both names are in use.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FIELDS = {"n_tie": 5, "u": 2}
# Gradients of the order of one; the two orders of summation differ by some 1e-15 of the terms. (Qwen2's RMSNorm
# computes in float32 even in a float64 model; a difference of 1e-15 before it is none behind it, on both sides alike.)
EXACT = {"rtol": 0, "atol": 1e-12}
modes = pytest.mark.parametrize("mode", ["no checkpointing", "reentrant", "non-reentrant"])


def adapted(base, mode="no checkpointing", **fields):
    """A float64 model in training mode, adapted, with drawn values."""
    model = get_peft_model(base.double(), TinyLoraConfig(**(fields or FIELDS))).double().train()
    set_values(model)
    return checkpointed(model, mode)


def assert_exact(model, plain, run):
    """Asserts that every active adapter has the gradient of `run`, which is returned."""
    expected = expected_gradients(plain, model, run)
    for name, gradient in zip(model.base_model.bank.active_adapters, expected, strict=True):
        torch.testing.assert_close(values_of(model, name).grad, gradient, **EXACT)
    return expected


def cross_entropy(logits, ids):
    # transformers computes its loss in float32, whatever the model's dtype.
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture
def passes(token_ids):
    """Three different losses of a model: functions of the model as called with keywords."""

    def loss_of(ids):
        return lambda model: cross_entropy(model(input_ids=ids).logits, ids)

    return [loss_of((token_ids + shift) % 60 + 3) for shift in range(3)]


def count_firings(leaf):
    """Counts how often a leaf's gradient is accumulated."""
    counter = Counter()
    leaf.register_post_accumulate_grad_hook(lambda _: counter.update(["fired"]))
    return counter


@modes
def test_gradient_equals_plain_autograd_and_fires_once(tiny_qwen2, passes, reentrant_backwards, mode):
    model = adapted(tiny_qwen2(num_hidden_layers=3), mode)
    firings = count_firings(values_of(model))

    passes[0](model).backward()

    (expected,) = assert_exact(model, tiny_qwen2(num_hidden_layers=3), passes[0])
    assert expected.abs().min() > 1e-4, "the tolerance would not tell this gradient from zero"
    assert firings["fired"] == 1
    assert len(reentrant_backwards) == (3 if mode == "reentrant" else 0)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]


def test_a_leaf_tied_by_plain_autograd_fires_more_often_under_reentrant_checkpointing(
    tiny_qwen2, passes, reentrant_backwards
):
    # Negative control of the test above: without the sink the same tying is what DeepSpeed and DDP do not stand.
    class Tied(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, weight):
            return weight * (1 + self.value)

    model = tiny_qwen2(num_hidden_layers=3).double().train().requires_grad_(False)
    value = nn.Parameter(torch.zeros((), dtype=torch.float64))
    for block in model.model.layers:
        parametrize.register_parametrization(block.self_attn.q_proj, "weight", Tied(value))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    firings = count_firings(value)

    passes[0](model).backward()

    assert len(reentrant_backwards) == 3
    assert firings["fired"] == 3


@modes
def test_gradients_accumulate_over_backward_passes(tiny_qwen2, passes, reentrant_backwards, mode):
    model = adapted(tiny_qwen2(), mode)
    firings = count_firings(values_of(model))

    for run in passes:
        run(model).backward()

    assert_exact(model, tiny_qwen2(), lambda plain: sum(run(plain) for run in passes))
    assert firings["fired"] == 3
    assert len(reentrant_backwards) == (6 if mode == "reentrant" else 0)


@modes
def test_two_forward_passes_may_precede_one_backward(tiny_qwen2, passes, mode):
    model = adapted(tiny_qwen2(), mode)

    (passes[0](model) + 2 * passes[1](model)).backward()

    assert_exact(model, tiny_qwen2(), lambda plain: passes[0](plain) + 2 * passes[1](plain))


@modes
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forward_passes_may_be_followed_by_their_backward_passes_in_any_order(tiny_qwen2, passes, mode, order):
    model = adapted(tiny_qwen2(), mode)
    losses = [run(model) for run in passes[:2]]

    for position in order:
        values_of(model).grad = None
        losses[position].backward()

        assert_exact(model, tiny_qwen2(), passes[position])


def no_grad_pass(model, ids):
    with torch.no_grad():
        model(input_ids=ids.flip(1))


def inference_mode_pass(model, ids):
    with torch.inference_mode():
        model(input_ids=ids.flip(1))


def generation(model, ids):
    model.eval()
    model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    model.train()


def disabled_pass(model, ids):
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=ids)


def pass_of_another_adapter(model, ids):
    model.set_adapter("other")
    with torch.no_grad():
        model(input_ids=ids)
    model.set_adapter("default")


def backward_of_another_adapter(model, ids):
    model.set_adapter("other")
    model(input_ids=ids, labels=ids).loss.backward()
    model.set_adapter("default")


def merge_and_unmerge(model, ids):
    model.merge_adapter()
    with torch.no_grad():
        model(input_ids=ids)
    model.unmerge_adapter()


def unused_pass_with_graph(model, ids):
    model(input_ids=ids, labels=ids)


@modes
@pytest.mark.parametrize(
    "between",
    [
        no_grad_pass,
        inference_mode_pass,
        generation,
        disabled_pass,
        pass_of_another_adapter,
        backward_of_another_adapter,
        merge_and_unmerge,
        unused_pass_with_graph,
    ],
)
def test_what_happens_between_forward_and_backward_does_not_matter(tiny_qwen2, passes, token_ids, mode, between):
    model = adapted(tiny_qwen2(), mode)
    model.add_adapter("other", TinyLoraConfig(r=1, n_tie=2))
    model.double()
    set_values(model, "other", seed=7)

    loss = passes[0](model)
    between(model, token_ids)
    loss.backward()

    assert_exact(model, tiny_qwen2(), passes[0])


@modes
def test_embeddings_may_be_given_instead_of_tokens(tiny_qwen2, token_ids, mode):
    model = adapted(tiny_qwen2(), mode)
    plain = tiny_qwen2().double()
    embedded = plain.get_input_embeddings()(token_ids).detach()

    def run(called, inputs):
        return cross_entropy(called(inputs_embeds=inputs).logits, token_ids)

    inputs, plain_inputs = (embedded.clone().requires_grad_() for _ in range(2))
    # A pass from tokens before it, so that a stale state would be another one.
    model(input_ids=token_ids)
    set_values(model, seed=3)
    run(model, inputs).backward()

    expected = expected_gradients(plain, model, lambda called: run(called, plain_inputs), [plain_inputs])
    for found, gradient in zip((values_of(model).grad, inputs.grad), expected, strict=True):
        torch.testing.assert_close(found, gradient, **EXACT)


@modes
def test_bfloat16_autocast_is_within_its_rounding(tiny_qwen2, passes, mode):
    model = adapted(tiny_qwen2(), mode).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = passes[0](model)
    loss.backward()

    assert values_of(model).grad.dtype == torch.float32
    (expected,) = expected_gradients(tiny_qwen2(), model.double(), passes[0])
    # bfloat16 has 4e-3 of relative rounding in each of some dozen products on the way; terms cancel in the sum.
    error = (values_of(model).grad.double() - expected).abs().max() / expected.abs().max()
    assert error < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_give_float32_gradients(tiny_qwen2, passes, dtype):
    model = get_peft_model(tiny_qwen2().to(dtype), TinyLoraConfig(**FIELDS)).train()
    set_values(model)

    passes[0](model).backward()

    (expected,) = expected_gradients(tiny_qwen2(), model.double(), passes[0])
    error = (values_of(model).grad.double() - expected).abs().max() / expected.abs().max()
    # As above: some dozen roundings of 4e-3 (bfloat16; float16 has 5e-4), and a base rounded to the same.
    assert error < 0.15


@modes
def test_a_failed_backward_pass_leaves_nothing_behind(tiny_qwen2, passes, mode):
    model = adapted(tiny_qwen2(), mode)
    block = model.get_submodule("base_model.model.model.layers.0")

    def fail(grad):
        raise RuntimeError("failed on purpose")

    def fail_in_backward(module, args, output):
        # Reentrant checkpointing calls a block twice, at first without gradients.
        if output.requires_grad:
            output.register_hook(fail)

    # On the first block's output: the backward passes of the second block's layers have run by then.
    handle = block.register_forward_hook(fail_in_backward)
    with pytest.raises(RuntimeError, match="failed on purpose"):
        passes[1](model).backward()
    handle.remove()
    vectors = model.base_model.bank.vectors("default")
    left_MRR = vectors.buffer.take()
    assert left_MRR.abs().max() > 0, "the failed pass left nothing that could have done harm"
    for index, left_RR in enumerate(left_MRR):
        vectors.buffer.add(index, left_RR, len(left_MRR))
    assert values_of(model).grad is None

    passes[0](model).backward()

    assert_exact(model, tiny_qwen2(), passes[0])


@modes
def test_a_kept_graph_gives_the_gradient_again(tiny_qwen2, passes, mode):
    model = adapted(tiny_qwen2(), mode)

    loss = passes[0](model)
    loss.backward(retain_graph=True)
    once = values_of(model).grad.clone()
    loss.backward()

    torch.testing.assert_close(once, *expected_gradients(tiny_qwen2(), model, passes[0]), **EXACT)
    torch.testing.assert_close(values_of(model).grad, 2 * once, **EXACT)


@pytest.mark.parametrize("mode", ["no checkpointing", "non-reentrant"])
def test_autograd_grad_returns_the_gradient(tiny_qwen2, passes, mode):
    model = adapted(tiny_qwen2(), mode)

    (grad,) = torch.autograd.grad(passes[0](model), values_of(model))

    torch.testing.assert_close(grad, *expected_gradients(tiny_qwen2(), model, passes[0]), **EXACT)
    assert values_of(model).grad is None


def test_gradient_equals_finite_differences(tiny_gpt2, passes):
    # GPT-2, since its LayerNorm computes in float64: float32 steps would drown the difference.
    model = adapted(tiny_gpt2())
    values = values_of(model)
    passes[0](model).backward()

    numeric = torch.zeros_like(values)
    step = 1e-5
    for index in range(values.numel()):
        for sign in (1, -1):
            with torch.no_grad():
                values.view(-1)[index] += sign * step
                numeric.view(-1)[index] += sign * passes[0](model) / (2 * step)
                values.view(-1)[index] -= sign * step

    # Central differences: the square of the step times a third derivative of the order of ten.
    torch.testing.assert_close(values.grad, numeric, rtol=0, atol=1e-8)


def test_frozen_values_get_no_gradient_and_pass_that_of_the_inputs_on(tiny_qwen2, token_ids):
    model = adapted(tiny_qwen2())
    values_of(model).requires_grad_(False)
    embedded = tiny_qwen2().double().get_input_embeddings()(token_ids).detach()
    grads = []
    for trainable in (False, True):
        values_of(model).requires_grad_(trainable)
        inputs = embedded.clone().requires_grad_()
        model(inputs_embeds=inputs, labels=token_ids).loss.backward()
        grads.append(inputs.grad)
        assert (values_of(model).grad is not None) == trainable

    torch.testing.assert_close(grads[0], grads[1], **EXACT)


@modes
def test_two_active_adapters_both_get_their_gradient(tiny_qwen2, passes, mode):
    model = adapted(tiny_qwen2(), mode)
    # The second one begins at the second block: the sinks of the two stand at different places.
    model.add_adapter(
        "other", TinyLoraConfig(r=3, n_tie=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    )
    model.double()
    set_values(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    firings = [count_firings(values_of(model, name)) for name in ("default", "other")]

    passes[0](model).backward()

    assert_exact(model, tiny_qwen2(), passes[0])
    assert [counter["fired"] for counter in firings] == [1, 1]


@modes
def test_layers_before_the_first_adapted_one_do_not_matter(tiny_qwen2, passes, mode):
    model = adapted(
        tiny_qwen2(num_hidden_layers=3), mode, target_modules=["q_proj", "down_proj"], layers_to_transform=[1, 2]
    )

    passes[0](model).backward()

    assert_exact(model, tiny_qwen2(num_hidden_layers=3), passes[0])


def test_values_changed_between_forward_and_recomputation_are_an_error(tiny_qwen2, passes):
    # The recomputed activations would belong to other values than the loss.
    model = adapted(tiny_qwen2(), "non-reentrant")
    loss = passes[0](model)
    with torch.no_grad():
        values_of(model).add_(0.1)

    with pytest.raises(RuntimeError, match="outside the model's forward pass"):
        loss.backward()


class Perceptron(nn.Module):
    """No transformers model, no configuration, no list of blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Stack(nn.Module):
    """A list of blocks that take their hidden states by keyword, checkpointed or not."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.layers = nn.ModuleList([Perceptron() for _ in range(2)])
        self.bridge = nn.Linear(3, 6)

    def forward(self, x):
        for layer in self.layers:
            if self.use_reentrant is None:
                hidden = layer(x=x)
            else:
                hidden = checkpoint(layer, x, use_reentrant=self.use_reentrant)
            x = torch.tanh(self.bridge(hidden))
        return x


@pytest.mark.parametrize(
    ("make", "targets"),
    [(Perceptron, ["first", "second", "third"]), (Perceptron, ["second"]), (Stack, ["first", "third"])],
)
def test_modules_that_are_no_transformers_models_are_adapted(make, targets):
    torch.manual_seed(0)
    base, plain = make().double(), make().double()
    plain.load_state_dict(base.state_dict())
    inputs = torch.randn(5, 6, dtype=torch.float64)
    model = get_peft_model(base, TinyLoraConfig(target_modules=targets, n_tie=2)).double()
    set_values(model)

    model(inputs).square().sum().backward()

    assert_exact(model, plain, lambda called: called(x=inputs).square().sum())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_around_whole_blocks_are_right_as_well(reentrant_backwards, use_reentrant):
    # Here the hook, and with it the sink, lies inside the first checkpoint.
    torch.manual_seed(0)
    base, plain = Stack(use_reentrant).double(), Stack().double()
    plain.load_state_dict(base.state_dict())
    inputs = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    model = get_peft_model(base, TinyLoraConfig(target_modules=["first", "third"], n_tie="all")).double()
    set_values(model)
    firings = count_firings(values_of(model))

    model(inputs).square().sum().backward()

    assert_exact(model, plain, lambda called: called(x=inputs).square().sum())
    assert firings["fired"] == 1
    assert len(reentrant_backwards) == (2 if use_reentrant else 0)


class OfTokens(nn.Module):
    """No list of blocks and no floating-point input; two branches, of which neither lies behind the other."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.embedding = nn.Embedding(9, 6)
        self.left, self.right, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, ids, mask=None):
        hidden = self.embedding(ids)
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        right = self.right(hidden)
        if self.use_reentrant is None:
            left = self.left(hidden)
        else:
            left = checkpoint(self.left, hidden.detach().requires_grad_(), use_reentrant=self.use_reentrant)
        return self.head(torch.tanh(left) * torch.tanh(right))


def of_tokens(use_reentrant=None):
    torch.manual_seed(0)
    base, plain = OfTokens(use_reentrant).double(), OfTokens().double()
    plain.load_state_dict(base.state_dict())
    fields = {"target_modules": ["left", "right", "head"], "n_tie": "all", "u": 2}
    model = get_peft_model(base, TinyLoraConfig(**fields)).double()
    set_values(model)
    return model, plain


@pytest.mark.parametrize("use_reentrant", [None, False])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_model_of_tokens_without_blocks_gives_the_gradient_once(use_reentrant, is_masked):
    model, plain = of_tokens(use_reentrant)
    ids = torch.arange(6).view(2, 3)
    mask = torch.rand(2, 3, dtype=torch.float64) if is_masked else None
    firings = count_firings(values_of(model))

    model(ids=ids, mask=mask).square().sum().backward()

    assert_exact(model, plain, lambda called: called(ids=ids, mask=mask).square().sum())
    assert firings["fired"] == 1


def test_a_reentrant_checkpoint_in_a_model_of_tokens_without_blocks_is_an_error():
    model, _ = of_tokens(use_reentrant=True)
    with pytest.raises(RuntimeError, match="no floating-point input.*`use_reentrant=False`"):
        model(ids=torch.arange(6).view(2, 3))
    with torch.no_grad():
        assert model(ids=torch.arange(6).view(2, 3)).isfinite().all()
