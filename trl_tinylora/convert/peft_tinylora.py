"""
Reads adapters of PEFT's own TinyLoRA (`peft.TinyLoraConfig`, type TINYLORA) and writes them as plain LoRA.

PEFT's formula is `W' = W + B (sum_k v_k P_k) A` with `A = sqrt(S) V^T` and `B = U sqrt(S)`, both in the file. What the
file lacks is the order of the modules, by which they are put into groups and P is seeded: it is the base model's
(`peft/tuners/tinylora/model.py` and `layer.py` in peft 0.21.2).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

import peft
import torch
from peft import PeftType
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..storage.checkpoint import PREFIX, read_tensors
from ..tuner.targets import skeleton
from .lora import read_config, refuse_what_is_no_lora, write_lora


def convert_peft_tinylora(
    adapter_dir: Union[str, os.PathLike],
    save_directory: Union[str, os.PathLike],
    *,
    model: Optional[Union[nn.Module, PretrainedConfig]] = None,
    earlier_adapters: Sequence[Union[str, os.PathLike]] = (),
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """
    Writes an adapter of PEFT's TinyLoRA as the plain LoRA that PEFT computes with: `lora_A = A`, `lora_B = B R`.

    `R = sum_k v_k P_k`, with the P of the file where it has them, and otherwise those of the seed and the module's
    place. A module of fewer dimensions than `r` gets zeros, so that all have one rank. See [`export_lora`] for what
    `dtype` costs.

    PEFT seeds the P of a module with its place among the modules of the adapter that wrapped it *first*, also for
    adapters that come later. Where a later adapter targets other modules and was saved without its P, PEFT itself loads
    it with another P than it was trained with; given `earlier_adapters`, this does not.

    Args:
        adapter_dir (`str` or `os.PathLike`): Folder that `save_pretrained` wrote.
        save_directory (`str` or `os.PathLike`): Folder to write.
        model (`torch.nn.Module` or `transformers.PretrainedConfig`, *optional*): The base model or its configuration;
            no weights are needed. By default the configuration that the adapter's `base_model_name_or_path` names.
        earlier_adapters (`Sequence[str or os.PathLike]`, *optional*): Folders of the adapters that were on the model
            before this one, first one first. Of use only where P was not saved.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): float32, float16 or bfloat16.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an adapter in that folder.

    Raises:
        ValueError: If the folder is not such an adapter's, is incomplete, or belongs to another base model.
        NotImplementedError: If it adapts an embedding.
        FileExistsError: If `save_directory` holds an adapter and `overwrite` is not set.
    """
    folder = Path(adapter_dir)
    config = _config_of(folder)
    refuse_what_is_no_lora(config)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: save the adapter with `save_pretrained` again.")
    tensors = read_tensors(path)
    if model is None:
        if not config.base_model_name_or_path:
            raise ValueError(
                f"{folder / CONFIG_NAME} names no base model, whose order of modules is needed. Pass it or its "
                "configuration as `model`."
            )
        model = AutoConfig.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    base = skeleton(model)
    places = _places(base, config)
    saved = {key[len(PREFIX) :].partition(".tinylora_A")[0] for key in tensors if ".tinylora_A" in key}
    if saved != set(places):
        stray = sorted(saved ^ set(places))
        raise ValueError(
            f"{folder} adapts {len(saved)} modules, and on this base model its configuration means {len(places)}; "
            f"{stray[0]} is in one only. Name the base model that the adapter was trained on."
        )
    seeded_by = dict(places)
    for earlier in reversed(earlier_adapters):
        seeded_by |= _places(base, _config_of(Path(earlier)))

    # The numbers of PEFT's `_create_and_replace`.
    n_groups = max(1, round(len(places) * (1.0 - config.weight_tying)))
    group_size = max(1, len(places) // n_groups)
    factors = {}
    for name, place in places.items():
        if isinstance(base.get_submodule(name), nn.Embedding):
            raise NotImplementedError(
                f"{name} is an embedding: a LoRA of one has other tensors, which vLLM and llama.cpp read for some "
                "models only. Load the adapter with PEFT, and merge it into the weights."
            )
        try:
            down_RI, up_OR = (tensors[f"{PREFIX}{name}.tinylora_{part}"] for part in "AB")
            values_K = tensors[f"base_model.tinylora_v.{min(place // group_size, n_groups - 1)}"]
        except KeyError as error:
            raise ValueError(
                f"{path} lacks {error.args[0]}. The file was altered, or belongs to another base model."
            ) from error
        rank = down_RI.shape[0]
        key = f"{PREFIX}{name}.tinylora_P"
        projections_KRR = tensors[key] if key in tensors else _projections(config, seeded_by[name], rank)
        mixing_RR = torch.einsum("k,kij->ij", values_K.float(), projections_KRR.float())
        padded = config.r - rank
        factors[name] = (
            nn.functional.pad(down_RI.float(), (0, 0, 0, padded)),
            nn.functional.pad(up_OR.float() @ mixing_RR, (0, padded)),
        )
    write_lora(save_directory, factors, config, base, dtype=dtype, overwrite=overwrite, dropout=config.tinylora_dropout)


def _config_of(folder: Path) -> peft.TinyLoraConfig:
    peft_type = read_config(folder).get("peft_type")
    if peft_type != PeftType.TINYLORA.value:
        raise ValueError(
            f"{folder} holds an adapter of type {peft_type}, not TINYLORA. One of trl_tinylora's own is exported with "
            "`export_lora`; others are not TinyLoRA."
        )
    return peft.TinyLoraConfig.from_pretrained(str(folder))


def _places(base: nn.Module, config: peft.TinyLoraConfig) -> dict[str, int]:
    """Place of each adapted module in the order of PEFT's `_build_target_key_mapping`."""
    config = _maybe_include_all_linear_layers(config, base)
    names = [
        name
        for name, module in base.named_modules()
        if check_target_module_exists(config, name) and isinstance(module, (nn.Linear, Conv1D, nn.Embedding))
    ]
    return {name: place for place, name in enumerate(names)}


def _projections(config: peft.TinyLoraConfig, place: int, rank: int) -> torch.Tensor:
    """P as PEFT draws them where they were not saved."""
    generator = torch.Generator().manual_seed(config.projection_seed + place)
    return torch.normal(mean=0.0, std=1.0 / rank**0.5, size=(config.u, rank, rank), generator=generator)
