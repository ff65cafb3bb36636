"""
A TinyLoRA adapter as a plain LoRA of PEFT's: exact, and read wherever LoRA is read, without this package.

What was read of the readers, so that the file suits them (the tests hold it to the same rules):

* vLLM, vllm-project/vllm: `vllm/lora/lora_model.py` (0306474), `vllm/lora/utils.py` (001e63a,
  `parse_fine_tuned_lora_name`), `vllm/lora/peft_helper.py` (e745baf), `vllm/config/lora.py` (01230b4). Every tensor's
  name ends in `lora_A.weight` or `lora_B.weight`; `modules_to_save`, `use_dora` and a `bias` other than "none" are
  refused; the scaling is `lora_alpha / r` for all modules, so there is no `rank_pattern`; `--max-lora-rank`, one of 1,
  8, 16, 32, 64, 128, 256, 320, 512, must be at least `r`: 8 for the usual rank of 2.
* llama.cpp, ggml-org/llama.cpp: `convert_lora_to_gguf.py` (0b03ada). It reads `lora_alpha` and
  `base_model_name_or_path`, and stops at a tensor that is neither `lora_A.weight` nor `lora_B.weight`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Optional, Union

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import TinyLoraConfig
from ..storage.checkpoint import PREFIX
from ..tuner.layer import Linear
from ..tuner.model import TinyLoraModel
from ..tuner.targets import unwrap


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What a folder is an adapter by, in the order in which another adapter is taken away.
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


def export_lora(
    model: PeftModel,
    save_directory: Union[str, os.PathLike],
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """
    Writes an adapter as a plain PEFT LoRA that adds the same to every weight.

    `U S R V^T = B A` with `lora_A = V^T`, `lora_B = U S R` and `lora_alpha = r`, where `R = sum_k v_k P_k`
    (arXiv:2602.04118, section 4). In float32 this is exact to rounding. In 16 bits every entry is rounded once, and the
    update of each module is off by at most `(1 + sqrt(r)) * e` of its Frobenius norm, with e = 2^-8 for bfloat16 and
    2^-11 for float16; for r=2 that is 0.95% and 0.12%. For float16, whose smallest numbers are not far below a small
    update, a power of two is moved from A to B so that their largest entries are of one size; that changes no product.
    Who loads the file may round once more: vLLM casts it to the model's dtype, so export float16 for a float16 model.

    The file is as large as a LoRA's: r * (out_features + in_features) numbers a module. It is written beside the folder
    first and moved there whole. Modules that were trained in full beside the adapter (`modules_to_save`,
    `trainable_token_indices`) are refused, as vLLM and llama.cpp refuse them.

    Args:
        model (`peft.PeftModel`): Model with the adapter, merged or not. Its weights must be whole in this process.
        save_directory (`str` or `os.PathLike`): Folder to write; it is made where there is none.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): float32, float16 or bfloat16.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an adapter in that folder.

    Raises:
        TypeError: If the model is no `PeftModel` with a TinyLoRA adapter.
        ValueError: If there is no such adapter, it trained modules in full, or `dtype` cannot hold the update.
        FileExistsError: If the folder holds an adapter and `overwrite` is not set.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, TinyLoraModel):
        raise TypeError(
            f"expected a PeftModel with a TinyLoRA adapter, got {type(model).__name__}. Load one with "
            "`PeftModel.from_pretrained(base, adapter_folder)`; a merged and unloaded model has no adapter left."
        )
    if adapter_name not in model.peft_config:
        raise ValueError(f"there is no adapter {adapter_name!r}; the model has {sorted(model.peft_config)}.")
    config: TinyLoraConfig = model.peft_config[adapter_name]
    refuse_what_is_no_lora(config)

    base = model.get_base_model()
    factors = {}
    for name, layer in base.named_modules():
        if isinstance(layer, Linear) and layer.place(adapter_name) is not None:
            vectors, index = layer.place(adapter_name)
            left_OR, right_RI = layer.factors_of(vectors.plan)
            factors[name] = right_RI, left_OR.cpu().double() @ vectors.mixing(index).cpu().double()
    base_name = config.base_model_name_or_path or base.__dict__.get("name_or_path") or None
    write_lora(save_directory, factors, config, base, base_name=base_name, dtype=dtype, overwrite=overwrite)


