"""
The command line: `python -m trl_tinylora plan | inspect | export | verify | run`.

Exit status 0 where all went well, 1 with one line on stderr where something is wrong, 2 for a wrong command line.

What takes seconds to import is imported by the command that needs it, once its arguments are known to be right.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Optional

from safetensors import SafetensorError

from .sources import ADAPTER_FILE, WEIGHTS_FILE, refuse_unfit_adapter, refuse_unfit_base


if TYPE_CHECKING:
    from peft import PeftModel

    from .config import TinyLoraConfig


OWN_TYPE = "TRL_TINYLORA"
FORMATS = ("peft", "gguf")
DTYPE_NAMES = ("float32", "float16", "bfloat16")
# Tensors of more values are not listed.
MOST_VALUES = 64
# Of a configuration, what is shown in another line, or is long and says nothing to a reader.
NOT_LISTED = ("peft_type", "base_model_name_or_path", "base_fingerprint", "singular_bases")
WRITTEN = ("checkpoint_format", "checkpoint_digest", "singular_bases", "base_fingerprint")
# What wrong input raises here, in PEFT, in transformers and on the Hub. Anything else is a bug: its traceback is shown.
EXPECTED = (ValueError, TypeError, KeyError, OSError, RuntimeError, ImportError, SafetensorError)


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
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["run"] and arguments[1:] not in ([], ["-h"], ["--help"]):
        # What follows is another program's, whose errors are its own.
        return _run(arguments[1:])
    options = _parser().parse_args(arguments)
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
    experts = "fused experts to adapt as well (default none)"
    plan.add_argument("--target_parameters", nargs="+", metavar="NAME", help=experts)
    command(_inspect, "what an adapter folder holds", adapter=either)
    about = "write an adapter (also one of PEFT's TINYLORA) as a plain LoRA"
    export = command(_export, about, adapter=either, out="folder to write, or a .gguf file with `--format gguf`")
    formats = "a folder of PEFT's, or a file of llama.cpp's (default peft)"
    export.add_argument("--format", choices=FORMATS, default="peft", help=formats)
    export.add_argument("--base", metavar="MODEL", help="base model (default: the one that the adapter names)")
    export.add_argument("--dtype", choices=DTYPE_NAMES, default="float32", help="of the file (default float32)")
    export.add_argument("--overwrite", action="store_true", help="replace an adapter at OUT")
    command(_verify, "load an adapter on a base model", adapter=either, model=f"{either} of the base model")
    what = "program that loads an adapter by PEFT: a script, or `-m` and a module, with its own arguments"
    command(_run, "run another program, for which PEFT knows the adapters' type", program=what)
    return parser


def _run(command: Sequence[str]) -> int:
    """Runs a script, or the module behind `-m`, as Python itself would."""
    is_module = command[0] == "-m"
    name, *own = command[1:] if is_module and len(command) > 1 else command
    if not (_is_module(name) if is_module else os.path.isfile(name)):
        print(f"error: there is no {'module' if is_module else 'file'} {name!r} to run", file=sys.stderr)
        return 1
    from .registration import register

    register()
    sys.argv = [name, *own]
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(name)))
        runpy.run_path(name, run_name="__main__")
    return 0


def _is_module(name: str) -> bool:
    """Whether there is a module of this name; its packages are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return False


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text!r}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _register_quietly() -> None:
    """Makes PEFT know the adapters' type, and keeps bars and remarks of the libraries out of what is printed."""
    import huggingface_hub
    import transformers

    from .registration import register

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    register()


