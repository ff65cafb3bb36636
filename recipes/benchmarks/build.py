"""
What building costs: the singular vectors of every weight, against PEFT's full SVD.

    python recipes/benchmark.py build                # writes results/build.json; half an hour on one core
    python recipes/benchmark.py build --layers 0     # without the whole model

The weights have the shapes of a Qwen2.5-7B layer and a spectrum like that of trained ones: a random matrix, over it a
power law (the i-th singular value as i**-0.5), and above that a few outliers two to five times larger. PEFT's side is
the very call that its TinyLoRA makes (peft 0.21.2, tuners/tinylora/layer.py): `torch.linalg.svd(weight.float(),
full_matrices=False)`. The hardest spectrum, that of a random matrix, is timed as well, and the others on one weight.

Angles are measured against singular vectors that are known because the weight was made of them. The whole model is
built layer by layer, as `inject_adapter` does it, out of one layer's weights that are changed a little from layer to
layer; making them is not counted.
"""

import argparse
import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from benchmarks.harness import Row, in_turns, parser_of, peak_bytes, ratio_of, run, seconds
from tqdm import tqdm

from trl_tinylora.maths import decomposition
from trl_tinylora.maths.decomposition import truncated_svd
from trl_tinylora.storage import cache
from trl_tinylora.storage.fingerprint import take_probe


RANK = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A singular vector is compared where its relative gap is at least this: it is unique, and the promise is about it.
SMALLEST_GAP = 1e-3


