"""TinyLoRA as pure functions of tensors, names and numbers."""
