"""Folders and Hub ids of base models and adapters, refused where they are none before anything is loaded."""

from __future__ import annotations

import os
from typing import Optional


# As transformers and PEFT name them, whose import takes seconds.
MODEL_FILE, ADAPTER_FILE, WEIGHTS_FILE = "config.json", "adapter_config.json", "adapter_model.safetensors"


def refuse_unfit_base(name: str, revision: Optional[str] = None) -> None:
    """
    Refuses what is no base model, at once: nothing is downloaded, and a network that fails is not tried again.

    Args:
        name (`str`): Folder or Hub id.
        revision (`str`, *optional*): Of a Hub id.

    Raises:
        ValueError: If there is none of this name, or it is an adapter, which transformers would load with its base.
    """
    if not os.path.isdir(name):
        _refuse_missing(name, MODEL_FILE, revision)
    elif os.path.isfile(os.path.join(name, ADAPTER_FILE)):
        raise ValueError(f"{name} is an adapter, not a base model. Name the base that its {ADAPTER_FILE} names.")
    elif not os.path.isfile(os.path.join(name, MODEL_FILE)):
        raise ValueError(f"{name} has no {MODEL_FILE}: it is no model. Name the folder or the Hub id of a base model.")


def refuse_unfit_adapter(name: str) -> None:
    """
    Refuses what is no adapter, at once: nothing is downloaded, and a network that fails is not tried again.

    Args:
        name (`str`): Folder or Hub id.

    Raises:
        ValueError: If there is no adapter of this name.
    """
    if not os.path.isdir(name):
        _refuse_missing(name, ADAPTER_FILE, None)
    elif not os.path.isfile(os.path.join(name, ADAPTER_FILE)):
        raise ValueError(f"{name} has no {ADAPTER_FILE}: it is no adapter folder. Name the folder that was saved.")


def _refuse_missing(name: str, file: str, revision: Optional[str]) -> None:
    """Raises `ValueError` where a name is no folder, and neither the cache nor the Hub has the file under it."""
    if os.path.exists(name):
        raise ValueError(f"{name} is a file. Name the folder that it lies in, or a Hub id.")
    # Adapters belong to somebody; some models, as gpt2, do not.
    is_hub_id = name.count("/") == 1 or ("/" not in name and file == MODEL_FILE)
    if not is_hub_id or not name or name.startswith((".", "/", "~")):
        raise ValueError(f"{name!r} is no folder, and no Hub id (owner/name). Look for a mistyped path.")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    try:
        if not isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            # One request: a download would try for half a minute.
            get_hf_file_metadata(hf_hub_url(name, file, revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is no folder, and not to be had from the Hub: {reason}") from error
