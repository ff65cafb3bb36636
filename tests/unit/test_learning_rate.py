"""The learning rate of a step that moves the policy by a share of its entropy: against the exact divergence. CPU."""

import copy
import math
import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from trl_tinylora import TinyLoraConfig, find_learning_rate
from trl_tinylora.learning_rate import _solve


PROMPTS = [[{"role": "user", "content": f"What is {n} plus {n + 2}?"}] for n in range(48)]
KINDS = {
    "TinyLoRA": TinyLoraConfig(u=3, n_tie=4),
    "LoRA": LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3),
    "all weights": None,
}


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def make(make_model):
    def build(kind="TinyLoRA"):
        torch.manual_seed(0)
        config = copy.deepcopy(KINDS[kind])
        # A tiny model with random weights says everything with almost the same probability.
        model = make_model()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(3)
        return model if config is None else get_peft_model(model, config)

    return build


def find(model, tokenizer, prompts=PROMPTS, **settings):
    return find_learning_rate(model, tokenizer, prompts, **{"max_new_tokens": 6, "batch_size": 16} | settings)


@torch.no_grad()
def log_probabilities(model, rows):
    """Of every token of the vocabulary, behind the prompt of each row, in float64."""
    return [model(input_ids=ids[None]).logits[0, start - 1 : -1].double().log_softmax(-1) for ids, start in rows]


@torch.no_grad()
def completions(model, tokenizer, count):
    """Rows sampled one at a time, and where their completions begin."""
    rows = []
    for prompt in (PROMPTS * count)[:count]:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 6, "pad_token_id": tokenizer.eos_token_id}
        made = model.generate(**ids, **settings)[0]
        rows.append((made, ids["input_ids"].shape[1]))
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_adam_at_the_rate_moves_the_policy_by_the_share_of_its_entropy(make, tokenizer, kind):
    model = make(kind)
    # Completions of six tokens are few: a rate is off by up to a fifth, and the divergence by twice that.
    rate = statistics.geometric_mean(find(model, tokenizer, relative_kl=0.01, seed=seed) for seed in range(6))
    model.eval()
    torch.manual_seed(1)
    rows = completions(model, tokenizer, len(PROMPTS))
    before = log_probabilities(model, rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    exact = []
    for _ in range(10):
        # The gradient of a random reward, from the start.
        for (ids, first), reward in zip(rows, torch.randn(len(rows)), strict=True):
            logits = model(input_ids=ids[None]).logits[0, first - 1 : -1]
            (reward * logits.log_softmax(-1).gather(1, ids[first:, None]).sum()).backward()
        torch.optim.AdamW(trained, lr=rate, weight_decay=0.0).step()
        after = log_probabilities(model, rows)
        exact += [float((old.exp() * (old - new)).sum()) for old, new in zip(before, after, strict=True)]
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
                parameter.grad = None
    entropy = [float(-(old.exp() * old).sum()) for old in before]
    assert statistics.median(exact) / statistics.median(entropy) == pytest.approx(0.01, rel=0.3)


def test_a_larger_share_is_a_larger_rate_by_its_square_root(make, tokenizer):
    model = make()
    small, large = (find(model, tokenizer, relative_kl=share) for share in (1e-5, 1e-3))
    assert large / small == pytest.approx(10, rel=0.1)


def test_a_parameter_that_moves_the_policy_twice_as_far_gets_half_of_the_rate(make, tokenizer):
    rates = []
    for alpha in (4, 8):
        KINDS["scaled"] = LoraConfig(r=2, target_modules="all-linear", lora_alpha=alpha)
        rates.append(find(make("scaled"), tokenizer, relative_kl=1e-4))
    del KINDS["scaled"]
    assert rates[0] / rates[1] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_the_stream_of_random_numbers_are_as_before(make, tokenizer, kind):
    model = make(kind).train()
    (first, *_) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    first.grad = torch.ones_like(first)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    find(model, tokenizer)
    assert torch.equal(torch.rand(4), drawn) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not first)


def test_the_rate_follows_from_the_seed_and_not_from_the_size_of_the_batches(make, tokenizer):
    model = make()
    assert find(model, tokenizer) == find(model, tokenizer)
    # Other batches draw other completions.
    assert find(model, tokenizer, batch_size=48) == pytest.approx(find(model, tokenizer), rel=0.5)


def test_texts_are_prompts_as_well(make, tokenizer):
    texts = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in PROMPTS]
    model = make()
    assert find(model, tokenizer, texts) == find(model, tokenizer)


@pytest.mark.bad_input("arguments of a tool")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"relative_kl": 0.0}, "`relative_kl` must be finite and above 0, got 0.0"),
        ({"relative_kl": math.inf}, "`relative_kl` must be finite"),
        ({"temperature": -1.0}, "`temperature` must be finite and above 0, got -1.0"),
        ({"prompts": []}, "`prompts` is empty: give as many"),
    ],
    ids=str,
)
def test_arguments_out_of_their_bounds_are_refused(make, tokenizer, settings, words):
    with pytest.raises(ValueError, match=words):
        find(make(), tokenizer, **settings)


@pytest.mark.bad_input("arguments of a tool")
def test_a_model_of_which_nothing_is_trained_is_refused(make, tokenizer):
    with pytest.raises(ValueError, match="nothing of the model is trained.*Add an adapter"):
        find(make().requires_grad_(False), tokenizer)


@pytest.mark.bad_input("arguments of a tool")
def test_a_policy_that_always_says_the_same_is_refused(make, tokenizer):
    with pytest.raises(ValueError, match="its entropy is .* nats a completion on these prompts. Raise `temperature`"):
        find(make(), tokenizer, temperature=1e-6)


@pytest.mark.bad_input("arguments of a tool")
def test_a_divergence_that_no_rate_has_is_refused_with_what_was_found():
    with pytest.raises(ValueError, match=r"by 0.1 of its entropy: found were 0 at .*wider dtype"):
        _solve(lambda rate: 0.0, 0.1)


def test_a_divergence_that_jumps_is_enclosed():
    def divergence(rate):
        return 1e-4 * rate**2 if rate < 0.3 else 50 * rate**4

    assert divergence(_solve(divergence, 1.0)) == pytest.approx(1, rel=0.06)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_divergence_that_grows_faster_than_the_square_is_solved_too(scale):
    def divergence(rate):
        return math.expm1((rate / scale) ** 2) if rate < 20 * scale else math.inf

    found = _solve(divergence, 100.0)
    assert divergence(found) == pytest.approx(100, rel=0.06)
