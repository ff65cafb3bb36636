"""What a saved adapter is, and how a damaged or foreign one is refused before a model is touched."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..maths.basis import encode
from ..sources import WEIGHTS_FILE


# PEFT's name of a file that no loader here reads.
PICKLE_FILE = "adapter_model.bin"
# PEFT puts it before every key of a file, whatever wrapped the model.
PREFIX = "base_model.model."
# The parameter's name without the adapter's, which is what transformers looks for.
VALUES = "tinylora_bank.trl_tinylora_v.lora_magnitude_vector"
# Of an empty tensor beside them, whose name goes on with the settings and modules that they belong to, as JSON without
# dots: PEFT reads no configuration where it loads values into an adapter that is there, as trainers do that resume.
OWNER = "tinylora_bank.trl_tinylora_v.{"
# Earlier versions stored the factors of uncertain modules: `trl_tinylora_factors.<module>.left` and `.right`.
FORMER_FACTORS, FORMER_RIGHT = "trl_tinylora_factors.", ".right"
# What an adapter's function depends on beside its values, its modules and their singular vectors.
SETTINGS = ("r", "u", "n_tie", "tying", "projection", "projection_seed")
# What is trained and saved beside them.
BESIDE = ("modules_to_save", "trainable_token_indices")
# Of a folder. Format 1, which says no number, has a digest of the tensors in its file alone; 2 one of the settings, the
# modules' names and what fixes their singular vectors as well; 3 has an OWNER in its file.
FORMAT, FORMER_FORMAT = 3, 2
# Radians: the effect of an adapter is right to about this share of itself where its factors are computed again.
MAX_UNCERTAINTY = 0.02


class SavedAdapter(NamedTuple):
    """
    What makes an adapter's folder: the values in its file, and what its configuration says of the model.

    Args:
        values_GK (`torch.Tensor` or `None`): v as it is in the file, shape `(groups, u)`; `None` on processes that have
            nothing to save.
        base_fingerprint (`dict` or `None`): What identifies the base model, see `fingerprint.py`.
        singular_bases (`dict[str, str]`): Of modules whose singular vectors another machine or dtype could rotate, what
            fixes the rotation, see `maths/basis.py`.
        settings (`dict`): The fields in [`SETTINGS`] and [`BESIDE`].
        folder (`str` or `None`): Where it was read; `None` where it is about to be written.
    """

    values_GK: Optional[torch.Tensor]
    base_fingerprint: Optional[dict]
    singular_bases: dict[str, str]
    settings: dict
    folder: Optional[str] = None

    def fields(self) -> dict:
        """Returns the fields for `adapter_config.json`."""
        fields = {
            **self.settings,
            "checkpoint_format": FORMAT,
            "base_fingerprint": self.base_fingerprint,
            "singular_bases": self.singular_bases,
        }
        # Under ZeRO-3 and FSDP2 the other processes have nothing to save.
        found = None if self.values_GK is None else digest({VALUES: self.values_GK}, function_of(fields))
        return {**fields, "checkpoint_digest": found}


def settings_of(config: object) -> dict:
    """Returns the fields of a configuration that are in [`SETTINGS`]."""
    return {name: getattr(config, name) for name in SETTINGS}


def beside_of(config: object) -> dict:
    """Returns the fields of a configuration that are in [`BESIDE`], as JSON holds them."""
    values = {name: getattr(config, name) for name in BESIDE}
    return {name: sorted(value) if isinstance(value, (set, tuple)) else value for name, value in values.items()}


def function_of(fields: Mapping) -> Optional[dict]:
    """Returns what an adapter's function depends on beside its values, of the fields of its configuration.

    Args:
        fields (`Mapping`): Of `adapter_config.json`, or of a [`~trl_tinylora.TinyLoraConfig`] as it was read.

    Returns:
        `dict`, or `None` for a folder of format 1, whose digest does not cover it.
    """
    if fields.get("checkpoint_format") is None:
        return None
    names = (fields.get("base_fingerprint") or {}).get("names")
    return {name: fields.get(name) for name in (*SETTINGS, *BESIDE, "singular_bases")} | {"names": names}


def digest(tensors: Mapping[str, torch.Tensor], function: Optional[Mapping] = None) -> str:
    """Returns the first 16 digits of a SHA-256 over names, dtypes, shapes and bytes of tensors, and [`function_of`]."""
    found = hashlib.sha256(b"" if function is None else json.dumps(function, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def own_tensors(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Returns a checkpoint's values, under [`VALUES`], and what earlier versions stored beside them, all without PREFIX.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): What a checkpoint holds, by name.

    Raises:
        ValueError: If the values are missing, no floating-point numbers or not finite.
    """
    named = {name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items()}
    if VALUES not in named:
        raise ValueError(
            f"this is no TinyLoRA checkpoint: it lacks {VALUES!r} and holds {sorted(named)[:3]}. Load an adapter "
            "that was saved with `peft_type` TRL_TINYLORA."
        )
    own = {name: tensor for name, tensor in named.items() if name.startswith((VALUES, FORMER_FACTORS))}
    for name, tensor in own.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"the checkpoint's {name} has dtype {tensor.dtype}, where floating-point numbers were saved. The file "
                "was altered: copy it again, or take an earlier checkpoint."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{int((~torch.isfinite(tensor)).sum())} of the checkpoint's {tensor.numel()} values are not finite "
                f"({name}). The run diverged or the file is damaged: take an earlier checkpoint."
            )
    return own