def shapes_of(hidden: int, intermediate: int, key_values: int) -> dict[str, tuple[int, int]]:
    """
    The seven weights of a Qwen2 layer.

    Args:
        hidden (`int`): Hidden size.
        intermediate (`int`): Width of the MLP.
        key_values (`int`): Width of the keys and of the values.
    Returns:
        `dict[str, tuple[int, int]]`: `(out_features, in_features)` by name.
    """
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (key_values, hidden),
        "v_proj": (key_values, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


def random_matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """
    Independent normal entries, of which the largest singular value is about 1.

    Args:
        shape (`tuple[int, int]`): Rows and columns.
        seed (`int`): The same gives the same matrix.
    Returns:
        `torch.Tensor`: float32, on the CPU.
    """
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return matrix.div_(shape[0] ** 0.5 + shape[1] ** 0.5)


def known_vectors(shape: tuple[int, int], count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Random orthonormal vectors to make a weight of.

    Args:
        shape (`tuple[int, int]`): Rows and columns of the weight.
        count (`int`): How many.
        seed (`int`): The same gives the same vectors.
    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shapes `(rows, count)` and `(columns, count)`, dtype float64.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(size, count, generator=generator, dtype=torch.float64) for size in shape)
    return tuple(torch.linalg.qr(matrix).Q for matrix in drawn)


def realistic(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """
    A weight with a spectrum like that of trained ones, as the module's docstring says.

    Args:
        shape (`tuple[int, int]`): Rows and columns.
        seed (`int`): The same gives the same weight.
    Returns:
        `torch.Tensor`: float32, on the CPU.
    """
    count = min(64, *shape)
    sigma = torch.arange(1, count + 1) ** -0.5 * 3
    sigma[:3] = sigma[3] * torch.tensor([5.0, 3.0, 2.0])
    left, right = (vectors.float() for vectors in known_vectors(shape, count, seed))
    return random_matrix(shape, seed).addmm_(left * sigma, right.T)


def spectra(count: int) -> dict[str, torch.Tensor]:
    """
    Singular values to measure angles on.

    Args:
        count (`int`): How many a weight has.
    Returns:
        `dict[str, torch.Tensor]`: float64, largest first, by name.
    """
    place = torch.arange(count, dtype=torch.float64)
    law = (place + 1) ** -0.5
    outliers = law.clone()
    outliers[:3] = law[3] * torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    return {
        "power law with outliers": outliers,
        "power law": law,
        "gaps of a thousandth": (1 - 1e-3 * place).clamp_min(0),
        "repeated below the top": torch.tensor([3.0, *[2.0] * (count // 2)], dtype=torch.float64),
        "rank two": torch.tensor([2.0, 1.0], dtype=torch.float64),
        "huge": 1e30 * outliers,
        "tiny": 1e-30 * outliers,
    }


def angle_to_truth(shape: tuple[int, int], sigma: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> float:
    """
    The largest angle in radians between our singular vectors and those that a float64 weight was made of.

    A weight that was rounded has others, by up to the rounding over the gap: those of its full SVD in float64.

    Args:
        shape (`tuple[int, int]`): Rows and columns.
        sigma (`torch.Tensor`): Singular values.
        dtype (`torch.dtype`): Of the weight.
        seed (`int`, *optional*, defaults to 0): Of its singular vectors.
    Returns:
        `float`
    """
    left, right = known_vectors(shape, len(sigma), seed)
    weight = ((left * sigma) @ right.T).to(dtype)
    if dtype != torch.float64:
        left, sigma, right_T = torch.linalg.svd(weight.double(), full_matrices=False)
        right = right_T.T
    factors = truncated_svd(weight.to(DEVICE), RANK)
    sigma = torch.cat([sigma, sigma.new_zeros(1)])
    gaps = (sigma[:-1] - sigma[1:]) / sigma[0]
    worst = 0.0
    for index in range(RANK):
        if gaps[max(index - 1, 0) : index + 1].min() < SMALLEST_GAP:
            continue
        pairs = [(factors.left_OR[:, index], left[:, index]), (factors.right_RI[index], right[:, index])]
        for ours, theirs in pairs:
            ours = ours.cpu().double()
            ours = ours / torch.linalg.vector_norm(ours)
            worst = max(worst, torch.linalg.vector_norm(ours - theirs * (theirs @ ours)).item())
    return worst


@contextmanager
def counted_svds() -> Iterator[list[tuple[int, ...]]]:
    """
    Counts the full SVDs and the iterations that are begun meanwhile.

    Yields:
        `list[tuple[int, ...]]`: The shape of each weight that was decomposed.
    """
    decomposed: list[tuple[int, ...]] = []
    original = cache.truncated_svd

    def counting(weight_OI: torch.Tensor, rank: int):
        decomposed.append(tuple(weight_OI.shape))
        return original(weight_OI, rank)

    cache.truncated_svd = counting
    try:
        yield decomposed
    finally:
        cache.truncated_svd = original


@contextmanager
def full_svds() -> Iterator[list[tuple[int, ...]]]:
    """
    Counts the fallbacks to the full SVD meanwhile.

    Yields:
        `list[tuple[int, ...]]`: The shape of each weight.
    """
    fallen_back: list[tuple[int, ...]] = []
    original = decomposition._full_svd

    def counting(matrix_OI: torch.Tensor, rank: int):
        fallen_back.append(tuple(matrix_OI.shape))
        return original(matrix_OI, rank)

    decomposition._full_svd = counting
    try:
        yield fallen_back
    finally:
        decomposition._full_svd = original


def pefts_svd(weight_OI: torch.Tensor) -> None:
    """
    What PEFT computes of each weight.

    Args:
        weight_OI (`torch.Tensor`): The weight.
    """
    torch.linalg.svd(weight_OI.float(), full_matrices=False)


def measure_layer(arguments: argparse.Namespace, make: Callable, repeats: int) -> dict:
    """
    Seconds for the seven weights of a layer, ours and PEFT's in turns.

    Args:
        arguments (`argparse.Namespace`): Sizes and dtype.
        make (`Callable`): Makes a weight of a shape and a seed.
        repeats (`int`): Rounds; of PEFT's there are none where it is 0, and one of ours.
    Returns:
        `dict`: By weight, the seconds of each round of either side; the full SVDs that ours fell back to.
    """
    measured = {}
    with full_svds() as fallen_back:
        for seed, (name, shape) in enumerate(sizes(arguments).items()):
            weight_OI = make(shape, seed).to(DEVICE, dtype_of(arguments))
            actions = {"ours": lambda: truncated_svd(weight_OI, RANK)}  # noqa: B023
            if repeats:
                actions["peft"] = lambda: pefts_svd(weight_OI)  # noqa: B023
            # Ours once before: the first call of a process loads the linear algebra. PEFT's takes minutes.
            actions["ours"]()
            measured[name] = in_turns(actions, repeats or 1, warmup=0)
    return {"times": measured, "full_svds": fallen_back}


def measure_hard(arguments: argparse.Namespace) -> dict:
    """
    Seconds for hard spectra, of a square weight of the hidden size.

    Args:
        arguments (`argparse.Namespace`): Sizes and dtype.
    Returns:
        `dict`: By spectrum, seconds of ours and of PEFT's full SVD; the full SVDs that ours fell back to.
    """
    shape, measured = (arguments.hidden, arguments.hidden), {}
    left, right = known_vectors(shape, arguments.hidden, 0)
    with full_svds() as fallen_back:
        for name, sigma in tqdm(spectra(arguments.hidden).items(), desc="hard spectra"):
            weight_OI = ((left[:, : len(sigma)] * sigma) @ right[:, : len(sigma)].T).to(DEVICE, dtype_of(arguments))
            measured[name] = {
                "ours": seconds(lambda: truncated_svd(weight_OI, RANK)),  # noqa: B023
                "peft": seconds(lambda: pefts_svd(weight_OI)),  # noqa: B023
            }
    return {"times": measured, "full_svds": fallen_back}


def measure_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """
    The most bytes beside a weight, over its own, for every step of building.

    Args:
        arguments (`argparse.Namespace`): Sizes.
    Returns:
        `dict[str, float]`: By weight, dtype and step.
    """
    shares = {}
    for name, shape in {shape: (name, shape) for name, shape in sizes(arguments).items()}.values():
        for dtype in (torch.float32, torch.bfloat16):
            weight_OI = realistic(shape, 0).to(DEVICE, dtype)
            steps = {
                "singular vectors": lambda: truncated_svd(weight_OI, RANK),  # noqa: B023
                "content key": lambda: cache.content_key(weight_OI),  # noqa: B023
                "fingerprint": lambda: take_probe("name", weight_OI, 1),  # noqa: B023
            }
            for step, action in steps.items():
                shares[f"{name}, {dtype}: {step}"] = peak_bytes(action) / weight_OI.nbytes
    return shares


def measure_model(arguments: argparse.Namespace) -> dict:
    """
    Seconds to build a whole model's adapter, the first time and with the cache.

    Args:
        arguments (`argparse.Namespace`): Sizes, dtype and number of layers.
    Returns:
        `dict`: Seconds of either, and how many weights were decomposed in either.
    """
    parts = {name: realistic(shape, seed) for seed, (name, shape) in enumerate(sizes(arguments).items())}
    found = {"first": 0.0, "again": 0.0, "decomposed_first": 0, "decomposed_again": 0}
    former = os.environ.get("TRL_TINYLORA_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRL_TINYLORA_CACHE"] = folder
        try:
            for layer in tqdm(range(arguments.layers), desc="layers"):
                for name, part_OI in parts.items():
                    # Another weight for each layer, or the cache would know it: a few rows of noise are enough.
                    part_OI[0] += 0.01 * torch.randn(part_OI.shape[1], generator=torch.Generator().manual_seed(layer))
                    weight_OI = part_OI.to(DEVICE, dtype_of(arguments))

                    def build(weight_OI=weight_OI, name=f"model.layers.{layer}.{name}"):
                        cache.cached_svd(weight_OI, RANK)
                        take_probe(name, weight_OI, 1)

                    for which in ("first", "again"):
                        with counted_svds() as decomposed:
                            found[which] += seconds(build)
                        found[f"decomposed_{which}"] += len(decomposed)
        finally:
            os.environ.pop("TRL_TINYLORA_CACHE")
            if former is not None:
                os.environ["TRL_TINYLORA_CACHE"] = former
    return found


def sizes(arguments: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """
    The shapes that were asked for.

    Args:
        arguments (`argparse.Namespace`): The command line's.
    Returns:
        `dict[str, tuple[int, int]]`: By name.
    """
    return shapes_of(arguments.hidden, arguments.intermediate, arguments.key_values)


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    """
    The dtype that was asked for.

    Args:
        arguments (`argparse.Namespace`): The command line's.
    Returns:
        `torch.dtype`
    """
    return getattr(torch, arguments.dtype)


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """
    Runs all measurements.

    Args:
        arguments (`argparse.Namespace`): The command line's.
    Returns:
        `tuple[list[Row], dict]`
    """
    of_layer = f"{arguments.dtype}, hidden size {arguments.hidden}, MLP {arguments.intermediate}"
    layer = measure_layer(arguments, realistic, arguments.repeats)
    ours, theirs = (
        [sum(times[side][turn] for times in layer["times"].values()) for turn in range(arguments.repeats)]
        for side in ("ours", "peft")
    )
    ratio, spread = ratio_of(theirs, ours)
    pefts_seconds = statistics.median(theirs)
    rows = [
        Row(
            claim=f"singular vectors of a layer's seven weights ({of_layer})",
            ours=statistics.median(ours),
            theirs=pefts_seconds,
            whose="PEFT's full SVD",
            unit="s",
            ratio=ratio,
            spread=spread,
            bound="at least 30",
            holds=ratio >= 30 and not layer["full_svds"],
        )
    ]
    flat = measure_layer(arguments, random_matrix, 0)
    flat_seconds = sum(times["ours"][0] for times in flat["times"].values())
    rows.append(
        Row(
            claim=f"the same for random matrices, the flattest spectrum ({of_layer})",
            ours=flat_seconds,
            theirs=pefts_seconds,
            whose="PEFT's full SVD of the weights above",
            unit="s",
            ratio=pefts_seconds / flat_seconds,
            bound="at least 30",
            holds=pefts_seconds >= 30 * flat_seconds and not flat["full_svds"],
        )
    )
    hard = measure_hard(arguments)
    slowest, times = min(hard["times"].items(), key=lambda entry: entry[1]["peft"] / entry[1]["ours"])
    ratio = times["peft"] / times["ours"]
    rows.append(
        Row(
            claim=f"the slowest of {len(hard['times'])} hard spectra, a square weight: {slowest} ({of_layer})",
            ours=times["ours"],
            theirs=times["peft"],
            whose="PEFT's full SVD",
            unit="s",
            ratio=ratio,
            bound="at least 30",
            holds=ratio >= 30 and not hard["full_svds"],
        )
    )
    angles = {}
    for shape in [(arguments.angles, arguments.angles * 2), (arguments.angles * 2, arguments.angles)]:
        for name, sigma in spectra(arguments.angles).items():
            for dtype in ("float64", "float32", "bfloat16"):
                angles[f"{name}, {shape[0]}x{shape[1]}, {dtype}"] = angle_to_truth(shape, sigma, getattr(torch, dtype))
    rows.append(
        Row(
            claim=f"worst angle of a singular vector with a gap of {SMALLEST_GAP} or more, {len(angles)} hard spectra",
            ours=max(angles.values()),
            bound="at most 1e-4",
            holds=max(angles.values()) <= 1e-4,
        )
    )
    shares = measure_memory(arguments)
    rows.append(
        Row(
            claim="most bytes beside a weight over its own, seven weights in float32 and bfloat16",
            ours=max(shares.values()),
            bound="less than 0.05",
            holds=max(shares.values()) < 0.05,
        )
    )
    details = {"layer": layer, "flat": flat, "hard": hard, "angles": angles, "memory": shares}
    gc.collect()
    if arguments.layers:
        model = details["model"] = measure_model(arguments)
        decomposed = model["decomposed_again"]
        rows += [
            Row(
                claim=f"build a whole model: {arguments.layers} layers ({of_layer})",
                ours=model["first"],
                unit="s",
            ),
            Row(
                claim=f"second adapter or reload: {decomposed} weights decomposed, {arguments.layers} layers",
                ours=model["again"],
                theirs=model["first"],
                whose="the first time",
                unit="s",
                ratio=model["first"] / model["again"],
                bound="no SVD",
                holds=decomposed == 0,
            ),
        ]
    return rows, details


def main() -> None:
    """Measures, prints, writes."""
    parser = parser_of(__doc__, "build")
    parser.add_argument("--hidden", type=int, default=3584, help="hidden size")
    parser.add_argument("--intermediate", type=int, default=18944, help="width of the MLP")
    parser.add_argument("--key_values", type=int, default=512, help="width of the keys and of the values")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--layers", type=int, default=28, help="layers of the whole model; 0 leaves it out")
    parser.add_argument("--angles", type=int, default=512, help="smaller side of the weights whose angles are measured")
    parser.add_argument("--repeats", type=int, default=1, help="rounds of PEFT's full SVD, minutes each on one core")
    run("build", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
