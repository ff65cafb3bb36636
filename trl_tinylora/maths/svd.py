"""
Leading singular vectors of a large matrix: float64, little memory, and a residual that is computed.

Thick-restart block Lanczos (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000) on the Gram matrix `A^T A` of one side,
with every vector orthogonalised twice against the whole basis: first in float32, where a product takes half the time,
and from what that finds in float64, which has little left to do. The weight is read a few rows at a time, and only
those are turned into another dtype. Vectors stand in rows, since products with a row-major matrix are several times
faster that way.

Suffixes: P and Q are the rows and columns of the weight as it lies in memory, S and L the side that the Gram matrix is
of and the other one, N the vectors of the basis, K those of a block, R those that are wanted.
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
# With fewer rows than this a wide matrix has its Gram matrix on that side, which takes two readings for a product: a
# basis of the other side would be too large beside the weight.
FEW_ROWS = 2048
# With fewer vectors in the basis, or for each one of a block, a restart throws away what then has to be found again.
SMALLEST_BASIS, BASIS_FOR_BLOCK = 14, 5
# Products with the Gram matrix. A random matrix, which has the flattest spectrum that occurs, takes about a hundred.
MAX_PRODUCTS = 1000
# A vector of which the basis leaves no more than this times the dtype's precision, over the largest, was in its span:
# the rest is rounding.
NOTHING = 45


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
    matrix_PQ = weight_OI.T if is_turned else weight_OI
    generator = torch.Generator().manual_seed(0)
    # What float32 cannot hold, or does not find, is left to float64.
    begun = _leading_eigenvectors(Pieces(matrix_PQ, rank, torch.float32), None, rank, tolerance / 2, generator)
    pieces = Pieces(matrix_PQ, rank, torch.float64)
    found = _leading_eigenvectors(pieces, begun and begun[0], rank, tolerance / 2, generator)
    if found is None:
        return None
    near_RS, sigma = found
    if begun is not None:
        # A few products say little of the next value, and all that they say is that it is no less.
        sigma[rank] = max(sigma[rank].item(), begun[1][rank].item() * 2.0**pieces.exponent)
    far_RL = pieces.across(near_RS)
    sigma[:rank] = torch.linalg.vector_norm(far_RL, dim=1).cpu()
    largest = sigma[0].item()
    overlap_RR = _orthonormalise(far_RL, 0, largest, generator)
    # W V is the triangle times U: what is not on its diagonal, or not the singular value there, is the residual.
    one_side = torch.linalg.vector_norm(overlap_RR - sigma[:rank].diag(), dim=1)
    other_side = pieces.back(far_RL).sub_(near_RS * sigma[:rank, None].to(near_RS.device))
    residual = max(one_side.max().item(), torch.linalg.vector_norm(other_side, dim=1).max().item())
    residual = residual / largest if largest > 0 else residual
    if not residual <= tolerance:
        return None
    left_RO, right_RI = (near_RS, far_RL) if pieces.is_wide != is_turned else (far_RL, near_RS)
    return Triplets(left_RO, sigma * 2.0**-pieces.exponent, right_RI, residual)


class Pieces:
    """
    A weight that is read a few rows at a time, in another dtype.

    Args:
        matrix_PQ (`torch.Tensor`): The weight or its transpose, so that rows are contiguous.
        width (`int`): Number of vectors that it will be multiplied by.
        dtype (`torch.dtype`): What is computed in, float32 or float64.
    """

    def __init__(self, matrix_PQ: torch.Tensor, width: int, dtype: torch.dtype):
        self.matrix_PQ, self.dtype = matrix_PQ, dtype
        rows, columns = matrix_PQ.shape
        self.is_wide = rows < min(columns, FEW_ROWS)
        self.bytes = matrix_PQ.numel() * matrix_PQ.element_size()
        row_bytes = dtype.itemsize * columns
        # Of a wide matrix a product with the longer side stands between the two of the Gram matrix.
        between = max(width, 2) * row_bytes if self.is_wide else 0
        size = min(max(PIECE_SHARE * self.bytes - between, SMALLEST_PIECE), LARGEST_PIECE)
        self.step = min(max(int(size) // row_bytes, 1), rows)
        # What is in the dtype already is read where it lies, unless it has to be scaled.
        self.buffer = None
        if matrix_PQ.dtype != dtype or dtype == torch.float64:
            self.buffer = torch.empty(self.step, columns, dtype=dtype, device=matrix_PQ.device)
        # Powers of two round nothing. Only float64 has entries whose squares float64 does not have.
        self.exponent = 0
        if matrix_PQ.dtype == dtype == torch.float64:
            largest = max(piece.abs_().max().item() for _, piece in self)
            self.exponent = min(max(-math.frexp(largest)[1], -1000), 1000)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(self.matrix_PQ), self.step):
            part = self.matrix_PQ[start : start + self.step]
            piece = part if self.buffer is None else self.buffer[: len(part)].copy_(part)
            if self.exponent:
                piece.mul_(2.0**self.exponent)
            yield slice(start, start + len(part)), piece

    @property
    def side(self) -> int:
        """The dimension that the Gram matrix is of."""
        return self.matrix_PQ.shape[0 if self.is_wide else 1]

    def gram(self, block_KS: torch.Tensor) -> torch.Tensor:
        """Returns a block times the Gram matrix.

        Args:
            block_KS (`torch.Tensor`): Vectors in rows, in the dtype that is computed in.

        Returns:
            `torch.Tensor` of the same shape.
        """
        if self.is_wide:
            return self.back(self.across(block_KS))
        # The fewer digits are lost in the sum, the less is left to float64.
        product_KS = torch.zeros_like(block_KS, dtype=torch.float64)
        for _, piece in self:
            product_KS += block_KS @ piece.T @ piece
        return product_KS.to(block_KS.dtype)

    def across(self, block_KS: torch.Tensor) -> torch.Tensor:
        """Returns what the matrix makes of vectors of the Gram matrix's side.

        Args:
            block_KS (`torch.Tensor`): Vectors in rows, in the dtype that is computed in.

        Returns:
            `torch.Tensor` of as many vectors of the other side.
        """
        return self._down(block_KS) if self.is_wide else self._along(block_KS)

    def back(self, block_KL: torch.Tensor) -> torch.Tensor:
        """Returns what the matrix makes of vectors of the other side.

        Args:
            block_KL (`torch.Tensor`): Vectors in rows, in the dtype that is computed in.

        Returns:
            `torch.Tensor` of as many vectors of the Gram matrix's side.
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
    pieces: Pieces, start_RS: Optional[torch.Tensor], rank: int, tolerance: float, generator: torch.Generator
) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
    # Fewer vectors in a block than are wanted would not find all of those that share a singular value, and a single
    # one could not tell that two do.
    width, kind = max(rank, 2), {"dtype": pieces.dtype, "device": pieces.matrix_PQ.device}
    budget = int(BASIS_SHARE * pieces.bytes) // (pieces.dtype.itemsize * pieces.side)
    size = max(min(budget, LARGEST_BASIS), SMALLEST_BASIS, BASIS_FOR_BLOCK * width)
    basis_NS = torch.empty(size, pieces.side, **kind)
    # G Q = Q T + (the last block) (the last rows of T): T has a row for each vector of the basis, and a column for
    # each but those of the last block.
    projected = torch.zeros(size, size, dtype=torch.float64)
    basis_NS[:width] = torch.randn(width, pieces.side, generator=generator, dtype=torch.float64)
    if start_RS is not None:
        basis_NS[:rank] = start_RS
    _orthonormalise(basis_NS[:width], 0, 1.0, generator)
    precision = torch.finfo(pieces.dtype).eps
    done, largest = 0, 0.0
    for _ in range(MAX_PRODUCTS):
        end = done + 2 * width
        basis_NS[done + width : end] = pieces.gram(basis_NS[done : done + width])
        largest = max(largest, torch.linalg.vector_norm(basis_NS[done + width : end], dim=1).max().item())
        projected[:end, done : done + width] = _orthonormalise(basis_NS[:end], done + width, largest, generator).T
        done += width
        if not projected[:end, :done].isfinite().all():
            return None
        inner = projected[:done, :done]
        theta, turn = torch.linalg.eigh((inner + inner.T) / 2)
        theta, turn = theta.flip(0), turn.flip(1)
        residual = torch.linalg.vector_norm(projected[done:end, :done] @ turn[:, :rank], dim=0)
        # Zero is all that is known of a next value before there are as many vectors.
        sigma = torch.nn.functional.pad(theta, (0, 1))[: rank + 1].clamp_min(0).sqrt()
        # As ||A^T u - s v||: the Gram matrix's over the singular value, which has rounding of its own.
        smallest = max(tolerance, 1000 * precision) * sigma[0]
        if (residual <= tolerance * sigma[0] * sigma[:rank].clamp_min(smallest)).all():
            return turn[:, :rank].T.to(**kind) @ basis_NS[:done], sigma
        if end + width > size:
            kept = max(done // 2, rank)
            _turn(basis_NS[:done], turn[:, :kept].T.to(**kind))
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
    count, nothing = len(vectors_NS), NOTHING * torch.finfo(vectors_NS.dtype).eps * largest
    triangle = vectors_NS.new_zeros(count - first, count)
    for index in range(first, count):
        vector_S, before_NS, parts = vectors_NS[index], vectors_NS[:index], triangle[index - first]
        # Twice is enough (Giraud, Langou, Rozloznik, 2005).
        for _ in range(2):
            _take_out(vector_S, before_NS, parts)
        length = torch.linalg.vector_norm(vector_S).item()
        if length > nothing:
            parts[index] = length
            vector_S /= length
            continue
        vector_S.copy_(torch.randn(len(vector_S), generator=generator, dtype=torch.float64))
        for _ in range(2):
            _take_out(vector_S, before_NS, torch.zeros_like(parts))
        vector_S /= torch.linalg.vector_norm(vector_S)
    return triangle.cpu().double()


def _take_out(vector_S: torch.Tensor, before_NS: torch.Tensor, parts: torch.Tensor) -> None:
    found = before_NS @ vector_S
    vector_S.addmv_(before_NS.T, found, alpha=-1)
    parts[: len(found)] += found
