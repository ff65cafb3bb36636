"""
The mathematics of TinyLoRA as pure functions of tensors (Morris et al., arXiv:2602.04118, section 4).

    W' = W + U S (sum_k v_k P_k) V^T

| symbol | name here        | shape                                                |
|--------|------------------|------------------------------------------------------|
| W      | `weight_OI`      | out_features x in_features, frozen                   |
| U S    | `left_OR`        | out_features x r, frozen: S stands on the U side     |
| V^T    | `right_RI`       | r x in_features, frozen                              |
| P      | `projections_KRR`| u x r x r, frozen, its own for each module           |
| v      | `values_GK`      | groups x u, trained                                  |
| R      | `mixing_RR`      | r x r, sum_k v_k P_k                                 |

Suffixes name the dimensions: O out, I in, R rank, K values of a group (the paper's u), G groups, M modules.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from .svd import BASIS_FOR_BLOCK, leading_triplets


# Up to this many rows or columns a full SVD costs less than an iteration.
FULL_SVD_BELOW = 256
# The larger of ||W v - s u|| and ||W^T u - s v|| over the largest singular value, computed and not assumed. A singular
# vector is right to this over its gap, the distance to the nearest other singular value over the largest one: to 1e-4
# where the gap is 1e-3 or more.
RESIDUAL_TOLERANCE = 1e-7
# The same of a computation elsewhere, where products of a few thousand terms may be in float32.
RESIDUAL_ELSEWHERE = 1e-5
# Entries of a weight that are looked at together, at least: pieces have a price of their own.
SMALLEST_PIECE = 2**13
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


def delta_weight(left_OR: torch.Tensor, mixing_RR: torch.Tensor, right_RI: torch.Tensor) -> torch.Tensor:
    """
    Returns what TinyLoRA adds to a weight: `U S R V^T` with `R = sum_k v_k P_k` (arXiv:2602.04118, section 4).

    Args:
        left_OR (`torch.Tensor`): U S, shape `(out_features, r)`.
        mixing_RR (`torch.Tensor`): R, shape `(r, r)`.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`.

    Returns:
        `torch.Tensor` of shape `(out_features, in_features)`.
    """
    return sum_of_outer_products(left_OR @ mixing_RR, right_RI)


def sum_of_outer_products(columns_OR: torch.Tensor, rows_RI: torch.Tensor) -> torch.Tensor:
    """
    Returns `columns @ rows`, the same to the last bit for any choice of rows, number of threads, library and device.

    It is made of elementwise products and sums, each of which IEEE 754 settles: a matrix product may order and fuse
    them in a way of its own, from one call to the next. Its cost grows with r; up to about 16 it is a product's.

    Args:
        columns_OR (`torch.Tensor`): Shape `(out_features, r)`.
        rows_RI (`torch.Tensor`): Shape `(r, in_features)`.

    Returns:
        `torch.Tensor` of shape `(out_features, in_features)`.
    """
    total_OI = columns_OR[:, :1] * rows_RI[0]
    for rank in range(1, len(rows_RI)):
        total_OI += columns_OR[:, rank : rank + 1] * rows_RI[rank]
    return total_OI


def mix(values_GK: torch.Tensor, groups_M: torch.Tensor, projections_MKRR: torch.Tensor) -> torch.Tensor:
    """
    Returns every module's `R = sum_k v_k P_k` in one batched product (arXiv:2602.04118, section 4).

    Args:
        values_GK (`torch.Tensor`): v of each group, shape `(groups, u)`.
        groups_M (`torch.Tensor`): Group of each module, shape `(modules,)`, int64.
        projections_MKRR (`torch.Tensor`): P of each module, shape `(modules, u, r, r)`.

    Returns:
        `torch.Tensor` of shape `(modules, r, r)`.
    """
    return torch.einsum("mk,mkij->mij", values_GK[groups_M], projections_MKRR)


def unmix(grad_MRR: torch.Tensor, groups_M: torch.Tensor, projections_MKRR: torch.Tensor, n_groups: int):
    """
    Returns the gradient of v from the gradients of every module's R: the adjoint of [`mix`].

    `dv_k = sum over the modules of the group of <P_k, dR>`.

    Args:
        grad_MRR (`torch.Tensor`): Gradient of each R, shape `(modules, r, r)`.
        groups_M (`torch.Tensor`): Group of each module, shape `(modules,)`, int64.
        projections_MKRR (`torch.Tensor`): P of each module, shape `(modules, u, r, r)`.
        n_groups (`int`): Number of groups.

    Returns:
        `torch.Tensor` of shape `(groups, u)`.
    """
    grad_MK = torch.einsum("mij,mkij->mk", grad_MRR, projections_MKRR)
    return grad_MK.new_zeros(n_groups, grad_MK.shape[1]).index_add_(0, groups_M, grad_MK)


def frozen_stream(text: str) -> np.random.RandomState:
    """Returns a stream of random numbers that follows from a text, the same on every machine and in years to come.

    It is numpy's `RandomState`, frozen by NEP 19.

    Args:
        text (`str`): Any text.

    Returns:
        `numpy.random.RandomState`
    """
    return np.random.RandomState(np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype="<u4").astype(np.uint32))


def gaussian_projections(name: str, u: int, r: int, seed: int) -> torch.Tensor:
    """
    Returns a module's fixed random matrices P with entries from N(0, 1/r), the same on every machine.

    They depend on the seed and the module's name alone, so that other targets, other adapters and the order of modules
    change nothing, and the first matrices stay the same when `u` grows. The stream is numpy's `RandomState`, frozen by
    NEP 19. The paper states neither the distribution nor whether modules share P; 1/r is PEFT's choice as well.

    Args:
        name (`str`): Name of the module in the base model.
        u (`int`): Number of matrices.
        r (`int`): Rank.
        seed (`int`): `0 <= seed < 2**32`.

    Returns:
        `torch.Tensor` of shape `(u, r, r)`, dtype float32, on the CPU.
    """
    stream = frozen_stream(f"{seed}:{name}")
    return torch.from_numpy((stream.standard_normal((u, r, r)) / np.sqrt(r)).astype(np.float32))


def basis_projections(u: int, r: int) -> torch.Tensor:
    """Returns the first `u` matrices of the standard basis of the r x r matrices, row by row: LoRA-XS at `u = r*r`.

    Args:
        u (`int`): Number of matrices, `1 <= u <= r*r`.
        r (`int`): Rank.

    Returns:
        `torch.Tensor` of shape `(u, r, r)`, dtype float32, on the CPU.
    """
    return torch.eye(r * r)[:u].reshape(u, r, r)


@torch.no_grad()
def truncated_svd(weight_OI: torch.Tensor, rank: int) -> Factors:
    """
    Returns the frozen factors `U S` and `V^T` of a weight's truncated SVD (arXiv:2602.04118, section 4).

    Small matrices are decomposed in full in float64. Large ones by [`~trl_tinylora.maths.svd.leading_triplets`], in the
    end in float64, until the residual is below [`RESIDUAL_TOLERANCE`], with less than 5% of the weight's bytes beside
    it (at rank 2, where the longer side is 3584 or more in bfloat16, 1792 in float32); in full where it does not get
    there.
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
    # Of what is contiguous, or it would be copied; and without a mask as large as the weight.
    if not torch.stack((weight_OI if weight_OI.is_contiguous() else weight_OI.T).aminmax()).isfinite().all():
        bad = sum(int((~torch.isfinite(part)).sum()) for part in in_pieces(weight_OI))
        raise ValueError(
            f"{bad} of {weight_OI.numel()} entries are not finite: the weights are damaged, load them again."
        )
    # Where a good part of all vectors is wanted, the full SVD is as good.
    is_small = smallest <= FULL_SVD_BELOW or smallest < BASIS_FOR_BLOCK * rank
    found = None if is_small else leading_triplets(weight_OI, rank, RESIDUAL_TOLERANCE)
    if found is None:
        left_OR, sigma, right_RI = _full_svd(weight_OI, rank)
    else:
        left_OR, sigma, right_RI = found.left_RO.T, found.sigma.to(weight_OI.device), found.right_RI
    sigma_R = sigma[:rank]
    sign_R = left_OR.gather(0, left_OR.abs().argmax(dim=0, keepdim=True)).sign().squeeze(0)
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    return Factors(
        (left_OR * (sign_R * sigma_R)).to(dtype).contiguous(),
        (right_RI * sign_R[:, None]).to(dtype).contiguous(),
        _uncertainty(weight_OI, sigma, rank),
    )


def in_pieces(weight_OI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns views of a few rows of a weight each, so that what is made of one of them is small beside the weight.

    Args:
        weight_OI (`torch.Tensor`): Shape `(out_features, in_features)`.

    Returns:
        `tuple[torch.Tensor, ...]`: Each has about 0.25% of the entries, or as many rows as [`SMALLEST_PIECE`] entries.
    """
    rows, columns = weight_OI.shape
    return weight_OI.split(max(rows // 400, SMALLEST_PIECE // columns, 1))


def relative_error(weight_OI: torch.Tensor, largest: float) -> float:
    """Returns by how much rounding to bfloat16 and another computation change a weight, over its largest singular value.

    Args:
        weight_OI (`torch.Tensor`): Shape `(out_features, in_features)`.
        largest (`float`): Its largest singular value, above 0.

    Returns:
        `float`: Of an entry between two singular vectors.
    """
    squares = sum(
        torch.linalg.vector_norm(part / torch.tensor(largest).to(part), dtype=torch.float64).square()
        for part in in_pieces(weight_OI)
    )
    return BFLOAT16_ROUNDING * (squares.item() / weight_OI.numel()) ** 0.5 + RESIDUAL_ELSEWHERE


def _uncertainty(weight_OI: torch.Tensor, sigma: torch.Tensor, rank: int) -> float:
    # First-order perturbation theory: an error's entry between two singular vectors, over the gap of their values.
    sigma = torch.cat([sigma.double(), sigma.new_zeros(1, dtype=torch.float64)])[: rank + 1]
    if sigma[0] == 0:
        return 1.0
    gap = (-sigma.diff()).min().item() / sigma[0].item()
    return min(relative_error(weight_OI, sigma[0].item()) / gap, 1.0) if gap > 0 else 1.0


def _full_svd(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    left, sigma, right = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
    return left[:, :rank], sigma[: rank + 1], right[:rank]
