"""Files that are whole or not there, whatever interrupts their writing."""

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
    Gives a place to write a file to, and moves it to its own place once the context has ended well.

    Args:
        path (`str` or `os.PathLike`): Where the file is to be; its folder is made where needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that moving it is one step.
    with tempfile.TemporaryDirectory(dir=path.parent) as beside:
        yield Path(beside) / path.name
        os.replace(Path(beside) / path.name, path)
