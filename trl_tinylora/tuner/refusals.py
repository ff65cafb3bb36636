"""What a model and its adapters cannot do, said before anything of the model is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from accelerate.utils import has_offloaded_params
from torch import nn

from ..config import TinyLoraConfig
from ..distributed import is_sharded
from ..storage.checkpoint import refuse_unfit_shape, settings_of
from ..storage.fingerprint import Probe, difference_of_weights, refuse_another_base
from .bank import TinyLoraBank
from .targets import decoder_of


if TYPE_CHECKING:
    from .model import TinyLoraModel


# PEFT's name for a row without an adapter.
BASE_ROW = "__base__"


def trains_more_than_values(config: TinyLoraConfig) -> bool:
    """Returns whether an adapter has trained modules or tokens beside its values."""
    return bool(config.modules_to_save or config.trainable_token_indices)


def refuse_second_injection(model: nn.Module, bank: Optional[TinyLoraBank], adapter_name: str) -> None:
    """Raises `ValueError` where an adapter would take the place of one that is there, or has no name it can have."""
    if not adapter_name or "." in adapter_name:
        raise ValueError(f"an adapter's name must be a text without dots, got {adapter_name!r}: choose another name.")
    if adapter_name == BASE_ROW:
        raise ValueError(
            f"an adapter cannot be named {BASE_ROW!r}: in `adapter_names` that stands for the base model. Choose "
            "another name."
        )
    is_below = bank is None and any(isinstance(module, TinyLoraBank) for module in model.modules())
    if is_below or (bank is not None and bank.vectors(adapter_name) is not None):
        raise ValueError(
            f"this model carries a TinyLoRA adapter already, and {adapter_name!r} would take its place without "
            "values to train. For a second one call `model.add_adapter(name, config)` on the `PeftModel`; to "
            "start anew, `model.unload()` first."
        )


def refuse_lost_weights(model: nn.Module) -> None:
    """
    Raises where weights lie on the disk and nothing can read them any more.

    Raises:
        NotImplementedError: If a `device_map` has put weights there and accelerate's hooks are gone.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    if "disk" in device_map.values() and not any(map(has_offloaded_params, model.modules())):
        offloaded = [name for name, place in device_map.items() if place == "disk"]
        raise NotImplementedError(
            f"accelerate has offloaded {', '.join(offloaded[:3])}{', ...' if len(offloaded) > 3 else ''} to the disk, "
            "and its hooks, which read the weights, are gone: `PeftModel.from_pretrained` takes them off before the "
            "adapter is made. Load the adapter with transformers' own `model.load_adapter(folder)`, or make it with "
            "`get_peft_model(model, TinyLoraConfig.from_pretrained(folder))` and load the values with "
            "`set_peft_model_state_dict(model, load_peft_weights(folder))`; or load the model without disk offload."
        )


def warn_of_zeros(scales: Mapping[str, float]) -> None:
    """Warns of weights that are all zero, of their root mean squares by name."""
    zero = [name for name, scale in scales.items() if scale == 0]
    if zero:
        warnings.warn(
            f"the weights of {', '.join(zero[:5])}{', ...' if len(zero) > 5 else ''} ({len(zero)} of {len(scales)} "
            "modules) are all zero, and so is every update of them: put them into `exclude_modules`, or load the "
            "model's weights first.",
            stacklevel=3,
        )


def warn_of_another_base(adapter_name: str, difference: Optional[str], n_unsettled: int) -> None:
    """Warns of what [`difference_of_weights`] found, where that base was asked for."""
    if difference is None:
        return
    signs = f" For {n_unsettled} modules the folder does not settle signs, which can turn over." if n_unsettled else ""
    warnings.warn(
        f"the adapter {adapter_name!r} is used on another base than its own: {difference}. Its values act on the "
        f"singular vectors of these weights, so that the update is another one by at least as much.{signs} The trained "
        "update itself is what `export_lora` writes on the adapter's own base.",
        stacklevel=4,
    )


