"""
A few numbers that settle which basis of a weight's leading singular vectors an adapter was trained with.

Where singular values nearly coincide, another dtype or machine rotates their vectors, by much more than it changes the
space that they span together with k more of them. So V = Q V_(r+k) with a rotation Q, and V G, the products with seeded
random vectors G, tells Q wherever V_(r+k) can be computed:

    Q = argmin ||Q V_(r+k) G - V G||, made orthonormal          U S = W V

Suffixes as in `decomposition.py`; C counts random vectors.
"""

from __future__ import annotations

import base64

import numpy as np
import torch

from .decomposition import frozen_stream
from .svd import root_mean_square, rounding_error, truncated_svd


# Singular vectors beyond the rank that may be needed. SmolLM2-135M needs 1 at most, random matrices up to 4.
MOST_EXTRA = 6
# Random vectors for each vector of the larger basis: with twice as many as unknowns the fit doubles an error at most.
COLUMNS_PER_VECTOR = 4


def encode_basis(name: str, weight_OI: torch.Tensor, right_RI: torch.Tensor, tolerance: float) -> str:
    """
    Returns what [`recover_basis`] needs to find these singular vectors again.

    Args:
        name (`str`): Name of the module in the base model, the seed of G.
        weight_OI (`torch.Tensor`): Its weight, shape `(out_features, in_features)`, any float dtype.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`.
        tolerance (`float`): By how much rounding may turn V out of the space of the r + k vectors, in radians.

    Returns:
        `str`: Base64 of float32 numbers, little endian: `V G` of shape `(r, C)` with `C = 4 (r + k)`; V itself where no
        k up to [`MOST_EXTRA`] serves or V has no more numbers.
    """
    rank, in_features = right_RI.shape
    smallest = min(weight_OI.shape)
    wanted = min(rank + MOST_EXTRA + 1, smallest)
    sigma = torch.linalg.vector_norm(truncated_svd(weight_OI, wanted).left_OR.double(), dim=0)
    if wanted == smallest:
        sigma = torch.nn.functional.pad(sigma, (0, 1))
    error = rounding_error(root_mean_square(weight_OI), sigma[0].item())
    kept_RC = right_RI.double().cpu()
    for size in range(rank, len(sigma)):
        n_columns = COLUMNS_PER_VECTOR * size
        if n_columns < in_features and error < tolerance * (sigma[rank - 1] - sigma[size]):
            kept_RC = kept_RC @ _random_vectors(name, in_features, n_columns)
            break
    return encode(kept_RC)


def encode_certain_basis(name: str, right_RI: torch.Tensor) -> str:
    """
    Returns what [`recover_basis`] needs where no rounding turns the vectors out of the space that they span.

    Another base, as the full-precision one of a quantised weight, turns them further, and the sign of a pair, which
    follows from the largest entry, is then another one in 1 of 25 pairs (4 bits).

    Args:
        name (`str`): Name of the module in the base model, the seed of G.
        right_RI (`torch.Tensor`): V^T, shape `(r, in_features)`.

    Returns:
        `str`: `V G` of shape `(r, 4 r)`, as of [`encode_basis`].
    """
    rank, in_features = right_RI.shape
    return encode(_products(name, right_RI.double().cpu(), min(COLUMNS_PER_VECTOR * rank, in_features)))


def encode(numbers: torch.Tensor) -> str:
    """Returns base64 of a tensor's numbers as float32, little endian."""
    return base64.b64encode(numbers.cpu().double().numpy().astype("<f4").tobytes()).decode()


def has_basis(name: str, right_RI: torch.Tensor, encoded: str) -> bool:
    """Returns whether singular vectors are the encoded ones, to what float32 gives."""
    stored_RC = _decode(name, encoded, len(right_RI))
    found_RC = _products(name, right_RI.double().cpu(), stored_RC.shape[1])
    return bool(torch.linalg.vector_norm(found_RC - stored_RC) <= 1e-4 * torch.linalg.vector_norm(stored_RC))


def recover_basis(name: str, weight_OI: torch.Tensor, rank: int, encoded: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the factors in the encoded basis: `V = Q V_(r+k)` and `U S = W V`.

    Args:
        name (`str`): Name of the module in the base model.
        weight_OI (`torch.Tensor`): Its weight, shape `(out_features, in_features)`, any float dtype.
        rank (`int`): r.
        encoded (`str`): As [`encode_basis`] returned.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: U S, shape `(out_features, r)`, and V^T, shape `(r, in_features)`, float32
        or wider, on the weight's device.
    """
    stored_RC = _decode(name, encoded, rank)
    dtype, in_features = torch.promote_types(weight_OI.dtype, torch.float32), weight_OI.shape[1]
    if stored_RC.shape[1] == in_features:
        right_RI = stored_RC
    else:
        size = stored_RC.shape[1] // COLUMNS_PER_VECTOR
        wider_NI = truncated_svd(weight_OI, size).right_RI.double().cpu()
        found_NC = _products(name, wider_NI, stored_RC.shape[1])
        left, _, right = torch.linalg.svd(torch.linalg.lstsq(found_NC.T, stored_RC.T).solution.T, full_matrices=False)
        right_RI = left @ right @ wider_NI
    right_RI = right_RI.to(weight_OI.device, dtype)
    return weight_OI.to(dtype) @ right_RI.T, right_RI


def _decode(name: str, encoded: str, rank: int) -> torch.Tensor:
    try:
        numbers = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<f4").astype(np.float64)
        return torch.from_numpy(numbers).reshape(rank, -1)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"`singular_bases` of {name} is damaged ({error}): adapter_config.json was altered, copy it again."
        ) from error


def _products(name: str, right_RI: torch.Tensor, n_columns: int) -> torch.Tensor:
    in_features = right_RI.shape[1]
    return right_RI if n_columns == in_features else right_RI @ _random_vectors(name, in_features, n_columns)


def _random_vectors(name: str, in_features: int, n_columns: int) -> torch.Tensor:
    stream = frozen_stream(f"basis:{name}")
    return torch.from_numpy(stream.standard_normal((n_columns, in_features)).T / in_features**0.5)
