"""
What an adapter adds to a training step: forward and backward pass of a few blocks over frozen weights.

    python recipes/benchmark.py step                             # prints the table and writes results/step.json
    python recipes/benchmark.py step --model FOLDER --layers 6 --output step.json           # on a pretrained model
    python recipes/benchmark.py step --dtypes bfloat16 --hidden 256 --intermediate 1024 --key_values 64 --repeats 9 \
        --output recipes/benchmarks/results/step_bfloat16.json

The same pass runs in turns over the frozen base, ours, PEFT's own TinyLoRA and plain LoRA of rank 1, on the same
weights. The base's backward pass goes to its inputs, as an adapter's has to. What an adapter adds is its time minus the
base's in the same round; what counts is the ratio of the medians of two such differences, with its 95% interval (a
bootstrap of the rounds), in the worst of the kinds of checkpointing. Of bytes, those that autograd keeps for the
backward pass beyond the base's.

Without `--model`, one block of random weights: on a CPU of Qwen2.5-0.5B's shapes by default, on a GPU of Qwen2.5-7B's
with 4096 tokens. About ten minutes on one core of a quiet machine; beside other work its figures mean little. A CPU
without bfloat16 of its own takes twenty times as long in it, in which what an adapter adds is lost: hence the smaller
block of the last command.
"""

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable

import numpy as np
import peft
import torch
from benchmarks.harness import Row, in_turns, parser_of, run
from scipy.stats import bootstrap
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModel, Qwen2Config, Qwen2Model

from trl_tinylora import TinyLoraConfig


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 2
OURS, PEFTS, LORA = "trl_tinylora", "PEFT's TinyLoRA", "LoRA r=1"
MODES = {"no checkpointing": None, "non-reentrant": False, "reentrant": True}
# Ours over theirs.
BOUNDS = {LORA: 1.0, PEFTS: None}


