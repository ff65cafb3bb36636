"""
Merging into a weight, and the way back bit for bit: `W' = W + D` in float32, rounded once, with `D = U S R V^T`.

Rounding loses bits of W which subtracting D does not bring back. There are two ways to keep them:

* [`Kept`] sets the original tensor aside and swaps it back: the fastest, and a copy of the weight while merged;
* [`Listed`] keeps the entries alone where `round(W' - D)` is not W, and subtracts. D is computed again from the factors
  as they were when they were merged, whatever the values have become since.

Both give the same W'. Both go through the weight in chunks of rows that fit into a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Optional

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..distributed import is_partitioned, is_sharded, put, shard_like, standing, whole
from ..maths.decomposition import sum_of_outer_products


# Entries: 1 MiB in float32 in a CPU's cache; on an accelerator, enough to be worth a launch.
CHUNK_ON_CPU = 2**18
CHUNK_ELSEWHERE = 2**22
# Of a GPU's memory, what a copy must leave free to be made without being asked for.
HEADROOM = 1 / 16
WAYS = ("auto", "keep", "sparse")

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Update:
    """
    D of one weight, to be had row by row and always the same to the last bit.

    Args:
        terms (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): For each adapter `U S R`, shape `(rows, r)`, and `V^T`,
            shape `(r, columns)`, of dtype float32 or float64; for a transposed weight `V` and `(U S R)^T`.
    """

    def __init__(self, terms: Sequence[tuple[torch.Tensor, torch.Tensor]]):
        self.terms = list(terms)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of D, which is the weight's."""
        tall, wide = self.terms[0]
        return len(tall), wide.shape[1]

    def to(self, device: torch.device) -> Update:
        """Returns the same D on another device: the same bits.

        Args:
            device (`torch.device`): The device.

        Returns:
            [`Update`]
        """
        return Update([(tall.to(device), wide.to(device)) for tall, wide in self.terms])

    def chunks(self) -> Iterator[slice]:
        """Returns the rows to take at a time.

        Returns:
            `Iterator[slice]`
        """
        n_rows, n_columns = self.shape
        entries = CHUNK_ON_CPU if self.terms[0][0].device.type == "cpu" else CHUNK_ELSEWHERE
        step = max(entries // n_columns, 1)
        return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))

    def rows(self, rows: slice) -> torch.Tensor:
        """Returns some rows of D.

        Args:
            rows (`slice`): Which ones.

        Returns:
            `torch.Tensor` of shape `(rows, columns)`.
        """
        tall, wide = self.terms[0]
        total = sum_of_outer_products(tall[rows], wide)
        for tall, wide in self.terms[1:]:
            total += sum_of_outer_products(tall[rows], wide)
        return total

    def whole(self) -> torch.Tensor:
        """Returns D.

        Returns:
            `torch.Tensor` of the weight's shape.
        """
        found = self.terms[0][0].new_empty(self.shape)
        for rows in self.chunks():
            found[rows] = self.rows(rows)
        return found


class Kept:
    """
    A merge that sets the original tensor aside.

    Args:
        update ([`Update`]): What is merged.
        original (`torch.Tensor`, *optional*): The original tensor, where the weight is merged already.
    """

    def __init__(self, update: Update, original: Optional[torch.Tensor] = None):
        self.update = update
        self._original = original

    def merge(self, weight: nn.Parameter, check: Optional[Callable[[torch.Tensor], None]] = None) -> None:
        """Puts `round(W + D)` in the weight's place; whatever fails before that has changed nothing.

        Args:
            weight (`torch.nn.Parameter`): W, whole or a `DTensor`, on the update's device.
            check (`Callable`, *optional*): Called with what was rounded, to raise where it may not stand.
        """
        if isinstance(weight, DTensor):
            wide = weight.data.to(self.update.terms[0][0].dtype)
            merged = (wide + shard_like(self.update.whole(), wide)).to(weight.dtype)
        else:
            merged = torch.empty_like(weight.data)
            for rows in self.update.chunks():
                merged[rows] = self.update.rows(rows).add_(weight.data[rows])
        if check is not None:
            check(merged)
        self._original = standing(weight)
        put(weight, merged)

    def restore(self, weight: nn.Parameter) -> None:
        """Puts the original back, bit for bit; one that was not merged is left alone.

        Args:
            weight (`torch.nn.Parameter`): As [`merge`] left it, on any device.
        """
        # Partitioned again, a weight of ZeRO-3 has lost what was merged into it: its parts are the original's.
        if self._original is not None and not is_partitioned(weight):
            put(weight, self._original.to(weight.device))
        self._original = None

    def original(self, weight: nn.Parameter) -> torch.Tensor:
        """Returns W.

        Args:
            weight (`torch.nn.Parameter`): As [`merge`] left it.

        Returns:
            `torch.Tensor`
        """
        return self._original


