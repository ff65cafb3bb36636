"""
Singular vectors on disk, so that loading an adapter again, or on another process, costs no second SVD.

A file is named by the content of the weight, the rank and the version of the computation, so that it is never stale.
It is written beside its place and moved there, which is safe between processes: at worst two compute the same.
`TRL_TINYLORA_CACHE` is the folder (by default `trl_tinylora` in `HF_HOME`), or `off`. `TRL_TINYLORA_CACHE_GB` is its
largest size (default 1), kept by deleting what was not used for the longest time.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..maths.decomposition import FULL_SVD_BELOW, Factors, truncated_svd
from .atomic_write import written_whole
from .checkpoint import digest


# Of the computation in decomposition.py: another one must not find the files of this one.
VERSION = 2
SIZE_GB = 1.0
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Integers hashed at a time: a share of the weight's, since what is needed beside it is 16 bytes for each.
_CHUNK_SHARE, _SMALLEST_CHUNK, _LARGEST_CHUNK = 1 / 128, 2**13, 2**16


def cache_folder() -> Path | None:
    """Returns the folder of the cache, or None where it is switched off.

    Returns:
        `pathlib.Path` or `None`
    """
    wanted = os.environ.get("TRL_TINYLORA_CACHE", "")
    if wanted.lower() in ("off", "0", "false", "no"):
        return None
    return Path(wanted) if wanted else Path(HF_HOME) / "trl_tinylora"


def largest_size() -> int:
    """Returns the largest size of the cache in bytes.

    Returns:
        `int`

    Raises:
        ValueError: If `TRL_TINYLORA_CACHE_GB` is no number of gigabytes.
    """
    wanted = os.environ.get("TRL_TINYLORA_CACHE_GB", str(SIZE_GB))
    try:
        size = float(wanted)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise ValueError(f"TRL_TINYLORA_CACHE_GB must be a number of gigabytes, at least 0, got {wanted!r}.")
    return int(size * 1e9)


@torch.no_grad()
def content_key(weight_OI: torch.Tensor) -> str:
    """
    Returns a key of a weight's bits, the same on every device: two sums of them as integers, modulo 2**64.

    The integers are of eight bytes, which several entries make up, or an entry each where a row's bytes leave a rest.
    Each is multiplied by an odd number of its own column and, in the sum over rows, of its row. It tells apart
    weights that differ; it is no protection against somebody who wants two to look alike.

    Args:
        weight_OI (`torch.Tensor`): Any dtype, shape `(out_features, in_features)`.

    Returns:
        `str` of 32 hexadecimal digits.
    """
    rows, columns = weight_OI.shape
    bytes_of_row = columns * weight_OI.element_size()
    integer = torch.int64 if bytes_of_row % 8 == 0 else _INTEGERS[weight_OI.element_size()]
    width = bytes_of_row // integer.itemsize
    sums = torch.zeros(2, dtype=torch.int64, device=weight_OI.device)
    of_columns, of_rows = (_odd_numbers(size).to(weight_OI.device) for size in (width, rows))
    step = int(min(max(rows * width * _CHUNK_SHARE, _SMALLEST_CHUNK), _LARGEST_CHUNK)) // width
    step = min(max(step, 1), rows)
    copy_OI = weight_OI.new_empty(step, columns)
    product = torch.empty(step, width, dtype=torch.int64, device=weight_OI.device)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        # Of a copy, which is contiguous and begins at a multiple of eight bytes.
        bits = copy_OI[:count].copy_(weight_OI[start : start + count]).view(integer)
        if integer == torch.int64:
            # The highest bit times any odd number is itself: signs would cancel out wherever they stand.
            bits ^= torch.bitwise_right_shift(bits, 32, out=product[:count])
        for which in range(2):
            row_sums = torch.mul(bits, of_columns[which], out=product[:count]).sum(1)
            # What the columns added up is mixed before the rows are, so that the two do not factor.
            row_sums = row_sums ^ (row_sums >> 29)
            sums[which] += (row_sums * of_rows[which, start : start + count]).sum()
    described = f"{rows} {columns} {weight_OI.dtype} {sums.tolist()}"
    return hashlib.sha256(described.encode()).hexdigest()[:32]


def cached_svd(weight_OI: torch.Tensor, rank: int) -> Factors:
    """
    Returns [`~trl_tinylora.maths.decomposition.truncated_svd`] of a weight, from disk where it was computed before.

    Weights that are decomposed faster than a file is read are not kept.

    Args:
        weight_OI (`torch.Tensor`): Frozen weight, shape `(out_features, in_features)`, any float dtype.
        rank (`int`): Number of singular triplets.

    Returns:
        [`Factors`]: On the weight's device.

    Raises:
        ValueError: If the rank exceeds the weight's dimensions or the weight has non-finite entries.
    """
    folder = cache_folder()
    if folder is None or min(weight_OI.shape) <= FULL_SVD_BELOW:
        return truncated_svd(weight_OI, rank)
    path = folder / f"v{VERSION}-{content_key(weight_OI)}-r{rank}.safetensors"
    factors = _read(path, weight_OI, rank)
    if factors is None:
        factors = truncated_svd(weight_OI, rank)
        _write(path, factors)
    return factors


def _odd_numbers(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(-(2**62), 2**62, (2, size), generator=generator) * 2 + 1


def _read(path: Path, weight_OI: torch.Tensor, rank: int) -> Factors | None:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("left", "right")}
            described = file.metadata()
        uncertainty, expected = float(described["uncertainty"]), described["digest"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        # Not there, or not whole: computed again, and written over.
        return None
    out_features, in_features = weight_OI.shape
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if shapes != [(out_features, rank), (rank, in_features)] or digest(tensors) != expected:
        return None
    try:
        os.utime(path)
    except OSError:
        # Another process has made room; what was read is right all the same.
        pass
    return Factors(tensors["left"].to(weight_OI.device), tensors["right"].to(weight_OI.device), uncertainty)


def _write(path: Path, factors: Factors) -> None:
    tensors = {"left": factors.left_OR.cpu(), "right": factors.right_RI.cpu()}
    size = largest_size()
    try:
        with written_whole(path) as scratch:
            save_file(tensors, scratch, {"uncertainty": repr(factors.uncertainty), "digest": digest(tensors)})
        _make_room(path.parent, size)
    except OSError:
        # A cache that cannot be written (a full or read-only disk) is no reason to stop.
        pass


def _make_room(folder: Path, size: int) -> None:
    files = []
    for path in folder.glob("v*.safetensors"):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        files.append((found.st_mtime, found.st_size, path))
    total = sum(size_of_file for _, size_of_file, _ in files)
    for _, size_of_file, path in sorted(files):
        if total <= size:
            return
        path.unlink(missing_ok=True)
        total -= size_of_file
