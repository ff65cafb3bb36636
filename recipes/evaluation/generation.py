"""How completions are generated: by transformers, or by vLLM where it is installed."""

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
import trl
from peft import PeftConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from evaluation.arguments import GenerationArguments
from trl_tinylora import TinyLoraPeftType, export_lora
from trl_tinylora.convert.lora import refuse_what_is_no_lora
from trl_tinylora.vllm.engine import max_lora_rank


# Beyond this, a tensor goes into a model's digest by sums of its bits.
WHOLLY_HASHED = 1_000_000


class Completion(NamedTuple):
    """
    What was generated.

    Args:
        text (`str`): Without the tokens that end a turn.
        tokens (`int`): Its tokens, the ending one included.
        truncated (`bool`): Whether the limit cut it.
        ids (`tuple[int, ...]`): The tokens.
    """

    text: str
    tokens: int
    truncated: bool
    ids: tuple[int, ...] = ()


class Generator(ABC):
    """What generates completions."""

    @abstractmethod
    def identity(self) -> str:
        """A digest that differs for another model, so that its completions are not taken for this one's."""

    @abstractmethod
    def generate(self, prompts: Sequence[str], samples: int, is_sampled: bool, seed: int) -> list[list[Completion]]:
        """
        Completions of a batch, which follow from the batch and the seed alone.

        Args:
            prompts (`Sequence[str]`): With the chat template.
            samples (`int`): Completions a prompt.
            is_sampled (`bool`): Whether to sample, else greedy.
            seed (`int`): Of the sampling.
        Returns:
            `list[list[Completion]]`: `samples` a prompt, in their order.
        """


class TransformersGenerator(Generator):
    """
    Generates with a model in this process, which keeps its mode (training or evaluation).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        arguments (`GenerationArguments`): Temperature and limit are read.
    """

    def __init__(self, model, tokenizer, arguments: GenerationArguments):
        self.model, self.tokenizer, self.arguments = model, tokenizer, arguments
        end_tokens = model.generation_config.eos_token_id
        end_tokens = set(end_tokens if isinstance(end_tokens, list) else [end_tokens]) | {tokenizer.eos_token_id}
        self.end_tokens = end_tokens - {None}

    def identity(self) -> str:
        """Of every weight in memory."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            # Where `device_map` put base weights on the disk.
            if value.is_meta:
                continue
            bits = value.detach().reshape(-1).view(torch.uint8)
            if bits.numel() <= WHOLLY_HASHED:
                digest.update(bits.cpu().numpy().tobytes())
            else:
                # The sums of the first bytes of all numbers, of the second ones, ...: an optimiser's step moves them.
                columns = bits.view(-1, value.element_size()).sum(dim=0, dtype=torch.int64)
                digest.update(str(columns.tolist()).encode())
        return digest.hexdigest()

    def generate(
        self,
        prompts: Sequence[str],
        samples: int,
        is_sampled: bool,
        seed: int,
        adapter_names: Sequence[str] | None = None,
    ) -> list[list[Completion]]:
        """As of [`Generator`]; with the adapter of each prompt where `adapter_names` has them."""
        tokenizer = self.tokenizer
        options = {} if adapter_names is None else {"adapter_names": list(adapter_names)}
        # Every value is spelled out, since what is left open comes from the model's own generation config (Qwen's
        # samples with top_k 20 and a repetition penalty).
        chosen = transformers.GenerationConfig(
            do_sample=is_sampled,
            temperature=self.arguments.temperature if is_sampled else 1.0,
            top_k=0 if is_sampled else 50,
            top_p=1.0,
            repetition_penalty=1.0,
            num_return_sequences=samples,
            max_new_tokens=self.arguments.max_new_tokens,
            eos_token_id=sorted(self.end_tokens),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            use_cache=True,
            disable_compile=True,
        )
        inputs = tokenizer(
            list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self.model.device)
        was_training = self.model.training
        self.model.eval()
        # Its own stream: evaluating between two training runs must not change the second one.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=chosen,
                **options,
            )
        self.model.train(was_training)
        generated = [self.read(tokens) for tokens in output[:, inputs["input_ids"].shape[1] :].tolist()]
        return [generated[start : start + samples] for start in range(0, len(generated), samples)]

    def read(self, tokens: list[int]) -> Completion:
        """A completion of these tokens, up to the one that ended it."""
        length = next((n for n, token in enumerate(tokens, start=1) if token in self.end_tokens), None)
        text = self.tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return Completion(text, len(tokens[:length]), length is None, tuple(tokens[:length]))


class VllmGenerator(Generator):
    """
    Generates with vLLM. A TinyLoRA adapter goes to it as a plain LoRA, or merged where it is more than a LoRA.

    vLLM's kernels round otherwise than transformers': compare runs of one backend only, the untrained model included.

    Args:
        model_args ([`~trl.ModelConfig`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        adapter_path (`str`, *optional*): Folder or Hub name of an adapter of the model.
        arguments (`GenerationArguments`): Temperature and limit are read.
    """

    def __init__(self, model_args: trl.ModelConfig, tokenizer, adapter_path, arguments: GenerationArguments):
        from vllm import LLM

        self.tokenizer, self.arguments = tokenizer, arguments
        self.source = f"vllm {model_args.model_name_or_path} {model_args.model_revision}"
        self.lora_request = None
        # Removed with this object; vLLM reads an adapter at the first request.
        self._folder = tempfile.TemporaryDirectory()
        served, lora = prepare_for_vllm(model_args, adapter_path, Path(self._folder.name))
        options = {}
        if lora is not None:
            from vllm.lora.request import LoRARequest

            path, rank = lora
            options = {"enable_lora": True, "max_lora_rank": max_lora_rank(rank)}
            self.lora_request = LoRARequest("adapter", 1, path)
        for path in sorted(Path(adapter_path).iterdir()) if adapter_path and Path(adapter_path).is_dir() else ():
            if path.name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
                self.source += f" {path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        self.llm = LLM(
            model=served,
            tokenizer=tokenizer.name_or_path,
            revision=model_args.model_revision if served == model_args.model_name_or_path else None,
            dtype=model_args.dtype or "auto",
            seed=arguments.eval_seed,
            # Not the model's own sampling settings: those are spelled out at every request.
            generation_config="vllm",
            **options,
        )

    def identity(self) -> str:
        """Of the model's name and the adapter's files."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def generate(self, prompts: Sequence[str], samples: int, is_sampled: bool, seed: int) -> list[list[Completion]]:
        from vllm import SamplingParams

        # A seed for each prompt.
        parameters = [
            SamplingParams(
                n=samples,
                temperature=self.arguments.temperature if is_sampled else 0.0,
                top_p=1.0,
                top_k=-1,
                repetition_penalty=1.0,
                max_tokens=self.arguments.max_new_tokens,
                seed=seed + place,
                skip_special_tokens=True,
            )
            for place in range(len(prompts))
        ]
        tokens = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in tokens], parameters, lora_request=self.lora_request, use_tqdm=False
        )
        return [
            [
                Completion(item.text, len(item.token_ids), item.finish_reason == "length", tuple(item.token_ids))
                for item in output.outputs
            ]
            for output in outputs
        ]


