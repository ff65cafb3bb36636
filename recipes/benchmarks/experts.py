"""
What an adapter on fused experts costs in a training step: memory and time beside PEFT's LoRA with `target_parameters`.

    python recipes/benchmark.py experts

A Qwen3-MoE with random weights, forward and backward pass of one sequence, without checkpointing; the
frozen base's step has a gradient for its inputs too. Memory follows from the sizes alone; time from the routing as
well, which is random here. Two minutes on one CPU core.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import peft
import torch
from benchmarks.harness import Row, in_turns, parser_of, peak_bytes, ratio_of, run
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_tinylora import TinyLoraConfig


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS = {
    "ours": TinyLoraConfig(target_modules=[], target_parameters=PARAMETERS),
    "LoRA r=1": peft.LoraConfig(r=1, target_modules=[], target_parameters=PARAMETERS),
}


def mixture(arguments: argparse.Namespace) -> Qwen3MoeForCausalLM:
    """The base, the same for each adapter."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.chosen,
    )
    model = Qwen3MoeForCausalLM(config).requires_grad_(False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def step(model: torch.nn.Module, embeddings: torch.Tensor) -> None:
    """Forward and backward pass of one sequence, by its embeddings, which need a gradient in every model alike."""
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    model.zero_grad()
    embeddings.grad = None


def steps(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[], None]], int]:
    """A training step of the frozen base and of each adapter, as calls, and the bytes of the experts' weights."""
    models = {"base": mixture(arguments)}
    models |= {name: peft.get_peft_model(mixture(arguments), config) for name, config in CONFIGS.items()}
    device = next(models["base"].parameters()).device
    embeddings = torch.randn(1, arguments.tokens, arguments.hidden, device=device).requires_grad_()
    experts = sum(p.nbytes for name, p in models["base"].named_parameters() if p.ndim == 3)
    return {name: partial(step, model, embeddings) for name, model in models.items()}, experts


def measure(arguments: argparse.Namespace) -> tuple[list[Row], dict]:
    """All figures and their rows."""
    actions, experts = steps(arguments)
    times = in_turns(actions, arguments.repeats)
    peaks = {name: peak_bytes(action) for name, action in actions.items()}
    of = f"{arguments.layers} layers of {arguments.experts} experts, {arguments.tokens} tokens"
    ours, theirs = (peaks[name] - peaks["base"] for name in CONFIGS)
    claim, bound = f"fused experts: peak memory beyond the frozen base's step, {of}", "less than theirs"
    rows = [Row(claim, ours, theirs, "LoRA r=1", "bytes", ours / theirs, [], bound, ours < theirs)]
    for whose in ("base", "LoRA r=1"):
        ratio, spread = ratio_of(times["ours"], times[whose])
        ours, theirs = (statistics.median(times[name]) for name in ("ours", whose))
        named = "the frozen base" if whose == "base" else whose
        rows.append(Row(f"fused experts: a training step, {of}", ours, theirs, named, "s", ratio, spread))
    return rows, {"seconds": times, "peak_bytes": peaks, "experts_bytes": experts}


def main() -> None:
    """Measures and writes the record."""
    parser = parser_of(__doc__, "experts")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size")
    parser.add_argument("--intermediate", type=int, default=256, help="width of an expert")
    parser.add_argument("--layers", type=int, default=2, help="layers")
    parser.add_argument("--experts", type=int, default=64, help="experts of a layer")
    parser.add_argument("--chosen", type=int, default=8, help="experts of a token")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the sequence")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in turns")
    run("experts", parser.parse_args(), measure)


if __name__ == "__main__":
    main()
