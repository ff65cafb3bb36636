"""
What a saved adapter weighs, and what is left of it where the base model is loaded in another dtype.

    python recipes/benchmark.py saved --model FOLDER  # a pretrained model; the embedded toy by default

An adapter of random values is saved on the model in one dtype and loaded on it in another. The base model's own logits
change by rounding then; the adapted model's must not change by more than that.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from benchmarks.harness import Row, parser_of, run
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from trl_tinylora import TinyLoraConfig


TOY = Path(__file__).parents[1] / "toy" / "base"
# Standard deviation of the values: of the order of what training gives.
SIZE = 0.05


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: int) -> torch.Tensor:
    """Logits of one sequence of random tokens, float32."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    return model.eval()(input_ids=ids).logits.float()


def load_base(folder: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model without an adapter."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def measure_dtypes(arguments: argparse.Namespace, saved: torch.dtype, loaded: torch.dtype) -> tuple[Row, dict]:
    """Saves in one dtype and loads in another; a row for the logits, and the folder's bytes and bases."""
    with tempfile.TemporaryDirectory() as folder:
        bases = [logits_of(load_base(arguments.model, dtype), arguments.tokens) for dtype in (saved, loaded)]
        config = TinyLoraConfig.for_budget(load_base(arguments.model, saved).config, 13, exact=True)
        model = get_peft_model(load_base(arguments.model, saved), config)
        (values,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
        torch.nn.init.normal_(values, std=SIZE, generator=torch.Generator().manual_seed(1))
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(load_base(arguments.model, loaded), folder)
        adapted = [logits_of(found, arguments.tokens) for found in (model, again)]
        sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    changes = {"adapted": (adapted[1] - adapted[0]).norm().item(), "base": (bases[1] - bases[0]).norm().item()}
    ratio = changes["adapted"] / changes["base"]
    names = [str(dtype).removeprefix("torch.") for dtype in (saved, loaded)]
    row = Row(
        claim=f"saved on a base in {names[0]}, loaded on it in {names[1]}: by how much the logits change",
        ours=changes["adapted"],
        theirs=changes["base"],
        whose="the base model's own logits",
        ratio=ratio,
        bound="at most 1.5",
        holds=ratio <= 1.5,
    )
    plan = model.base_model.bank.plans[0]
    effect = (adapted[0] - bases[0]).norm().item()
    found = {"bytes": sizes, "modules": len(plan.index), "bases": len(plan.singular_bases), "effect": effect}
    return row, found | changes


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Both directions, and the bytes of the folder."""
    dtypes = {"float32 to bfloat16": (torch.float32, torch.bfloat16), "back": (torch.bfloat16, torch.float32)}
    found = {name: measure_dtypes(arguments, *pair) for name, pair in dtypes.items()}
    details = {name: detail for name, (_, detail) in found.items()}
    first = details["float32 to bfloat16"]
    of_model = f"13 values on {Path(arguments.model).name}, {first['modules']} modules"
    weights, config = (first["bytes"][name] for name in ("adapter_model.safetensors", "adapter_config.json"))
    rows = [
        Row(f"file of {of_model}", weights, unit="bytes", bound="less than 1000", holds=weights < 1000),
        Row(f"its adapter_config.json, with the bases of {first['bases']} modules", config, unit="bytes"),
    ]
    return [*rows, *(row for row, _ in found.values())], details


def main() -> None:
    """Measures, prints, writes."""
    parser = parser_of(__doc__, "saved")
    parser.add_argument("--model", default=str(TOY), help="folder of a pretrained model")
    parser.add_argument("--tokens", type=int, default=64, help="length of the sequence")
    run("saved", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
