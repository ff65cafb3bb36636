"""The file of completions. CPU, seconds."""

import pytest
from evaluation.completions import CompletionsFile, read_lines


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text('{"kind": "greedy"}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_lines(path)
    path.write_text('{"kind": "greedy"}\n{"kin')
    assert read_lines(path) == [{"kind": "greedy"}]


def test_completions_are_in_the_file_before_the_next_batch_begins(tmp_path):
    path = tmp_path / "folder" / "completions.jsonl"
    kept = CompletionsFile(path, {"a": 1})
    kept.append([{"kind": "sampled", "problem": 1, "sample": 0}])
    assert len(read_lines(path)) == 1
    kept.append([{"kind": "greedy", "problem": 0, "sample": 0}])
    assert [line["kind"] for line in read_lines(path)] == ["sampled", "greedy"]
    again = CompletionsFile(path, {"a": 1})
    assert [line["kind"] for line in read_lines(path)] == ["greedy", "sampled"]
    assert again.is_done("greedy", [0], 1) and not again.is_done("greedy", [0, 1], 1)
    assert not again.is_done("sampled", [1], 2)
