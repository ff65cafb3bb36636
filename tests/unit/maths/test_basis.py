"""The few numbers that settle a basis of singular vectors: what they bring back, and from what. CPU, seconds."""

import base64

import pytest
import torch

from trl_tinylora.maths.basis import encode_basis, has_basis, recover_basis
from trl_tinylora.maths.svd import truncated_svd


NAME = "model.layers.3.mlp.up_proj"
TOLERANCE = 0.02


def weight_of(sigma, rows=60, columns=90, seed=0):
    """A weight with these singular values, and many small ones."""
    sigma = torch.tensor([*sigma, *torch.linspace(0.4, 0.1, 30).tolist()], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(sigma), generator=generator, dtype=torch.float64)).Q
    return (left * sigma @ right.T).float()


def rotated(weight, rank, extra, seed=1):
    """The factors of leading vectors that were turned among `extra` more of them, as another machine might."""
    wider = truncated_svd(weight.double(), rank + extra).right_RI
    drawn = torch.randn(len(wider), len(wider), generator=torch.Generator().manual_seed(seed)).double()
    turn = torch.linalg.qr(drawn).Q
    right_RI = turn[:rank] @ wider
    return (weight.double() @ right_RI.T).float(), right_RI.float()


def numbers_in(encoded):
    return len(base64.b64decode(encoded)) // 4


def distance(ours, theirs):
    return torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)


@pytest.mark.parametrize(
    ("sigma", "extra"),
    [([4.0, 4.0, 1.0], 0), ([4.0, 2.0, 2.0, 1.0], 1), ([4.0, 4.0, 4.0 * (1 - 1e-5), 4.0, 1.0], 2)],
)
def test_a_basis_is_found_again_from_a_few_numbers(sigma, extra):
    weight = weight_of(sigma)
    left_OR, right_RI = rotated(weight, 2, extra)

    encoded = encode_basis(NAME, weight, right_RI, TOLERANCE)

    assert numbers_in(encoded) == 2 * 4 * (2 + extra) < right_RI.numel()
    # Another dtype turns the computed vectors by much, and what the numbers bring back by what rounding makes.
    for found, tolerance in ((weight, 1e-5), (weight.bfloat16(), 2e-2)):
        again = recover_basis(NAME, found, 2, encoded)
        assert distance(again[1], right_RI) <= tolerance
        assert distance(again[0], left_OR) <= tolerance
    # Control: what this machine computes is another basis.
    assert distance(truncated_svd(weight, 2).right_RI, right_RI) > 0.1
    assert not has_basis(NAME, truncated_svd(weight, 2).right_RI, encoded)
    assert has_basis(NAME, right_RI, encoded)


def test_numbers_of_another_module_bring_back_another_basis():
    weight = weight_of([4.0, 4.0, 1.0])
    _, right_RI = rotated(weight, 2, 0)
    encoded = encode_basis(NAME, weight, right_RI, TOLERANCE)
    assert distance(recover_basis("another.module", weight, 2, encoded)[1], right_RI) > 0.1


@pytest.mark.parametrize("sigma", [[1.0] * 30, [0.0]], ids=["all singular values equal", "a zero weight"])
def test_where_no_few_vectors_hold_the_basis_all_of_it_is_kept(sigma):
    weight = weight_of(sigma) if sigma[0] else torch.zeros(60, 90)
    right_RI = torch.linalg.qr(torch.randn(90, 2, generator=torch.Generator().manual_seed(2))).Q.T

    encoded = encode_basis(NAME, weight, right_RI, TOLERANCE)

    assert numbers_in(encoded) == right_RI.numel()
    assert torch.equal(recover_basis(NAME, weight, 2, encoded)[1], right_RI)


def test_a_weight_with_few_inputs_keeps_all_of_its_basis():
    weight = weight_of([4.0, 4.0, 1.0], rows=90, columns=40)[:, :7]
    right_RI = truncated_svd(weight, 2).right_RI
    encoded = encode_basis(NAME, weight, right_RI, TOLERANCE)
    assert numbers_in(encoded) == right_RI.numel()
    assert distance(recover_basis(NAME, weight, 2, encoded)[1], right_RI) == 0
