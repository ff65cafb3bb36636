"""The tuner: which modules are wrapped, where the values live, and what a checkpoint holds."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple, Optional

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from tqdm import tqdm

from .bank import TinyLoraBank, TinyLoraLayer, Vectors
from .cache import cached_svd
from .checkpoint import FACTORS, MAX_UNCERTAINTY, VALUES, digest, refuse_unfit_shape, refuse_unfit_values
from .config import TinyLoraConfig
from .distributed import gathered, is_spread, same_on_all, whole
from .fingerprint import Probe, fingerprint, probes_needed, refuse_another_base, take_probe
from .layer import Linear
from .targets import as_OI, resolve_target_modules, unwrap


BANK = "tinylora_bank"
_VALUES_KEY = re.compile(rf"(.*\.)?{BANK}\.trl_tinylora_v\.(?P<adapter>.+)\.lora_magnitude_vector")


class TinyLoraModel(BaseTuner):
    """
    Adapts a model with TinyLoRA: `W' = W + U S (sum_k v_k P_k) V^T` (arXiv:2602.04118, section 4).

    The values are registered once on the base model, as a parameter of shape (groups, u) for each adapter. What a
    checkpoint holds is that parameter alone; everything else is computed from the base weights, the module names and
    the seed.

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

        Args:
            model (`torch.nn.Module`): The base model.
            adapter_name (`str`): Name of the adapter; its configuration is in `self.peft_config`.
            autocast_adapter_dtype (`bool`, *optional*): Of no effect: the values are float32.
            low_cpu_mem_usage (`bool`, *optional*): Whether to create the values on the meta device.
            state_dict (`dict`, *optional*): Of no effect on the choice of modules, which is the configuration's.

        Raises:
            ValueError: If a module cannot be adapted; the message names it.
            NotImplementedError: If the modules do not all lie behind one place where the sink can stand.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, TinyLoraConfig):
            raise ValueError(f"expected a TinyLoraConfig for {adapter_name!r}, got {type(config).__name__}.")
        names = resolve_target_modules(model, config)
        block_name = first_block(model, names)
        if config.n_tie == "all" or config.n_tie > len(names):
            config.warn_if_redundant(len(names))
        factors, measured = compute_factors(model, names, config.r)
        vectors = Vectors(config, names, block_name, factors[names[0]][0].device)
        probes = [measured[name].probe for name in names]
        self._refuse_another_base(adapter_name, config, vectors, probes)
        vectors.fingerprint = fingerprint(names, probes)
        vectors.uncertain = [name for name in names if measured[name].uncertainty > MAX_UNCERTAINTY]

        if low_cpu_mem_usage:
            # Only what the checkpoint brings is left open.
            vectors.lora_magnitude_vector = nn.Parameter(vectors.values_GK.to("meta"))
        places = {name: (index, config.r, factors[name]) for index, name in enumerate(names)}
        self._injection = vectors, places
        state = _tree_of(model)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except Exception:
            # PEFT looks at `modules_to_save` and `trainable_token_indices` last, when the layers are in place.
            _restore_tree(model, state, adapter_name)
            raise
        finally:
            del self._injection
        self.bank.measured.update({(name, config.r): measured[name] for name in names})
        _place_hook(model.get_submodule(block_name), block_name, self.bank)

    def _refuse_another_base(self, adapter_name, config, vectors, probes) -> None:
        # A configuration that was read from a folder has these; nothing is changed yet.
        if config.base_fingerprint is not None:
            try:
                refuse_another_base(config.base_fingerprint, vectors.names, probes)
            except ValueError as error:
                raise ValueError(
                    f"this is not the base model of the adapter {adapter_name!r}: {error}. Load it on "
                    f"{config.base_model_name_or_path or 'its own base'} as it was then, unquantised. To load it on "
                    "this model all the same, pass `config=config` with `config.base_fingerprint = None`, from "
                    "`config = PeftConfig.from_pretrained(...)`."
                ) from error
        if config._stored_shape is not None:
            refuse_unfit_shape(config._stored_shape, vectors.shape)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        vectors, places = self._injection
        # Not earlier: PEFT freezes the base model on the first injection only, which it tells by adapter layers.
        if not hasattr(self.model, BANK):
            self.model.add_module(BANK, TinyLoraBank())
        if adapter_name not in self.bank.trl_tinylora_v:
            self.bank.add(adapter_name, vectors)
        if not isinstance(target, Linear):
            layer = Linear(target, self.bank)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        target.update_layer(adapter_name, *places[current_key])

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # PEFT's own also reassigns the weight of what is unloaded, which a wrapper of trained tokens does not allow.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, and makes another one active where that was the active one.

        Args:
            adapter_name (`str`): Its name.
        """
        super().delete_adapter(adapter_name)
        # PEFT takes the choice of the first layer, which need not have another adapter; the bank has them all.
        if self.active_adapters != self.bank.active_adapters:
            self.set_adapter(self.bank.active_adapters)

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for module in model.modules():
            _remove_hook(module)
        delattr(model, BANK)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # Called by PEFT around every forward and generate; silence here would mean that the argument is ignored.
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "`adapter_names` (a different adapter for each row of a batch) is not supported by TinyLoRA yet. "
                "Choose one with `model.set_adapter(name)`, and run the rows of each adapter as a batch of their own."
            )
        yield

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        own = {}
        for key in found:
            if _VALUES_KEY.fullmatch(key):
                found[key] = own[VALUES] = found[key].to(getattr(torch, config.save_dtype))
        bank = _bank_of(model)
        vectors = bank.trl_tinylora_v[adapter_name]
        config._of_saved = {"base_fingerprint": vectors.fingerprint, "checkpoint_digest": digest(own)}
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        match = _VALUES_KEY.fullmatch(key)
        if match is not None and match["adapter"] == adapter_name:
            return VALUES
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        vectors = _bank_of(model).trl_tinylora_v[adapter_name]
        own = {key: tensor for key, tensor in state_dict.items() if key.startswith((VALUES, FACTORS))}
        refuse_unfit_values(own or state_dict)
        refuse_unfit_shape(own[VALUES].shape, vectors.shape)
        state_dict = {**state_dict, VALUES: own[VALUES].float()}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class Measured(NamedTuple):
    """What else is known of a weight once its factors are: the base's part in a fingerprint, and how sure they are."""

    probe: Probe
    uncertainty: float


