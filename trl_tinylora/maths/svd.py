"""
The truncated SVD of a weight: in full where it is small, by block Lanczos where it is large.

Thick-restart block Lanczos (Wu and Simon, SIAM J. Matrix Anal. Appl. 22, 2000) on the Gram matrix `W^T W`, in float64.
The weight is multiplied a few rows at a time, and only those are turned into float64. Vectors stand in rows.

Suffixes: O and I as in `decomposition.py`; P and Q are the rows and columns of the weight as it lies in memory, N the
vectors of the Lanczos basis, B those of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Optional

import torch


# The full SVD's operations grow with the smaller side squared times the larger one. Up to this, and for weights that
# are NARROW, it costs less than Lanczos on the slowest spectrum of a real weight (one core, 27 shapes, 64 to 65,536).
FULL_SVD_BELOW, NARROW = 80_000_000, 256
# The residual over the largest singular value. A singular vector is right to this over its gap, the distance to the
# nearest other singular value over the largest one: to 1e-4 where the gap is 1e-3 or more.
RESIDUAL_TOLERANCE = 1e-7
# Products with the Gram matrix. A random matrix, which has the flattest spectrum that occurs, takes about a hundred.
MAX_PRODUCTS = 1000
# Parts of a weight that are worked on in turn: each is 3% of a float32 weight's bytes once it is float64.
PIECES, SMALLEST_PIECE = 64, 2**15
# The same residual of a computation elsewhere, where products of a few thousand terms may be in float32.
RESIDUAL_ELSEWHERE = 1e-5
# Error of rounding to bfloat16 over the size of the entries, root mean squares: 2**-8 / sqrt(3) over a mean mantissa.
BFLOAT16_ROUNDING = 1.6e-3


class Factors(NamedTuple):
    """
    The frozen factors of a weight, and how far they are determined by it.

    Args:
        left_OR (`torch.Tensor`): U S, shape `(out_features, r)`.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`.
        uncertainty (`float`): About by how much a singular vector turns (in radians, at most 1) between two
            computations of it, one of them from weights rounded to bfloat16: the error over the nearest gap of the
            singular values. Where values coincide, their basis is arbitrary, and this is 1.
    """

    left_OR: torch.Tensor
    right_RI: torch.Tensor
    uncertainty: float


@torch.no_grad()
def truncated_svd(weight_OI: torch.Tensor, rank: int) -> Factors:
    """
    Returns the frozen factors `U S` and `V^T` of a weight's truncated SVD (arXiv:2602.04118, section 4).

    The sign of each pair of singular vectors is such that the entry of largest magnitude in the left one is positive.
    No random state outside is touched.

    Args:
        weight_OI (`torch.Tensor`): Frozen weight, shape `(out_features, in_features)`, any float dtype.
        rank (`int`): Number of singular triplets kept, `1 <= rank <= min(out_features, in_features)`.

    Returns:
        [`Factors`]: dtype float32 (float64 for a float64 weight), on the weight's device.

    Raises:
        ValueError: If the rank exceeds the weight's dimensions or the weight has non-finite entries.
    """
    smallest = min(weight_OI.shape)
    if not 1 <= rank <= smallest:
        raise ValueError(
            f"rank {rank} is not within 1..{smallest} for a weight of shape {tuple(weight_OI.shape)}: lower `r`."
        )
    # A sum tells as much as `isfinite` of every entry, in a third of the time.
    rms = root_mean_square(weight_OI)
    bad = 0 if math.isfinite(rms) else sum(int((~piece.isfinite()).sum()) for piece in in_pieces(weight_OI))
    if bad:
        raise ValueError(
            f"{bad} of {weight_OI.numel()} entries are not finite: the weights are damaged, load them again."
        )
    # Where a good part of all vectors is wanted, the full SVD is as good.
    is_small = smallest * weight_OI.numel() <= FULL_SVD_BELOW or smallest < max(NARROW, 32 * rank)
    found = None if is_small else leading_triplets(weight_OI, rank)
    left_OR, sigma, right_RI = _full_svd(weight_OI, rank) if found is None else found[:3]
    sign_R = left_OR.gather(0, left_OR.abs().argmax(dim=0, keepdim=True)).sign().squeeze(0)
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    return Factors(
        (left_OR * (sign_R * sigma[:rank])).to(dtype).contiguous(),
        (right_RI * sign_R[:, None]).to(dtype).contiguous(),
        _uncertainty(rms, sigma, rank),
    )


@torch.no_grad()
def leading_triplets(
    weight_OI: torch.Tensor, rank: int
) -> Optional[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """
    Returns the leading singular triplets of a weight by block Lanczos, or None where [`MAX_PRODUCTS`] do not find them.

    Args:
        weight_OI (`torch.Tensor`): Finite entries, shape `(out_features, in_features)`, any float dtype.
        rank (`int`): Number of triplets, a small part of either dimension.

    Returns:
        U, S and an estimate of the next singular value, V^T: float64, shapes `(out_features, r)`, `(r + 1,)` and
        `(r, in_features)`; and the residual, at most [`RESIDUAL_TOLERANCE`], computed from these very vectors: the
        largest `||W^T u - s v||` over the largest singular value, where `W v = s u` holds up to rounding.
    """
    # The transpose of a transposed view, so that rows are contiguous.
    is_transposed = weight_OI.stride(0) < weight_OI.stride(1)
    matrix_PQ = weight_OI.T if is_transposed else weight_OI
    found = _leading_eigenvectors(matrix_PQ, rank)
    if found is None:
        return None
    right_RQ, sigma = found
    image_PR = torch.cat([piece @ right_RQ.T for piece in _float64_pieces(matrix_PQ)])
    left_PR, sigma[:rank], rotation_RR = torch.linalg.svd(image_PR, full_matrices=False)
    right_RQ = rotation_RR @ right_RQ
    rows_of_piece = len(in_pieces(matrix_PQ)[0])
    pairs = zip(left_PR.split(rows_of_piece), _float64_pieces(matrix_PQ), strict=True)
    error_RQ = sum(left.T @ piece for left, piece in pairs) - sigma[:rank, None] * right_RQ
    residual = torch.linalg.vector_norm(error_RQ, dim=1).max().item()
    if not residual <= RESIDUAL_TOLERANCE * sigma[0].item():
        return None
    left_OR, right_RI = (right_RQ.T, left_PR.T) if is_transposed else (left_PR, right_RQ)
    return left_OR, sigma, right_RI, residual / max(sigma[0].item(), torch.finfo(torch.float64).tiny)


def in_pieces(weight_OI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns views of a few rows of a weight each, so that what is made of one of them is small beside the weight."""
    rows, columns = weight_OI.shape
    return weight_OI.split(max(rows // PIECES, SMALLEST_PIECE // columns, 1))


def root_mean_square(weight_OI: torch.Tensor) -> float:
    """Returns the root mean square of a weight's entries, summed in float64."""
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in in_pieces(weight_OI)]
    return torch.stack(norms).norm().item() / weight_OI.numel() ** 0.5


def rounding_error(rms: float, largest: float) -> float:
    """Returns about how much rounding to bfloat16 and computing elsewhere change a weight between two singular vectors.

    Args:
        rms (`float`): Root mean square of the weight's entries.
        largest (`float`): Its largest singular value.

    Returns:
        `float`: `|u^T E v|` for a change E, comparable with the distance of two singular values.
    """
    return BFLOAT16_ROUNDING * rms + RESIDUAL_ELSEWHERE * largest


def _leading_eigenvectors(matrix_PQ: torch.Tensor, rank: int) -> Optional[tuple[torch.Tensor, torch.Tensor]]:
    """The leading eigenvectors of the Gram matrix in rows, and roots of one eigenvalue more; None if not found."""
    # A single vector could not tell that two share a singular value. A basis of 96 takes hardly fewer products than 24.
    width, size, tolerance = max(rank, 2), max(24, 6 * rank), RESIDUAL_TOLERANCE / 2
    basis_NQ = matrix_PQ.new_empty(size, matrix_PQ.shape[1], dtype=torch.float64)
    products_NQ = torch.empty_like(basis_NQ)
    generator = torch.Generator().manual_seed(0)
    block_BQ = torch.randn(width, matrix_PQ.shape[1], generator=generator, dtype=torch.float64)
    block_BQ, count = _orthonormal(block_BQ.to(matrix_PQ.device), basis_NQ[:0]), 0
    for _ in range(MAX_PRODUCTS):
        basis_NQ[count : count + width] = block_BQ
        products_NQ[count : count + width] = _gram_product(matrix_PQ, block_BQ)
        count += width
        projected_NN = (basis_NQ[:count] @ products_NQ[:count].T).cpu()
        if not projected_NN.isfinite().all():
            return None
        eigenvalues, vectors = torch.linalg.eigh((projected_NN + projected_NN.T) / 2)
        eigenvalues, rotation_NN = eigenvalues.flip(0).to(basis_NQ.device), vectors.flip(1).T.to(basis_NQ.device)
        ritz_BQ = rotation_NN[:width] @ basis_NQ[:count]
        residual_BQ = rotation_NN[:width] @ products_NQ[:count] - eigenvalues[:width, None] * ritz_BQ
        # Zero is all that is known of a next value before there are as many vectors.
        sigma = torch.nn.functional.pad(eigenvalues, (0, 1))[: rank + 1].clamp_min(0).sqrt()
        # The residual of the Gram matrix is that of the weight times the singular value; both have rounding errors.
        bound_R = tolerance * sigma[0] * sigma[:rank].clamp_min(4 * tolerance * sigma[0])
        if (torch.linalg.vector_norm(residual_BQ[:rank], dim=1) <= bound_R).all():
            return ritz_BQ[:rank], sigma
        if count + width > size:
            # Thick restart: the leading half of the Ritz vectors stays.
            kept = size // 2
            basis_NQ[:kept] = rotation_NN[:kept] @ basis_NQ[:count]
            products_NQ[:kept] = rotation_NN[:kept] @ products_NQ[:count]
            count = kept
        block_BQ = _orthonormal(residual_BQ, basis_NQ[:count])
    return None


def _gram_product(matrix_PQ: torch.Tensor, block_BQ: torch.Tensor) -> torch.Tensor:
    product_BQ = torch.zeros_like(block_BQ)
    for piece in _float64_pieces(matrix_PQ):
        product_BQ += block_BQ @ piece.T @ piece
    return product_BQ


def _float64_pieces(matrix_PQ: torch.Tensor) -> Iterator[torch.Tensor]:
    """The pieces in turn, in one buffer: to allocate memory for each would take as long as to convert it."""
    pieces = in_pieces(matrix_PQ)
    buffer = torch.empty_like(pieces[0], dtype=torch.float64)
    for piece in pieces:
        yield buffer[: len(piece)].copy_(piece)


def _orthonormal(block_BQ: torch.Tensor, basis_NQ: torch.Tensor) -> torch.Tensor:
    """The block, orthonormal and orthogonal to the basis."""
    # Twice is enough for what is new (Giraud, Langou, Rozloznik, 2005); a third time for the arbitrary vectors that QR
    # returns for a block that lies in the span of the basis.
    for _ in range(3):
        block_BQ = torch.linalg.qr((block_BQ - block_BQ @ basis_NQ.T @ basis_NQ).T).Q.T
    return block_BQ


def _uncertainty(rms: float, sigma: torch.Tensor, rank: int) -> float:
    """First-order perturbation theory: an error's entry between two singular vectors over the gap of their values."""
    sigma = torch.nn.functional.pad(sigma, (0, 1))[: rank + 1]
    if sigma[0] == 0:
        return 1.0
    gap = (-sigma.diff()).min().item()
    return min(rounding_error(rms, sigma[0].item()) / gap, 1.0) if gap > 0 else 1.0


def _full_svd(weight_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, sigma, right = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    return left[:, :rank], sigma[: rank + 1], right[:rank]
