"""Files that hold results, and the sections of documents that are generated from them."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from trl_tinylora.storage.atomic_write import written_whole
from trl_tinylora.storage.card import markers, replaced_section


def write_text(path: str | Path, text: str) -> None:
    """
    Writes a file that is whole or absent, never half.

    Args:
        path (`str` or `Path`): Its folder is made where needed.
        text (`str`): The content.
    """
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def append_lines(path: Path, records: Iterable[dict]) -> None:
    """
    Adds records to a file of JSON lines, on the disk before this returns.

    Args:
        path (`Path`): The file, there or not.
        records (`Iterable[dict]`): One a line.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def changes(before: dict, now: dict) -> list[str]:
    """
    What sets two settings apart, a phrase for each key, for an error.

    Args:
        before (`dict`): The one that a file was made with.
        now (`dict`): The other.
    Returns:
        `list[str]`: `name=old (now new)`, by name; empty where they are equal.
    """
    return [
        f"{name}={before.get(name)!r} (now {now.get(name)!r})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def digest_of(settings: object) -> str:
    """
    SHA-256 of something that JSON can hold.

    Args:
        settings (`object`): As JSON can hold it.
    Returns:
        `str`: Hexadecimal.
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def replace_section(document: str, section: str, content: str) -> str:
    """
    A document with the text between two markers renewed; one that is current is returned unchanged.

    Args:
        document (`str`): The text, with `<!-- results:section -->` and `<!-- /results:section -->`.
        section (`str`): Name in the markers.
        content (`str`): What goes between them.
    Returns:
        `str`: The new text.
    Raises:
        ValueError: If a marker is missing.
    """
    name = f"results:{section}"
    renewed = replaced_section(document, name, content)
    if renewed is None:
        opening, closing = markers(name)
        raise ValueError(f"the README lacks the markers {opening} and {closing}, between which the table goes")
    return renewed


def update_section(path: str | Path, section: str, content: str) -> None:
    """
    Renews the text between two markers of a document in place, as [`replace_section`] does.

    Args:
        path (`str` or `Path`): The document.
        section (`str`): Name in the markers.
        content (`str`): What goes between them.
    Raises:
        ValueError: If a marker is missing.
    """
    write_text(path, replace_section(Path(path).read_text(encoding="utf-8"), section, content))