def prepare_for_vllm(
    model_args: trl.ModelConfig, adapter_path: str | None, folder: Path
) -> tuple[str, tuple[str, int] | None]:
    """
    What vLLM is to serve, which knows no TinyLoRA: a plain LoRA of the same update, or the merged model.

    Args:
        model_args ([`~trl.ModelConfig`]): The model.
        adapter_path (`str`, *optional*): Folder or Hub name of its adapter.
        folder (`Path`): Where to write what has to be written.
    Returns:
        `tuple`: Model to serve, and the folder and rank of its LoRA if there is one.
    """
    name = model_args.model_name_or_path
    if adapter_path is None:
        return name, None
    config = PeftConfig.from_pretrained(adapter_path)
    if config.peft_type == PeftType.LORA:
        return name, (str(adapter_path), config.r)
    model = PeftModel.from_pretrained(load_model(model_args, device_map=None), adapter_path)
    if config.peft_type == TinyLoraPeftType.TRL_TINYLORA:
        try:
            refuse_what_is_no_lora(config)
        except ValueError:
            pass
        else:
            export_lora(model, folder / "lora")
            return name, (str(folder / "lora"), config.r)
    model.merge_and_unload().save_pretrained(folder / "merged")
    return str(folder / "merged"), None


def load_model(model_args: trl.ModelConfig, device_map: str | None) -> transformers.PreTrainedModel:
    """
    The base model.

    Args:
        model_args ([`~trl.ModelConfig`]): Its name, revision, dtype, attention and quantisation.
        device_map (`str`, *optional*): As of transformers.
    Returns:
        [`~transformers.PreTrainedModel`]
    """
    return transformers.AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=trl.get_quantization_config(model_args),
        device_map=device_map,
    )