def former_bases(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns the `singular_bases` that follow from the factors in the [`own_tensors`] of an earlier version."""
    return {
        name.removeprefix(FORMER_FACTORS).removesuffix(FORMER_RIGHT): encode(tensor)
        for name, tensor in tensors.items()
        if name.startswith(FORMER_FACTORS) and name.endswith(FORMER_RIGHT)
    }


def owner_of(settings: Mapping, base_fingerprint: Mapping) -> str:
    """Returns the name, behind the bank's, of the [`OWNER`] of values with these settings on these modules.

    Args:
        settings (`Mapping`): With the fields in [`SETTINGS`].
        base_fingerprint (`Mapping`): With the number of the modules and the digest of their names.
    """
    owner = {name: settings[name] for name in SETTINGS}
    owner |= {name: base_fingerprint[name] for name in ("modules", "names")}
    return json.dumps(owner, sort_keys=True, separators=(",", ":")).replace(".", "\\u002e")


def is_owner(name: str) -> bool:
    """Returns whether a tensor's name is that of an [`OWNER`]."""
    return name.removeprefix(PREFIX).startswith(OWNER)


def refuse_another_owner(state_dict: Mapping[str, torch.Tensor], expected: str) -> None:
    """
    Raises where the values in a checkpoint belong to an adapter with other settings or modules.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): What a checkpoint holds, by name; before format 3 that does not tell.
        expected (`str`): [`owner_of`] the adapter that they are loaded into.

    Raises:
        ValueError: If they do; the message names both.
    """
    for name in filter(is_owner, state_dict):
        here = json.loads(expected)
        try:
            there = json.loads(name[name.index("{") :])
        except ValueError:
            # The file was altered.
            there = {}
        if there != here:
            differences = [
                f"{key} ({here[key]!r}, {there.get(key)!r} there)" for key in here if here[key] != there.get(key)
            ]
            raise ValueError(
                f"the checkpoint belongs to an adapter that differs from this one in {', '.join(differences)}: its "
                "values would mean something else here. Resume with the settings in the checkpoint's "
                "adapter_config.json, on its base model, or start a new run in another folder."
            )


def refuse_unfit_shape(stored: Sequence[int], shape: Sequence[int]) -> None:
    """Raises `ValueError` where the values in a checkpoint have another shape than the adapter's `(groups, u)`."""
    if tuple(stored) != tuple(shape):
        raise ValueError(
            f"the checkpoint holds values of shape {tuple(stored)}, this adapter has {tuple(shape)} (groups, u). The "
            "base model or its target modules differ from those the checkpoint was made with: load it with the "
            "configuration in its own adapter_config.json, on its own base model."
        )


def read_fields(path: str | os.PathLike) -> dict:
    """Returns what an adapter_config.json holds; `ValueError` where it is no complete JSON, or no object."""
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except ValueError as error:
        # Not JSON, or not even UTF-8.
        raise ValueError(
            f"{path} is no complete JSON file ({error}). It was truncated or altered: copy it again."
        ) from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold an object with the fields of an adapter, got {fields!r:.80}.")
    return fields


def read_tensors(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file, by name; `ValueError` where it is truncated or altered."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}; {os.path.getsize(path)} bytes). It was truncated or "
            "altered: copy it again, or take an earlier checkpoint."
        ) from error


def refuse_altered(
    tensors: Mapping[str, torch.Tensor], expected: Optional[str], function: Optional[Mapping], place: str
) -> None:
    """
    Raises where tensors or configuration are not those that were saved together.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): The [`own_tensors`] of a file.
        expected (`str` or `None`): The `checkpoint_digest` in the configuration; with `None`, nothing is compared.
        function (`Mapping` or `None`): [`function_of`] the configuration.
        place (`str`): Where they were found.

    Raises:
        ValueError: If the digests differ.
    """
    found = digest(tensors, function)
    if expected is not None and found != expected:
        covered = "" if function is None else f", {', '.join(SETTINGS)}, the modules or their singular vectors"
        raise ValueError(
            f"{place} is not what was saved: its digest is {found}, adapter_config.json says {expected}. The values"
            f"{covered} were altered, or file and configuration are of different adapters: copy the folder again. "
            "Where that was done on purpose, remove `checkpoint_digest` from adapter_config.json."
        )


def read_folder(folder: str | os.PathLike) -> dict[str, torch.Tensor] | None:
    """
    Returns this package's tensors of an adapter folder, see [`own_tensors`].

    Args:
        folder (`str` or `os.PathLike`): The folder.

    Returns:
        `dict[str, torch.Tensor]`, or `None` if the folder is not on this machine or holds no weights.

    Raises:
        ValueError: If the file is truncated, altered, foreign or a pickle.
    """
    path = os.path.join(folder, WEIGHTS_FILE)
    if not os.path.isfile(path):
        pickle = os.path.join(folder, PICKLE_FILE)
        if os.path.isfile(pickle):
            raise ValueError(
                f"{pickle} is a pickle, which can run code when it is read. Save the adapter again with "
                "`safe_serialization=True` (the default) where it came from."
            )
        return None
    return own_tensors(read_tensors(path))


def refuse_pickle(folder: str | os.PathLike) -> None:
    """Raises `ValueError` where an adapter was just written as a pickle, which no loader here reads; it is removed."""
    # PEFT says nothing of `safe_serialization` before it has written the file.
    pickle, path = (os.path.join(folder, name) for name in (PICKLE_FILE, WEIGHTS_FILE))
    if not os.path.isfile(pickle) or (os.path.isfile(path) and os.path.getmtime(path) >= os.path.getmtime(pickle)):
        return
    os.remove(pickle)
    raise ValueError(
        f"`safe_serialization=False` writes {pickle}, a pickle, which can run code when it is read and is refused by "
        "every loader of TinyLoRA adapters. It was removed: save with `safe_serialization=True` (the default)."
    )
