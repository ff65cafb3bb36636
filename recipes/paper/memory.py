"""Arithmetic of memory: what TRL and TinyLoRA keep on each GPU, by model size and launcher. Loads no weights.

Bytes are counted from the shapes of the published configurations; activations are an estimate, by the formula in
`_activation_bytes`. Nothing here was measured.
"""

from dataclasses import dataclass

from transformers import Qwen2Config

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tuner.targets import resolve_target_modules, skeleton


BYTES_BF16, BYTES_FP32 = 2, 4
TOKENS = 4096
GPUS = (2, 4, 8)
VALUES = 13

# config.json of Qwen/Qwen2.5-*-Instruct: hidden, layers, heads, key-value heads, intermediate, vocabulary, tied.
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False),
}


@dataclass(frozen=True)
class Sizes:
    """Bytes on each GPU.

    Args:
        weights (`int`): All frozen weights in bfloat16.
        adapted (`int`): Those of the adapted modules among them.
        largest (`int`): The largest single weight: what ZeRO-3 and FSDP2 hold whole at least.
        factors (`int`): U S and V^T of every adapted module in float32, on every GPU.
        values (`int`): The trained values with gradient and Adam's two moments, in float32.
        activations (`int`): Estimate for one micro-batch of `TOKENS` tokens with activation checkpointing.
    """

    weights: int
    adapted: int
    largest: int
    factors: int
    values: int
    activations: int


def _activation_bytes(hidden: int, layers: int, intermediate: int, vocabulary: int, tokens: int) -> int:
    """Estimate: each block's input, the inside of one block, and logits with their gradient in float32."""
    return tokens * (BYTES_BF16 * (hidden * layers + 8 * hidden + 3 * intermediate) + 2 * BYTES_FP32 * vocabulary)


def config_of(shape: tuple) -> Qwen2Config:
    """
    A model's configuration.

    Args:
        shape (`tuple`): A row of `SHAPES`.
    Returns:
        [`~transformers.Qwen2Config`]
    """
    hidden, layers, heads, key_value_heads, intermediate, vocabulary, tied = shape
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def count(shape: tuple) -> Sizes:
    """
    Counts a model's bytes from its shapes.

    Args:
        shape (`tuple`): A row of `SHAPES`.
    Returns:
        `Sizes`
    """
    hidden, layers, _, _, intermediate, vocabulary, _ = shape
    model = skeleton(config_of(shape))
    adapter = TinyLoraConfig()
    adapted = [model.get_submodule(name) for name in resolve_target_modules(model, adapter)]
    return Sizes(
        weights=BYTES_BF16 * sum(parameter.numel() for parameter in model.parameters()),
        adapted=BYTES_BF16 * sum(module.weight.numel() for module in adapted),
        largest=BYTES_BF16 * max(parameter.numel() for parameter in model.parameters()),
        factors=BYTES_FP32 * adapter.r * sum(sum(module.weight.shape) for module in adapted),
        values=4 * BYTES_FP32 * VALUES,
        activations=_activation_bytes(hidden, layers, intermediate, vocabulary, TOKENS),
    )


def table() -> str:
    """The table as Markdown, in GB (1e9 bytes)."""
    sharded = " | ".join(f"sharded over {gpus}" for gpus in GPUS)
    lines = [
        f"| Qwen2.5 | weights | factors | {VALUES} values with Adam | activations | a GPU, whole | {sharded} "
        "| more while weights go to vLLM |",
        "|---|" + "--:|" * (6 + len(GPUS)),
    ]
    for name, shape in SHAPES.items():
        sizes = count(shape)
        fixed = sizes.factors + sizes.values + sizes.activations
        cells = [
            f"{sizes.weights / 1e9:.1f}",
            f"{sizes.factors / 1e9:.3f}",
            f"{sizes.values} bytes",
            f"{sizes.activations / 1e9:.1f}",
            f"**{(sizes.weights + fixed) / 1e9:.0f}**",
            *(f"{(sizes.weights / gpus + sizes.largest + fixed) / 1e9:.0f}" for gpus in GPUS),
            f"{sizes.adapted / 1e9:.1f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
