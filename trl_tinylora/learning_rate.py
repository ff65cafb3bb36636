"""
A learning rate in a unit that means the same for every number of trained values: how far a step moves the policy.

A rate of Adam's says how far each parameter moves. How much that changes the policy depends on the model, on the number
of values and on how they are tied, so that the best rates differ by factors of a thousand. With d, the signs of a
gradient, which is the direction of Adam's first step, the rate h solves

    KL(p_theta, p_{theta + h d}) = relative_kl * H(p_theta)

of the median completion y ~ p_theta, each exactly: summed over the vocabulary at each of its tokens. Not the mean, for
in a rare place a policy may be so near to changing its mind that one token outweighs all others. The gradient is that
of a random reward, so that neither rewards nor right answers are read; several are drawn, each for a part of the
completions. The ratio has no unit and does not depend on the length of the completions.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig

from .distributed import is_sharded


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Ratio of the divergence to the wanted one at which the rate is found; it goes with the square of the rate.
TOLERANCE = 1.05
MAX_TRIES = 20
# From then on a rate that is enclosed is searched for by halving, in case it does not go with the square.
FIRST_TRIES = 4
# Longest way from one try to the next; beyond it the divergence does not go with the square.
MAX_FACTOR = 30.0
# Gradients of random rewards: with few values, steps of equal length go unequally far in different directions.
DIRECTIONS = 8
# In nats a completion: below it, rounding has a part in the ratio.
LOWEST_ENTROPY = 1e-3


def find_learning_rate(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    relative_kl: float = 3e-4,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
) -> float:
    """
    Returns the learning rate at which Adam's first step moves the policy by a given share of its entropy.

    For Adam and its like (AdamW, Lion) and for everything that is trained: TinyLoRA, LoRA, all weights. Takes one
    generation, eight backward passes and some ten forward passes over the prompts; the model is as before afterwards.

    Example:

    ```python
    rate = find_learning_rate(model, tokenizer, dataset["prompt"][:64], max_new_tokens=256)
    args = GRPOConfig(learning_rate=rate, ...)
    ```

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): With what is to be trained, whole in this
            process.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (`Sequence`): Texts or conversations, as many as there are completions in a step of the training: with
            many trained values, a step on fewer completions moves each of them further.
        relative_kl (`float`, *optional*, defaults to `3e-4`): KL divergence of a step over the entropy of a completion,
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
        count = min(DIRECTIONS, len(batches))
        directions = [_direction(model, trained, batches, temperature) for _ in range(count)]
        starts = [parameter.detach().clone() for parameter in trained]

        def move(rate: float, direction: list[torch.Tensor]) -> None:
            for parameter, start, signs in zip(trained, starts, direction, strict=True):
                parameter.copy_(start + rate * signs if rate else start)

        @torch.no_grad()
        def relative_divergence(rate: float) -> float:
            divergences, entropies = [], []
            # Each direction on its part of the completions.
            for batch, direction in zip(batches, itertools.cycle(directions), strict=False):
                # Again for each rate: kept, the distributions of all tokens would not fit.
                move(0.0, direction)
                old_NV = _logprobs(model, *batch, temperature)
                move(rate, direction)
                new_NV = _logprobs(model, *batch, temperature)
                lengths = batch[2].sum(1).tolist()
                divergences += _sums((old_NV.exp() * (old_NV - new_NV)).sum(1), lengths)
                entropies += _sums(-(old_NV.exp() * old_NV).sum(1), lengths)
            entropy = statistics.median(entropies)
            if entropy < LOWEST_ENTROPY:
                raise ValueError(
                    f"the policy nearly always says the same: its entropy is {entropy:.3g} nats a completion on these "
                    "prompts. Raise `temperature`."
                )
            return statistics.median(divergences) / entropy

        try:
            return _solve(relative_divergence, relative_kl)
        finally:
            with torch.no_grad():
                move(0.0, directions[0])


def _solve(divergence: Callable[[float], float], wanted: float) -> float:
    """The rate at which a divergence is the wanted one; near 0 it goes with the square of the rate."""
    rate, below, above, tried = 1e-3, 0.0, math.inf, []
    for number in range(MAX_TRIES):
        found = divergence(rate)
        tried.append(f"{found:.3g} at {rate:.3g}")
        if wanted / TOLERANCE < found < wanted * TOLERANCE:
            return rate
        if found < wanted:
            below = rate
        else:
            # Also where it is infinite or not a number.
            above = rate
        factor = math.sqrt(wanted / found) if 0 < found < math.inf else MAX_FACTOR if found <= 0 else 1 / MAX_FACTOR
        rate *= min(max(factor, 1 / MAX_FACTOR), MAX_FACTOR)
        if not below < rate < above or (number >= FIRST_TRIES and 0 < below and above < math.inf):
            rate = math.sqrt(below * above)
    raise ValueError(
        f"no learning rate moves the policy by {wanted:.3g} of its entropy: found were {', '.join(tried[-4:])}. Choose "
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


def _direction(model, trained: list[nn.Parameter], batches: list[tuple], temperature: float) -> list[torch.Tensor]:
    """The signs of the gradient of a random reward, dtype int8."""
    for parameter in trained:
        parameter.grad = None
    for tokens_BT, kept_BT, sampled_BT in batches:
        logprobs_NV = _logprobs(model, tokens_BT, kept_BT, sampled_BT, temperature)
        chosen_N = logprobs_NV.gather(1, tokens_BT[sampled_BT][:, None])[:, 0]
        rewards_B = torch.randn(len(tokens_BT)).to(chosen_N)
        (chosen_N * rewards_B.repeat_interleave(sampled_BT.sum(1))).sum().backward()
    grads = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in trained]
    return [grad.sign().to(torch.int8) for grad in grads]


def _sums(values_N: torch.Tensor, lengths: list[int]) -> list[float]:
    """The sum of each completion's tokens, which follow one another."""
    return [float(part.double().sum()) for part in values_N.split(lengths)]


def _logprobs(model, tokens_BT, kept_BT, sampled_BT, temperature: float) -> torch.Tensor:
    """Log-probabilities of the vocabulary where a token was sampled: a row for each such token of all rows."""
    logits_BTV = model(input_ids=tokens_BT, attention_mask=kept_BT.long()).logits
    # The logits at a token are of the next one.
    return (logits_BTV[:, :-1][sampled_BT[:, 1:]].float() / temperature).log_softmax(-1)
