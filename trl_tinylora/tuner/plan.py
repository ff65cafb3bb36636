"""What adapters have in common that differ in their values alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from ..config import TinyLoraConfig
from ..maths.decomposition import basis_projections, gaussian_projections
from ..maths.tying import assign_groups, count_groups
from ..storage.checkpoint import owner_of, settings_of
from ..storage.fingerprint import Measured, Probe, fingerprint


# Of the matrices P. LoRA-XS with r = 64 on 200 modules (u = 4096) takes 13 GB where they are Gaussian.
MOST_BYTES = 2**34


class Plan:
    """
    Modules, rank, groups and projections of adapters that differ in their values alone.

    A model keeps one plan for all such adapters, so that another one costs its values and a few references to it.

    Args:
        config ([`TinyLoraConfig`]): The configuration of one of the adapters.
        names (`list[str]`): Names of the adapted modules in depth order.
        first_blocks (`tuple[str, ...]`): Name of the first adapted block of each stack.
        device (`torch.device`): Where the values live.
        measured (`dict[str, Measured]`): What is known of each module's weight beside its factors.
        rotated (`dict[str, str]`): Of modules where the adapters use other singular vectors than this machine computes,
            what settles them, see `maths/basis.py`.
    """

    def __init__(
        self,
        config: TinyLoraConfig,
        names: list[str],
        first_blocks: tuple[str, ...],
        device: torch.device,
        measured: dict[str, Measured],
        rotated: dict[str, str],
    ):
        self.settings = settings_of(config)
        self.rank = config.r
        self.shape = (count_groups(names, config.n_tie, config.tying), config.u)
        self.first_blocks = first_blocks
        # Position of each module among the adapted ones.
        self.index = {name: index for index, name in enumerate(names)}
        # Configurations that name these modules, what PEFT makes of them, and the adapters that follow the plan.
        self.targets: set[tuple] = set()
        self.target_modules = config.target_modules
        self.adapters: set[str] = set()
        self.measured = measured
        self.rotated = rotated
        if config.projection == "basis":
            projections = basis_projections(config.u, config.r).expand(len(names), -1, -1, -1)
        else:
            projections = torch.stack(
                [gaussian_projections(name, config.u, config.r, config.projection_seed) for name in names]
            )
        # No buffers: DDP broadcasts those before every forward pass.
        self.projections_MKRR = projections.to(device)
        self.groups_M = torch.tensor(assign_groups(names, config.n_tie, config.tying)).to(device)

    @staticmethod
    def targets_of(config: TinyLoraConfig) -> tuple:
        """Returns the fields of a configuration that choose the modules, as something to look up."""
        asked_for = config.target_modules, config.exclude_modules, config.layers_to_transform, config.layers_pattern
        asked_for += (config.target_parameters,)
        return tuple(
            frozenset(value) if isinstance(value, set) else tuple(value) if isinstance(value, list) else value
            for value in asked_for
        )

    @property
    def factors_key(self) -> Hashable:
        """Equal for plans whose modules have the same factors."""
        return self.rank, frozenset(self.rotated.items())

    def factor_key(self, module: str) -> Hashable:
        """Returns what is equal for plans with the same factors of one module."""
        return self.rank, self.rotated.get(module)

    @property
    def probes(self) -> dict[str, Probe]:
        """Each module's part in the base's fingerprint, by name, in depth order."""
        return {name: self.measured[name].probe for name in self.index}

    @property
    def owner(self) -> str:
        """What values that are loaded alone are told by, see `storage/checkpoint.py`."""
        return owner_of(self.settings, fingerprint(self.probes))

    @property
    def singular_bases(self) -> dict[str, str]:
        """Of each module whose singular vectors another machine or dtype could rotate, what settles the rotation."""
        found = {name: self.rotated.get(name) or self.measured[name].basis for name in self.index}
        return {name: basis for name, basis in found.items() if basis is not None}

    def serves(self, config: TinyLoraConfig) -> bool:
        """Returns whether an adapter with these modules may follow the plan."""
        if self.settings != settings_of(config):
            return False
        return config.singular_bases == self.singular_bases if config.singular_bases else not self.rotated

    def differences(self, other: Plan) -> list[str]:
        """Returns what sets two plans apart, a phrase for each field."""
        phrases = [
            f"{field} ({value!r} and {other.settings[field]!r})"
            for field, value in self.settings.items()
            if value != other.settings[field]
        ]
        if list(self.index) != list(other.index):
            phrases.append(f"the adapted modules ({len(self.index)} and {len(other.index)} of them)")
        if self.rotated != other.rotated:
            phrases.append("the bases of singular vectors that came with a checkpoint")
        return phrases

    def frozen(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the group and the projections of each module, as [`mix`] and [`unmix`] take them."""
        return self.groups_M.to(device), self.projections_MKRR.to(device, dtype)

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Moves the frozen tensors to another device or dtype."""
        self.groups_M, self.projections_MKRR = fn(self.groups_M), fn(self.projections_MKRR)


def refuse_too_large(config: TinyLoraConfig, n_modules: int) -> None:
    """
    Raises where the fixed matrices P of an adapter would need more memory than any machine should give for them.

    Raises:
        ValueError: If they take more than [`MOST_BYTES`] in float32.
    """
    n_bytes = 4 * config.u * config.r**2 * (n_modules if config.projection == "gaussian" else 1)
    if n_bytes > MOST_BYTES:
        raise ValueError(
            f"u={config.u} at r={config.r} on {n_modules} modules needs {n_bytes / 2**30:.0f} GiB for the matrices P, "
            f"more than {MOST_BYTES / 2**30:.0f} GiB. Lower `u`: beyond r * r * n_tie its values only rescale the step."
        )
