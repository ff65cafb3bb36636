"""Rewards that teach nothing about the answer: what RL gains with them, it does not gain by learning to reason."""

from typing import Any

import torch


def random_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """A fair coin for each completion, from torch's global CPU generator, which the trainer seeds.

    Args:
        completions (`list`): Only their number is read.
        kwargs: The other columns and values that TRL hands to every reward function; unused.
    Returns:
        `list[float]`: 0.0 or 1.0, one a completion.
    """
    return torch.randint(2, (len(completions),)).double().tolist()
