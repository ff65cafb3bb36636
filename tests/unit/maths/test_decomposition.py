"""The equation and the frozen projections: literals, statistics and adjoints. CPU, seconds."""

import hashlib

import numpy as np
import pytest
import torch

from trl_tinylora.maths.decomposition import basis_projections, delta_weight, gaussian_projections, mix, unmix


def test_projections_are_these_numbers():
    # From numpy.random.RandomState seeded with the eight little-endian words of the SHA-256 of "seed:name".
    golden = {
        ("model.layers.0.self_attn.q_proj", 2, 2, 0): [
            [[-0.4607491, 1.0184102], [0.8822955, 1.2666569]],
            [[-0.7033923, 0.4119038], [-0.11049842, 1.4924148]],
        ],
        ("model.layers.11.mlp.down_proj", 1, 3, 7): [
            [
                [0.356603, 0.30896193, 0.07882263],
                [0.41699168, -0.55067736, -0.98325497],
                [-0.15812674, -0.6245999, 0.1425064],
            ]
        ],
    }
    for arguments, expected in golden.items():
        # The literals are the shortest that name each float32: equality is exact.
        assert torch.equal(gaussian_projections(*arguments), torch.tensor(expected))


def test_projections_depend_on_the_name_and_the_seed():
    reference = gaussian_projections("layers.0.q", 1, 2, 0)

    assert torch.equal(gaussian_projections("layers.0.q", 1, 2, 0), reference)
    assert not torch.equal(gaussian_projections("layers.1.q", 1, 2, 0), reference)
    assert not torch.equal(gaussian_projections("layers.0.q", 1, 2, 1), reference)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_the_first_projections_stay_when_u_grows(r):
    assert torch.equal(gaussian_projections("layers.0.q", 9, r, 0)[:4], gaussian_projections("layers.0.q", 4, r, 0))


def test_projections_use_all_256_bits_of_the_digest():
    name, seed = "layers.0.q", 5
    words = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest(), dtype="<u4")
    one_word = np.random.RandomState(words[:1].astype(np.uint32)).standard_normal((1, 2, 2)) / np.sqrt(2)

    assert len(words) == 8
    assert not np.allclose(gaussian_projections(name, 1, 2, seed), one_word)


@pytest.mark.parametrize("r", [2, 4])
def test_projections_have_mean_zero_and_variance_one_over_r(r):
    drawn = gaussian_projections("layers.0.q", 4000, r, 0).double()

    # Five standard errors of the mean and of the variance of n independent normal numbers.
    n = drawn.numel()
    assert abs(drawn.mean()) < 5 * (1 / r / n) ** 0.5
    assert abs(drawn.var() * r - 1) < 5 * (2 / n) ** 0.5


def test_the_basis_names_the_entries_row_by_row():
    assert basis_projections(3, 2).tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]]
    assert torch.equal(basis_projections(9, 3).flatten(1), torch.eye(9))


def test_delta_is_the_product_of_the_paper():
    left, mixing, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]]), torch.tensor([[1.0, 0.0, -1.0]])

    assert delta_weight(left, mixing, right).tolist() == [[3, 0, -3], [6, 0, -6]]


def test_mix_sums_each_modules_own_projections_with_its_groups_values():
    values = torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    projections = torch.arange(24.0).reshape(3, 2, 2, 2)

    mixed = mix(values, torch.tensor([1, 0, 1]), projections)

    assert torch.equal(mixed[0], 5 * projections[0, 0] + 7 * projections[0, 1])
    assert torch.equal(mixed[1], 2 * projections[1, 0] + 3 * projections[1, 1])
    assert torch.equal(mixed[2], 5 * projections[2, 0] + 7 * projections[2, 1])


def test_unmix_is_the_adjoint_of_mix():
    generator = torch.Generator().manual_seed(0)
    values, projections, grads = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(3, 4), (7, 4, 2, 2), (7, 2, 2)]
    )
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2])

    forward = (mix(values, groups, projections) * grads).sum()
    backward = (values * unmix(grads, groups, projections, 3)).sum()

    torch.testing.assert_close(forward, backward, rtol=1e-13, atol=0)
    # Negative control: another grouping is not the adjoint.
    assert (values * unmix(grads, groups.flip(0), projections, 3)).sum().sub(forward).abs() > 1e-2
