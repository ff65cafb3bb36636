"""The benchmarks on the smallest sizes: that they run and write what they print. CPU, seconds."""

import json

from benchmarks.many_adapters import main, make_parser


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
