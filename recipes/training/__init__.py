"""What `grpo.py` and `sft.py` share: their arguments, and what they add to TRL's trainers."""
