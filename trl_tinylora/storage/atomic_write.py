"""Writing a file so that an interruption leaves the former one, never a part of the new one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union


@contextmanager
def written_whole(path: Union[str, os.PathLike]) -> Iterator[Path]:
    """
    Gives a temporary path to write a file to, and moves the file to `path` unless the context ends with an error.

    Args:
        path (`str` or `os.PathLike`): Path of the file; its folder is made where needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that moving it is one step.
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        yield Path(beside) / path.name
        os.replace(Path(beside) / path.name, path)
