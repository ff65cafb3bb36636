"""Evolution of an adapter's values: what `es.py` is made of."""
