"""`TinyLoraConfig`: every field of a TinyLoRA adapter, and its folder's adapter_config.json."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, Optional, Union

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .budget import nearest_budget
from .storage.atomic_write import written_whole
from .storage.card import describe, put_section
from .storage.checkpoint import (
    VALUES,
    SavedAdapter,
    former_bases,
    function_of,
    own_tensors,
    read_fields,
    read_folder,
    refuse_altered,
    refuse_pickle,
    settings_of,
)
from .tuner.targets import resolve_target_modules, skeleton
from .validation import refuse_no_count, refuse_wrong_fields


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig


class TinyLoraPeftType(str, Enum):
    """The name under which the tuner stands in PEFT's registries; PEFT's own `TINYLORA` is another formula."""

    TRL_TINYLORA = "TRL_TINYLORA"


@dataclass
class TinyLoraConfig(PeftConfig):
    """
    Configuration of a TinyLoRA adapter: ceil(modules / n_tie) * u trained values.

    Every adapted weight W becomes `W' = W + U S (sum_k v_k P_k) V^T` (Morris et al., arXiv:2602.04118, section 4), with
    U, S, V the truncated SVD of W at rank `r`, P fixed random matrices, and v the `u` trained values that `n_tie`
    modules share. There is no scaling factor. v starts at zero, so that the adapted model starts as the base model.

    Differences from `peft.TinyLoraConfig`: S stands on the U side only (there its square root stands on both sides),
    `n_tie` is an exact number of modules (there `weight_tying` is a ratio), and each module's P comes from its name.

    Args:
        r (`int`, *optional*, defaults to `2`):
            Rank of the frozen truncated SVD, `1 <= r <= min(out_features, in_features)` of every adapted module. The
            paper uses 2 in all main experiments (section 7). A rank that a module does not have is an error.
        u (`int`, *optional*, defaults to `1`):
            Trained values per group of modules. Beyond `r * r * n_tie` further values only rescale the step.
        n_tie (`int` or `"all"`, *optional*, defaults to `1`):
            Modules that share one vector v. The last group of a kind is smaller where the number does not divide.
            `"all"` shares among all modules (`tying="tiled"`) or among all modules of a kind (`tying` otherwise).
        tying (`str` or `dict[str, str]`, *optional*, defaults to `"tiled"`):
            Which modules share: `"tiled"`, consecutive modules in depth order whatever their type; `"structured"`,
            modules of one type at consecutive depths (section 6.5); or kinds by name, each a regular expression that is
            searched for in the modules' names, as in `{"attention": "self_attn", "mlp": "mlp"}`, in exactly one of
            which every adapted module is.
        projection (`str`, *optional*, defaults to `"gaussian"`):
            `"gaussian"`: P ~ N(0, 1/r), its own for every module (the paper does not state the distribution).
            `"basis"`: P_k is the k-th matrix of the standard basis of the r x r matrices, at most `r * r` of them; with
            `u=r*r, n_tie=1` this is LoRA-XS.
        projection_seed (`int`, *optional*, defaults to `0`):
            Seed of the Gaussian projections, `0 <= projection_seed < 2**32`. With the module's name it determines P.
        target_modules (`list[str]` or `str`, *optional*, defaults to `"all-linear"`):
            Modules to adapt, with PEFT's meaning: a list of names or name endings, a regular expression, or
            `"all-linear"` (every linear layer but the output embedding).
        target_parameters (`list[str]`, *optional*):
            Fused experts to adapt, each of their matrices as a module of its own: names of parameters or their endings,
            as `["experts.gate_up_proj", "experts.down_proj"]`. `target_modules` may be empty then.
        exclude_modules (`list[str]` or `str`, *optional*):
            Modules not to adapt: a list of names or name endings, or a regular expression.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indexes of the layers to adapt; needs `target_modules` as a list.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of layers that `layers_to_transform` counts in, where it is not found by itself.
        modules_to_save (`list[str]`, *optional*):
            Modules trained and saved in full beside the adapter.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Token embeddings trained and saved beside the adapter.
        init_weights (`bool` or `"uniform"`, *optional*, defaults to `True`):
            `True`: v starts at zero, and the adapted model as the base model. `False` or `"uniform"`: v is drawn
            uniformly within `init_v_bound`, from a stream of `projection_seed`; for tests of what an adapter does.
        init_v_bound (`float`, *optional*, defaults to `0.02`):
            Bound of the drawn values, at least 0; as in `peft.TinyLoraConfig`.
        save_dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of the values in the file: `"float32"`, `"bfloat16"` or `"float16"` (13 values: 52, 26 or 26 bytes).
            They are trained in float32 whatever it is.
        base_fingerprint (`dict`, *optional*):
            What tells the base model, see `storage/fingerprint.py`; written when an adapter is saved, and compared
            before it is loaded. `None` loads it on any base.
        singular_bases (`dict[str, str]`, *optional*):
            For modules whose singular vectors another machine or dtype could rotate, what settles the rotation, see
            `maths/basis.py`; written when an adapter is saved.
        checkpoint_format (`int`, *optional*):
            Format of the folder, see `storage/checkpoint.py`; written when an adapter is saved.
        checkpoint_digest (`str`, *optional*):
            Digest of the values and of all else that the adapter's function depends on; written when an adapter is
            saved, verified when it is loaded.
        task_type, inference_mode, base_model_name_or_path, revision:
            As in every PEFT configuration.

    Raises:
        TypeError: If `r`, `u` or `n_tie` is not an integer.
        ValueError: If a value is out of its range; the message names the value and the bound.

    Example:

    ```python
    >>> from trl import GRPOConfig, GRPOTrainer
    >>> from trl_tinylora import TinyLoraConfig

    >>> trainer = GRPOTrainer(
    ...     model="Qwen/Qwen2.5-7B-Instruct",
    ...     reward_funcs=reward,
    ...     args=GRPOConfig(learning_rate=1e-4),
    ...     train_dataset=dataset,
    ...     peft_config=TinyLoraConfig(n_tie=16),  # 13 trained values
    ... )
    ```
    """

    r: int = 2
    u: int = 1
    n_tie: Union[int, str] = 1
    tying: Union[Literal["tiled", "structured"], dict[str, str]] = "tiled"
    projection: Literal["gaussian", "basis"] = "gaussian"
    projection_seed: int = 0
    target_modules: Optional[Union[list[str], str]] = "all-linear"
    target_parameters: Optional[list[str]] = None
    exclude_modules: Optional[Union[list[str], str]] = None
    layers_to_transform: Optional[Union[list[int], int]] = None
    layers_pattern: Optional[Union[list[str], str]] = None
    modules_to_save: Optional[list[str]] = None
    trainable_token_indices: Optional[Union[list[int], dict[str, list[int]]]] = None
    init_weights: Union[bool, Literal["uniform"]] = True
    init_v_bound: float = 0.02
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    base_fingerprint: Optional[dict] = None
    singular_bases: Optional[dict] = None
    checkpoint_format: Optional[int] = None
    checkpoint_digest: Optional[str] = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = TinyLoraPeftType.TRL_TINYLORA
        # Of the folder that was last read or written with this configuration, which may serve several models.
        self._saved: Optional[SavedAdapter] = None
        # No field: PEFT would read it from the folder again.
        self.takes_other_base = False
        if self.target_modules == ["all-linear"]:
            # A command line gives lists.
            self.target_modules = "all-linear"
        refuse_wrong_fields(self)
        # What the values have to be that are loaded into an adapter with this configuration, as it is now: its fields
        # may be changed on purpose before.
        self._expected = self.checkpoint_digest, function_of(vars(self))
        if isinstance(self.n_tie, int):
            self.warn_if_redundant(self.n_tie)
        # PEFT keeps names as sets and patterns as strings.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    def verify_values(self, tensors: dict[str, torch.Tensor], place: str) -> None:
        """
        Verifies that values which are loaded are those that were saved with this configuration, once.

        Args:
            tensors (`dict[str, torch.Tensor]`): What a file holds, see `storage.checkpoint.own_tensors`.
            place (`str`): Where they were found.

        Raises:
            ValueError: If they are not, or not finite.
        """
        refuse_altered(own_tensors(tensors), *self._expected, place)
        self.forget_expected()

    def forget_expected(self) -> None:
        """Lets any values be loaded from now on."""
        self._expected = None, None

    @property
    def lacks_values(self) -> bool:
        """Whether values were saved with this configuration, and none were loaded into its frozen adapter."""
        return self._expected[0] is not None and self.inference_mode

    def warn_if_redundant(self, modules_per_group: int) -> None:
        """Warns where a group, of this many modules, has more trained values than directions to move in."""
        freedom = self.r**2 * modules_per_group
        if self.u > freedom:
            warnings.warn(
                f"u={self.u} is more than the r*r*n_tie = {freedom} degrees of freedom of a group of "
                f"{modules_per_group} module(s) at r={self.r}: the values beyond that only rescale the step. "
                f"Lower `u` to {freedom}, or raise `r`.",
                UserWarning,
                stacklevel=4,
            )

    @classmethod
    def for_budget(
        cls, model: Union[nn.Module, PretrainedConfig], n_values: int, *, exact: bool = False, **fields
    ) -> TinyLoraConfig:
        """
        Returns the configuration that trains `n_values` values on this model, tying as few modules as possible.

        The number of values is ceil(modules / n_tie) * u (section 4). Among the configurations with the wanted number
        the one with the smallest `n_tie` is taken, so that `u` falls to 1 before more modules are tied, as the paper
        advises (section 6.5, appendix A.1). Where none has the wanted number, the nearest one is returned with a
        warning that names its number.

        Args:
            model (`torch.nn.Module` or `transformers.PretrainedConfig`):
                The model to be adapted, or its configuration: no weights are loaded.
            n_values (`int`): Number of trained values, at least 1.
            exact (`bool`, *optional*, defaults to `False`): Whether to raise where no configuration has the number.
            **fields: Other fields of the configuration; `u` or `n_tie` given here are kept.

        Returns:
            [`TinyLoraConfig`]

        Raises:
            ValueError: If `n_values` is below 1, or not to be had and `exact=True`.
        """
        refuse_no_count("n_values", n_values)
        fixed_u, fixed_n_tie = fields.pop("u", None), fields.pop("n_tie", None)
        if fixed_u is not None:
            refuse_no_count("u", fixed_u)
        if fixed_n_tie not in (None, "all"):
            refuse_no_count("n_tie", fixed_n_tie)
        draft = cls(**fields)
        names = resolve_target_modules(skeleton(model), draft)
        u, n_tie, count = nearest_budget(
            names,
            n_values,
            r=draft.r,
            tying=draft.tying,
            modules_add_freedom=draft.projection == "gaussian",
            u=fixed_u,
            n_tie=fixed_n_tie,
        )
        if count != n_values:
            message = (
                f"No TinyLoRA configuration with r={draft.r} and tying={draft.tying!r} on {len(names)} modules trains "
                f"exactly {n_values} values; the nearest, u={u} and n_tie={n_tie!r}, trains {count}."
            )
            if exact:
                raise ValueError(message)
            warnings.warn(message, UserWarning, stacklevel=2)
        return cls(u=u, n_tie=n_tie, **fields)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: Optional[str] = None,
        *,
        other_base: bool = False,
        **kwargs,
    ):
        """
        Loads the configuration of an adapter folder, after a look at whether that folder can be loaded at all.

        `PeftModel.from_pretrained(model, folder, other_base=True)` passes `other_base` on to here.

        Args:
            pretrained_model_name_or_path (`str`): Local folder or Hub repository.
            subfolder (`str`, *optional*): Folder within it.
            other_base (`bool`, *optional*, defaults to `False`): Whether the adapter may be loaded on other weights
                than those it was trained on, as a quantised or full-precision variant, with a warning that states the
                distance. The factors U S and V^T are then of those weights.
            **kwargs: Passed on to PEFT (`token`, `revision`, `cache_dir`, ...).

        Returns:
            [`TinyLoraConfig`]

        Raises:
            ValueError: If the folder holds the adapter of another method, or a damaged or foreign weights file.
        """
        folder = str(pretrained_model_name_or_path)
        folder = os.path.join(folder, subfolder) if subfolder else folder
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except (TypeError, ValueError) as error:
            raise error if folder in str(error) else ValueError(f"{folder}/{CONFIG_NAME}: {error}") from error
        except KeyError as error:
            raise ValueError(f"{folder}/{CONFIG_NAME}: `peft_type` is {error}, which PEFT does not know.") from error
        if not isinstance(config, cls):
            raise ValueError(
                f"{folder} holds an adapter of type {getattr(config.peft_type, 'value', config.peft_type)}, not "
                f"{TinyLoraPeftType.TRL_TINYLORA.value}. Load it with `peft.PeftModel.from_pretrained`."
            )
        if not os.path.isdir(folder):
            # The weights are looked at here as well, before PEFT wraps the model for them.
            for_hub, _, _ = cls._split_kwargs(kwargs)
            with contextlib.suppress(EntryNotFoundError):
                path = hf_hub_download(
                    pretrained_model_name_or_path, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **for_hub
                )
                folder = os.path.dirname(path)
        tensors = read_folder(folder)
        if tensors is None and config.checkpoint_digest is not None and os.path.isdir(folder):
            raise ValueError(f"{folder} lacks {SAFETENSORS_WEIGHTS_NAME}, the values: copy the whole folder again.")
        if tensors is not None:
            config.verify_values(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
            config.singular_bases = config.singular_bases or former_bases(tensors)
            config._saved = SavedAdapter(
                tensors[VALUES], config.base_fingerprint, config.singular_bases, settings_of(config), folder
            )
        config.takes_other_base = other_base
        return config

    def to_dict(self) -> dict:
        """Returns the fields that are saved, those that follow from a model as of the adapter last saved with them."""
        is_written = self._saved is not None and self._saved.folder is None
        return super().to_dict() | (self._saved.fields() if is_written else {})

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Writes adapter_config.json, whole or not at all, and what the adapter is into the folder's model card."""
        if os.path.isfile(save_directory):
            # PEFT says what is wrong.
            super().save_pretrained(save_directory, **kwargs)
        if self._saved is not None and self._saved.folder is None and self._saved.values_GK is not None:
            refuse_pickle(save_directory)
        with written_whole(os.path.join(save_directory, CONFIG_NAME)) as scratch:
            super().save_pretrained(str(scratch.parent), **kwargs)
        # Under ZeRO-3 and FSDP2 the other processes have nothing to save.
        if self._saved is not None and self._saved.folder is None and self._saved.values_GK is not None:
            put_section(save_directory, "trl_tinylora", describe(self.to_dict(), self._saved.values_GK))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs) -> dict:
        """
        Reads a configuration file.

        Args:
            path_json_file (`str`): Path of the file.
            **kwargs: Passed on to PEFT.

        Returns:
            `dict`: The fields.

        Raises:
            ValueError: If the file is no complete JSON.
        """
        # PEFT's own reads it again, and changes what it has to.
        read_fields(path_json_file)
        return super().from_json_file(path_json_file, **kwargs)
