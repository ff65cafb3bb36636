"""
What building costs: the singular vectors of every weight, against the full SVD.

    python recipes/benchmark.py build                # writes results/build.json; ten minutes on two cores

Spectra are those of a real model: the singular values of the weights of layers 0, 15 and 29 of SmolLM2-135M-Instruct
(`data/smollm2_spectra.npz`, by `torch.linalg.svdvals` in float64). For a weight of a Qwen2.5-7B layer they are
interpolated over the relative index, which makes the gaps between the leading ones up to six times smaller: no easy
case. Singular vectors are those of four random Householder reflections on either side. Neither computation takes
advantage of that: one begins with random vectors, the operations of the other depend on the shape alone.

PEFT's side is the very call that its TinyLoRA makes (peft 0.21.2, tuners/tinylora/layer.py):
`torch.linalg.svd(weight.float(), full_matrices=False)`. It is timed once for each shape. A whole model's time is
that of building these three layers together, which is extrapolated to the number of layers.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness import Row, parser_of, peak_bytes, ratio_of, run, seconds
from torch import nn
from tqdm import tqdm

from trl_tinylora.maths.svd import truncated_svd
from trl_tinylora.storage.fingerprint import take_probe
from trl_tinylora.tuner.build import compute_factors


RANK = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DATA = Path(__file__).parent / "data" / "smollm2_spectra.npz"
DEPTHS = (15, 0, 29)
KINDS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
# A singular vector is compared where its relative gap is at least this: it is unique, and the promise is about it.
SMALLEST_GAP = 1e-3
BUSY_LOOP = [sys.executable, "-c", "while True: pass"]


def shapes_of(hidden: int, intermediate: int, key_values: int) -> dict[str, tuple[int, int]]:
    """The seven weights of a layer of Llama or Qwen2."""
    outputs = [hidden, key_values, key_values, hidden, intermediate, intermediate, hidden]
    return {
        kind: (rows, intermediate if kind == KINDS[-1] else hidden) for kind, rows in zip(KINDS, outputs, strict=True)
    }


def with_spectrum(shape: tuple[int, int], sigma: np.ndarray, seed: int = 0) -> torch.Tensor:
    """
    A weight with these singular values, stretched to its smaller side, over the largest one.

    Args:
        shape (`tuple[int, int]`): Rows and columns.
        sigma (`np.ndarray`): Singular values, largest first.
        seed (`int`, *optional*, defaults to 0): Of the singular vectors.
    Returns:
        `torch.Tensor`: float32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    places = [np.linspace(0, 1, count) for count in (min(shape), len(sigma))]
    weight = torch.zeros(shape)
    weight.diagonal().copy_(torch.from_numpy(np.interp(*places, sigma / sigma[0])))
    for _ in range(4):
        left, right = (nn.functional.normalize(torch.randn(size, generator=generator), dim=0) for size in shape)
        weight.addr_(left, left @ weight, alpha=-2)
        weight.addr_(weight @ right, right, alpha=-2)
    return weight


