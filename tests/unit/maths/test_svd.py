"""The frozen factors against NumPy in float64, or a truth known by construction. CPU, seconds."""

import numpy as np
import pytest
import torch
from benchmarks.harness import peak_bytes

from trl_tinylora.maths import svd
from trl_tinylora.maths.svd import RESIDUAL_TOLERANCE, truncated_svd


def with_spectrum(rows, columns, spectrum, seed=0):
    """A float64 matrix with random singular vectors and these singular values."""
    stream = np.random.RandomState(seed)
    left = np.linalg.qr(stream.standard_normal((rows, len(spectrum))))[0]
    right = np.linalg.qr(stream.standard_normal((columns, len(spectrum))))[0]
    return (left * np.asarray(spectrum)) @ right.T


def numpy_factors(weight, rank):
    """U S and V^T by NumPy's full SVD in float64, the largest entry of each left vector made positive."""
    left, sigma, right = np.linalg.svd(np.asarray(weight, dtype=np.float64), full_matrices=False)
    left, sigma, right = left[:, :rank], sigma[:rank], right[:rank]
    for column in range(rank):
        if left[np.argmax(np.abs(left[:, column])), column] < 0:
            left[:, column] *= -1
            right[column] *= -1
    return left * sigma, right


def assert_singular_pairs(weight, left, right, tolerance):
    """`W V = U S`, `W^T U = V S` and orthonormal V: what a truncated SVD is, where its vectors are not unique."""
    weight, left, right = (np.asarray(array, dtype=np.float64) for array in (weight, left, right))
    sigma = np.linalg.norm(left, axis=0)
    scale = np.linalg.norm(weight, 2)
    assert np.abs(weight @ right.T - left).max() <= tolerance * scale
    assert np.abs(weight.T @ left - right.T * sigma**2).max() <= tolerance * scale**2
    assert np.abs(right @ right.T - np.eye(len(right))).max() <= tolerance
    leading = np.linalg.svd(weight, compute_uv=False)[: len(sigma)]
    assert np.abs(sigma - leading).max() <= tolerance * scale


@pytest.fixture(autouse=True)
def matrices_of_300_rows_count_as_large(monkeypatch):
    monkeypatch.setattr(svd, "FULL_SVD_BELOW", 256 * 256 * 300)


@pytest.fixture
def no_full_svd(monkeypatch):
    def refuse(*args):
        raise AssertionError("the full SVD was computed")

    monkeypatch.setattr(svd, "_full_svd", refuse)


@pytest.fixture
def full_svd_calls(monkeypatch):
    calls = []
    original = svd._full_svd

    def spy(*args):
        calls.append(tuple(args[0].shape))
        return original(*args)

    monkeypatch.setattr(svd, "_full_svd", spy)
    return calls


