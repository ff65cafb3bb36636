"""
The command line: `python -m trl_tinylora plan | inspect | export | verify`.

Exit status 0 where all went well, 1 with one line on stderr where something is wrong, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

import huggingface_hub
import transformers
from huggingface_hub import snapshot_download
from peft import PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from .config import TinyLoraConfig, TinyLoraPeftType
from .convert.lora import DTYPES, export_lora, read_config
from .convert.peft_tinylora import convert_peft_tinylora
from .maths.tying import TYINGS, count_groups
from .storage.checkpoint import read_tensors
from .tuner.layer import Linear
from .tuner.targets import resolve_target_modules, skeleton


DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
# Tensors of more values are not listed.
MOST_VALUES = 64
# What wrong input raises here, in PEFT, in transformers and on the Hub. Anything else is a bug: its traceback is shown.
EXPECTED = (ValueError, TypeError, KeyError, OSError, RuntimeError, SafetensorError)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """
    Runs one command.

    Args:
        arguments (`Sequence[str]`, *optional*): The command line; that of the process by default.

    Returns:
        `int`: Exit status, 0 or 1.

    Raises:
        SystemExit: With status 2 for a wrong command line, with 0 for `--help`.
    """
    options = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options.run(options)
    except EXPECTED as error:
        print(f"error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trl_tinylora", description="TinyLoRA adapters on the command line."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(run: Callable, help: str, **positional: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.removeprefix("_"), help=help)
        added.set_defaults(run=run)
        for name, what in positional.items():
            added.add_argument(name, metavar=name.upper(), help=what)
        return added

    either = "folder or Hub id"
    plan = command(_plan, "budgets for a model, from its configuration alone", model=f"{either}; no weights are read")
    plan.add_argument("--values", type=_count, nargs="+", metavar="N", help="numbers of trained values to plan for")
    plan.add_argument("--r", type=_count, default=2, help="rank of the frozen SVD (default 2)")
    plan.add_argument("--target_modules", nargs="+", metavar="NAME", help='names of modules (default "all-linear")')
    command(_inspect, "what an adapter folder holds", adapter=either)
    about = "write an adapter (also one of PEFT's TINYLORA) as a plain LoRA"
    export = command(_export, about, adapter=either, out="folder to write")
    export.add_argument("--base", metavar="MODEL", help="base model (default: the one that the adapter names)")
    export.add_argument("--dtype", choices=list(DTYPE_NAMES), default="float32", help="of the file (default float32)")
    export.add_argument("--overwrite", action="store_true", help="replace an adapter in OUT")
    command(_verify, "load an adapter on a base model", adapter=either, model=f"{either} of the base model")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _plan(options: argparse.Namespace) -> None:
    model = skeleton(AutoConfig.from_pretrained(options.model))
    fields = {"r": options.r}
    if options.target_modules:
        fields["target_modules"] = options.target_modules
    names = resolve_target_modules(model, TinyLoraConfig(**fields))
    n_modules = len(names)
    budgets = options.values or sorted({1, 2, 4, 7, 13, 25, 49, 98, n_modules, 2 * n_modules, 4 * n_modules})
    print(f"{options.model}: {n_modules} modules at r={options.r}")
    row = "{:<10} {:>7} {:>8} {:>5} {:>6} {:>6}  {}"
    print(row.format("tying", "values", "bytes", "u", "n_tie", "groups", "config"))
    for tying in TYINGS:
        seen = set()
        for budget in budgets:
            config = TinyLoraConfig.for_budget(model, budget, tying=tying, **fields)
            groups = count_groups(names, config.n_tie, tying)
            values = groups * config.u
            if values in seen:
                continue
            seen.add(values)
            line = _config_line(config, fields)
            print(row.format(tying, values, 4 * values, config.u, str(config.n_tie), groups, line))


def _config_line(config: TinyLoraConfig, asked_for: dict) -> str:
    plain = TinyLoraConfig()
    wanted = {"u": config.u, "n_tie": config.n_tie, "tying": config.tying, **asked_for}
    return f"TinyLoraConfig({', '.join(f'{k}={v!r}' for k, v in wanted.items() if v != getattr(plain, k))})"


def _inspect(options: argparse.Namespace) -> None:
    folder = _adapter_folder(options.adapter)
    fields = read_config(folder)
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}.")
    if fields.get("peft_type") == TinyLoraPeftType.TRL_TINYLORA.value:
        # Says which of the two files is damaged.
        TinyLoraConfig.from_pretrained(str(folder))
    tensors = read_tensors(path)
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    print(f"type: {fields.get('peft_type')}")
    print(f"base model: {fields.get('base_model_name_or_path')}")
    print(f"file: {path.stat().st_size} bytes, {n_bytes} of them tensors")
    print(f"config: {', '.join(f'{name}={value!r}' for name, value in sorted(fields.items()) if value is not None)}")
    for name, tensor in sorted(tensors.items()):
        is_listed = tensor.is_floating_point() and tensor.numel() <= MOST_VALUES
        values = f", values {' '.join(f'{value:.6g}' for value in tensor.flatten().tolist())}" if is_listed else ""
        print(f"{name}: {str(tensor.dtype).removeprefix('torch.')}, shape {tuple(tensor.shape)}{values}")


def _export(options: argparse.Namespace) -> None:
    folder = _adapter_folder(options.adapter)
    fields = read_config(folder)
    how = {"dtype": DTYPE_NAMES[options.dtype], "overwrite": options.overwrite}
    base = options.base or fields.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / CONFIG_NAME} names no base model. Name it with `--base`.")
    if fields.get("peft_type") == PeftType.TINYLORA.value:
        convert_peft_tinylora(folder, options.out, model=AutoConfig.from_pretrained(base), **how)
    else:
        TinyLoraConfig.from_pretrained(str(folder))
        export_lora(_load(folder, base), options.out, **how)
    print(f"wrote {options.out}: {(Path(options.out) / SAFETENSORS_WEIGHTS_NAME).stat().st_size} bytes")


def _verify(options: argparse.Namespace) -> None:
    folder = _adapter_folder(options.adapter)
    read_config(folder)
    TinyLoraConfig.from_pretrained(str(folder))
    model = _load(folder, options.model)
    n_modules = sum(isinstance(module, Linear) for module in model.modules())
    n_values = sum(p.numel() for name, p in model.named_parameters() if "lora_magnitude_vector" in name)
    print(f"OK: {n_values} values on {n_modules} modules of {options.model}")


def _load(folder: Path, base: str) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))


def _adapter_folder(name: str) -> Path:
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]))
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} is no folder, and not to be had from the Hub: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