def compute_factors(
    model: nn.Module, names: list[str], rank: int
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Measured]]:
    """Returns U S and V^T of each module, taken from an adapter of the same rank where there is one.

    Args:
        model (`torch.nn.Module`): The base model.
        names (`list[str]`): Names of the modules.
        rank (`int`): The rank.

    Returns:
        `tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Measured]]`

    Raises:
        ValueError: If a weight has non-finite entries or is on the meta device; the message names the module.
    """
    factors, measured = {}, {}
    needed = probes_needed(len(names))
    known_measured = getattr(model, BANK).measured if hasattr(model, BANK) else {}
    for name in tqdm(names, desc="TinyLoRA: singular vectors", delay=3, leave=False):
        module = model.get_submodule(name)
        known = module.factors(rank) if isinstance(module, Linear) else None
        if known is not None and len(known_measured[name, rank].probe.values) >= needed:
            factors[name], measured[name] = known, known_measured[name, rank]
            continue
        linear = unwrap(module)
        if linear.weight.is_meta:
            raise ValueError(
                f"the weight of {name} is on the meta device: it has no values yet. Load the model's weights first "
                "(`from_pretrained` without `device_map='meta'` or `init_empty_weights`; under FSDP with "
                "`fsdp_cpu_ram_efficient_loading: false`, for otherwise only the first process has them)."
            )
        unmerged = module._unmerged_weight if isinstance(module, Linear) else None
        must_gather = is_spread(linear.weight)
        try:
            # One weight at a time: what is whole at any moment is small beside the model.
            with gathered([linear.weight]):
                weight_OI = as_OI(linear, whole(linear.weight.data if unmerged is None else unmerged))
                left_OR, right_RI, uncertainty = (
                    cached_svd(weight_OI, rank) if known is None else (*known, known_measured[name, rank].uncertainty)
                )
                measured[name] = Measured(take_probe(name, weight_OI, needed), uncertainty)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        factors[name] = left_OR, right_RI
        if must_gather:
            same_on_all(factors[name])
    return factors, measured


def _bank_of(model: nn.Module) -> TinyLoraBank:
    return next(module for module in model.modules() if isinstance(module, TinyLoraBank))


def first_block(model: nn.Module, names: list[str]) -> str:
    """
    Returns the name of the module whose input all adapted modules depend on: the sink's place.

    That is the first adapted member of a list of blocks (`model.layers.0`); the model itself, "", where there is none.

    Args:
        model (`torch.nn.Module`): The base model.
        names (`list[str]`): Names of the adapted modules in depth order.

    Returns:
        `str`

    Raises:
        NotImplementedError: If a module does not lie in the same list of blocks.
    """

    def block_of(name: str) -> str:
        parts = name.split(".")
        for length in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:length])), nn.ModuleList):
                return ".".join(parts[: length + 1])
        return ""

    blocks = [block_of(name) for name in names]
    lists = Counter(block.rpartition(".")[0] for block in blocks)
    if len(lists) > 1 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        home = lists.most_common(1)[0][0]
        stray = next((n for n, b in zip(names, blocks, strict=True) if b.rpartition(".")[0] != home), names[0])
        raise NotImplementedError(
            f"{stray} does not lie in the list of blocks {home!r} with the other adapted modules. TinyLoRA adapts one "
            "stack of decoder blocks: leave modules outside it (a vision tower, an encoder, a head) out with "
            "`exclude_modules`."
        )
    return blocks[0]


def _tree_of(model: nn.Module) -> tuple[list, list]:
    modules = [(module, dict(module._modules)) for module in model.modules()]
    return modules, [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _restore_tree(model: nn.Module, state: tuple[list, list], adapter_name: str) -> None:
    modules, parameters = state
    for module, children in modules:
        module._modules.clear()
        module._modules.update(children)
        if isinstance(module, Linear):
            module.trl_tinylora_place.pop(adapter_name, None)
            module.drop_unused_factors()
    for parameter, requires_grad in parameters:
        parameter.requires_grad_(requires_grad)


def _place_hook(block: nn.Module, name: str, bank: TinyLoraBank) -> None:
    _remove_hook(block)
    block._trl_tinylora_block = name
    block._trl_tinylora_hook = block.register_forward_pre_hook(bank.before_first_block, with_kwargs=True)


def _remove_hook(block: nn.Module) -> None:
    if hasattr(block, "_trl_tinylora_hook"):
        block._trl_tinylora_hook.remove()
        del block._trl_tinylora_hook, block._trl_tinylora_block
