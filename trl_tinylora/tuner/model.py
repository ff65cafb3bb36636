"""The tuner: which modules are wrapped, where the values live, and what a checkpoint holds."""

from __future__ import annotations

import copy
import math
import os
from contextlib import contextmanager
from typing import Optional

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from ..config import TinyLoraConfig
from ..maths.tying import count_groups
from ..storage.checkpoint import (
    PREFIX,
    VALUES,
    SavedAdapter,
    beside_of,
    is_owner,
    own_tensors,
    refuse_another_owner,
    refuse_unfit_shape,
)
from ..storage.fingerprint import fingerprint
from ..validation import refuse_wrong_fields
from .adapted_layer import AdaptedLayer, refuse_quantised
from .bank import TinyLoraBank, TinyLoraLayer
from .build import ModuleTree, compute_factors, first_blocks, recover_factors
from .experts import Experts
from .layer import Linear
from .mixed_batch import MixedBatch
from .plan import Plan, refuse_too_large
from .refusals import (
    BASE_ROW,
    refuse_lost_weights,
    refuse_second_injection,
    refuse_unfit,
    refuse_wrong_rows,
    trains_more_than_values,
    warn_of_zeros,
)
from .targets import is_all_linear, resolve_target_modules
from .values import Vectors
from .weights import holders


# The bank's name in the base model.
BANK = "tinylora_bank"