def read_config(folder: Path) -> dict:
    """Returns the fields of an adapter folder's configuration.

    Args:
        folder (`pathlib.Path`): The folder.

    Returns:
        `dict`

    Raises:
        ValueError: If there is no such file, or it is no complete JSON.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}: it is no adapter folder. Name the folder that was saved.")
    return TinyLoraConfig.from_json_file(str(path))


def refuse_what_is_no_lora(config) -> None:
    """Raises where an adapter holds more than a matrix to be added to each weight.

    Args:
        config (`peft.PeftConfig`): The adapter's configuration.

    Raises:
        ValueError: If it has modules, tokens or biases that are trained in full.
    """
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            raise ValueError(
                f"the adapter has {field}={getattr(config, field)!r}, which vLLM and llama.cpp refuse in a LoRA. Put "
                "everything into the weights with `model.merge_and_unload().save_pretrained(folder)` and serve those."
            )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"the adapter has bias={config.bias!r}: biases trained in full do not fit in a LoRA.")


def target_modules(names: Iterable[str], base: nn.Module) -> list[str]:
    """Returns what makes PEFT adapt exactly these modules: their last names where those match no other module.

    Args:
        names (`Iterable[str]`): Full names of the modules.
        base (`torch.nn.Module`): The base model; it may carry adapters, and needs no weights.

    Returns:
        `list[str]`: Last names, for example `["q_proj", "v_proj"]`, or the full ones; sorted.
    """
    wanted = set(names)
    inside = tuple(f"{name}." for name, module in base.named_modules() if name and isinstance(module, BaseTunerLayer))
    short = sorted({name.rpartition(".")[2] for name in wanted})
    draft = LoraConfig(target_modules=short)
    matched = {
        name
        for name, _ in base.named_modules()
        if name and not name.startswith(inside) and check_target_module_exists(draft, name)
    }
    return short if matched == wanted else sorted(wanted)


def write_lora(
    save_directory: Union[str, os.PathLike],
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    adapter: PeftConfig,
    base: nn.Module,
    *,
    base_name: Optional[str],
    dtype: torch.dtype,
    overwrite: bool,
    dropout: float = 0.0,
) -> None:
    """
    Writes a LoRA in PEFT's layout, so that the folder holds the earlier files, none that load, or the whole adapter.

    Args:
        save_directory (`str` or `os.PathLike`): Folder to write.
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): A, shape `(r, in_features)`, and B, shape
            `(out_features, r)`, by module name.
        adapter (`peft.PeftConfig`): Configuration of the adapter that this is the LoRA of; its rank is taken.
        base (`torch.nn.Module`): The base model; it may carry adapters, and needs no weights.
        base_name (`str`): Name or path of the base model, if it has one.
        dtype (`torch.dtype`): One of [`DTYPES`].
        overwrite (`bool`): Whether to replace an adapter in that folder.
        dropout (`float`, *optional*, defaults to `0.0`): `lora_dropout`.

    Raises:
        ValueError: If `dtype` is another one or cannot hold the update.
        FileExistsError: If the folder holds an adapter and `overwrite` is not set, or is a file.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")
    folder = Path(save_directory).absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Name a folder to write the adapter to.")
    found = [name for name in ADAPTER_FILES if (folder / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} holds an adapter already ({', '.join(found)}). Name another folder, or pass `overwrite=True` "
            "(`--overwrite`)."
        )
    tensors = {}
    for name, (down_RI, up_OR) in factors.items():
        for part, factor in zip("AB", _rounded(name, down_RI, up_OR, dtype), strict=True):
            tensors[f"{PREFIX}{name}.lora_{part}.weight"] = factor
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.r,
        lora_dropout=dropout,
        target_modules=target_modules(factors, base),
        fan_in_fan_out=any(isinstance(unwrap(base.get_submodule(name)), Conv1D) for name in factors),
        task_type=adapter.task_type,
        base_model_name_or_path=base_name,
        revision=adapter.revision,
        inference_mode=True,
    )
    # What PEFT notes where there is no task type.
    noted = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    beside.mkdir()
    try:
        save_file(tensors, beside / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(beside), auto_mapping_dict=noted if config.task_type is None else None)
        if not folder.exists():
            os.replace(beside, folder)
            return
        # The configuration goes first and comes last: what lies in between does not load.
        for name in found:
            (folder / name).unlink()
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(beside / name, folder / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _rounded(name: str, down_RI: torch.Tensor, up_OR: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """A and B in the wanted dtype, on the CPU."""
    down_RI, up_OR = (factor.detach().cpu().double() for factor in (down_RI, up_OR))
    largest_down, largest_up = down_RI.abs().max(), up_OR.abs().max()
    if dtype == torch.float16 and largest_down > 0 and 0 < largest_up < torch.inf:
        shift = torch.round(torch.log2(largest_down / largest_up) / 2)
        down_RI, up_OR = torch.ldexp(down_RI, -shift), torch.ldexp(up_OR, shift)
    rounded = tuple(factor.to(dtype).contiguous() for factor in (down_RI, up_OR))
    if not all(torch.isfinite(factor).all() for factor in rounded):
        raise ValueError(
            f"the update of {name} has entries up to {float(largest_up):.3g}, which are not finite in {dtype}. Export "
            "in float32, or look at the adapter's values with `python -m trl_tinylora inspect`."
        )
    return rounded
