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

import numpy as np
import torch


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
        columns_OR (`torch.Tensor`): Shape `(..., out_features, r)`.
        rows_RI (`torch.Tensor`): Shape `(..., r, in_features)`.

    Returns:
        `torch.Tensor` of shape `(..., out_features, in_features)`.
    """
    total_OI = columns_OR[..., :1] * rows_RI[..., :1, :]
    for rank in range(1, rows_RI.shape[-2]):
        total_OI += columns_OR[..., rank : rank + 1] * rows_RI[..., rank : rank + 1, :]
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
    """
    Returns a stream of random numbers that follows from a text, the same on every machine and in years to come.

        It is numpy's `RandomState`, frozen by NEP 19.
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
