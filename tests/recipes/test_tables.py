"""The generated tables in the recipes' READMEs."""

import tables


def test_every_generated_table_is_current():
    documents = tables.documents()
    assert len(documents) == 16
    for path, text in documents.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python recipes/tables.py"
