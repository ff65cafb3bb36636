"""What is done to a model before it carries an adapter, and how all of it is undone where something fails."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Optional

import torch
from accelerate.utils import align_module_device
from torch import nn
from tqdm import tqdm

from ..config import TinyLoraConfig
from ..distributed import gathered, is_sharded, same_on_all, whole
from ..maths.basis import encode_basis, encode_certain_basis, has_basis, recover_basis
from ..maths.svd import truncated_svd
from ..storage.checkpoint import MAX_UNCERTAINTY
from ..storage.fingerprint import Measured, probes_needed, take_probe
from .adapted_layer import AdaptedLayer
from .bank import TinyLoraBank
from .weights import Holder, expert_names, holders, is_quantised, matrices, unwrap, weight_of


def compute_factors(
    model: nn.Module, bank: Optional[TinyLoraBank], names: list[str], rank: int
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Measured]]:
    """
    Returns U S and V^T of each module, taken from an adapter of the same rank where there is one.

    They are the same bits whatever the number of torch's threads, of which there are as many as modules at a time.

    Args:
        model (`torch.nn.Module`): The base model.
        bank ([`TinyLoraBank`] or `None`): Its bank, where it has adapters.
        names (`list[str]`): Names of the modules.
        rank (`int`): The rank.

    Returns:
        `tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Measured]]`

    Raises:
        ValueError: If a weight has non-finite entries or is on the meta device; the message names the module.
    """
    places = holders(model, names)
    weights = [getattr(unwrap(model.get_submodule(place.module)), place.parameter) for place in places]
    # Gathering is a collective operation, in the same order on all processes; an accelerator runs one at a time anyway.
    is_independent = all(weight.device.type == "cpu" and not is_sharded(weight) for weight in weights)
    compute = partial(_compute, model, bank, rank, probes_needed(len(names)))
    with _one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        results = (pool.map if is_independent else map)(compute, places)
        bar = tqdm(results, total=len(places), desc="TinyLoRA: singular vectors", delay=3, leave=False)
        found = {name: result for found_there in bar for name, result in found_there.items()}
    return {name: found[name][0] for name in names}, {name: found[name][1] for name in names}


def _compute(
    model: nn.Module, bank: Optional[TinyLoraBank], rank: int, probes: int, place: Holder
) -> dict[str, tuple[tuple[torch.Tensor, torch.Tensor], Measured]]:
    """By matrix: U S and V^T, and what else is measured of it."""
    module = model.get_submodule(place.module)
    found = {}
    for name in place.names:
        known = module.factors((rank, None), name) if isinstance(module, AdaptedLayer) else None
        found[name] = known, None if known is None else bank.measured(name, rank)
    if all(before is not None and len(before.probe.values) >= probes for _, before in found.values()):
        return found
    with _whole_weights(place, module) as weights:
        for name, weight_OI in weights:
            known, before = found[name]
            if before is None:
                *known, uncertainty = truncated_svd(weight_OI, rank)
                basis = None
                if uncertainty > MAX_UNCERTAINTY:
                    basis = encode_basis(name, weight_OI, known[1], MAX_UNCERTAINTY)
                elif is_quantised(unwrap(module)):
                    # Users train on few bits and serve on 16.
                    basis = encode_certain_basis(name, known[1])
            else:
                basis = before.basis
            found[name] = tuple(known), Measured(take_probe(name, weight_OI, probes), basis)
    if is_sharded(getattr(unwrap(module), place.parameter)):
        for factors, _ in found.values():
            same_on_all(factors)
    return found


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """Gives each operation one thread, new Python threads included, and yields how many the caller has set."""
    # A product with a few vectors waits longer for threads that other processes keep from running than it takes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def recover_factors(
    model: nn.Module, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], config: TinyLoraConfig
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns U S and V^T of the modules where a saved adapter used other singular vectors than this machine computes.

    Args:
        model (`torch.nn.Module`): The base model.
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): As [`compute_factors`] returns.
        config ([`TinyLoraConfig`]): The adapter's configuration.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: Empty where there is none.
    """
    recovered = {}
    needed = {
        name: basis
        for name, basis in (config.singular_bases or {}).items()
        if name in factors and not has_basis(name, factors[name][1], basis)
    }
    for place in holders(model, list(needed)):
        module = model.get_submodule(place.module)
        there = {
            name: module.factors((config.r, needed[name]), name) if isinstance(module, AdaptedLayer) else None
            for name in place.names
        }
        if None in there.values():
            with _whole_weights(place, module) as weights:
                there = {
                    name: recover_basis(name, weight_OI, config.r, needed[name])
                    for name, weight_OI in weights
                    if name in needed
                }
            if is_sharded(getattr(unwrap(module), place.parameter)):
                for factors_there in there.values():
                    same_on_all(factors_there)
        recovered |= there
    return recovered


@contextmanager
def _whole_weights(place: Holder, module: nn.Module) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """The matrices in a parameter without adapters, with their names; gathered where the parameter is sharded: one at a
    time is small beside the model."""
    layer, name = unwrap(module), place.names[0]
    # What accelerate has put on the disk or into host memory is read, and dropped again.
    with align_module_device(layer):
        parameter = getattr(layer, place.parameter)
        if parameter.is_meta:
            raise ValueError(
                f"the weight of {name} is on the meta device: it has no values yet. Load the model's weights first "
                "(`from_pretrained` without `device_map='meta'` or `init_empty_weights`; under FSDP with "
                "`fsdp_cpu_ram_efficient_loading: false`, for otherwise only the first process has them)."
            )
        try:
            with gathered([parameter]):
                if isinstance(module, AdaptedLayer):
                    weight = module.unmerged_weight(place.parameter)
                else:
                    weight = weight_of(layer) if place.parameter == "weight" else parameter.data
                names = (
                    place.names if place.parameter == "weight" else expert_names(place.module, layer)[place.parameter]
                )
                yield zip(names, matrices(layer, place.parameter, whole(weight)), strict=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def first_blocks(model: nn.Module, names: list[str]) -> tuple[str, ...]:
    """
    Returns the modules in front of which the gradient sink stands: the first adapted block of each stack.

    That is the first adapted member of a list of blocks (`model.layers.0`); for modules outside of any list the model
    itself, "".

    Args:
        model (`torch.nn.Module`): The base model.
        names (`list[str]`): Names of the adapted modules in depth order.

    Returns:
        `tuple[str, ...]`
    """

    def block_of(name: str) -> str:
        parts = name.split(".")
        for length in range(1, len(parts)):
            block = ".".join(parts[: length + 1])
            is_listed = isinstance(model.get_submodule(block.rpartition(".")[0]), nn.ModuleList)
            # Blocks of several stages stand in a list of lists, of which the outer one is never called.
            if is_listed and not isinstance(model.get_submodule(block), nn.ModuleList):
                return block
        return ""

    first = {}
    for block in map(block_of, names):
        first.setdefault(block.rpartition(".")[0], block)
    return tuple(first.values())


class ModuleTree:
    """
    The modules of a model as they are, to be restored where an injection fails.

    Args:
        model (`torch.nn.Module`): The base model.
    """

    def __init__(self, model: nn.Module):
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Puts every module back in its place, and every parameter's `requires_grad`."""
        for module, children in self._children:
            module._modules.clear()
            module._modules.update(children)
            if isinstance(module, AdaptedLayer):
                module.drop_unused_factors()
        for parameter, requires_grad in self._trained:
            parameter.requires_grad_(requires_grad)
