"""How results are written down: files that are whole or not there, where a number comes from, sections of documents."""
