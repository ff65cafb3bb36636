"""
A TinyLoRA adapter as a plain LoRA of PEFT's: exact, and read wherever LoRA is read, without this package.

The file keeps to what its readers ask for, as read in their code (the tests check the same rules):

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
from collections.abc import Iterable
from pathlib import Path
from typing import Union

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import TinyLoraConfig
from ..storage.atomic_write import written_whole
from ..storage.checkpoint import PREFIX, read_fields
from ..tuner.model import TinyLoraModel
from ..tuner.weights import holders, unwrap


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What makes a folder an adapter's, in the order in which an earlier adapter is deleted.
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

    Fused experts are written as PEFT's LoRA has them (`target_parameters`), which vLLM reads with
    `enable_mixed_moe_lora_format` and `LoRARequest(..., is_3d_lora_weight=True)`.

    The file is as large as a LoRA's: r * (out_features + in_features) numbers a module. It is written to a temporary
    path first and moved into the folder whole. Modules that were trained in full beside the adapter (`modules_to_save`,
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
    factors = lora_factors(model, adapter_name)
    config, base = model.peft_config[adapter_name], model.get_base_model()
    write_lora(save_directory, factors, config, base, dtype=dtype, overwrite=overwrite)


def lora_factors(model: PeftModel, adapter_name: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Returns the LoRA of an adapter's present values: `A = V^T` and `B = U S R` of every module.

    `R = sum_k v_k P_k` (arXiv:2602.04118, section 4) is computed for all modules in one product.

    Args:
        model (`peft.PeftModel`): Model with the adapter, merged or not. Its weights must be whole in this process.
        adapter_name (`str`, *optional*, defaults to `"default"`): The adapter.

    Returns:
        `dict` of A, shape `(r, in_features)`, in its dtype and on its device, and B, shape `(out_features, r)`, dtype
        float64 on the CPU, by the module's name in the base model, in depth order.

    Raises:
        TypeError: If the model is no `PeftModel` with a TinyLoRA adapter.
        ValueError: If there is no such adapter, or it trained modules in full.
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

    vectors, base = model.base_model.bank.vectors(adapter_name), model.get_base_model()
    mixings_MRR = vectors.mixings().cpu().double()
    factors = {}
    for place in holders(base, list(vectors.plan.index)):
        layer = base.get_submodule(place.module)
        for name in place.names:
            left_OR, right_RI = layer.factors(vectors.plan.factor_key(name), name)
            factors[name] = right_RI, left_OR.cpu().double() @ mixings_MRR[vectors.plan.index[name]]
    return factors


def read_config(folder: Path) -> dict:
    """Returns the fields of an adapter folder's configuration; `ValueError` without one, or where it is damaged."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}: it is no adapter folder. Name the folder that was saved.")
    return read_fields(path)


def refuse_what_is_no_lora(config: PeftConfig) -> None:
    """Raises `ValueError` where an adapter has modules, tokens or biases that are trained in full."""
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            raise ValueError(
                f"the adapter has {field}={getattr(config, field)!r}, which vLLM and llama.cpp refuse in a LoRA. Put "
                "everything into the weights with `model.merge_and_unload().save_pretrained(folder)` and serve those."
            )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"the adapter has bias={config.bias!r}: biases trained in full do not fit in a LoRA.")


def refuse_other_dtype(dtype: torch.dtype) -> None:
    """Raises `ValueError` for a dtype that is none of a file's."""
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES))}, got {dtype}.")


def write_lora(
    save_directory: Union[str, os.PathLike],
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    adapter: PeftConfig,
    base: nn.Module,
    *,
    dtype: torch.dtype,
    overwrite: bool,
    dropout: float = 0.0,
) -> None:
    """
    Writes a LoRA in PEFT's layout: interrupted, the folder holds the earlier adapter, none that loads, or the new one.

    `factors` are A, shape `(r, in_features)`, and B, shape `(out_features, r)`, by module name.
    """
    refuse_other_dtype(dtype)
    folder = Path(save_directory).absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Name a folder to write the adapter to.")
    found = [name for name in ADAPTER_FILES if (folder / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} holds an adapter already ({', '.join(found)}). Name another folder, or set `overwrite` "
            "(`--overwrite`)."
        )
    tensors, places = {}, holders(base, list(factors))
    linear = [place.module for place in places if place.parameter == "weight"]
    fused = [place for place in places if place.parameter != "weight"]
    for name in linear:
        for part, factor in zip("AB", rounded(name, *factors[name], dtype), strict=True):
            tensors[f"{PREFIX}{name}.lora_{part}.weight"] = factor
    # PEFT puts a wrapper for each parameter around the one before it.
    last = {place.module: place for place in fused}
    for place in fused:
        pairs = [rounded(name, *factors[name], dtype) for name in place.names]
        inside = "" if last[place.module] is place else ".base_layer"
        down, up = zip(*pairs, strict=True)
        tensors[f"{PREFIX}{place.module}{inside}.lora_A.weight"] = torch.cat(down)
        # Column `rank * experts + expert` (peft v0.21.2, tuners/lora/layer.py, ParamWrapper.get_delta_weight).
        tensors[f"{PREFIX}{place.module}{inside}.lora_B.weight"] = torch.stack(up, dim=2).flatten(1)
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.r,
        lora_dropout=dropout,
        target_modules=_target_modules(linear, base),
        target_parameters=[f"{place.module}.{place.parameter}" for place in fused] or None,
        fan_in_fan_out=any(isinstance(unwrap(base.get_submodule(name)), Conv1D) for name in linear),
        task_type=adapter.task_type,
        base_model_name_or_path=adapter.base_model_name_or_path or base.__dict__.get("name_or_path") or None,
        revision=adapter.revision,
        inference_mode=True,
    )
    # What PEFT notes where there is no task type.
    noted = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}

    with (
        written_whole(folder / CONFIG_NAME) as new_config,
        written_whole(folder / SAFETENSORS_WEIGHTS_NAME) as new_weights,
    ):
        config.save_pretrained(str(new_config.parent), auto_mapping_dict=noted if config.task_type is None else None)
        save_file(tensors, new_weights, metadata={"format": "pt"})
        # The earlier configuration goes first and the new one comes last: what lies in between does not load.
        for name in found:
            (folder / name).unlink()


def _target_modules(names: Iterable[str], base: nn.Module) -> list[str]:
    """What makes PEFT adapt exactly these modules: their last names, or the full ones where others end alike."""
    inside = tuple(f"{name}." for name, module in base.named_modules() if name and isinstance(module, BaseTunerLayer))
    others = {name for name, _ in base.named_modules() if not name.startswith(inside)}.difference(names)
    last, last_of_others = ({name.rpartition(".")[2] for name in part} for part in (names, others))
    return sorted(last if last.isdisjoint(last_of_others) else names)


def rounded(name: str, down_RI: torch.Tensor, up_OR: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """
    Returns A and B in a dtype of the file, on the CPU, with the balance for float16 that [`export_lora`] describes.

    Raises:
        ValueError: If an entry is not finite in that dtype.
    """
    down_RI, up_OR = down_RI.detach().cpu().double(), up_OR.detach().cpu().double()
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
