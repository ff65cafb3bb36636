"""The PEFT tuner: what is adapted, the trained values, the forward and backward pass, merging."""
