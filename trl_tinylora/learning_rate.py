"""
A learning rate in a unit that means the same for every number of trained values: how far a step moves the policy.

A rate of Adam's says how far each parameter moves. How much that changes the policy depends on the model, on the number
of values and on how they are tied, so that the best rates differ by factors of a thousand. With d, the signs of a
gradient, which is the direction of Adam's first step, the rate h solves

    KL(p_theta, p_{theta + h d}) = relative_kl * H(p_theta)

    KL(h) = mean over completions y ~ p_theta of sum_t [exp(D_t) - 1 - D_t]
    H     = mean over completions of sum_t -log p_theta(y_t | y_<t)
    D_t   = log p_{theta + h d}(y_t | y_<t) - log p_theta(y_t | y_<t)

KL's estimator is the one that is never negative. The gradient is that of a random reward, so that neither rewards nor
right answers are read. The ratio has no unit and does not depend on the length of the completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig

from .distributed import is_sharded


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Ratio of the divergence to the wanted one at which the rate is found: it goes with the square of the rate.
TOLERANCE = 1.05
MAX_TRIES = 20
# Longest way from one try to the next; beyond it the divergence does not go with the square.
MAX_FACTOR = 30.0


def find_learning_rate(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    relative_kl: float = 1e-3,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
) -> float:
    """
    Returns the learning rate at which Adam's first step moves the policy by a given share of its entropy.

    For Adam and its like (AdamW, Lion) and for everything that is trained: TinyLoRA, LoRA, all weights. Takes one
    generation, one backward pass and some ten forward passes over the prompts; the model is as before afterwards.

    Example:

    ```python
    rate = find_learning_rate(model, tokenizer, dataset["prompt"][:64], max_new_tokens=256)
    args = GRPOConfig(learning_rate=rate, ...)
    ```

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): With what is to be trained, whole in this
            process.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`Sequence`): Texts or conversations, as many as there are completions in a step of the training: where
            many values are trained, the gradient of more completions is shared by fewer of them.
        relative_kl (`float`, *optional*, defaults to `1e-3`): KL divergence of a step over the entropy of a completion,
            above 0.
        max_new_tokens (`int`, *optional*, defaults to `256`): Limit of a completion, as in training.
        temperature (`float`, *optional*, defaults to `1.0`): Of the sampling, above 0.
        batch_size (`int`, *optional*, defaults to `8`): Prompts at a time.
        seed (`int`, *optional*, defaults to `0`): Of the sampling and the random reward.

    Returns:
        `float`: The rate.

    Raises:
        ValueError: If an argument is out of its bounds, nothing is trained, parameters are sharded, the policy always
            says the same, or no rate moves it that far.
    """
    for name, value in (("relative_kl", relative_kl), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be finite and above 0, got {value}.")
    if not len(prompts):
        raise ValueError("`prompts` is empty: give as many as there are completions in a step of the training.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("nothing of the model is trained: `requires_grad` is false everywhere. Add an adapter first.")
    if any(map(is_sharded, trained)):
        raise ValueError("the parameters are sharded over processes: find the rate in one process before the training.")

    with _set_aside(model, trained, seed):
        batches = [
            _sample(model, processing_class, prompts[start : start + batch_size], max_new_tokens, temperature)
            for start in range(0, len(prompts), batch_size)
        ]
        before = []
        rewards = torch.randn(len(prompts)).split(batch_size)
        for batch, reward in zip(batches, rewards, strict=True):
            logprobs_BT = _logprobs(model, *batch, temperature)
            (logprobs_BT.sum(1) * reward.to(logprobs_BT)).sum().backward()
            before.append(logprobs_BT.detach())
        entropy = -float(torch.cat([logprobs_BT.sum(1) for logprobs_BT in before]).double().mean())
        if entropy <= 0:
            raise ValueError("the policy always says the same: its entropy is 0 on these prompts. Raise `temperature`.")
        directions = [torch.zeros_like(p) if p.grad is None else p.grad.sign() for p in trained]
        starts = [parameter.detach().clone() for parameter in trained]

        @torch.no_grad()
        def divergence(rate: float) -> float:
            for parameter, start, direction in zip(trained, starts, directions, strict=True):
                parameter.copy_(start + rate * direction)
            total = 0.0
            for batch, old_BT in zip(batches, before, strict=True):
                moved_BT = (_logprobs(model, *batch, temperature) - old_BT).double()
                total += float((moved_BT.expm1() - moved_BT).sum())
            return total / len(prompts)

        try:
            return _solve(divergence, relative_kl * entropy)
        finally:
            with torch.no_grad():
                for parameter, start in zip(trained, starts, strict=True):
                    parameter.copy_(start)


def _solve(divergence: Callable[[float], float], kl: float) -> float:
    """The rate at which a divergence is `kl`; near 0 it goes with the square of the rate."""
    rate, below, above, tried = 1e-3, 0.0, math.inf, []
    for _ in range(MAX_TRIES):
        found = divergence(rate)
        tried.append(f"{found:.3g} at {rate:.3g}")
        if kl / TOLERANCE < found < kl * TOLERANCE:
            return rate
        if found < kl:
            below = rate
        else:
            # Also where it is infinite or not a number.
            above = rate
        factor = math.sqrt(kl / found) if 0 < found < math.inf else 1 / MAX_FACTOR if found else MAX_FACTOR
        rate *= min(max(factor, 1 / MAX_FACTOR), MAX_FACTOR)
        if not below < rate < above:
            rate = math.sqrt(below * above)
    raise ValueError(
        f"no learning rate moves the policy by a KL divergence of {kl:.3g}: found were {', '.join(tried[-4:])}. Choose "
        "another `relative_kl`, or train in a wider dtype."
    )


@contextmanager
def _set_aside(model: nn.Module, trained: list[nn.Parameter], seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients and a stream of random numbers of its own inside; all as before afterwards."""
    was_training = model.training
    grads = [parameter.grad for parameter in trained]
    model.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            for parameter in trained:
                parameter.grad = None
            yield
    finally:
        for parameter, grad in zip(trained, grads, strict=True):
            parameter.grad = grad
        model.train(was_training)


