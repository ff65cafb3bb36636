"""Every check of a configuration's field that needs no model."""

from __future__ import annotations

import math
import os
import re
from typing import TYPE_CHECKING

from .maths.tying import TYINGS
from .storage.checkpoint import FORMAT, FORMER_FORMAT
from .storage.fingerprint import RESTORE, refuse_malformed


if TYPE_CHECKING:
    from types import SimpleNamespace

    from .config import TinyLoraConfig


PROJECTIONS = ("gaussian", "basis")
SAVE_DTYPES = ("float32", "bfloat16", "float16")


def refuse_wrong_fields(config: TinyLoraConfig) -> None:
    """
    Raises where a field has the wrong type or is out of its range.

    Args:
        config ([`TinyLoraConfig`]): Its fields may have been set after it was made.

    Raises:
        TypeError: If a field has another type than it can have.
        ValueError: If a value is out of its range; the message names the value and the bound.
    """
    refuse_no_count("r", config.r)
    refuse_no_count("u", config.u)
    if config.n_tie != "all":
        if isinstance(config.n_tie, str):
            raise ValueError(f'`n_tie` must be an integer or "all", got {config.n_tie!r}.')
        refuse_no_count("n_tie", config.n_tie)
    _refuse_wrong_tying(config.tying)
    for name, choices in (("projection", PROJECTIONS), ("save_dtype", SAVE_DTYPES)):
        if getattr(config, name) not in choices:
            raise ValueError(f"`{name}` must be one of {choices}, got {getattr(config, name)!r}.")
    _refuse_no_integer("projection_seed", config.projection_seed)
    if not 0 <= config.projection_seed < 2**32:
        raise ValueError(f"`projection_seed` must lie in [0, 2**32), got {config.projection_seed}.")
    if config.projection == "basis" and config.u > config.r**2:
        raise ValueError(
            f'`projection="basis"` has r * r = {config.r**2} matrices, got u={config.u}. Lower `u` or raise `r`.'
        )
    if config.init_weights not in (True, False, "uniform"):
        raise ValueError(f'`init_weights` must be True, False or "uniform", got {config.init_weights!r}.')
    bound = config.init_v_bound
    if isinstance(bound, bool) or not isinstance(bound, (int, float)):
        raise TypeError(f"`init_v_bound` must be a number, got {bound!r} of type {type(bound).__name__}.")
    if not 0 <= bound < math.inf:
        raise ValueError(f"`init_v_bound` must be finite and at least 0, got {bound}.")
    _refuse_wrong_targets(config)
    _refuse_wrong_fields_of_peft(config)
    refuse_wrong_written_fields(config)


def refuse_no_count(name: str, value: object) -> None:
    """Raises `TypeError` where a value is no integer, and `ValueError` where it is below 1."""
    _refuse_no_integer(name, value)
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _refuse_no_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r} of type {type(value).__name__}.")


def _refuse_wrong_tying(tying: object) -> None:
    if isinstance(tying, str) and tying in TYINGS:
        return
    if not isinstance(tying, dict) or not tying:
        raise ValueError(
            f"`tying` must be one of {TYINGS}, or regular expressions by a name of their modules, as in "
            f'{{"attention": "self_attn", "mlp": "mlp"}}; got {tying!r}.'
        )
    for kind, pattern in tying.items():
        if not (isinstance(kind, str) and isinstance(pattern, str)):
            raise TypeError(f"`tying` must have texts as names and expressions, got {kind!r}: {pattern!r}.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`tying` has {kind!r}: {pattern!r}, which is no regular expression: {error}.") from error


