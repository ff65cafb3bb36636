"""The benchmarks on the smallest sizes: that they run and write what they print. CPU, seconds."""

import json
from pathlib import Path

from benchmarks.many_adapters import as_markdown, main, make_parser, origin
from report import replace_section


ROOT = Path(__file__).parents[2]


def test_many_adapters_measures_both_libraries_and_writes_a_record(tmp_path, capsys):
    path = tmp_path / "results" / "many_adapters.json"
    sizes = "--hidden 64 --layers 1 --adapters 2 --thousands 1 --rows 3 --tokens 4 --new_tokens 2 --repeats 2"

    main(make_parser().parse_args([*sizes.split(), "--output", str(path)]))

    record = json.loads(path.read_text())
    ours, theirs = record["adding"]["trl_tinylora"], record["adding"]["peft"]
    assert ours["trained_values"] == theirs["trained_values"] == 7
    # float32 values and nothing else.
    assert ours["tensor_bytes"] == 7 * 4 < theirs["tensor_bytes"]
    assert record["mixed_batch"]["largest_difference_from_alone"] < 1e-5
    assert record["mixed_batch"]["smallest_effect_of_an_adapter"] > 1e-3
    assert record["provenance"]["versions"]["peft"] is not None
    assert "| PEFT's TinyLoRA |" in capsys.readouterr().out


def test_the_readmes_table_of_many_adapters_is_the_committed_record():
    readme = (ROOT / "README.md").read_text()
    record = json.loads((ROOT / "recipes" / "benchmarks" / "results" / "many_adapters.json").read_text())
    content = f"{as_markdown(record)}\n\n{origin(record)}"
    assert replace_section(readme, "many_adapters", content) == readme, "run `make results`"
    assert not record["provenance"]["git"]["is_dirty"]
