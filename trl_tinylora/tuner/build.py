"""The factors of each adapted module: modules side by side, one thread each, or one after another where they must."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from ..distributed import gathered, is_spread, same_on_all, whole
from ..maths.svd import truncated_svd
from ..storage.fingerprint import Measured, probes_needed, take_probe
from .layer import Linear
from .targets import as_OI, unwrap


# The bank's name in the base model.
BANK = "tinylora_bank"


def compute_factors(
    model: nn.Module, names: list[str], rank: int
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Measured]]:
    """
    Returns U S and V^T of each module, taken from an adapter of the same rank where there is one.

    They are the same bits whatever the number of torch's threads, of which there are as many as modules at a time.

    Args:
        model (`torch.nn.Module`): The base model.
        names (`list[str]`): Names of the modules.
        rank (`int`): The rank.

    Returns:
        `tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Measured]]`

    Raises:
        ValueError: If a weight has non-finite entries or is on the meta device; the message names the module.
    """
    weights = [unwrap(model.get_submodule(name)).weight for name in names]
    # Gathering is a collective operation, in the same order on all processes; an accelerator runs one at a time anyway.
    is_independent = all(weight.device.type == "cpu" and not is_spread(weight) for weight in weights)
    compute = partial(_compute, model, rank, probes_needed(len(names)))
    with _one_thread() as threads, ThreadPoolExecutor(threads) as pool:
        results = (pool.map if is_independent else map)(compute, names)
        bar = tqdm(results, total=len(names), desc="TinyLoRA: singular vectors", delay=3, leave=False)
        found = dict(zip(names, bar, strict=True))
    return {name: factors for name, (factors, _) in found.items()}, {name: other for name, (_, other) in found.items()}


def _compute(model: nn.Module, rank: int, probes: int, name: str) -> tuple[tuple[torch.Tensor, torch.Tensor], Measured]:
    """U S and V^T of one module, and what else is measured of its weight."""
    module = model.get_submodule(name)
    known = module.factors(rank) if isinstance(module, Linear) else None
    before = None if known is None else getattr(model, BANK).measured(name, rank)
    if before is not None and len(before.probe.values) >= probes:
        return known, before
    linear = unwrap(module)
    if linear.weight.is_meta:
        raise ValueError(
            f"the weight of {name} is on the meta device: it has no values yet. Load the model's weights first "
            "(`from_pretrained` without `device_map='meta'` or `init_empty_weights`; under FSDP with "
            "`fsdp_cpu_ram_efficient_loading: false`, for otherwise only the first process has them)."
        )
    must_gather = is_spread(linear.weight)
    try:
        # One weight at a time: what is whole at any moment is small beside the model.
        with gathered([linear.weight]):
            weight = module.unmerged_weight() if isinstance(module, Linear) else linear.weight.data
            weight_OI = as_OI(linear, whole(weight))
            if before is None:
                *factors, uncertainty = truncated_svd(weight_OI, rank)
            else:
                factors, uncertainty = known, before.uncertainty
            measured = Measured(take_probe(name, weight_OI, probes), uncertainty)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if must_gather:
        same_on_all(factors)
    return tuple(factors), measured


@contextmanager
def _one_thread() -> Iterator[int]:
    """Gives each operation one thread, new Python threads included, and yields how many the caller has set."""
    # A product with a few vectors waits longer for threads that other processes keep from running than it takes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
