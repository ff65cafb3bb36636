"""How good candidates for v are: the rewards of their completions."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from evolution.sampling import Sampler


class Candidates:
    """
    Adapters that differ in their values alone, of one model.

    Args:
        model ([`~peft.PeftModel`]): With the adapter "default".
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        sampler (`Sampler`): Of that model.
        count (`int`): How many candidates there are at a time.
        dtype (`torch.dtype`): What values are rounded to.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        count: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.model, self.tokenizer, self.sampler, self.dtype = model, tokenizer, sampler, dtype
        self.names = [f"candidate-{index}" for index in range(count)]
        for name in self.names:
            model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))

    def set_values(self, name: str, values: np.ndarray) -> None:
        """Gives an adapter its values, shape `(values,)`."""
        vectors = self.model.base_model.bank.vectors(name)
        with torch.no_grad():
            vectors.values_GK.copy_(torch.as_tensor(values).to(self.dtype).reshape(vectors.values_GK.shape))

    def rewards(
        self,
        candidates: np.ndarray,
        rows: Sequence[dict],
        samples: int,
        reward_functions: Sequence[Callable[..., list[float]]],
        seed: int,
    ) -> tuple[np.ndarray, int]:
        """
        The reward of every completion.

        Args:
            candidates (`numpy.ndarray`): Values of each, shape `(candidates, values)`.
            rows (`Sequence[dict]`): Problems, with `prompt` and the columns that a reward reads.
            samples (`int`): Completions of a problem by each candidate.
            reward_functions (`Sequence[Callable]`): As TRL's trainers take them; their sum is the reward, and None, for
                "not applicable", adds nothing to it.
            seed (`int`): Of the sampling, and of rewards that draw from torch's generator.
        Returns:
            `numpy.ndarray` of shape `(candidates, problems, samples)`; and the number of tokens that were generated.
        Raises:
            FloatingPointError: If a candidate's logits or a reward are not finite.
        """
        for name, values in zip(self.names, candidates, strict=True):
            self.set_values(name, values)
        apply = self.tokenizer.apply_chat_template
        texts = [apply(row["prompt"], add_generation_prompt=True, tokenize=False) for row in rows]
        asked = [(name, place) for name in self.names for place in range(len(rows)) for _ in range(samples)]
        try:
            completions = self.sampler.sample([texts[place] for _, place in asked], [name for name, _ in asked], seed)
        except FloatingPointError as error:
            largest = float(np.abs(candidates).max())
            raise FloatingPointError(f"{error}, with values of up to {largest:.3g}: lower --sigma") from error
        columns = {key: [rows[place][key] for _, place in asked] for key in rows[0] if key != "prompt"}
        said = [[{"role": "assistant", "content": completion.text}] for completion in completions]
        prompts = [rows[place]["prompt"] for _, place in asked]
        columns |= {"prompts": prompts, "completions": said, "completion_ids": [list(c.ids) for c in completions]}
        total = np.zeros(len(asked))
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            for reward in reward_functions:
                total += [0.0 if value is None else value for value in reward(**columns)]
        if not np.isfinite(total).all():
            raise FloatingPointError(f"{int((~np.isfinite(total)).sum())} of {len(total)} rewards are not finite")
        shape = len(self.names), len(rows), samples
        return total.reshape(shape), sum(completion.tokens for completion in completions)