def _sample(model, processing_class, prompts: Sequence, max_new_tokens: int, temperature: float) -> tuple:
    """Of each prompt and its completion: the tokens, which are no padding, and which were sampled."""
    texts = [
        prompt
        if isinstance(prompt, str)
        else processing_class.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    inputs = processing_class(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=isinstance(prompts[0], str)
    ).to(model.device)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), processing_class.eos_token_id} - {None}
    pad = processing_class.pad_token_id
    chosen = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad if pad is not None else processing_class.eos_token_id,
        disable_compile=True,
    )
    with torch.no_grad():
        generated_BT = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=chosen
        )
    width = inputs["input_ids"].shape[1]
    is_end_BT = torch.isin(generated_BT[:, width:], torch.tensor(sorted(ends), device=generated_BT.device))
    # The token that ends a completion is sampled; what follows it is padding.
    sampled_BT = is_end_BT.cumsum(1) - is_end_BT.long() == 0
    prompt_BT = inputs["attention_mask"].bool()
    kept_BT = torch.cat([prompt_BT, sampled_BT], 1)
    # Padded on the right, positions count from the first token of each row, whatever the model.
    order_BT = kept_BT.long().argsort(dim=1, descending=True, stable=True)
    sampled_BT = torch.cat([torch.zeros_like(prompt_BT), sampled_BT], 1)
    return tuple(each_BT.gather(1, order_BT) for each_BT in (generated_BT, kept_BT, sampled_BT))


def _logprobs(model, tokens_BT, kept_BT, sampled_BT, temperature: float) -> torch.Tensor:
    """Log-probability of each sampled token, 0 elsewhere."""
    logits_BTV = model(input_ids=tokens_BT, attention_mask=kept_BT.long()).logits[:, :-1].float() / temperature
    chosen_BT = logits_BTV.gather(2, tokens_BT[:, 1:, None])[..., 0]
    return torch.where(sampled_BT[:, 1:], chosen_BT - logits_BTV.logsumexp(2), 0.0)
