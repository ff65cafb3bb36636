"""
A TinyLoRA adapter as a LoRA file of llama.cpp's, which Ollama reads as well: exact, and read without this package.

What the file holds follows ggml-org/llama.cpp: `src/llama-adapter.cpp` (0650ea8) reads `general.type`,
`general.architecture`, `adapter.type` and `adapter.lora.alpha`, and of every weight `.lora_a`, shape
`(r, in_features)`, and `.lora_b`, shape `(out_features, r)`; it scales with `alpha / r`. The weights' names are those
of the `gguf` library.

llama.cpp computes the rotary embedding of Llama models on neighbouring rows, where transformers pairs the two halves of
a head, so its converter reorders the rows of q and k (`LlamaModel.permute` in `conversion/llama.py`, 0274f0f, which is
`convert_hf_to_gguf.py` in earlier versions). The rows of B follow. Qwen's are left as they are (`conversion/qwen.py`,
03173d5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Union

import torch
from peft import PeftModel
from torch import nn

from ..storage.atomic_write import written_whole
from .lora import lora_factors, refuse_other_dtype, rounded


# By the class of the model: llama.cpp's name of the architecture, and whether the rows of q and k are reordered. Those
# that tests/with_llama_cpp compares with transformers.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
SUFFIX = ".gguf"


def export_gguf(
    model: PeftModel,
    path: Union[str, os.PathLike],
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """
    Writes an adapter as a LoRA in a GGUF file, for llama.cpp (`--lora`) and Ollama (`ADAPTER`).

    The factors are those of [`export_lora`], which says what `dtype` costs; on the CPU, llama.cpp rounds the
    activations to a 16-bit dtype as well, before it multiplies them. The base model's GGUF file may be quantised: the
    update is added to its output. The file is written to a temporary path and moved into place whole.

    Args:
        model (`peft.PeftModel`): Model with the adapter, merged or not: a Llama, Mistral, Qwen2 or Qwen3 for causal
            language modelling. Its weights must be whole in this process.
        path (`str` or `os.PathLike`): File to write; its name ends in ".gguf".
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): float32, float16 or bfloat16.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace a file at that path.

    Raises:
        ImportError: If the `gguf` library is not installed.
        TypeError: If the model is no `PeftModel` with a TinyLoRA adapter.
        ValueError: If the path ends otherwise, there is no such adapter, it trained modules in full, or `dtype` cannot
            hold the update.
        NotImplementedError: If the model is another one than those above, or llama.cpp has no such weight.
        FileExistsError: If there is a file at that path and `overwrite` is not set, or a folder.
    """
    gguf = import_gguf()
    path = writable(path, overwrite)
    refuse_other_dtype(dtype)
    factors = lora_factors(model, adapter_name)
    base = model.get_base_model()
    architecture, is_reordered = _architecture_of(base)
    names = _names(gguf, architecture, base, factors)
    tensors = {}
    for name, (down_RI, up_OR) in factors.items():
        if is_reordered and name.endswith(("q_proj", "k_proj")):
            up_OR = up_OR[rotary_order(len(up_OR), _n_heads(base, name))]
        for part, factor in zip("ab", rounded(name, down_RI, up_OR, dtype), strict=True):
            tensors[f"{names[name]}.lora_{part}"] = factor

    with written_whole(path) as new:
        writer = gguf.GGUFWriter(new, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(model.peft_config[adapter_name].r))
        for name, tensor in tensors.items():
            if dtype == torch.bfloat16:
                # NumPy knows no bfloat16: the bits go as integers.
                bits = tensor.view(torch.int16).numpy()
                writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                writer.add_tensor(name, tensor.numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def import_gguf() -> ModuleType:
    """Returns the `gguf` library; `ImportError` with what installs it where it is missing."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ImportError(
            f"writing a GGUF file needs the library `gguf` ({error}). Install it with "
            "`pip install 'trl-tinylora[gguf]'` or `pip install gguf`."
        ) from error
    return gguf


def writable(path: Union[str, os.PathLike], overwrite: bool) -> Path:
    """Returns the absolute path of a GGUF file that may be written; `ValueError` or `FileExistsError` otherwise."""
    path = Path(path).absolute()
    # So that a mistake never replaces weights or a configuration beside it.
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} does not end in {SUFFIX}. Name a file, such as {path.with_suffix(SUFFIX).name}.")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder. Name a file to write the adapter to.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already. Name another file, or set `overwrite` (`--overwrite`).")
    return path


def rotary_order(n_rows: int, n_heads: int) -> torch.Tensor:
    """
    Returns, for every row of llama.cpp's q or k of a Llama model, which row of transformers' it is.

    Row `2 i + j` of a head of `2 d` rows is row `j d + i` of transformers' (`LlamaModel.permute`, see the module).

    Args:
        n_rows (`int`): Rows of the weight, a multiple of `2 n_heads`.
        n_heads (`int`): Heads of the weight: query heads of q, key-value heads of k.

    Returns:
        `torch.Tensor` of shape `(n_rows,)`, dtype int64.
    """
    return torch.arange(n_rows).reshape(n_heads, 2, -1).mT.reshape(-1)


def _architecture_of(base: nn.Module) -> tuple[str, bool]:
    """llama.cpp's name of a model's architecture, and whether it reorders q and k."""
    kind = type(base).__name__
    if kind not in ARCHITECTURES:
        raise NotImplementedError(
            f"{kind} is none of {', '.join(ARCHITECTURES)}: how llama.cpp lays out the weights of others is not known "
            "here, and a wrong layout would go unnoticed. Merge the adapter (`model.merge_and_unload().save_pretrained"
            "(folder)`) and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    return ARCHITECTURES[kind]


def _names(gguf: ModuleType, architecture: str, base: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """llama.cpp's names of the modules' weights."""
    (known,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(known, base.config.num_hidden_layers)
    names = {}
    for name in modules:
        found = table.get_name(name)
        if found is None:
            raise NotImplementedError(
                f"the adapter adapts {name}, which has no counterpart in llama.cpp's {architecture}. Merge the adapter "
                "(`model.merge_and_unload().save_pretrained(folder)`) and convert the folder with llama.cpp's "
                "convert_hf_to_gguf.py."
            )
        names[name] = f"{found}.weight"
    return names


def _n_heads(base: nn.Module, name: str) -> int:
    return base.config.num_attention_heads if name.endswith("q_proj") else base.config.num_key_value_heads
