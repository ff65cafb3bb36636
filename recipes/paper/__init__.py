"""The paper's experiments: its published numbers beside our own, and the memory that they need by arithmetic."""