@pytest.mark.parametrize("shape", [(8, 8), (40, 24), (24, 40), (5, 300), (256, 300)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_small_matrices_are_decomposed_as_numpy_does(shape, rank):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    left, right, _ = truncated_svd(weight, rank)

    expected_left, expected_right = numpy_factors(weight, rank)
    assert left.dtype == right.dtype == torch.float64
    # Two float64 SVDs; vectors are as good as 1e-16 over the relative gap, here above 1e-3.
    np.testing.assert_allclose(left, expected_left, rtol=0, atol=1e-11)
    np.testing.assert_allclose(right, expected_right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(600, 300), (300, 900)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_large_matrices_are_decomposed_as_numpy_does_without_a_full_svd(no_full_svd, shape, rank):
    weight = with_spectrum(*shape, 0.8 ** np.arange(300))

    left, right, _ = truncated_svd(torch.from_numpy(weight).float(), rank)

    expected_left, expected_right = numpy_factors(weight.astype(np.float32), rank)
    assert left.dtype == right.dtype == torch.float32
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    # The residual is at most 1e-7; over the relative gap of 0.2 * 0.8**3 that is 1e-6 in a vector.
    np.testing.assert_allclose(left, expected_left, rtol=0, atol=1e-6)
    np.testing.assert_allclose(right, expected_right, rtol=0, atol=1e-6)
    np.testing.assert_allclose(left.norm(dim=0), 0.8 ** np.arange(rank), rtol=1e-6)


def test_large_float64_matrices_stay_float64(no_full_svd):
    weight = with_spectrum(400, 300, 0.5 ** np.arange(20))

    left, right, _ = truncated_svd(torch.from_numpy(weight), 2)

    assert left.dtype == right.dtype == torch.float64
    assert_singular_pairs(weight, left, right, 1e-5)


FLAT = np.linspace(1, 0.9, 300)
HARD = {
    "repeated at the top": [2.0, 2.0, 1.0, *[0.1] * 50],
    "repeated below the top": [3.0, 2.0, 2.0, 2.0, 1.0],
    "all the same": np.ones(300),
    "nearly the same": FLAT,
    "rank one": [2.0],
    "rank two": [2.0, 1.0],
    "gaps of a thousandth": [1.0, 0.999, 0.998, *np.linspace(0.9, 0.1, 200)],
    "a power law": np.arange(1, 301) ** -0.5,
    "one value far above the rest": [1.0, *1e-6 * np.linspace(1, 0.5, 200)],
    "below what squares of float64 tell apart": [1.0, *1e-12 * np.linspace(1, 0.5, 200)],
    "zero": [0.0],
}


def worst_angle(weight, left, right, smallest_gap=1e-3):
    """The largest angle between our vectors and NumPy's, of those whose relative gap is not smaller."""
    exact_left, sigma, exact_right = np.linalg.svd(np.asarray(weight, dtype=np.float64), full_matrices=False)
    gaps = -np.diff(sigma[: len(right) + 1]) / max(sigma[0], 1e-300)
    worst = 0.0
    for index in range(len(right)):
        if min(gaps[max(index - 1, 0) : index + 1]) < smallest_gap:
            continue
        ours = np.asarray(left[:, index], dtype=np.float64), np.asarray(right[index], dtype=np.float64)
        for vector, exact in zip(ours, (exact_left[:, index], exact_right[index]), strict=True):
            vector = vector / np.linalg.norm(vector)
            worst = max(worst, np.linalg.norm(vector - exact * (exact @ vector)))
    return worst


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(500, 300), (300, 500)])
@pytest.mark.parametrize("spectrum", HARD)
def test_hard_spectra_need_no_full_svd_and_unique_vectors_are_right(no_full_svd, spectrum, shape, dtype):
    weight = torch.from_numpy(with_spectrum(*shape, HARD[spectrum])).to(dtype)

    for rank in (2, 4) if dtype == torch.float64 else (2,):
        left, right, _ = truncated_svd(weight, rank)

        # Rounding to float32 turns a vector by some 3e-8.
        assert worst_angle(weight.double(), left, right) < 1e-4
        assert_singular_pairs(weight.double(), left, right, 3e-7)


@pytest.mark.parametrize("shape", [(600, 300), (300, 600), (512, 3584)])
def test_a_flat_spectrum_takes_some_hundred_products_and_no_full_svd(no_full_svd, monkeypatch, shape):
    # The singular values of a random matrix lie as close together as any weight's do.
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    products, original = [], svd._gram_product
    monkeypatch.setattr(svd, "_gram_product", lambda *args: (products.append(1), original(*args))[1])

    left, right, _ = truncated_svd(weight, 2)

    assert worst_angle(weight, left, right) < 1e-5
    assert len(products) < 150


@pytest.mark.parametrize("shape", [(500, 300), (300, 500)])
@pytest.mark.parametrize("spectrum", HARD)
def test_the_residual_is_that_of_the_vectors_and_below_its_bound(spectrum, shape):
    weight = torch.from_numpy(with_spectrum(*shape, HARD[spectrum]))

    left, sigma, right, residual = svd.leading_triplets(weight, 3)

    largest = max(sigma[0].item(), 1e-300)
    one_side = torch.linalg.vector_norm(weight @ right.T - left * sigma[:3], dim=0) / largest
    other_side = torch.linalg.vector_norm(weight.T @ left - right.T * sigma[:3], dim=0) / largest
    # Apart from the rounding of some hundred terms.
    assert abs(max(one_side.max(), other_side.max()) - residual) < 1e-13
    assert residual <= RESIDUAL_TOLERANCE
    for vectors in (left.T, right):
        assert (vectors @ vectors.T - torch.eye(3)).abs().max() < 1e-13


@pytest.mark.parametrize("shape", [(500, 300), (300, 500)])
def test_a_looser_tolerance_leaves_a_larger_residual(monkeypatch, shape):
    # Negative control: the residual is measured, and it is the tolerance that makes it small.
    weight = torch.from_numpy(with_spectrum(*shape, np.arange(1, 301) ** -0.5))

    monkeypatch.setattr(svd, "RESIDUAL_TOLERANCE", 1e-2)
    assert svd.leading_triplets(weight, 2)[3] > 10 * RESIDUAL_TOLERANCE


@pytest.mark.parametrize("shape", [(600, 300), (300, 600)])
def test_what_does_not_converge_is_decomposed_in_full(full_svd_calls, monkeypatch, shape):
    monkeypatch.setattr(svd, "MAX_PRODUCTS", 1)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    left, right, _ = truncated_svd(weight, 2)

    assert full_svd_calls == [shape]
    assert worst_angle(weight, left, right) < 1e-6


def test_a_residual_above_its_bound_is_not_returned(monkeypatch):
    weight = torch.from_numpy(with_spectrum(400, 300, 0.8 ** np.arange(24)))
    assert svd.leading_triplets(weight, 2) is not None
    original = svd._leading_eigenvectors

    def a_little_off(*args):
        vectors, sigma = original(*args)
        vectors[1] += 1e-6 * vectors.roll(1, 1)[1]
        return vectors, sigma

    monkeypatch.setattr(svd, "_leading_eigenvectors", a_little_off)
    assert svd.leading_triplets(weight, 2) is None


def test_most_of_the_vectors_come_from_the_full_svd(full_svd_calls):
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))

    left, right, _ = truncated_svd(weight, 80)

    assert full_svd_calls == [(300, 300)] and right.shape == (80, 300)


