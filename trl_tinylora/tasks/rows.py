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
    """Checked rows, with the columns that all of them have.

    Args:
        dataset_name (`str`): A `.jsonl` or `.json` file, a folder that holds `{split}.jsonl`, or a name on the Hub.
        split (`str`): Split to load; a single file is taken as this split.
        config (`str`, *optional*): The Hub data set's configuration, or its folder where it has folders instead; that
            of [`~trl_tinylora.tasks.benchmarks.BENCHMARKS`] without one.
        limit (`int`, *optional*): Keep the first `limit` rows.
        check (`Callable`): From a row as it was read to the texts to keep; `None` for a row without a gold answer,
            which is left out with a warning; raises `ValueError` for what is no row.
    Returns:
        `datasets.Dataset`: Columns of texts.
    Raises:
        FileNotFoundError: If the file or the split's file does not exist.
        ValueError: If a row cannot be read or is refused, if there is none, or if `limit` is below 1.
    """
    from datasets import Dataset, load_dataset

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(dataset_name)
    if path.is_dir():
        path = path / f"{split}.jsonl"
    is_local = path.suffix in {".jsonl", ".json"} or path.is_absolute() or dataset_name.startswith(".")
    if is_local:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist (dataset_name={dataset_name!r}, split={split!r})")
        rows, source = _read_json(path), str(path)
    else:
        rows, source = _load_published(load_dataset, dataset_name, config, split), f"{dataset_name} ({split})"
    checked = [_checked(check, row, number, source) for number, row in enumerate(rows, start=1)]
    blank = [number for number, row in enumerate(checked, start=1) if row is None]
    if blank:
        warnings.warn(
            f"{source}: {len(blank)} of {len(checked)} rows have no gold answer and are left out: rows "
            f"{', '.join(map(str, blank[:10]))}{', ...' if len(blank) > 10 else ''}"
        )
    kept = [row for row in checked if row is not None][:limit]
    if not kept:
        raise ValueError(f"{source} holds no rows")
    columns = [name for name in kept[0] if all(name in row for row in kept)]
    return Dataset.from_list([{name: row[name] for name in columns} for row in kept])


def text_in(row: dict, column: str) -> str:
    """The text in a column.

    Args:
        row (`dict`): A row.
        column (`str`): Name of the column.
    Returns:
        `str`
    Raises:
        ValueError: If it is missing or no text.
    """
    if not isinstance(row.get(column), str):
        raise ValueError(f"no text in column {[column]}; it has {sorted(row)}")
    return row[column]


def id_of(row: dict) -> dict[str, str]:
    """The row's own name as the column `id`, if it has one.

    Args:
        row (`dict`): A row.
    Returns:
        `dict[str, str]`: Empty, or of the one key "id".
    """
    names = [row[column] for column in ("id", "unique_id") if isinstance(row.get(column), (str, int))]
    return {"id": str(names[0])} if names else {}


def to_prompts(dataset: "Dataset", **columns: Callable[[dict], Any]) -> "Dataset":
    """The rows with nothing but these columns.

    Args:
        dataset (`datasets.Dataset`): Rows of [`read_rows`].
        columns (`Callable`): What makes a column from a row, by the column's name.
    Returns:
        `datasets.Dataset`
    """
    return dataset.map(
        lambda row: {name: make(row) for name, make in columns.items()},
        remove_columns=[name for name in dataset.column_names if name not in columns],
    )


def _load_published(load_dataset, dataset_name, config, split):
    """Rows of a data set on the Hub; of those in the table, the configuration need not be named."""
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
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a JSON array of rows, got {type(rows).__name__}")
        return rows
    rows = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number}: not JSON: {error}") from error
    return rows


def _checked(check, row: Any, number: int, source: str) -> dict[str, str] | None:
    """What is kept of a row; a complaint names the row."""
    if not isinstance(row, dict):
        raise ValueError(f"{source}, row {number}: must be an object with a question and an answer, got {row!r}")
    try:
        return check(row)
    except ValueError as error:
        raise ValueError(f"{source}, row {number}: {error}") from error
