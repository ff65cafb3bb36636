"""The file of completions: every one is kept, batch by batch, so that an interruption loses one batch at most.

`completions.jsonl` holds one completion a line; `completions.settings.json` beside it says how they were made.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from records.files import append_lines, changes, digest_of, write_text
from records.provenance import read_provenance


KINDS = ("greedy", "sampled")


class CompletionsFile:
    """
    Completions by kind, problem and sample; those of an interrupted evaluation of the same settings are there already.

    Args:
        path (`str` or `Path`, *optional*): JSONL to keep them in; without one they are kept in memory.
        settings (`dict`): What the completions follow from, as JSON can hold it.
    Raises:
        FileExistsError: If the file holds completions of other settings.
    """

    def __init__(self, path: str | Path | None, settings: dict):
        self.path = None if path is None else Path(path)
        self.by_key = {}
        if self.path is None:
            return
        if self.path.exists():
            _refuse_other_settings(self.path, settings)
            self.by_key = {_key(record): record for record in read_lines(self.path)}
        else:
            made = {"digest": digest_of(settings), "settings": settings, "generated": stamp()}
            write_text(settings_path(self.path), json.dumps(made, indent=2) + "\n")
        self.write()

    def is_done(self, kind: str, problems: Iterable[int], samples: int) -> bool:
        """
        Whether all completions of a batch are there.

        Args:
            kind (`str`): One of [`KINDS`].
            problems (`Iterable[int]`): The batch's problems.
            samples (`int`): Completions a problem.
        Returns:
            `bool`
        """
        return all((kind, problem, sample) in self.by_key for problem in problems for sample in range(samples))

    def append(self, records: Sequence[dict]) -> None:
        """
        Adds a batch, in the file as well before this returns.

        Args:
            records (`Sequence[dict]`): With `kind`, `problem` and `sample`.
        """
        self.by_key |= {_key(record): record for record in records}
        if self.path is not None:
            append_lines(self.path, records)

    def records(self) -> list[dict]:
        """All completions, by kind, problem and sample."""
        return sorted(self.by_key.values(), key=_key)

    def write(self) -> None:
        """Writes the whole file anew, in the order of [`records`]."""
        if self.path is not None:
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records()))


def read_lines(path: Path) -> list[dict]:
    """
    The completions in a file; a last line that an interruption cut is dropped.

    Args:
        path (`Path`): The file.
    Returns:
        `list[dict]`
    Raises:
        ValueError: If another line is no JSON.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    # What follows the last line feed is empty, or the beginning of a line.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}. Delete the file to generate anew") from error
    return records


def read_settings(path: Path) -> dict:
    """
    How a file's completions were made.

    Args:
        path (`Path`): The file of completions.
    Returns:
        `dict`: `digest`, `settings` and `generated` (commit, versions, machine, time).
    Raises:
        FileNotFoundError: If there is nothing beside the file that says so.
    """
    beside = settings_path(path)
    if not beside.is_file():
        raise FileNotFoundError(f"{path} has no {beside.name} beside it, which says how its completions were made")
    return json.loads(beside.read_text(encoding="utf-8"))


def _refuse_other_settings(path: Path, settings: dict) -> None:
    """Raises FileExistsError where a file's completions do not follow from these settings."""
    try:
        made = read_settings(path)
    except FileNotFoundError as error:
        raise FileExistsError(f"{error}: choose another folder, or delete it") from error
    if made["digest"] != digest_of(settings):
        changed = ", ".join(changes(made["settings"], settings))
        raise FileExistsError(
            f"{path} holds completions of other settings, {changed}: choose another folder, or delete it"
        )


def settings_path(path: Path) -> Path:
    """Where the settings of a file of completions stand."""
    return path.with_suffix(".settings.json")


def stamp() -> dict:
    """Commit, versions, machine and time of now."""
    return read_provenance() | {"time": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def _key(record: dict) -> tuple[str, int, int]:
    """Greedy stands before sampled, in the alphabet as well."""
    return record["kind"], record["problem"], record["sample"]
