"""Reading a data set's rows from a file, a folder or the Hub, each checked, with its number in every complaint."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .benchmarks import published_as


if TYPE_CHECKING:
    from datasets import Dataset


def read_rows(
    dataset_name: str,
    split: str,
    config: str | None,
    limit: int | None,
    check: Callable[[dict], dict[str, str] | None],
) -> "Dataset":
    """Checked rows, with the columns that all of them have; the other arguments and errors are a task's `load_rows`'.

    Args:
        check (`Callable`): From a row as it was read to the texts to keep; `None` for a row without a gold answer,
            which is left out with a warning; raises `ValueError` for what is no row.
    """
    from datasets import Dataset

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(dataset_name)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    if path.suffix in {".jsonl", ".json"} or path.is_absolute() or dataset_name.startswith("."):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist (dataset_name={dataset_name!r}, split={split!r})")
        rows, source = _read_json(path), str(path)
    else:
        rows, source = _load_published(dataset_name, config, split), f"{dataset_name} ({split})"
    checked = {number: _checked(check, row, f"{source}, row {number}") for number, row in enumerate(rows, start=1)}
    blank = [str(number) for number, row in checked.items() if row is None]
    if blank:
        warnings.warn(
            f"{source}: {len(blank)} of {len(checked)} rows have no gold answer and are left out: rows "
            f"{', '.join(blank[:10])}{', ...' if len(blank) > 10 else ''}"
        )
    kept = [row for row in checked.values() if row is not None][:limit]
    if not kept:
        raise ValueError(f"{source} holds no rows")
    return Dataset.from_list(kept).select_columns([name for name in kept[0] if all(name in row for row in kept)])


def text_in(row: dict, column: str) -> str:
    """The text in a column; `ValueError` if there is none."""
    if not isinstance(row.get(column), str):
        raise ValueError(f"no text in column {[column]}; it has {sorted(row)}")
    return row[column]


def id_of(row: dict) -> dict[str, str]:
    """The row's own name as the column `id`, if it has one."""
    names = [row[column] for column in ("id", "unique_id") if isinstance(row.get(column), (str, int))]
    return {"id": str(names[0])} if names else {}


def demonstration_of(row: dict) -> dict[str, str]:
    """What SFT learns instead of the task's own text, as the column `demonstration`, if the row has one."""
    return {"demonstration": row["demonstration"]} if isinstance(row.get("demonstration"), str) else {}


def _load_published(dataset_name: str, config: str | None, split: str) -> "Dataset":
    """Rows of a data set on the Hub; of those in the table, the configuration need not be named."""
    from datasets import load_dataset

    known = published_as(dataset_name)
    if known is None:
        return load_dataset(dataset_name, config, split=split)
    config = config or known.config
    if known.has_folders:
        rows = load_dataset(dataset_name, data_dir=config, split=split)
    else:
        rows = load_dataset(dataset_name, config, split=split)
    if (split, config) == (known.split, known.config) and len(rows) != known.n_problems:
        warnings.warn(
            f"{dataset_name} ({split}) has {len(rows)} rows, not {known.n_problems}: it is no longer the data set that "
            "published numbers are for"
        )
    return rows


def _read_json(path: Path) -> list[Any]:
    """Rows of a JSON array or of JSON lines; blank lines are an error, so that row and line numbers agree."""
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty: it must hold a row at least")
    if path.suffix == ".json":
        rows = _parsed(content, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a JSON array of rows, got {type(rows).__name__}")
        return rows
    lines = content.removesuffix(b"\n").split(b"\n")
    return [_parsed(line, f"{path}, row {number}") for number, line in enumerate(lines, start=1)]


def _parsed(content: bytes, place: str) -> Any:
    """What JSON in UTF-8 says; a complaint names the place."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {content[error.start]:#04x} at position {error.start}"
        raise ValueError(f"{place}: not UTF-8 ({byte}): convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error


def _checked(check: Callable[[dict], dict[str, str] | None], row: Any, place: str) -> dict[str, str] | None:
    """What is kept of a row; a complaint names the row."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: must be an object with a question and an answer, got {row!r}")
    try:
        return check(row)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
