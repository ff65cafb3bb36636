"""A batch whose rows have adapters of their own: R of every row and module, computed before the pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch

from ..maths.decomposition import mix
from .gradient import columns, without_autocast
from .plan import Plan
from .values import Vectors


class MixedBatch:
    """
    R of every module for each row of a batch, in inference.

    Rows differ in r x r matrices alone, so that adapters with the same factors go through the same products however
    many there are, whatever their groups; a row without an adapter, or with one that leaves a module out, has R = 0.

    Args:
        adapters (`list[Vectors | None]`): The adapter of each row.
    """

    @torch.no_grad()
    def __init__(self, adapters: list[Optional[Vectors]]):
        self.n_rows = len(adapters)
        # For each module, by a plan with the factors that are used: shape (rows, r, r).
        self._mixing_BRR: dict[str, dict[Plan, torch.Tensor]] = {}
        plans = list(dict.fromkeys(vectors.plan for vectors in adapters if vectors is not None))
        together: dict[object, list[Plan]] = {}
        for plan in plans:
            together.setdefault(plan.factors_key, []).append(plan)
        for alike in together.values():
            rank = alike[0].rank
            index = {name: i for i, name in enumerate(dict.fromkeys(name for plan in alike for name in plan.index))}
            parts = [_part(plan, adapters) for plan in alike]
            total_MBRR = parts[0][1].new_zeros(len(index), self.n_rows, rank, rank)
            for plan, (rows, mixing_MBRR) in zip(alike, parts, strict=True):
                modules_M = torch.tensor([index[name] for name in plan.index], device=total_MBRR.device)
                rows_B = torch.tensor(rows, device=total_MBRR.device)
                total_MBRR[modules_M[:, None], rows_B] = mixing_MBRR.to(total_MBRR.device)
            for name, mixing_BRR in zip(index, total_MBRR, strict=True):
                self._mixing_BRR.setdefault(name, {})[alike[0]] = mixing_BRR

    def of(self, module: str, x: torch.Tensor) -> Iterator[tuple[Plan, torch.Tensor]]:
        """Returns R of each row for one module, for each pair of factors that a row of the batch uses.

        Raises:
            ValueError: If the batch has another number of rows.
        """
        if len(x) != self.n_rows:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{self.n_rows} and {len(x)} respectively."
            )
        return iter(self._mixing_BRR.get(module, {}).items())


def mixed_of_rows(x: torch.Tensor, right_RI: torch.Tensor, mixing_BRR: torch.Tensor) -> torch.Tensor:
    """Returns `R V^T x` with an R for each row, a column for each token of all rows: shape `(r, tokens)`."""
    with without_autocast(x):
        hidden_RT = (right_RI @ columns(x)).to(torch.promote_types(x.dtype, mixing_BRR.dtype))
        # The tokens of a row follow one another, whatever stands between the rows and the last dimension.
        mixed_RBT = torch.einsum("bij,jbt->ibt", mixing_BRR.to(hidden_RT), hidden_RT.unflatten(1, (len(x), -1)))
        return mixed_RBT.flatten(1).to(x.dtype)


def _part(plan: Plan, adapters: list[Optional[Vectors]]) -> tuple[list[int], torch.Tensor]:
    """The rows whose adapters follow a plan, and R of each module and row."""
    rows = [row for row, vectors in enumerate(adapters) if vectors is not None and vectors.plan is plan]
    # Each adapter once, however many rows it has.
    users = {vectors: i for i, vectors in enumerate(dict.fromkeys(adapters[row] for row in rows))}
    values_NGK = torch.stack([vectors.values_GK for vectors in users])
    values_NGK = values_NGK.to(torch.promote_types(values_NGK.dtype, torch.float32))
    with torch.autocast(values_NGK.device.type, enabled=False):
        groups_M, projections_MKRR = plan.frozen(values_NGK.device, values_NGK.dtype)
        mixing_MNRR = torch.vmap(mix, in_dims=(0, None, None), out_dims=1)(values_NGK, groups_M, projections_MKRR)
    which = torch.tensor([users[adapters[row]] for row in rows], device=values_NGK.device)
    return rows, mixing_MNRR[:, which]
