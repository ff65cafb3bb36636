"""Which modules of a model are adapted, and whether they can be: checked before anything is changed."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Union

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from ..distributed import full_shape, is_sharded, refuse_tensor_parallel
from .weights import (
    KNOWN_DTYPES,
    KNOWN_LAYERS,
    expert_names,
    is_fused_experts,
    is_known,
    is_quantised,
    shape_of,
    unwrap,
)


if TYPE_CHECKING:
    from ..config import TinyLoraConfig


# What makes transformers dequantise a checkpoint while it loads, by the library whose layers are there otherwise.
DEQUANTISED_BY = {
    "compressed_tensors": "CompressedTensorsConfig(dequantize=True)",
    "transformers.integrations.finegrained_fp8": "FineGrainedFP8Config(dequantize=True)",
}


def skeleton(model_or_config: Union[nn.Module, PretrainedConfig]) -> nn.Module:
    """Returns a model whose module names can be read; a configuration becomes one without weights."""
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    if not isinstance(model_or_config, PretrainedConfig):
        raise TypeError(
            f"expected a model or its configuration, got {model_or_config!r}: pass "
            f"`AutoConfig.from_pretrained({str(model_or_config)!r})`."
        )
    with torch.device("meta"):
        if type(model_or_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            # `from_config` would build it under zero.Init where a trainer's arguments have turned ZeRO-3 on.
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(model_or_config)](model_or_config)
        return AutoModelForCausalLM.from_config(model_or_config)


def resolve_target_modules(model: nn.Module, config: TinyLoraConfig) -> list[str]:
    """
    Returns the names of the modules that a configuration adapts, in depth order, by PEFT's own rules.

    Each expert's matrix in a parameter of `target_parameters` is a module, `module.parameter.expert`.

    Args:
        model (`torch.nn.Module`): The base model; it may carry adapters already, and needs no weights.
        config ([`TinyLoraConfig`]): Its `target_modules` is left as it is.

    Returns:
        `list[str]`

    Raises:
        ValueError: If nothing matches, a match is no linear layer that is known, or `r` exceeds a module's dimensions.
            Under "all-linear" the latter are left out, with a warning that names them, as is one of fused experts.
        NotImplementedError: If the model is split by tensor parallelism, or a quantised weight is sharded.
    """
    refuse_tensor_parallel(model)
    refuse_data_parallel(model)
    asked_for = config.target_modules
    # For "all-linear" PEFT finds the output embedding of a `PreTrainedModel` only; other models name their targets.
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    outside_adapters = _outside_adapters(model)
    if is_all_linear(asked_for):
        # Those of quantisation libraries that PEFT does not take for linear layers: named, and not left out in silence.
        config.target_modules |= {
            name
            for name, module in model.named_modules()
            if "Linear" in type(module).__name__
            and hasattr(module, "in_features")
            and not isinstance(module, (nn.Linear, BaseTunerLayer))
        }
    names = [name for name, _ in outside_adapters if name and check_target_module_exists(config, name)]
    experts = _experts_in(outside_adapters, config.target_parameters or ())
    if is_all_linear(asked_for):
        names = _without_left_out(model, names, config.r, experts)
    if not names and not experts:
        linear = [name for name, module in model.named_modules() if isinstance(unwrap(module), KNOWN_LAYERS)]
        raise ValueError(
            f"target_modules={asked_for!r} with exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} matches no module. Linear layers of this model: "
            f"{', '.join(linear[:8]) or 'none'}{', ...' if len(linear) > 8 else ''}."
        )
    _refuse_unmatched(model, config, [*names, *experts])
    for name in names:
        linear = unwrap(model.get_submodule(name))
        if not is_quantised(linear):
            _refuse_unknown(name, linear, asked_for)
        elif is_sharded(linear.weight):
            raise NotImplementedError(
                f"the quantised weight of {name} is sharded, and only a whole one can be dequantised. Make the adapter "
                "before ZeRO-3 or FSDP2 shards the model, as TRL's trainers do."
            )
        shape = shape_of(linear)
        if len(shape) != 2:
            raise ValueError(
                f"the weight of {name} has shape {shape}: it is not loaded, or sharded by something other than ZeRO-3 "
                "and FSDP2, and its singular values cannot be computed. Build the adapter on a whole model."
            )
        if config.r > min(shape):
            raise ValueError(
                f"r={config.r} exceeds the rank {min(shape)} that {name} of shape {shape} can have. "
                f"Lower `r` to {min(shape)} or put the module into `exclude_modules`."
            )
    for name in experts:
        _refuse_unknown_experts(name, model, config.r)
    if not experts:
        return names
    linear, found = set(names), []
    for name, module in model.named_modules():
        found += [name] if name in linear else []
        for parameter, expert_by_expert in _names_of_experts(name, module).items():
            found += expert_by_expert if f"{name}.{parameter}" in experts else ()
    return found


def _names_of_experts(name: str, module: nn.Module) -> dict[str, tuple[str, ...]]:
    """[`expert_names`] of fused experts, in an adapter layer or not; of anything else, none."""
    inside = unwrap(module)
    return expert_names(name, inside) if is_fused_experts(inside) else {}


def _outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a model by name, adapter layers included, and not what is inside those."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer) and name)
    return [(name, module) for name, module in model.named_modules() if not name.startswith(inside)]


def _experts_in(modules: list[tuple[str, nn.Module]], wanted: Collection[str]) -> list[str]:
    """Names of the parameters that `target_parameters` asks for, by PEFT's rule: a name, or the ending of one."""
    return [
        key
        for name, module in modules
        for parameter, _ in unwrap(module).named_parameters(recurse=False)
        if (key := f"{name}.{parameter}") in wanted or any(key.endswith(f".{part}") for part in wanted)
    ]


