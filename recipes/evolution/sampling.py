"""What samples the completions of candidates: transformers in batches of rows with adapters of their own, or vLLM."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from evaluation.generation import Completion, TransformersGenerator
from peft import PeftModel

from evolution.arguments import EvolutionArguments
from trl_tinylora.vllm.engine import Engine, LocalEngine, ServerEngine, engine_settings, folder_for_adapters, new_prefix


class Sampler(ABC):
    """What samples a completion of each prompt, by an adapter of its own."""

    @abstractmethod
    def sample(self, prompts: Sequence[str], names: Sequence[str], seed: int) -> list[Completion]:
        """
        Samples.

        Args:
            prompts (`Sequence[str]`): With the chat template.
            names (`Sequence[str]`): The adapter of each.
            seed (`int`): What all draws follow from.
        Returns:
            `list[Completion]`: One a prompt.
        Raises:
            FloatingPointError: If an adapter's logits are not finite.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives back what it holds outside this process."""


class BatchSampler(Sampler):
    """
    By transformers, with the model in this process.

    Args:
        generator (`TransformersGenerator`): Of a model with the adapters.
        batch_size (`int`): Completions generated at once.
    """

    def __init__(self, generator: TransformersGenerator, batch_size: int):
        self.generator, self.batch_size = generator, batch_size

    def sample(self, prompts: Sequence[str], names: Sequence[str], seed: int) -> list[Completion]:
        """As of [`Sampler`]."""
        completions = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            try:
                found = self.generator.generate(prompts[rows], 1, True, seed + start, adapter_names=names[rows])
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise FloatingPointError("the logits of a candidate are not finite") from error
            completions += [completion for (completion,) in found]
        return completions

    def close(self) -> None:
        """Nothing is held elsewhere."""


class VllmSampler(Sampler):
    """
    By vLLM, in this process or a server, which gets each adapter as a LoRA.

    vLLM's draws follow from the seed as far as its kernels round alike whatever else is in the batch.

    Args:
        engine ([`~trl_tinylora.vllm.engine.Engine`]): Of the model's base.
        generator (`TransformersGenerator`): Of a model with the adapters; it reads tokens.
    """

    def __init__(self, engine: Engine, generator: TransformersGenerator):
        self.engine, self.generator = engine, generator

    def sample(self, prompts: Sequence[str], names: Sequence[str], seed: int) -> list[Completion]:
        """As of [`Sampler`]; an adapter whose logits are not finite is not noticed."""
        for name in dict.fromkeys(names):
            self.engine.send(self.generator.model, name)
        tokens = self.generator.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        arguments = self.generator.arguments
        asked = {
            "n": 1,
            "temperature": arguments.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": arguments.max_new_tokens,
        }
        sampled = self.engine.sample(tokens, names, asked, [seed + place for place in range(len(tokens))])
        return [self.generator.read(one.token_ids) for one in sampled]

    def close(self) -> None:
        """Takes the adapters off a server."""
        self.engine.close()


def make_sampler(
    args: EvolutionArguments, model: PeftModel, generator: TransformersGenerator, population: int, revision: str | None
) -> Sampler:
    """
    What the arguments ask for.

    Args:
        args (`EvolutionArguments`): Of the search.
        model ([`~peft.PeftModel`]): With the adapter "default".
        generator (`TransformersGenerator`): Of that model.
        population (`int`): Candidates at a time.
        revision (`str`, *optional*): Of the base model.
    Returns:
        `Sampler`
    """
    if not args.use_vllm:
        return BatchSampler(generator, args.generation_batch_size)
    folder, prefix = folder_for_adapters(), new_prefix()
    if args.is_served:
        engine = ServerEngine(args.vllm_server_base_url, folder, prefix)
        return VllmSampler(engine, generator)
    settings = engine_settings(model, "default", max_loras=population) | {
        "revision": revision,
        "seed": args.seed,
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "max_model_len": args.vllm_max_model_length,
        "max_num_seqs": args.generation_batch_size,
        # Not the model's own sampling settings: those are spelled out at every request.
        "generation_config": "vllm",
    }
    return VllmSampler(LocalEngine(settings, folder, prefix), generator)
