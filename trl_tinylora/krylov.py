"""
Leading singular vectors of a large matrix: float64, little memory, and a residual that is computed.

Thick-restart block Lanczos (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000) on the Gram matrix of the smaller side,
`A^T A` with A taken as tall, with every vector orthogonalised twice against the whole basis. The weight is read a few
rows at a time, and only those are turned into float64. Vectors stand in rows, since products with a row-major matrix
are several times faster that way.

Suffixes: P and Q are the rows and columns of the weight as it lies in memory, S and L its shorter and longer side, N
the vectors of the basis, K those of a block, R those that are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch


# Shares of the weight's own bytes. With blocks and results they make less than 5% at rank 2, where the smallest basis
# is no more than its share: with a longer side of 3584 in bfloat16, of 1792 in float32.
PIECE_SHARE, SMALLEST_PIECE, LARGEST_PIECE = 0.02, 2**15, 2**22
BASIS_SHARE, LARGEST_BASIS = 0.016, 96
# With fewer vectors in the basis, or for each one of a block, a restart throws away what then has to be found again.
SMALLEST_BASIS, BASIS_FOR_BLOCK = 14, 5
# Products with the Gram matrix. A random matrix, which has the flattest spectrum that occurs, takes about a hundred.
MAX_PRODUCTS = 1000
# A vector of which the basis leaves no more than this, over the largest, was in its span: the rest is rounding.
NOTHING = 1e-14


class Triplets(NamedTuple):
    """
    The leading singular triplets of a weight.

    Args:
        left_RO (`torch.Tensor`): U^T, orthonormal rows, shape `(r, out_features)`, dtype float64.
        sigma (`torch.Tensor`): S and the next singular value, shape `(r + 1,)`, dtype float64.
        right_RI (`torch.Tensor`): V^T, orthonormal rows, shape `(r, in_features)`, dtype float64.
        residual (`float`): The largest of `||W v - s u||` and `||W^T u - s v||` over the largest singular value,
            computed from these very vectors.
    """

    left_RO: torch.Tensor
    sigma: torch.Tensor
    right_RI: torch.Tensor
    residual: float


@torch.no_grad()
def leading_triplets(weight_OI: torch.Tensor, rank: int, tolerance: float) -> Optional[Triplets]:
    """
    Returns the leading singular triplets of a weight, or None where they are not found within [`MAX_PRODUCTS`].

    A singular vector is right to the tolerance over its gap: the distance from its singular value to the nearest other
    one, over the largest. (The first-order bound; it is about half of that when the values are near the largest.)

    Args:
        weight_OI (`torch.Tensor`): Finite entries, shape `(out_features, in_features)`, any float dtype.
        rank (`int`): Number of triplets, at most a fifth of either dimension.
        tolerance (`float`): Bound on the residual of [`Triplets`], at least 1e-8.

    Returns:
        [`Triplets`] on the weight's device, or `None`.
    """
    # A transposed view is read along the rows of what it is a view of.
    is_turned = weight_OI.stride(0) < weight_OI.stride(1)
    pieces = Pieces(weight_OI.T if is_turned else weight_OI, rank)
    generator = torch.Generator().manual_seed(0)
    found = _leading_eigenvectors(pieces, rank, tolerance / 2, generator)
    if found is None:
        return None
    short_RS, sigma = found
    long_RL = pieces.to_long(short_RS)
    sigma[:rank] = torch.linalg.vector_norm(long_RL, dim=1).cpu()
    largest = sigma[0].item()
    overlap_RR = _orthonormalise(long_RL, 0, largest, generator)
    # W V is the triangle times U: what is not on its diagonal, or not the singular value there, is the residual.
    one_side = torch.linalg.vector_norm(overlap_RR - sigma[:rank].diag(), dim=1)
    other_side = pieces.to_short(long_RL).sub_(short_RS * sigma[:rank, None].to(short_RS.device))
    residual = max(one_side.max().item(), torch.linalg.vector_norm(other_side, dim=1).max().item())
    residual = residual / largest if largest > 0 else residual
    if not residual <= tolerance:
        return None
    left_RO, right_RI = (short_RS, long_RL) if pieces.is_wide != is_turned else (long_RL, short_RS)
    return Triplets(left_RO, sigma * 2.0**-pieces.exponent, right_RI, residual)


class Pieces:
    """
    A weight that is read a few rows at a time, in float64.

    Args:
        matrix_PQ (`torch.Tensor`): The weight or its transpose, so that rows are contiguous.
        width (`int`): Number of vectors that it will be multiplied by.
    """

    def __init__(self, matrix_PQ: torch.Tensor, width: int):
        self.matrix_PQ = matrix_PQ
        rows, columns = matrix_PQ.shape
        self.is_wide = rows < columns
        self.bytes = matrix_PQ.numel() * matrix_PQ.element_size()
        # Of a wide matrix a product with the longer side stands between the two of the Gram matrix.
        between = 8 * max(width, 2) * columns if self.is_wide else 0
        size = min(max(PIECE_SHARE * self.bytes - between, SMALLEST_PIECE), LARGEST_PIECE)
        self.step = min(max(int(size) // (8 * columns), 1), rows)
        self.buffer = torch.empty(self.step, columns, dtype=torch.float64, device=matrix_PQ.device)
        # Powers of two round nothing. Only float64 has entries whose squares float64 does not have.
        self.exponent = 0
        if matrix_PQ.dtype == torch.float64:
            largest = max(piece.abs_().max().item() for _, piece in self)
            self.exponent = min(max(-math.frexp(largest)[1], -1000), 1000)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(self.matrix_PQ), self.step):
            part = self.matrix_PQ[start : start + self.step]
            piece = self.buffer[: len(part)].copy_(part)
            if self.exponent:
                piece.mul_(2.0**self.exponent)
            yield slice(start, start + len(part)), piece

    @property
    def short(self) -> int:
        """The smaller dimension."""
        return min(self.matrix_PQ.shape)

    def gram(self, block_KS: torch.Tensor) -> torch.Tensor:
        """Returns a block times the Gram matrix of the shorter side.

        Args:
            block_KS (`torch.Tensor`): Vectors in rows, dtype float64.

        Returns:
            `torch.Tensor` of the same shape.
        """
        if self.is_wide:
            return self.to_short(self.to_long(block_KS))
        product_KS = torch.zeros_like(block_KS)
        for _, piece in self:
            product_KS.addmm_(block_KS @ piece.T, piece)
        return product_KS

    def to_long(self, block_KS: torch.Tensor) -> torch.Tensor:
        """Returns what the matrix makes of vectors of its shorter side.

        Args:
            block_KS (`torch.Tensor`): Vectors in rows, dtype float64.

        Returns:
            `torch.Tensor` of as many vectors of the longer side.
        """
        return self._down(block_KS) if self.is_wide else self._along(block_KS)

    def to_short(self, block_KL: torch.Tensor) -> torch.Tensor:
        """Returns what the matrix makes of vectors of its longer side.

        Args:
            block_KL (`torch.Tensor`): Vectors in rows, dtype float64.

        Returns:
            `torch.Tensor` of as many vectors of the shorter side.
        """
        return self._along(block_KL) if self.is_wide else self._down(block_KL)

    def _down(self, block_KP: torch.Tensor) -> torch.Tensor:
        product_KQ = block_KP.new_zeros(len(block_KP), self.matrix_PQ.shape[1])
        for rows, piece in self:
            product_KQ.addmm_(block_KP[:, rows], piece)
        return product_KQ

    def _along(self, block_KQ: torch.Tensor) -> torch.Tensor:
        product_KP = block_KQ.new_empty(len(block_KQ), self.matrix_PQ.shape[0])
        for rows, piece in self:
            product_KP[:, rows] = block_KQ @ piece.T
        return product_KP


def _leading_eigenvectors(
    pieces: Pieces, rank: int, tolerance: float, generator: torch.Generator
) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
    # Fewer vectors in a block than are wanted would not find all of those that share a singular value, and a single
    # one could not tell that two do.
    width = max(rank, 2)
    budget = int(BASIS_SHARE * pieces.bytes) // (8 * pieces.short)
    size = max(min(budget, LARGEST_BASIS), SMALLEST_BASIS, BASIS_FOR_BLOCK * width)
    device = pieces.buffer.device
    basis_NS = torch.empty(size, pieces.short, dtype=torch.float64, device=device)
    # G Q = Q T + (the last block) (the last rows of T): T has a row for each vector of the basis, and a column for
    # each but those of the last block.
    projected = torch.zeros(size, size, dtype=torch.float64)
    basis_NS[:width] = torch.randn(width, pieces.short, generator=generator, dtype=torch.float64)
    _orthonormalise(basis_NS[:width], 0, 1.0, generator)
    done, largest = 0, 0.0
    for _ in range(MAX_PRODUCTS):
        end = done + 2 * width
        basis_NS[done + width : end] = pieces.gram(basis_NS[done : done + width])
        largest = max(largest, torch.linalg.vector_norm(basis_NS[done + width : end], dim=1).max().item())
        projected[:end, done : done + width] = _orthonormalise(basis_NS[:end], done + width, largest, generator).T
        done += width
        inner = projected[:done, :done]
        theta, turn = torch.linalg.eigh((inner + inner.T) / 2)
        theta, turn = theta.flip(0), turn.flip(1)
        residual = torch.linalg.vector_norm(projected[done:end, :done] @ turn[:, :rank], dim=0)
        sigma = theta[: rank + 1].clamp_min(0).sqrt()
        # As ||A^T u - s v||: the Gram matrix's over the singular value.
        if (residual <= tolerance * sigma[0] * sigma[:rank].clamp_min(tolerance * sigma[0])).all():
            return turn[:, :rank].T.to(device) @ basis_NS[:done], sigma
        if end + width > size:
            kept = max(done // 2, rank)
            _turn(basis_NS[:done], turn[:, :kept].T.to(device))
            basis_NS[kept : kept + width] = basis_NS[done:end].clone()
            coupling = projected[done:end, :done] @ turn[:, :kept]
            projected.zero_()
            projected[:kept, :kept] = theta[:kept].diag()
            projected[kept : kept + width, :kept] = coupling
            done = kept
    return None


def _turn(basis_NS: torch.Tensor, turn_RN: torch.Tensor) -> None:
    # In place, a few columns at a time: a second basis would cost as much as the first.
    for columns in basis_NS.split(256, dim=1):
        columns[: len(turn_RN)] = turn_RN @ columns


def _orthonormalise(vectors_NS: torch.Tensor, first: int, largest: float, generator: torch.Generator) -> torch.Tensor:
    """
    Makes the vectors from `first` on orthonormal, to each other and to those before, in place.

    Returns, on the CPU, the triangle that makes the former ones of the new ones. What lies in the span of the others is
    replaced by a random vector, of which it has nothing.
    """
    count = len(vectors_NS)
    triangle = vectors_NS.new_zeros(count - first, count)
    for index in range(first, count):
        vector_S, before_NS, parts = vectors_NS[index], vectors_NS[:index], triangle[index - first]
        # Twice is enough (Giraud, Langou, Rozloznik, 2005).
        for _ in range(2):
            _take_out(vector_S, before_NS, parts)
        length = torch.linalg.vector_norm(vector_S).item()
        if length > NOTHING * largest:
            parts[index] = length
            vector_S /= length
            continue
        vector_S.copy_(torch.randn(len(vector_S), generator=generator, dtype=torch.float64))
        for _ in range(2):
            _take_out(vector_S, before_NS, torch.zeros_like(parts))
        vector_S /= torch.linalg.vector_norm(vector_S)
    return triangle.cpu()


def _take_out(vector_S: torch.Tensor, before_NS: torch.Tensor, parts: torch.Tensor) -> None:
    found = before_NS @ vector_S
    vector_S.addmv_(before_NS.T, found, alpha=-1)
    parts[: len(found)] += found