def _refuse_unknown_experts(name: str, model: nn.Module, rank: int) -> None:
    """Raises where a parameter is none of fused experts that can be adapted."""
    module_name, _, parameter = name.rpartition(".")
    module = unwrap(model.get_submodule(module_name))
    weight = getattr(module, parameter)
    if parameter not in _names_of_experts(module_name, module) or len(full_shape(weight)) != 3:
        raise ValueError(
            f"`target_parameters` matches {name}, of shape {full_shape(weight)} in a {type(module).__module__}."
            f"{type(module).__name__}: TinyLoRA adapts the gate_up_proj, up_proj and down_proj of experts that "
            "transformers keeps fused in three dimensions. Name those, and linear layers in `target_modules`."
        )
    if type(weight).__module__.partition(".")[0] != "torch" or weight.dtype not in KNOWN_DTYPES:
        raise ValueError(
            f"the experts {name} are a {type(weight).__name__} of {weight.dtype}, of which TinyLoRA takes no singular "
            f"vectors. Load the model in one of {', '.join(str(dtype) for dtype in KNOWN_DTYPES)}, or leave them out "
            "of `target_parameters`."
        )
    if rank > min(full_shape(weight)[1:]):
        raise ValueError(
            f"r={rank} exceeds the rank {min(full_shape(weight)[1:])} that an expert of {name}, of shape "
            f"{full_shape(weight)}, can have. Lower `r`, or leave it out of `target_parameters`."
        )
    if getattr(module, "_is_expert_parallel", False):
        raise NotImplementedError(
            f"the experts {name} are split over processes by expert parallelism. Shard the model by FSDP2 or "
            "DeepSpeed ZeRO-3."
        )


def _refuse_unknown(name: str, linear: nn.Module, asked_for: Union[str, Collection[str]]) -> None:
    """Raises `ValueError` where a layer that is not quantised is not known, or is in a dtype without an SVD."""
    weight, place = getattr(linear, "weight", None), f"{type(linear).__module__}.{type(linear).__name__}"
    # compressed-tensors leaves the class as it is, and gives each layer a forward of its own.
    is_compressed = hasattr(linear, "quantization_scheme")
    place = f"compressed_tensors {place}" if is_compressed else place
    loaded = next((how for library, how in DEQUANTISED_BY.items() if place.startswith(library)), None)
    way_out = (
        f"Load the model with `quantization_config={loaded}`, which gives weights in floating point."
        if loaded
        else "Name linear layers only, put it into `exclude_modules`, or load the model unquantised or in one of the "
        "quantisations that docs/bases.md lists."
    )
    if isinstance(linear, nn.Embedding):
        # Why: docs/architecture.md.
        way_out = (
            "To train embeddings beside the values, name tokens in `trainable_token_indices`, or the whole module in "
            "`modules_to_save`; in `target_modules` name linear layers only."
        )
    if is_compressed or not is_known(linear):
        raise ValueError(
            f"target_modules={asked_for!r} matches {name}, a {place}; TinyLoRA "
            f"adapts `torch.nn.Linear`, `Conv1D` and quantised layers of bitsandbytes and torchao. {way_out}"
        )
    if type(weight).__module__.partition(".")[0] != "torch":
        raise ValueError(
            f"the weight of {name} is a {type(weight).__module__}.{type(weight).__name__}, of which TinyLoRA knows no "
            f"dequantisation. {way_out}"
        )
    if weight.dtype not in KNOWN_DTYPES:
        raise ValueError(
            f"the weight of {name} has dtype {weight.dtype}, of which TinyLoRA takes no singular vectors. "
            f"Load the model in one of {', '.join(str(dtype) for dtype in KNOWN_DTYPES)}, or put the module into "
            "`exclude_modules`."
        )