class Listed:
    """
    A merge that keeps the entries alone which subtracting D would not bring back.

    It writes into the weight chunk by chunk. Stopped at any point, in either direction, [`restore`] still finds back.

    Args:
        update ([`Update`]): What is merged.
    """

    def __init__(self, update: Update):
        self.update = update
        # Of each merged chunk its rows, and the places and entries of W that do not come back by themselves.
        self.parts: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
        # Rows that are being written, and what they are in W.
        self._under_way: Optional[tuple[slice, torch.Tensor]] = None

    def merge(self, weight: nn.Parameter, check: Optional[Callable[[torch.Tensor], None]] = None) -> None:
        """Puts `round(W + D)` into the weight; where it fails, [`restore`] is needed.

        Args:
            weight (`torch.nn.Parameter`): W, whole in this process, on the update's device.
            check (`Callable`, *optional*): Called with what was rounded, to raise where it may not stand.
        """
        for rows in self.update.chunks():
            before = weight.data[rows].clone(memory_format=torch.contiguous_format)
            delta = self.update.rows(rows)
            merged = (before + delta).to(weight.dtype)
            if check is not None:
                check(merged)
            back = (merged - delta).to(weight.dtype)
            # As bits, for 0.0 is equal to -0.0.
            bits = _BITS[before.element_size()]
            lost = (back.view(bits) != before.view(bits)).flatten().nonzero().flatten()
            self._under_way = rows, before
            weight.data[rows] = merged
            self.parts.append((rows, lost.int(), before.flatten()[lost]))
            self._under_way = None

    def restore(self, weight: nn.Parameter) -> None:
        """Puts W back, bit for bit, in every chunk that was merged.

        Args:
            weight (`torch.nn.Parameter`): As [`merge`] left it, on any device.
        """
        if self._under_way is not None:
            rows, before = self._under_way
            weight.data[rows] = before
            if self.parts and self.parts[-1][0] == rows:
                self.parts.pop()
            self._under_way = None
        update = self.update.to(weight.device)
        while self.parts:
            rows, back = self._back(weight, update, *self.parts[-1])
            self._under_way = rows, back
            weight.data[rows] = back
            self.parts.pop()
            self._under_way = None

    def original(self, weight: nn.Parameter) -> torch.Tensor:
        """Returns W, and leaves the weight as it is.

        Args:
            weight (`torch.nn.Parameter`): As [`merge`] left it.

        Returns:
            `torch.Tensor`
        """
        found, update = weight.data.clone(), self.update.to(weight.device)
        for part in self.parts:
            rows, back = self._back(weight, update, *part)
            found[rows] = back
        return found

    @staticmethod
    def _back(
        weight: nn.Parameter, update: Update, rows: slice, lost: torch.Tensor, entries: torch.Tensor
    ) -> tuple[slice, torch.Tensor]:
        back = (weight.data[rows] - update.rows(rows)).to(weight.dtype).contiguous()
        back.view(-1)[lost.to(weight.device, torch.int64)] = entries.to(weight.device)
        return rows, back


def way_back(update: Update, weight: nn.Parameter, asked_for: Sequence[str]) -> Kept | Listed:
    """
    Returns a merge of the kind that the adapters ask for.

    Several adapters in one weight have one way back: the one that needs less memory, `"sparse"` before `"keep"` before
    `"auto"`. A weight that ZeRO-3 or FSDP2 spreads over processes is always kept.

    Args:
        update ([`Update`]): What is to be merged.
        weight (`torch.nn.Parameter`): The weight.
        asked_for (`Sequence[str]`): Each adapter's `merge_restore`.

    Returns:
        [`Kept`] or [`Listed`]

    Raises:
        ValueError: If an adapter asks for something else.
    """
    # They may have been changed since the configuration was made.
    for way in asked_for:
        refuse_unknown_way(way)
    if is_sharded(weight):
        return Kept(update)
    if "sparse" in asked_for:
        return Listed(update)
    if "keep" in asked_for or has_room(weight.device, weight.numel() * weight.element_size()):
        return Kept(update)
    return Listed(update)


def refuse_unknown_way(way: str) -> None:
    """Raises where there is no such way back.

    Args:
        way (`str`): An adapter's `merge_restore`.

    Raises:
        ValueError: If it is not one of [`WAYS`].
    """
    if way not in WAYS:
        raise ValueError(f"`merge_restore` must be one of {WAYS}, got {way!r}.")


def has_room(device: torch.device, n_bytes: int) -> bool:
    """
    Returns whether a copy of this size would leave a sixteenth of a GPU's memory free; elsewhere, True.

    What torch has reserved and does not use counts as free.

    Args:
        device (`torch.device`): Where the copy would be.
        n_bytes (`int`): Its size.

    Returns:
        `bool`
    """
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused - n_bytes >= HEADROOM * total


def refuse_not_finite(merged: torch.Tensor, names: Sequence[str]) -> None:
    """Raises where a merge overflows.

    Args:
        merged (`torch.Tensor`): Rows of the merged weight, or a `DTensor` of all of them.
        names (`Sequence[str]`): The adapters.

    Raises:
        ValueError: If an entry is not finite.
    """
    if not whole(torch.isfinite(merged).all()):
        raise ValueError(
            f"merging {', '.join(names)} gives weights that are not finite in {merged.dtype}. Check the adapter's "
            "values with `print(model.state_dict())`, or merge into a model of a wider dtype."
        )