class TinyLoraModel(BaseTuner):
    """
    Adapts a model with TinyLoRA: `W' = W + U S (sum_k v_k P_k) V^T` (arXiv:2602.04118, section 4).

    The values are registered once on the base model, a parameter of shape (groups, u) for each adapter. A checkpoint
    holds that parameter alone; all else is computed from the base weights, the module names and the seed.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        peft_config ([`TinyLoraConfig`] or `dict[str, TinyLoraConfig]`): Its configuration.
        adapter_name (`str`): Name of the adapter.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Whether to create the values on the meta device.
    """

    prefix: str = "trl_tinylora_"
    tuner_layer_cls = TinyLoraLayer
    target_module_mapping = {}

    @property
    def bank(self) -> TinyLoraBank:
        """The holder of every adapter's values."""
        return getattr(self.model, BANK)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Optional[dict[str, torch.Tensor]] = None,
    ) -> None:
        """
        Wraps the target modules; everything that can fail is done before the first module is touched.

        Raises:
            ValueError: If a module cannot be adapted; the message names it.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, TinyLoraConfig):
            raise ValueError(f"expected a TinyLoraConfig for {adapter_name!r}, got {type(config).__name__}.")
        # Fields can have been set since.
        refuse_wrong_fields(config)
        bank: Optional[TinyLoraBank] = model._modules.get(BANK)
        refuse_second_injection(model, bank, adapter_name)
        plan = None if bank is None else bank.plan_in_same_words(config)
        if plan is not None and not trains_more_than_values(config):
            refuse_unfit(adapter_name, config, plan.probes, plan.shape)
            # PEFT's own injection looks at every module and every adapter there is; here nothing is left to wrap.
            bank.add(adapter_name, Vectors(plan, _device(plan, low_cpu_mem_usage), config))
            config.target_modules = copy.copy(plan.target_modules)
            return
        plan, factors = self._new_plan(model, bank, adapter_name)
        as_asked_for = Plan.targets_of(config)
        if is_all_linear(config.target_modules):
            # PEFT's own list has modules in it that are left out here.
            linear = {place.module for place in holders(model, list(plan.index)) if place.parameter == "weight"}
            config.target_modules = linear
        self._injection = Vectors(plan, _device(plan, low_cpu_mem_usage), config), factors
        tree = ModuleTree(model)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except Exception:
            # PEFT looks at `modules_to_save` and `trainable_token_indices` last, when the layers are in place.
            if hasattr(model, BANK):
                self.bank.delete_adapter(adapter_name)
            tree.restore()
            raise
        finally:
            del self._injection
        # PEFT has put names in the place of "all-linear".
        plan.target_modules = copy.copy(config.target_modules)
        plan.targets |= {as_asked_for, Plan.targets_of(config)}
        for block in plan.first_blocks:
            self.bank.place_hooks(model, block)

    def _new_plan(self, model: nn.Module, bank: Optional[TinyLoraBank], adapter_name: str) -> tuple[Plan, dict]:
        """The plan that an adapter follows and the factors of its modules, once all that can be refused is accepted."""
        config = self.peft_config[adapter_name]
        refuse_lost_weights(model)
        names = resolve_target_modules(model, config)
        refuse_too_large(config, len(names))
        shape = count_groups(names, config.n_tie, config.tying), config.u
        if config.n_tie == "all" or config.n_tie > len(names):
            config.warn_if_redundant(len(names))
        factors, measured = compute_factors(model, bank, names, config.r)
        warn_of_zeros({name: measured[name].probe.scale for name in names})
        refuse_unfit(adapter_name, config, {name: measured[name].probe for name in names}, shape)
        recovered = recover_factors(model, factors, config)
        rotated = {name: config.singular_bases[name] for name in recovered}
        blocks = first_blocks(model, [place.module for place in holders(model, names)])
        plan = Plan(config, names, blocks, factors[names[0]][0].device, measured, rotated)
        return plan if bank is None else bank.same_plan(plan), factors | recovered

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        vectors, factors = self._injection
        # Not earlier: PEFT freezes the base model on the first injection only, which it tells by adapter layers.
        if not hasattr(self.model, BANK):
            self.model.add_module(BANK, TinyLoraBank())
        if adapter_name not in self.bank.trl_tinylora_v:
            self.bank.add(adapter_name, vectors)
        if not isinstance(target, AdaptedLayer):
            kind = Linear if parameter_name is None else Experts
            layer = kind(target, current_key, self.bank)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.keep_factors(vectors.plan, factors)

    def _inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage) -> list[str]:
        # PEFT's own would put a wrapper of LoRA's around each parameter, one inside the other.
        vectors, _ = self._injection
        places = [place for place in holders(model, list(vectors.plan.index)) if place.parameter != "weight"]
        for place in places:
            parent, _, target_name = place.module.rpartition(".")
            target = model.get_submodule(place.module)
            parent = model.get_submodule(parent)
            self._create_and_replace(
                peft_config, adapter_name, target, target_name, parent, place.module, place.parameter
            )
        return [f"{place.module}.{place.parameter}" for place in places]

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT's own also reassigns the weight of what is unloaded, which a wrapper of trained tokens does not allow.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The values are float32 from the start; PEFT would look for others in every adapter there is.
        if trains_more_than_values(self.peft_config[adapter_name]):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes adapters the active ones, trained unless `inference_mode`.

        Raises:
            ValueError: If one does not exist or is named twice.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(set(names)) != len(names):
            raise ValueError(f"each adapter must be named once, got {adapter_name!r}.")
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"Adapter {', '.join(map(str, unknown))} not found, there are {list(self.peft_config)}.")
        super().set_adapter(adapter_name, inference_mode)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """
        Adds the weighted sum of adapters, which is exact: `v = sum_i w_i v_i`, and W' is linear in v.

        With weights (1 - t, t) it interpolates. The new adapter is neither active nor trained.

        Args:
            adapters (`list[str]`): Names of adapters that differ in their values alone.
            weights (`list[float]`): A weight for each of them, of either sign.
            adapter_name (`str`): Name of the new adapter.
            combination_type (`str`, *optional*, defaults to `"linear"`): As for LoRA, which has other types as well.

        Raises:
            TypeError: If `adapters` is no list, or `weights` no list of numbers.
            ValueError: If an adapter does not exist, the name is taken, there is not one weight for each adapter, the
                sum is not finite, or the adapters differ in more than their values; the message names the difference.
        """
        if combination_type != "linear":
            raise ValueError(
                f"`combination_type` must be 'linear', got {combination_type!r}: a weighted sum of TinyLoRA "
                "adapters is exact, so that there is nothing to choose."
            )
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name {adapter_name!r} already exists: delete it, or choose another name.")
        if not isinstance(adapters, (list, tuple)) or not isinstance(weights, (list, tuple)):
            raise TypeError(f"`adapters` and `weights` must be lists, got {adapters!r} and {weights!r}.")
        if not adapters or len(weights) != len(adapters):
            raise ValueError(f"there must be one weight for each adapter, got {len(weights)} for {len(adapters)}.")
        try:
            weights = [float(weight) for weight in weights]
        except (TypeError, ValueError) as error:
            raise TypeError(f"`weights` must be numbers, got {weights}.") from error
        if not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"`weights` must be finite, got {weights}.")
        parts = self._values_of_one_plan(adapters)
        total = sum(weight * part for weight, part in zip(weights, parts, strict=True)).float()
        if not torch.isfinite(total).all():
            raise ValueError(f"the sum with `weights` {weights} exceeds what float32 can hold. Take smaller ones.")
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapters[0]])
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        with torch.no_grad():
            self.bank.vectors(adapter_name).values_GK.copy_(total)

    def refuse_checkpoint(self, folder: str | os.PathLike, adapter_name: str = "default") -> None:
        """
        Raises where the values in a checkpoint would mean something else to an adapter of this model.

        A trainer that resumes loads the values alone: PEFT reads no configuration for an adapter that is there.

        Args:
            folder (`str` or `os.PathLike`): The checkpoint, with its adapter_config.json.
            adapter_name (`str`, *optional*, defaults to `"default"`): The adapter that it is to be loaded into.

        Raises:
            ValueError: If settings, modules or method differ, the message names both; or there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found, there are {list(self.peft_config)}.")
        there, plan = TinyLoraConfig.from_pretrained(str(folder)), self.bank.vectors(adapter_name).plan
        pairs = {name: (value, getattr(there, name)) for name, value in plan.settings.items()}
        if there.base_fingerprint is not None:
            here = fingerprint(plan.probes)
            for name in ("modules", "names"):
                pairs[f"{name} adapted"] = here[name], there.base_fingerprint[name]
        differences = [f"{name} ({here!r}, {saved!r} there)" for name, (here, saved) in pairs.items() if here != saved]
        if differences:
            raise ValueError(
                f"the adapter in {folder} differs from this one in {', '.join(differences)}: its values would mean "
                "something else here. Resume with its own settings, or start a new run in another folder."
            )

    def distance(self, first: str, second: str) -> float:
        """Returns the Euclidean norm of the difference between the values of two adapters.

        Args:
            first, second (`str`): Names of adapters that differ in their values alone.

        Returns:
            `float`

        Raises:
            ValueError: If one does not exist, or they differ in more than their values.
        """
        values, others = self._values_of_one_plan([first, second])
        return torch.linalg.vector_norm(values - others).item()

    def _values_of_one_plan(self, adapters: list[str]) -> list[torch.Tensor]:
        """The values of adapters in float64, once it is sure that they mean the same."""
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist")
            if trains_more_than_values(self.peft_config[name]):
                raise ValueError(
                    f"{name!r} has trained modules or tokens beside its values, which cannot be added up or compared. "
                    "Use adapters without `modules_to_save` and `trainable_token_indices`."
                )
        vectors = [self.bank.vectors(name) for name in adapters]
        for name, other in zip(adapters, vectors, strict=True):
            differences = vectors[0].plan.differences(other.plan)
            if differences:
                raise ValueError(
                    f"the values of {adapters[0]!r} and {name!r} do not mean the same: the adapters differ in "
                    f"{', '.join(differences)}. Only adapters that agree in these can be added up or compared."
                )
        return [other.whole_values().double() for other in vectors]

    def _check_merge_allowed(self) -> None:
        # Called by PEFT before the first layer is merged.
        super()._check_merge_allowed()
        refuse_quantised(module for module in self.model.modules() if isinstance(module, AdaptedLayer))

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        getattr(model, BANK).remove_hooks()
        delattr(model, BANK)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # Called by PEFT around every forward and generate.
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        refuse_wrong_rows(self, names)
        num_beams = kwargs.get("num_beams")
        if isinstance(num_beams, int):
            # Beam search repeats each row, one beam after another.
            names = [name for name in names for _ in range(num_beams)]
        self.bank.mixed_batch = MixedBatch([None if name == BASE_ROW else self.bank.vectors(name) for name in names])
        try:
            yield
        finally:
            self.bank.mixed_batch = None

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # Fields can have been set since.
        refuse_wrong_fields(config)
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        vectors = _bank_of(model).vectors(adapter_name)
        values = f"{BANK}.trl_tinylora_v.{adapter_name}.lora_magnitude_vector"
        saved_GK = None
        # PEFT looks for names that torch's older FSDP changes where it wraps modules between the model and the bank.
        found |= {key: tensor for key, tensor in state_dict.items() if key.removeprefix(PREFIX) == values}
        plan = vectors.plan
        for key in list(found):
            if key.removeprefix(PREFIX) == values:
                found[key] = saved_GK = found[key].to(getattr(torch, config.save_dtype))
                found[key.replace("lora_magnitude_vector", plan.owner)] = torch.empty(0)
        if saved_GK is not None:
            own_tensors({VALUES: saved_GK})
        settings = plan.settings | beside_of(config)
        config._saved = SavedAdapter(saved_GK, fingerprint(plan.probes), plan.singular_bases, settings)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        own, vectors, saved = own_tensors(state_dict), _bank_of(model).vectors(adapter_name), config._saved
        refuse_unfit_shape(own[VALUES].shape, vectors.plan.shape)
        if config.inference_mode:
            config.verify_values(own, "the checkpoint")
        # What was read with the configuration was verified with it, and its fields may have been changed on purpose.
        if saved is None or saved.folder is None or not torch.equal(saved.values_GK, own[VALUES].cpu()):
            refuse_another_owner(state_dict, vectors.plan.owner)
        vectors._buffers.clear()
        # A trainer loads checkpoints of its own into an adapter whose configuration was read from another folder.
        config.forget_expected()
        state_dict = {
            name: tensor
            for name, tensor in state_dict.items()
            if name.removeprefix(PREFIX) not in own and not is_owner(name)
        }
        # `save_pretrained(save_embedding_layers=True)` saves those.
        others = sorted(name for name in state_dict if not set(EMBEDDING_LAYER_NAMES) & set(name.split(".")))
        if others and not trains_more_than_values(config):
            raise ValueError(
                f"the checkpoint holds {', '.join(others[:3])} beside the values, which no field of the adapter's "
                "configuration names: file and configuration are of different adapters. Copy the folder again."
            )
        state_dict[PREFIX + VALUES] = own[VALUES].float()
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _bank_of(model: nn.Module) -> TinyLoraBank:
    return next(module for module in model.modules() if isinstance(module, TinyLoraBank))


def _device(plan: Plan, low_cpu_mem_usage: bool) -> torch.device:
    # Only what the checkpoint brings is left open.
    return torch.device("meta") if low_cpu_mem_usage else plan.groups_M.device