def layer_of(depth: int, shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a layer with SmolLM2's spectra."""
    with np.load(DATA) as spectra:
        return {
            kind: with_spectrum(shape, spectra[f"layers.{depth}.{kind}"]).to(DEVICE, dtype)
            for kind, shape in shapes.items()
        }


def full_svd(weight_OI: torch.Tensor) -> None:
    """What PEFT computes of each weight."""
    torch.linalg.svd(weight_OI.float(), full_matrices=False)


def build_seconds(weights: dict[str, torch.Tensor]) -> float:
    """Seconds to build an adapter's frozen factors, on as many threads as torch has."""
    layers = {name.replace(".", "_"): nn.Linear(1, 1, bias=False) for name in weights}
    for layer, weight in zip(layers.values(), weights.values(), strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return seconds(lambda: compute_factors(nn.ModuleDict(layers), None, list(layers), RANK))


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Keeps cores busy with another process each."""
    processes = [subprocess.Popen(BUSY_LOOP) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_layers(shapes: dict[str, tuple[int, int]], arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """The singular vectors of a large layer's weights, one thread, and of a whole model on all cores."""
    ours, theirs, all_weights = {}, {}, {}
    for depth in tqdm(DEPTHS[: arguments.depths], desc="layers"):
        weights = layer_of(depth, shapes, getattr(torch, arguments.dtype))
        for kind, weight_OI in weights.items():
            if weight_OI.shape not in theirs:
                theirs[weight_OI.shape] = seconds(lambda: full_svd(weight_OI))  # noqa: B023
            ours[f"{depth}.{kind}"] = seconds(lambda: truncated_svd(weight_OI, RANK))  # noqa: B023
            all_weights[f"{depth}.{kind}"] = weight_OI
    torch.set_num_threads(arguments.cores)
    built = build_seconds(all_weights)
    torch.set_num_threads(arguments.threads)
    model = arguments.layers / arguments.depths * built
    ratios = {name: theirs[shapes[name.partition(".")[2]]] / taken for name, taken in ours.items()}
    totals = [
        sum(taken for name, taken in ours.items() if name.startswith(f"{d}.")) for d in DEPTHS[: arguments.depths]
    ]
    their_total = sum(theirs[shape] for shape in shapes.values())
    ratio, spread = ratio_of([their_total] * len(totals), totals)
    slowest = min(ratios, key=ratios.get)
    slowest_shape = shapes[slowest.partition(".")[2]]
    of_layer = f"{arguments.dtype}, hidden size {arguments.hidden}, MLP {arguments.intermediate}"
    rows = [
        Row(
            claim=f"singular vectors of a layer's seven weights, a real model's spectra ({of_layer})",
            ours=statistics.median(totals),
            theirs=their_total,
            whose="PEFT's full SVD",
            unit="s",
            ratio=ratio,
            spread=spread,
            bound="at least 15",
            holds=spread[0] >= 15,
        ),
        Row(
            claim=f"the worst of these {len(ours)} weights: {slowest_shape[0]} x {slowest_shape[1]}",
            ours=ours[slowest],
            theirs=theirs[slowest_shape],
            whose="PEFT's full SVD",
            unit="s",
            ratio=ratios[slowest],
            bound="at least 1",
            holds=ratios[slowest] >= 1,
        ),
        Row(
            claim=f"build a whole model: {arguments.layers} layers, {arguments.cores} threads ({of_layer})",
            ours=model,
            unit="s",
            bound="at most 120 s",
            holds=model <= 120,
        ),
    ]
    # As text, since JSON has no tuples for names.
    return rows, {
        "ours": ours,
        "theirs": {str(tuple(shape)): taken for shape, taken in theirs.items()},
        "built": built,
    }


def measure_small(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """A small real model's weights: against a full SVD that is as exact, and beside processes that keep cores busy."""
    weights = {
        f"{depth}.{kind}": weight_OI
        for depth in DEPTHS[: arguments.depths]
        for kind, weight_OI in layer_of(depth, shapes_of(576, 1536, 192), torch.float32).items()
    }
    ours, theirs = {}, {}
    for name, weight_OI in weights.items():
        # The best of three: these are milliseconds.
        theirs[name] = min(seconds(lambda: full_svd(weight_OI.double())) for _ in range(3))  # noqa: B023
        ours[name] = min(seconds(lambda: truncated_svd(weight_OI, RANK)) for _ in range(3))  # noqa: B023
    alone, beside = [], []
    torch.set_num_threads(arguments.cores)
    for _ in range(3):
        alone.append(build_seconds(weights))
        with busy_cores(arguments.cores):
            beside.append(build_seconds(weights))
    torch.set_num_threads(arguments.threads)
    slowdown, spread = ratio_of(beside, alone)
    ratio = sum(theirs.values()) / sum(ours.values())
    rows = [
        Row(
            claim=f"singular vectors of {len(weights)} weights of SmolLM2-135M's shapes and spectra",
            ours=sum(ours.values()),
            theirs=sum(theirs.values()),
            whose="the full SVD in float64",
            unit="s",
            ratio=ratio,
            bound="at least 1",
            holds=ratio >= 1,
        ),
        Row(
            claim=f"build them beside {arguments.cores} processes that keep {arguments.cores} cores busy",
            ours=statistics.median(beside),
            theirs=statistics.median(alone),
            whose="alone",
            unit="s",
            ratio=slowdown,
            spread=spread,
            bound="at most 3 times as long",
            holds=slowdown <= 3,
        ),
    ]
    return rows, {"ours": ours, "theirs": theirs, "alone": alone, "beside": beside}


def hard_spectra(count: int) -> dict[str, np.ndarray]:
    """Singular values to measure angles on."""
    place = np.arange(count)
    return {
        "power law": (place + 1) ** -0.5,
        "gaps of a thousandth": (1 - 1e-3 * place).clip(0),
        "repeated below the top": np.where(place == 0, 3.0, np.where(place < count // 2, 2.0, 0.0)),
        "rank two": np.where(place < 2, 2.0 - place, 0.0),
        "a millionth below the top": np.where(place == 0, 1.0, 1e-6),
    }


def worst_angle(weight_OI: torch.Tensor) -> float:
    """
    The largest angle in radians between our singular vectors and those of the full SVD in float64.

    Args:
        weight_OI (`torch.Tensor`): The weight.
    Returns:
        `float`: Over vectors whose relative gap is `SMALLEST_GAP` or more.
    """
    left, sigma, right = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    factors = truncated_svd(weight_OI.to(DEVICE), RANK)
    gaps, worst = -sigma.diff() / sigma[0], 0.0
    for index in range(RANK):
        if gaps[max(index - 1, 0) : index + 1].min() < SMALLEST_GAP:
            continue
        for ours, exact in [(factors.left_OR[:, index], left[:, index]), (factors.right_RI[index], right[index])]:
            ours = nn.functional.normalize(ours.cpu().double(), dim=0)
            worst = max(worst, torch.linalg.vector_norm(ours - exact * (exact @ ours)).item())
    return worst


def measure_accuracy(size: int) -> tuple[list[Row], dict]:
    """Angles, for real and for hard spectra, shapes and dtypes."""
    with np.load(DATA) as real:
        spectra = {**hard_spectra(size), **{name: real[name] for name in real if ".15." in name}}
    angles = {}
    for name, sigma in spectra.items():
        for shape in [(size, size * 2), (size * 2, size)]:
            weight_OI = with_spectrum(shape, sigma)
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                angles[f"{name}, {shape[0]}x{shape[1]}, {dtype}"] = worst_angle(weight_OI.to(dtype))
    row = Row(
        claim=f"worst angle of a singular vector with a gap of {SMALLEST_GAP} or more, {len(angles)} weights",
        ours=max(angles.values()),
        bound="at most 1e-4",
        holds=max(angles.values()) <= 1e-4,
    )
    return [row], angles


def measure_memory(shapes: dict[str, tuple[int, int]]) -> tuple[list[Row], dict]:
    """The most bytes beside a weight, over its own."""
    shares, total = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = layer_of(DEPTHS[0], shapes, dtype)
        largest = max(weight_OI.nbytes for weight_OI in weights.values())
        for kind, weight_OI in weights.items():
            peaks = [
                peak_bytes(lambda: truncated_svd(weight_OI, RANK)),  # noqa: B023
                peak_bytes(lambda: take_probe("name", weight_OI, 1)),  # noqa: B023
            ]
            shares[f"{kind}, {dtype}"], total[f"{kind}, {dtype}"] = max(peaks) / weight_OI.nbytes, max(peaks) / largest
    row = Row(
        claim="most bytes beside a layer's weights over those of its largest one, float32 and bfloat16",
        ours=max(total.values()),
        bound="at most 0.25",
        holds=max(total.values()) <= 0.25,
    )
    return [row], shares


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Runs all measurements."""
    shapes = shapes_of(arguments.hidden, arguments.intermediate, arguments.key_values)
    measured = {
        "layers": measure_layers(shapes, arguments),
        "small": measure_small(arguments),
        "accuracy": measure_accuracy(arguments.angles),
        "memory": measure_memory(shapes),
    }
    return [row for rows, _ in measured.values() for row in rows], {
        name: found for name, (_, found) in measured.items()
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = parser_of(__doc__, "build")
    parser.add_argument("--cores", type=int, default=2, help="threads for a whole model, and busy processes beside it")
    parser.add_argument("--hidden", type=int, default=3584, help="hidden size")
    parser.add_argument("--intermediate", type=int, default=18944, help="width of the MLP")
    parser.add_argument("--key_values", type=int, default=512, help="width of the keys and of the values")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    parser.add_argument("--layers", type=int, default=28, help="layers of the whole model")
    parser.add_argument("--depths", type=int, default=3, help="how many of SmolLM2's layers lend their spectra, 1 to 3")
    parser.add_argument("--angles", type=int, default=512, help="smaller side of the weights whose angles are measured")
    run("build", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