def refuse_unfit(
    adapter_name: str, config: TinyLoraConfig, probes: Mapping[str, Probe], shape: tuple[int, int]
) -> None:
    """
    Raises where a saved adapter does not belong to a base model.

    Args:
        adapter_name (`str`): The adapter.
        config ([`TinyLoraConfig`]): Its configuration; one that was not read from a folder fits any base, and one that
            was read with `other_base=True` any with these modules.
        probes (`Mapping[str, Probe]`): Of each module that it would adapt here, by name, in depth order.
        shape (`tuple[int, int]`): Of its values here, (groups, u).

    Raises:
        ValueError: If it is another base, or the values have another shape.
        NotImplementedError: If its factors were stored and are not read.
    """
    if config.base_fingerprint is not None:
        try:
            if config.takes_other_base:
                difference = difference_of_weights(config.base_fingerprint, probes)
                warn_of_another_base(adapter_name, difference, len(set(probes).difference(config.singular_bases or ())))
            else:
                refuse_another_base(config.base_fingerprint, probes)
        except ValueError as error:
            raise ValueError(
                f"this is not the base model of the adapter {adapter_name!r}: {error}. Load it on "
                f"{config.base_model_name_or_path or 'its own base'} as it was then, quantised in the same way and "
                "from the same dtype if it was; where another adapter had been merged into it, save the merged model "
                "and name that. To take the trained update to this model as it is, write it as a LoRA on its own base "
                "(`export_lora`). To use the values on this model's own singular vectors, pass `other_base=True` to "
                "`PeftModel.from_pretrained`, or to the `TinyLoraConfig.from_pretrained` of a further adapter."
            ) from error
        if config.base_fingerprint.get("stored") and not config.singular_bases:
            raise NotImplementedError(
                f"the adapter {adapter_name!r} was saved by an earlier version, with factors that this loader does "
                "not read. Load it with `peft.PeftModel.from_pretrained`, and save it again."
            )
    is_read = config._saved is not None and config._saved.folder is not None
    # With other settings than those that were read it is a new adapter.
    if is_read and config._saved.settings == settings_of(config):
        refuse_unfit_shape(config._saved.values_GK.shape, shape)


def refuse_wrong_rows(tuner: TinyLoraModel, adapter_names: Sequence[str]) -> None:
    """
    Raises for what can be told of a batch whose rows have adapters of their own before it is seen.

    Args:
        tuner ([`TinyLoraModel`]): The model.
        adapter_names (`Sequence[str]`): An adapter for each row.

    Raises:
        TypeError: If it is no list of names.
        ValueError: If an adapter does not exist, or the model is in training mode or merged.
        NotImplementedError: If something beside the values would have to differ, or the values are sharded.
    """
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"`adapter_names` must be a list with a name for each row, got {adapter_names!r}.")
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if tuner.bank.merged_layers:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    names = set(adapter_names) - {BASE_ROW}
    unknown = [name for name in names if tuner.bank.vectors(name) is None]
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    # What stands beside the values is the active adapter's in every row.
    for name in sorted({*names, *tuner.active_adapters}):
        if trains_more_than_values(tuner.peft_config[name]):
            raise NotImplementedError(
                f"{name!r} has trained modules or tokens beside its values, which cannot differ between the rows "
                "of a batch. Leave it out and make another adapter active, or run its rows as a batch of their own."
            )
    with_experts = sorted(name for name in names if tuner.peft_config[name].target_parameters)
    if with_experts:
        raise NotImplementedError(
            f"{with_experts[0]!r} adapts fused experts, to which a model gives its tokens without their rows. Run the "
            "rows of each adapter as a batch of their own, or train without `target_parameters`."
        )
    _refuse_rows_of_images(tuner, sorted(names))
    if any(is_sharded(tuner.bank.vectors(name).values_GK) for name in names):
        raise NotImplementedError(
            "`adapter_names` needs the values whole in each process, and ZeRO-3 or FSDP2 has sharded them. Load "
            "the adapters on an ordinary model, or run the rows of each adapter as a batch of their own."
        )


def _refuse_rows_of_images(tuner: TinyLoraModel, adapter_names: Sequence[str]) -> None:
    """Raises `NotImplementedError` where an adapter is on a part of the model whose rows are images, of which a row of
    the batch may have several or none."""
    model = tuner.model
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return
    decoder, head = decoder_of(model), getattr(model, "get_output_embeddings", lambda: None)()
    # A name for each plan: there may be thousands of adapters.
    by_plan = {tuner.bank.vectors(name).plan: name for name in reversed(adapter_names)}
    for plan, adapter_name in by_plan.items() if decoder else ():
        outside = [name for name in plan.index if not name.startswith(f"{decoder}.")]
        outside = [name for name in outside if model.get_submodule(name) is not head]
        if outside:
            raise NotImplementedError(
                f"{adapter_name!r} adapts {outside[0]}, which lies outside the language model, {decoder}: its rows are "
                "images, and `adapter_names` has a name for each row of the batch. Run the rows of each adapter as a "
                "batch of their own."
            )