@pytest.mark.parametrize(
    "shape, dtype",
    [((2048, 3584), torch.bfloat16), ((3584, 512), torch.bfloat16), ((1200, 1800), torch.float32)],
)
def test_beside_a_weight_a_fifth_of_its_bytes_is_needed(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    outliers = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    weight = (torch.randn(shape, generator=generator) + outliers).to(dtype)

    assert peak_bytes(lambda: truncated_svd(weight, 2)) < 0.2 * weight.nbytes
    # Negative control: what is counted sees a copy of the whole.
    assert peak_bytes(lambda: weight.float() + 1) >= 4 * weight.numel()


def test_the_uncertainty_is_that_of_the_full_svd():
    for seed, spectrum in enumerate([0.8 ** np.arange(300), np.arange(1, 301) ** -0.5, FLAT, [2.0, 1.0]]):
        weight = torch.from_numpy(with_spectrum(400, 300, spectrum, seed))
        sigma = torch.linalg.svdvals(weight)
        expected = svd._uncertainty(weight.square().mean().sqrt(), sigma, 2)

        assert truncated_svd(weight, 2).uncertainty == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("size", [20, 300])
def test_equal_singular_values_still_give_singular_pairs(size):
    weight = with_spectrum(size, size, np.ones(size))

    left, right, _ = truncated_svd(torch.from_numpy(weight).float(), 2)

    assert_singular_pairs(weight, left, right, 1e-5)


@pytest.mark.parametrize("shape", [(30, 20), (400, 300)])
def test_a_matrix_of_lower_rank_is_reproduced(shape):
    weight = with_spectrum(*shape, [2.0])

    left, right, _ = truncated_svd(torch.from_numpy(weight).float(), 3)

    assert torch.isfinite(left).all() and torch.isfinite(right).all()
    np.testing.assert_allclose(left @ right, weight, rtol=0, atol=1e-6)
    assert left[:, 1:].abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(30, 20), (400, 300)])
