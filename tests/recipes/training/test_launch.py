"""Where a training continues, and what it never writes over."""

from pathlib import Path

import pytest
import sft
import trl
import yaml
from training.launch import resume_point


TOY = Path(__file__).parents[3] / "recipes" / "toy"


def parse(name, output_dir, **changes):
    settings = yaml.safe_load((TOY / f"{name}.yaml").read_text()) | changes | {"output_dir": str(output_dir)}
    return trl.TrlParser(sft.ARGUMENTS).parse_dict(settings)


def test_a_run_is_never_written_over(tmp_path):
    _, training_args, *_ = parse("sft", tmp_path)
    assert resume_point(training_args) is None
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(FileExistsError, match="interrupted run.*--resume_from_checkpoint true"):
        resume_point(training_args)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileExistsError, match="a finished run: choose another --output_dir"):
        resume_point(training_args)
    training_args.resume_from_checkpoint = "true"
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        resume_point(training_args)
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{}")
    # Written before it, but not to the end.
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text('{"step')
    assert resume_point(training_args) == str(tmp_path / "checkpoint-10")
    training_args.resume_from_checkpoint = str(tmp_path / "checkpoint-20")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        resume_point(training_args)
    training_args.resume_from_checkpoint = str(tmp_path / "checkpoint-11")
    with pytest.raises(FileNotFoundError, match="checkpoint-11"):
        resume_point(training_args)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    _, training_args, *_ = parse("sft", tmp_path, resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resume_point(training_args)
