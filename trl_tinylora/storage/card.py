"""The part of a model card that says what an adapter is; what others wrote around it is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

import torch

from .atomic_write import written_whole


CARD = "README.md"
MOST_VALUES = 128


def describe(fields: Mapping, values_GK: torch.Tensor) -> str:
    """
    Returns what an adapter is, for its model card: formula, values, base, how to load it.

    Args:
        fields (`Mapping`): Those of its adapter_config.json.
        values_GK (`torch.Tensor`): The values as they are saved, shape `(groups, u)`.

    Returns:
        `str`: Markdown.
    """
    count, (groups, u) = values_GK.numel(), values_GK.shape
    n_bytes, dtype = values_GK.nbytes, str(values_GK.dtype).removeprefix("torch.")
    base, fingerprint = fields["base_model_name_or_path"], fields["base_fingerprint"]
    revision = f" (revision {fields['revision']})" if fields["revision"] else ""
    listed = "\n".join(" ".join(f"{value:.8g}" for value in row) for row in values_GK.float().tolist())
    tying = fields["tying"]
    if isinstance(tying, dict):
        tying = "tied by " + ", ".join(f"{kind} (`{pattern}`)" for kind, pattern in sorted(tying.items()))
    shown = f"\n```\n{listed}\n```\n" if count <= MOST_VALUES else ""
    return f"""## TinyLoRA

{count} trained value{"s" if count > 1 else ""} ({n_bytes} bytes, {dtype}), by the method of "Learning to Reason in 13 \
Parameters" ([arXiv:2602.04118](https://arxiv.org/abs/2602.04118)): in each of {fingerprint["modules"]} modules

    W' = W + U S (sum_k v_k P_k) V^T

with U, S, V the truncated SVD of W at rank {fields["r"]}, P fixed matrices (seed {fields["projection_seed"]}) and v \
the values: {groups} groups of {u}, n_tie = {fields["n_tie"]}, {tying}.
{shown}
Base model: {f"`{base}`" if base else "not named"}{revision}. `base_fingerprint` in adapter_config.json identifies its \
weights (modules {fingerprint["names"]}); another base is refused.

Loading it takes the package trl-tinylora, which is on no package index: install it from a clone of its repository, \
by `pip install -e .` there.

```python
import trl_tinylora  # registers the adapter's type: without it, PEFT raises KeyError: 'TRL_TINYLORA'
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this/folder/or/repository")
```

A program that loads adapters with PEFT and does not know this package runs by `python -m trl_tinylora run`, as in \
`python -m trl_tinylora run -m lm_eval --model hf --model_args pretrained=BASE,peft=this/folder/or/repository`.
`python -m trl_tinylora export this/folder/or/repository lora` makes a plain LoRA of it, which loads without this \
package."""


def markers(name: str) -> tuple[str, str]:
    """Returns the comments before and after a named part of a Markdown document."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def replaced_section(document: str, name: str, content: str) -> Optional[str]:
    """Returns a Markdown document with new content between the [`markers`] of a part, or None where it lacks them."""
    opening, closing = markers(name)
    before, found, rest = document.partition(opening)
    if not found or closing not in rest:
        return None
    return f"{before}{opening}\n{content}\n{closing}{rest.split(closing, 1)[1]}"


def put_section(folder: str | os.PathLike, name: str, content: str) -> None:
    """Writes a part of a folder's model card: over its former content if there is any, at the end otherwise."""
    path = Path(folder) / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    renewed = replaced_section(card, name, content)
    if renewed is None:
        opening, closing = markers(name)
        renewed = f"{card.rstrip()}\n\n{opening}\n{content}\n{closing}\n".lstrip()
    with written_whole(path) as scratch:
        scratch.write_text(renewed, encoding="utf-8")
