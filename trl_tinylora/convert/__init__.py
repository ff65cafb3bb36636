"""Adapters as plain LoRA."""