def _refuse_wrong_targets(config: TinyLoraConfig) -> None:
    """Of the fields that choose modules, layers and tokens."""
    is_empty = config.target_modules in ([], set())
    if config.target_modules in (None, "") or (is_empty and not config.target_parameters):
        raise ValueError(
            f'`target_modules` must be "all-linear", a list of names or a regular expression, got '
            f"{config.target_modules!r}. It may be empty where `target_parameters` names fused experts."
        )
    if isinstance(config.target_parameters, str):
        raise TypeError(f"`target_parameters` must be a list of names, got {config.target_parameters!r}.")
    _refuse_no_names("target_parameters", config.target_parameters, "a list of names")
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        _refuse_no_names(name, getattr(config, name), "a text or a list of names")
    if isinstance(config.modules_to_save, str):
        raise TypeError(f"`modules_to_save` must be a list of names, got {config.modules_to_save!r}.")
    _refuse_no_names("modules_to_save", config.modules_to_save, "a list of names")
    tokens = config.trainable_token_indices
    for indexes in tokens.values() if isinstance(tokens, dict) else [tokens]:
        _refuse_no_indexes("trainable_token_indices", indexes)
    layers = config.layers_to_transform
    _refuse_no_indexes("layers_to_transform", [layers] if isinstance(layers, int) else layers)
    if layers in ([], ()):
        raise ValueError("`layers_to_transform` is empty, and would adapt every layer: name layers, or leave it out.")
    if config.layers_pattern and layers is None:
        raise ValueError("`layers_pattern` needs `layers_to_transform`; set both or neither.")
    if layers is not None and isinstance(config.target_modules, str):
        raise ValueError(
            "`layers_to_transform` needs `target_modules` as a list of names, for example "
            f"['q_proj', 'v_proj'], got {config.target_modules!r}."
        )


def _refuse_no_names(name: str, value: object, wanted: str) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"`{name}` is no regular expression, {error}: {value!r}.") from error
    elif value is not None:
        if not isinstance(value, (list, set, tuple)) or not all(isinstance(part, str) for part in value):
            raise TypeError(f"`{name}` must be {wanted}, got {value!r}.")


def _refuse_no_indexes(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"`{name}` must be a list of integers, got {value!r}.")
    for index in value:
        _refuse_no_integer(name, index)


def _refuse_wrong_fields_of_peft(config: TinyLoraConfig) -> None:
    """Of the fields that every PEFT configuration has, and PEFT itself takes whatever they hold."""
    if not isinstance(config.inference_mode, bool):
        raise TypeError(f"`inference_mode` must be True or False, got {config.inference_mode!r}.")
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(getattr(config, name), (str, os.PathLike, type(None))):
            raise TypeError(f"`{name}` must be a text or None, got {getattr(config, name)!r}.")
    if not isinstance(config.auto_mapping, (dict, type(None))):
        raise TypeError(f"`auto_mapping` must be a dictionary or None, got {config.auto_mapping!r}.")


def refuse_wrong_written_fields(config: TinyLoraConfig | SimpleNamespace) -> None:
    """
    Raises where a field that is written when an adapter is saved is none that was written: a file can hold anything.

    Args:
        config ([`TinyLoraConfig`] or `types.SimpleNamespace`): With those fields.

    Raises:
        TypeError: If a field has another type than it can have.
        ValueError: If the folder is of a later format, or a field is damaged.
    """
    is_number = type(config.checkpoint_format) is int
    if config.checkpoint_format is not None and not (is_number and config.checkpoint_format in (FORMER_FORMAT, FORMAT)):
        raise ValueError(
            f"`checkpoint_format` is {config.checkpoint_format!r}, and this version of trl_tinylora reads {FORMAT} and "
            "the folders before it. The adapter was saved by another version: install the newest one."
        )
    if not isinstance(config.checkpoint_digest, (str, type(None))):
        raise TypeError(f"`checkpoint_digest` must be a text, got {config.checkpoint_digest!r}: {RESTORE}")
    bases = config.singular_bases
    if bases is not None and not (isinstance(bases, dict) and all(isinstance(text, str) for text in bases.values())):
        raise TypeError(f"`singular_bases` must hold a text for each module, got {bases!r}: {RESTORE}")
    if config.base_fingerprint is not None:
        refuse_malformed(config.base_fingerprint)