def test_a_zero_matrix_has_zero_factors_and_finite_directions(shape):
    left, right, _ = truncated_svd(torch.zeros(shape), 2)

    assert torch.equal(left, torch.zeros(shape[0], 2))
    assert torch.isfinite(right).all()


@pytest.mark.parametrize("shape", [(40, 24), (400, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_decomposed_in_float32(shape, dtype):
    weight = torch.from_numpy(with_spectrum(*shape, 0.7 ** np.arange(24))).to(dtype)

    left, right, _ = truncated_svd(weight, 2)

    assert left.dtype == right.dtype == torch.float32
    from_float32 = truncated_svd(weight.float(), 2)
    assert torch.equal(left, from_float32[0]) and torch.equal(right, from_float32[1])


@pytest.mark.parametrize("shape", [(40, 24), (400, 300)])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_neither_huge_nor_tiny_weights_lose_accuracy(shape, scale):
    weight = with_spectrum(*shape, 0.8 ** np.arange(24))

    left, right, _ = truncated_svd(torch.from_numpy(weight * scale).float(), 2)

    # A residual of squares that overflow or underflow would accept the first guess, or never be content.
    assert_singular_pairs(weight, left.double() / scale, right, 3e-5)


def test_huge_weights_need_no_full_svd(no_full_svd):
    truncated_svd(torch.from_numpy(with_spectrum(400, 300, 0.8 ** np.arange(24)) * 1e30).float(), 2)


@pytest.mark.parametrize("shape", [(40, 24), (400, 300)])
def test_the_largest_entry_of_each_left_vector_is_positive(shape):
    for seed in range(6):
        left, _, _ = truncated_svd(torch.from_numpy(with_spectrum(*shape, 0.7 ** np.arange(8), seed)), 3)

        assert (left.gather(0, left.abs().argmax(dim=0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(40, 24), (400, 300)])
def test_negating_a_weight_leaves_the_left_factor_and_negates_the_right_one(shape):
    weight = torch.from_numpy(with_spectrum(*shape, 0.7 ** np.arange(8)))

    left, right, _ = truncated_svd(weight, 3)
    negated_left, negated_right, _ = truncated_svd(-weight, 3)

    # Without the rule the sign would go to either side; 1e-9 stands for equal in float64 at these gaps.
    np.testing.assert_allclose(negated_left, left, rtol=0, atol=1e-9)
    np.testing.assert_allclose(negated_right, -right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 24), (400, 300)])
def test_factors_are_the_same_bits_each_time_and_no_random_state_moves(shape):
    weight = torch.from_numpy(with_spectrum(*shape, 0.7 ** np.arange(24))).float()
    torch.manual_seed(1)
    first = truncated_svd(weight, 2)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()

    second = truncated_svd(weight, 2)

    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_a_strided_weight_is_decomposed_as_its_copy():
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))

    assert torch.equal(truncated_svd(weight.T, 2)[0], truncated_svd(weight.T.contiguous(), 2)[0])


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_the_weight_does_not_have_is_refused(rank):
    with pytest.raises(
        ValueError, match=rf"rank {rank} is not within 1\.\.5 for a weight of shape \(5, 7\): lower `r`"
    ):
        truncated_svd(torch.ones(5, 7), rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weight = torch.ones(5, 7)
    weight[1, 2] = weight[3, 3] = bad

    with pytest.raises(ValueError, match="2 of 35 entries are not finite: the weights are damaged, load them again"):
        truncated_svd(weight, 2)
