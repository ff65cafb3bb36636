"""What `evaluate.py` and a comparison share: completions are generated, kept, graded and counted."""