def _plan(options: argparse.Namespace) -> None:
    refuse_unfit_base(options.model)
    _register_quietly()
    from transformers import AutoConfig

    from .config import TinyLoraConfig
    from .maths.tying import TYINGS, count_groups
    from .tuner.targets import resolve_target_modules, skeleton

    model = skeleton(AutoConfig.from_pretrained(options.model))
    fields = {"r": options.r, "target_parameters": options.target_parameters}
    if options.target_modules:
        fields["target_modules"] = options.target_modules
    names = resolve_target_modules(model, TinyLoraConfig(**fields))
    n_modules = len(names)
    budgets = options.values or sorted({1, 2, 4, 7, 13, 25, 49, 98, n_modules, 2 * n_modules, 4 * n_modules})
    print(f"{options.model}: {n_modules} modules at r={options.r}")
    row = "{:<10} {:>7} {:>8} {:>5} {:>6} {:>6}  {}"
    print(row.format("tying", "values", "bytes", "u", "n_tie", "groups", "config"))
    remarks = []
    for tying in TYINGS:
        seen = set()
        for budget in budgets:
            config = TinyLoraConfig.for_budget(model, budget, tying=tying, **fields)
            groups = count_groups(names, config.n_tie, tying)
            values = groups * config.u
            if values != budget and options.values:
                remarks.append(f"no configuration has {budget} values with tying={tying!r}; the nearest has {values}")
            if values in seen:
                continue
            seen.add(values)
            line = _config_line(config, fields)
            print(row.format(tying, values, 4 * values, config.u, str(config.n_tie), groups, line))
    for remark in remarks:
        print(remark)


def _config_line(config: TinyLoraConfig, asked_for: dict) -> str:
    plain = type(config)()
    wanted = {"u": config.u, "n_tie": config.n_tie, "tying": config.tying, **asked_for}
    return f"TinyLoraConfig({', '.join(f'{k}={v!r}' for k, v in wanted.items() if v != getattr(plain, k))})"


def _inspect(options: argparse.Namespace) -> None:
    folder, fields = _read_adapter(options.adapter)
    from .storage.checkpoint import VALUES, function_of, own_tensors, read_tensors, refuse_altered
    from .validation import refuse_wrong_written_fields

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS_FILE}.")
    is_own = fields.get("peft_type") == OWN_TYPE
    tensors = read_tensors(path)
    if is_own:
        try:
            refuse_wrong_written_fields(SimpleNamespace(**dict.fromkeys(WRITTEN) | fields))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / ADAPTER_FILE}: {error}") from error
        refuse_altered(own_tensors(tensors), fields.get("checkpoint_digest"), function_of(fields), str(path))
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    print(f"type: {fields.get('peft_type')}")
    print(f"base model: {fields.get('base_model_name_or_path')}")
    print(f"file: {path.stat().st_size} bytes, {n_bytes} of them tensors")
    if is_own:
        (values_GK,) = (tensor for name, tensor in tensors.items() if name.endswith(VALUES))
        base = fields.get("base_fingerprint") or {}
        print(
            f"values: {values_GK.numel()} (groups: {len(values_GK)}, u={fields.get('u')}), r={fields.get('r')}, "
            f"n_tie={fields.get('n_tie')}, tying={fields.get('tying')}, on {base.get('modules', 'unknown')} modules"
        )
    listed = {name: value for name, value in sorted(fields.items()) if value is not None and name not in NOT_LISTED}
    print(f"config: {', '.join(f'{name}={value!r}' for name, value in listed.items())}")
    for name, tensor in sorted(tensors.items()):
        if not tensor.numel():
            continue
        is_listed = tensor.is_floating_point() and tensor.numel() <= MOST_VALUES
        values = f", values {' '.join(f'{value:.6g}' for value in tensor.flatten().tolist())}" if is_listed else ""
        print(f"{name}: {str(tensor.dtype).removeprefix('torch.')}, shape {tuple(tensor.shape)}{values}")


