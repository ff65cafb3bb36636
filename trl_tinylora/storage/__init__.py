"""What a saved adapter is, and how it is written and verified."""