def make_base(arguments: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """The frozen base: the first blocks of a pretrained model, or random ones."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.model:
        base = AutoModel.from_pretrained(arguments.model, num_hidden_layers=arguments.layers, dtype=dtype)
        return base.requires_grad_(False).to(device)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // arguments.head,
        num_key_value_heads=arguments.key_values // arguments.head,
        max_position_embeddings=max(arguments.tokens),
        use_cache=False,
    )
    with torch.device(device):
        return Qwen2Model(config).requires_grad_(False).to(dtype)


def make_models(base: nn.Module) -> dict[str, nn.Module]:
    """The frozen base and its adapted copies, with drawn values."""
    configs = {
        OURS: TinyLoraConfig(r=RANK, target_modules=TARGETS),
        PEFTS: peft.TinyLoraConfig(r=RANK, u=1, weight_tying=0.0, target_modules=TARGETS),
        LORA: peft.LoraConfig(r=1, target_modules=TARGETS),
    }
    models = {"base": base}
    for name, config in configs.items():
        # The same tensors, not copies: one copy lies better in memory than another, which costs a product some percent.
        copied = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        models[name] = peft.get_peft_model(copied, config)
        with torch.no_grad():
            for parameter in models[name].parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.01)
    return models


def set_checkpointing(model: nn.Module, use_reentrant: bool | None) -> None:
    """Turns gradient checkpointing on or off."""
    model.train()
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if use_reentrant is None:
        base.gradient_checkpointing_disable()
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def step_of(model: nn.Module, inputs: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """A forward and a backward pass that leaves nothing behind."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        embedded = inputs.detach().requires_grad_()
        model(inputs_embeds=embedded).last_hidden_state.backward(grad)
        for parameter in trained:
            parameter.grad = None

    return step


def saved_bytes(model: nn.Module, inputs: torch.Tensor) -> int:
    """
    Bytes that autograd keeps between forward and backward pass, each storage once, the model's own tensors left out.

    Args:
        model (`torch.nn.Module`): The base, or an adapted one.
        inputs (`torch.Tensor`): Embedded tokens, shape `(1, tokens, hidden)`.
    Returns:
        `int`
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        # The result holds the graph, and so every storage that was counted: none is freed and counted again.
        output = model(inputs_embeds=inputs.detach().requires_grad_()).last_hidden_state
    del output
    return sum(kept.values())


def overheads(models: dict[str, nn.Module], inputs: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds that each adapter adds to the frozen base's, round by round."""
    grad = torch.randn_like(inputs)
    times = in_turns({name: step_of(model, inputs, grad) for name, model in models.items()}, repeats, warmup=2)
    added = {
        name: [time - base for time, base in zip(seconds, times["base"], strict=True)]
        for name, seconds in times.items()
        if name != "base"
    }
    return {"base": times["base"]} | added


def ratio_of_medians(over: list[float], under: list[float]) -> tuple[float, list[float]]:
    """Ratio of two medians, for differences of times: some denominators of single ratios are near zero."""

    def ratio(over, under, axis=-1):
        return np.median(over, axis) / np.median(under, axis)

    if len(over) == 1:
        return ratio(over, under), []
    found = bootstrap((over, under), ratio, paired=True, vectorized=True, method="percentile", rng=0)
    return float(ratio(over, under)), [float(bound) for bound in found.confidence_interval]


def time_row(added: dict[str, dict[str, list[float]]], setting: str, whose: str) -> Row:
    """What [`overheads`] found in the kind of checkpointing that is worst for us, as a line of the table."""
    ratios = {mode: ratio_of_medians(found[OURS], found[whose]) for mode, found in added.items()}
    worst = max(ratios, key=lambda mode: ratios[mode][0])
    ratio, spread = ratios[worst]
    bound = BOUNDS[whose]
    return Row(
        claim=f"step, {setting}: time added to the frozen base's; worst of {', '.join(added)}: {worst}",
        ours=statistics.median(added[worst][OURS]),
        theirs=statistics.median(added[worst][whose]),
        whose=whose,
        unit="s",
        ratio=ratio,
        spread=spread,
        bound="" if bound is None else f"at most {bound:g}",
        holds=None if bound is None else bool(ratio <= bound),
    )


def byte_row(saved: dict[str, int], setting: str, largest: int) -> Row:
    """What ours keeps for its backward pass beside LoRA's, as a line of the table."""
    ours, theirs = (saved[name] - saved["base"] for name in (OURS, LORA))
    return Row(
        claim=f"step, {setting}: bytes kept for the backward pass beyond the frozen base's",
        ours=ours,
        theirs=theirs,
        whose=LORA,
        unit="bytes",
        ratio=ours / theirs,
        bound=f"ours at most {RANK} numbers for each token and module",
        holds=ours <= largest,
    )


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """Runs all measurements."""
    # PEFT and transformers tell of renamed arguments and experimental parts, not of anything measured here.
    warnings.simplefilter("ignore")
    rows, details = [], {}
    for dtype_name in arguments.dtypes:
        dtype = getattr(torch, dtype_name)
        models = make_models(make_base(arguments, dtype))
        base = models["base"]
        modules = len(TARGETS) * arguments.layers
        for tokens in arguments.tokens:
            inputs = torch.randn(1, tokens, base.config.hidden_size, dtype=dtype, device=base.device)
            setting, added = f"{dtype_name}, {tokens} tokens", {}
            for mode, use_reentrant in MODES.items():
                for model in models.values():
                    set_checkpointing(model, use_reentrant)
                # As long for a short row as for a long one: beside the base's its overhead is lost in the noise first.
                rounds = arguments.repeats * max(arguments.tokens) // tokens
                added[mode] = overheads(models, inputs, rounds)
                if use_reentrant is None:
                    saved = {name: saved_bytes(model, inputs) for name, model in models.items()}
            rows += [time_row(added, setting, whose) for whose in BOUNDS]
            # Bytes are proportional to the tokens: one length says it.
            if tokens == arguments.tokens[0]:
                rows.append(byte_row(saved, setting, modules * tokens * RANK * dtype.itemsize))
            details[setting] = {"seconds_added": added, "saved_bytes": saved}
    return rows, details


def main() -> None:
    """Measures, prints, writes."""
    on_gpu = torch.cuda.is_available()
    parser = parser_of(__doc__, "step")
    parser.add_argument("--model", help="folder of a pretrained model; random weights of these sizes without it:")
    parser.add_argument("--hidden", type=int, default=3584 if on_gpu else 896, help="hidden size")
    parser.add_argument("--key_values", type=int, default=512 if on_gpu else 128, help="width of keys and of values")
    parser.add_argument("--head", type=int, default=128 if on_gpu else 64, help="width of an attention head")
    parser.add_argument("--intermediate", type=int, default=18944 if on_gpu else 4864, help="width of the MLP")
    parser.add_argument("--layers", type=int, default=1, help="number of blocks")
    lengths, dtypes = ([4096], ["float32", "bfloat16"]) if on_gpu else ([256, 1024], ["float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=lengths, help="tokens of the one row; each in turn")
    parser.add_argument("--dtypes", nargs="+", default=dtypes, help="dtypes of the base")
    parser.add_argument("--repeats", type=int, default=21, help="rounds of the longest row; more of others")
    run("step", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
