"""Tiny encoder-decoders with random weights, of three families, and what each is called with."""

import torch
import transformers


IDS = torch.randint(6, 60, (2, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(6, 60, (2, 5), generator=torch.Generator().manual_seed(1))
MEL = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SIZES = {f"{stack}_{name}": n for stack in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))}
SIZES |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "vocab_size": 64, "dropout": 0.0}


def t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
    )


def bart():
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(**SIZES, max_position_embeddings=32, init_std=0.2)
    )


def whisper():
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**SIZES, **tokens, num_mel_bins=8, max_source_positions=8)
    )


def sequences(dtype=torch.float32):
    """Tokens for both stacks."""
    return {"input_ids": IDS, "labels": LABELS}


def sound(dtype=torch.float32):
    """A spectrogram for the encoder."""
    return {"input_features": MEL.to(dtype), "labels": LABELS}
