"""
What identifies a base model: a few numbers of each adapted weight, the same in another dtype and not for other weights.

A probe of a weight W is `a^T W b / sqrt(out_features * in_features)`, with random signs a and b that follow from the
module's name. A change E of the weight moves it by about the root mean square entry of E. So, in units of the root mean
square entry of W, rounding to bfloat16 moves a probe by 0.0016, 8-bit weights by 0.01, 4-bit weights by 0.1, other
weights by 1. Singular values would not do: the largest ones hardly feel quantisation.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..maths.decomposition import frozen_stream
from ..maths.svd import BFLOAT16_ROUNDING, in_pieces


# An adapter keeps at least this many numbers, so that the base of one with few modules is identified as well.
FEWEST_NUMBERS = 64
# Of the root mean square over all probes, and of a single one: rounding to bfloat16 makes BFLOAT16_ROUNDING.
TOLERANCE = 2.2 * BFLOAT16_ROUNDING
SINGLE_TOLERANCE = 6 * BFLOAT16_ROUNDING
UNRELATED = 0.3
# The way out where what we wrote is no longer what it was.
RESTORE = "adapter_config.json was altered, copy it again."


class Probe(NamedTuple):
    """Of one adapted weight: `(out_features, in_features)`, the root mean square of its entries, and its probes."""

    shape: tuple[int, int]
    scale: float
    values: tuple[float, ...]


class Measured(NamedTuple):
    """Of one adapted weight, beside its factors: its probe, and its entry in `singular_bases` where it needs one."""

    probe: Probe
    basis: Optional[str]


def probes_needed(modules: int) -> int:
    """Returns how many probes of each module an adapter of this many modules keeps."""
    return math.ceil(FEWEST_NUMBERS / modules)


def take_probe(name: str, weight_OI: torch.Tensor, count: int) -> Probe:
    """Returns probes of one weight; the first ones are the same whatever their number.

    Args:
        name (`str`): Name of the module in the base model.
        weight_OI (`torch.Tensor`): Its weight, shape `(out_features, in_features)`, any float dtype.
        count (`int`): How many; the cost is that of a product with so many columns.
    """
    out_features, in_features = weight_OI.shape
    stream = frozen_stream(f"probe:{name}")
    signs = torch.from_numpy(stream.randint(0, 2, (count, out_features + in_features)).astype(np.float32) * 2 - 1)
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    left_OP, right_IP = signs.T.to(weight_OI.device, dtype).split([out_features, in_features])
    size = weight_OI.numel() ** 0.5
    # A few rows at a time: the whole weight in float32 would be up to two more of it.
    values, square, start = 0.0, 0.0, 0
    for part_OI in in_pieces(weight_OI):
        part_OI = part_OI.to(dtype)
        left_of_part = left_OP[start : start + len(part_OI)]
        values += (left_of_part * (part_OI @ right_IP)).sum(0, dtype=torch.float64)
        square += torch.linalg.vector_norm(part_OI, dtype=torch.float64).square()
        start += len(part_OI)
    return Probe((out_features, in_features), square.sqrt().item() / size, tuple((values / size).tolist()))


def fingerprint(probes: Mapping[str, Probe]) -> dict:
    """
    Returns what an adapter keeps of its base, for `adapter_config.json`.

    Args:
        probes (`Mapping[str, Probe]`): Of each adapted module, by name, in depth order.

    Returns:
        `dict`: `modules`, their number; `names`, a digest of their names and shapes in order; `probes`, base64 of
        float32 numbers, little endian, an equal number for each module.
    """
    listed = "\n".join(f"{name} {probe.shape}" for name, probe in probes.items())
    kept = np.array([probe.values[: probes_needed(len(probes))] for probe in probes.values()], dtype="<f4")
    return {
        "modules": len(probes),
        "names": hashlib.sha256(listed.encode()).hexdigest()[:16],
        "probes": base64.b64encode(kept.tobytes()).decode(),
    }


def refuse_malformed(found: object) -> None:
    """
    Raises where something is no [`fingerprint`].

    Raises:
        ValueError: If it is none; the message says what is missing.
    """
    try:
        modules, names, probes = found["modules"], found["names"], base64.b64decode(found["probes"], validate=True)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"`base_fingerprint` is damaged, {type(error).__name__}: {error}; {RESTORE}") from error
    if not isinstance(names, str) or not isinstance(modules, int) or modules < 1 or len(probes) % (4 * modules):
        raise ValueError(
            f"`base_fingerprint` is damaged: {modules!r} modules, names {names!r}, {len(probes)} bytes; {RESTORE}"
        )


def refuse_another_base(expected: Mapping, probes: Mapping[str, Probe]) -> None:
    """
    Verifies that a base is the one that an adapter was trained on, whatever its dtype.

    Args:
        expected (`Mapping`): The adapter's [`fingerprint`].
        probes (`Mapping[str, Probe]`): Of each module that it would adapt here, by name, in depth order.

    Raises:
        ValueError: If the base differs; the message says in what.
    """
    difference = difference_of_weights(expected, probes)
    if difference is not None:
        raise ValueError(difference)


def difference_of_weights(expected: Mapping, probes: Mapping[str, Probe]) -> Optional[str]:
    """
    Returns by how much the weights of a base differ from those that an adapter was trained on, or None.

    Args:
        expected (`Mapping`): The adapter's [`fingerprint`].
        probes (`Mapping[str, Probe]`): Of each module that it would adapt here, by name, in depth order.

    Raises:
        ValueError: If there are other modules, or of other shapes.
    """
    found, names = fingerprint(probes), list(probes)
    if found["modules"] != expected["modules"]:
        raise ValueError(
            f"it was trained on {expected['modules']} modules, and its configuration matches {found['modules']} here: "
            "a model of another depth, or modules that are missing or were renamed"
        )
    if found["names"] != expected["names"]:
        raise ValueError(
            f"the {len(names)} modules have other names, another order or other shapes than those it was trained on; "
            f"here they run from {names[0]} {probes[names[0]].shape} to {names[-1]} {probes[names[-1]].shape}"
        )
    there = np.frombuffer(base64.b64decode(expected["probes"]), dtype="<f4").reshape(len(names), -1)
    here = np.array([probe.values[: there.shape[1]] for probe in probes.values()])
    scale = np.array([[max(probe.scale, np.finfo(np.float32).tiny)] for probe in probes.values()])
    moved = np.abs(here - there) / scale
    overall, single = float(np.sqrt((moved**2).mean())), moved.max(axis=1)
    if overall <= TOLERANCE and single.max() <= SINGLE_TOLERANCE:
        return None
    other = [name for name, most in zip(names, single, strict=True) if most > SINGLE_TOLERANCE] or list(names)
    kind = "other weights" if overall > UNRELATED else "a quantised, fine-tuned, merged or revised variant of its base"
    return (
        f"the weights of {len(other)} of {len(names)} modules differ, the first {other[0]}: by {overall:.1e} of their "
        f"size overall and {single.max():.1e} at most, where rounding to bfloat16 makes {BFLOAT16_ROUNDING:.1e}. That "
        f"is {kind}"
    )