def _export(options: argparse.Namespace) -> None:
    _refuse_to_write_over(options.out, options.adapter)
    folder, fields = _read_adapter(options.adapter)
    base = fields.get("base_model_name_or_path") if options.base is None else options.base
    if not isinstance(base, str):
        raise ValueError(f"{folder / ADAPTER_FILE} names no base model (got {base!r}). Name it with `--base`.")
    _refuse_to_write_over(options.out, base)
    refuse_unfit_base(base)
    _register_quietly()
    import torch
    from peft import PeftType
    from transformers import AutoConfig

    from .convert.gguf import export_gguf, import_gguf, writable
    from .convert.lora import export_lora
    from .convert.peft_tinylora import convert_peft_tinylora

    how = {"dtype": getattr(torch, options.dtype), "overwrite": options.overwrite}
    is_of_peft = fields.get("peft_type") == PeftType.TINYLORA.value
    if options.format == "gguf":
        if is_of_peft:
            raise ValueError(
                f"{folder} holds an adapter of PEFT's own TinyLoRA, which is not written as GGUF. Export it with "
                "`--format peft` and convert that folder with llama.cpp's convert_lora_to_gguf.py."
            )
        import_gguf()
        written = writable(options.out, options.overwrite)
        export_gguf(_load(folder, fields, base), options.out, **how)
    else:
        written = Path(options.out) / WEIGHTS_FILE
        if is_of_peft:
            convert_peft_tinylora(folder, options.out, model=AutoConfig.from_pretrained(base), **how)
        else:
            export_lora(_load(folder, fields, base), options.out, **how)
    print(f"wrote {options.out}: {written.stat().st_size} bytes")


def _refuse_to_write_over(out: str, read: str) -> None:
    if os.path.exists(out) and os.path.exists(read) and os.path.samefile(out, read):
        raise ValueError(f"{out} is read, and would be written over. Name another folder to write.")


def _verify(options: argparse.Namespace) -> None:
    refuse_unfit_adapter(options.adapter)
    refuse_unfit_base(options.model)
    folder, fields = _read_adapter(options.adapter)
    _register_quietly()

    model = _load(folder, fields, options.model)
    n_modules = len(model.base_model.bank.vectors("default").plan.index)
    n_values = sum(p.numel() for name, p in model.named_parameters() if "lora_magnitude_vector" in name)
    print(f"OK: {n_values} values on {n_modules} modules of {options.model}")


def _load(folder: Path, fields: dict, base: str) -> PeftModel:
    """The base model with the adapter. What tells another base is compared before singular vectors are computed."""
    if fields.get("peft_type") != OWN_TYPE:
        raise ValueError(f"{folder} holds an adapter of type {fields.get('peft_type')}, not {OWN_TYPE}.")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from .config import TinyLoraConfig
    from .storage.fingerprint import probes_needed, refuse_another_base, take_probe
    from .tuner.targets import resolve_target_modules
    from .tuner.weights import each_matrix

    config = TinyLoraConfig.from_pretrained(str(folder))
    try:
        model = AutoModelForCausalLM.from_pretrained(base)
    except SafetensorError as error:
        raise ValueError(f"the weights of {base} are no complete safetensors file: {error}") from error
    if config.base_fingerprint is not None:
        names = resolve_target_modules(model, config)
        count = probes_needed(len(names))
        try:
            refuse_another_base(
                config.base_fingerprint,
                {name: take_probe(name, weight_OI, count) for name, weight_OI in each_matrix(model, names)},
            )
        except ValueError as error:
            own = config.base_model_name_or_path or "the model that it was trained on"
            raise ValueError(
                f"{base} is not the base model of {folder}: {error}. Name {own} as it was then, quantised in the same "
                "way if it was."
            ) from error
    return PeftModel.from_pretrained(model, str(folder))


def _read_adapter(name: str) -> tuple[Path, dict]:
    """The folder of an adapter, downloaded where it is on the Hub, and the fields of its configuration."""
    refuse_unfit_adapter(name)
    from .storage.checkpoint import read_fields

    folder = Path(name if os.path.isdir(name) else _download(name))
    return folder, read_fields(folder / ADAPTER_FILE)


def _download(name: str) -> str:
    import huggingface_hub

    huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub.snapshot_download(name, allow_patterns=[ADAPTER_FILE, WEIGHTS_FILE])


if __name__ == "__main__":
    sys.exit(main())