def is_all_linear(target_modules: Union[str, Collection[str]]) -> bool:
    """Returns whether every linear layer is asked for, by PEFT's own word for it."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def decoder_of(model: nn.Module) -> str:
    """Returns the name of the language model inside a model that may have a vision tower or the like beside it; of an
    encoder-decoder, and where a model does not say, ""."""
    get_decoder = getattr(model, "get_decoder", None)
    if get_decoder is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ""
    decoder = get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _without_left_out(model: nn.Module, names: list[str], rank: int, adapted_experts: list[str]) -> list[str]:
    """The names that "all-linear" stands for; warns of what it leaves out: other stacks than the language model's,
    modules that cannot have the rank, and experts that are no linear layers."""
    decoder = decoder_of(model)
    inside = [name for name in names if name.startswith(f"{decoder}.")]
    if inside and len(inside) < len(names):
        outside = [name for name in names if name not in set(inside)]
        warnings.warn(
            f'target_modules="all-linear" adapts the language model, {decoder}, and leaves out {len(outside)} linear '
            f"layers beside it: {', '.join(outside[:3])}{', ...' if len(outside) > 3 else ''}. To adapt "
            "others, name all modules in `target_modules`. A new head is neither trained nor saved unless "
            "`modules_to_save` names it.",
            stacklevel=2,
        )
        names = inside
    thin = [name for name in names if min(shape_of(unwrap(model.get_submodule(name)))) < rank]
    if thin and len(thin) < len(names):
        warnings.warn(
            f"{len(thin)} linear layers have fewer than r={rank} inputs or outputs and are left out: "
            f"{', '.join(thin[:5])}{', ...' if len(thin) > 5 else ''}. Named in `target_modules` they are an error.",
            stacklevel=2,
        )
        names = [name for name in names if name not in set(thin)]
    sizes = {name: math.prod(full_shape(parameter)) for name, parameter in model.named_parameters()}
    experts = [
        name
        for name in sizes
        if "experts" in name.split(".")
        and len(full_shape(model.get_parameter(name))) == 3
        and name.replace(".base_layer.", ".") not in adapted_experts
    ]
    if experts:
        share = sum(sizes[name] for name in experts) / sum(sizes.values())
        endings = sorted({".".join(name.replace(".base_layer.", ".").split(".")[-2:]) for name in experts})
        warnings.warn(
            f'target_modules="all-linear" leaves out {share:.0%} of the parameters: the fused experts '
            f"{', '.join(experts[:2])}{', ...' if len(experts) > 2 else ''}. To adapt them as well, set "
            f"`target_parameters={endings}`.",
            stacklevel=2,
        )
    return names


def refuse_data_parallel(model: nn.Module) -> None:
    """Raises `RuntimeError` where a model is, or runs as a replica of, `torch.nn.DataParallel`."""
    if isinstance(model, nn.DataParallel) or getattr(model, "_is_replica", False):
        raise RuntimeError(
            "`torch.nn.DataParallel` is not supported: its replicas would share one gradient buffer. Start with "
            "`accelerate launch` (one process per GPU), or let the process see one GPU (CUDA_VISIBLE_DEVICES=0)."
        )


def _refuse_unmatched(model: nn.Module, config: TinyLoraConfig, names: list[str]) -> None:
    """Raises where a part of what a configuration asks for matches nothing, or lies outside an embedding."""
    everywhere = [name for name, _ in model.named_modules()]

    def is_in(wanted: str, found: list[str]) -> bool:
        return any(name == wanted or name.endswith(f".{wanted}") for name in found)

    unmatched = {}
    if not isinstance(config.target_modules, str):
        unmatched["target_modules"] = [
            wanted for wanted in config.target_modules or [] if not is_in(wanted, everywhere)
        ]
    if isinstance(config.exclude_modules, (list, set, tuple)) and config.base_fingerprint is None:
        unmatched["exclude_modules"] = [part for part in config.exclude_modules if not is_in(part, everywhere)]
    # For a classifier PEFT itself asks for every name that a head can have, of which a model has one.
    heads = SEQ_CLS_HEAD_NAMES if config.task_type in ("SEQ_CLS", "TOKEN_CLS") else []
    beside = everywhere + heads if any(is_in(head, everywhere) for head in heads) else everywhere
    unmatched["modules_to_save"] = [wanted for wanted in config.modules_to_save or [] if not is_in(wanted, beside)]
    unmatched["target_parameters"] = [wanted for wanted in config.target_parameters or [] if not is_in(wanted, names)]
    if isinstance(config.layers_to_transform, list):
        indexes = {int(part) for name in names for part in name.split(".") if part.isdigit()}
        unmatched["layers_to_transform"] = [index for index in config.layers_to_transform if index not in indexes]
    for field, parts in unmatched.items():
        if parts:
            parts = sorted(parts)
            raise ValueError(
                f"{parts!r} in {field}={getattr(config, field)!r} matches nothing in this model. Remove it, or correct "
                f"the name; the adapted modules begin with {names[0]}."
            )
    tokens = config.trainable_token_indices or {}
    if isinstance(tokens, list):
        tokens = {"get_input_embeddings": tokens}
    for embedding, indexes in tokens.items():
        found = [module for name, module in model.named_modules() if is_in(embedding, [name])]
        if embedding == "get_input_embeddings" and hasattr(model, embedding):
            found = [model.get_input_embeddings()]
        count = found[0].weight.shape[0] if found else math.inf
        wrong = [index for index in indexes if not 0 <= index < count]
        if wrong:
            raise ValueError(
                f"trainable_token_indices holds {wrong[:5]}, but the tokens of this embedding are 0 to {count - 1}."
            )
