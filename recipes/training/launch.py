"""What is refused before a training starts, and the checkpoint that it continues from."""

import json
import os
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME


def refuse_miscounted_processes(training_args: TrainingArguments) -> None:
    """
    Raises where the processes of a launch do not see each other: each would train on all rows by itself.

    Args:
        training_args ([`~transformers.TrainingArguments`]): Read for `world_size`.
    Raises:
        RuntimeError: If the launcher started another number of processes than the trainer counts.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != training_args.world_size:
        raise RuntimeError(
            f"the launcher started {started} processes, but the trainer counts {training_args.world_size}. Without a "
            "GPU, DeepSpeed needs `use_cpu: true` in the YAML (or --use_cpu true)."
        )


def resume_point(training_args: TrainingArguments) -> str | None:
    """
    The checkpoint where the trainer continues, and the refusal to write over what is already in the output folder.

    Args:
        training_args ([`~transformers.TrainingArguments`]): Read for `output_dir` and `resume_from_checkpoint`.
    Returns:
        `str` or `None`: For `trainer.train(resume_from_checkpoint=...)`: a checkpoint (for "true" the last complete one
        in the output folder), or `None` for a new run.
    Raises:
        FileExistsError: If a new run would write over a finished or an interrupted one.
        FileNotFoundError: If there is no checkpoint to continue from.
    """
    output_dir = Path(training_args.output_dir)
    # The trainer's own; somebody's "checkpoint-best" has no place in their order.
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    checkpoints = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    wanted = str(training_args.resume_from_checkpoint or "false")
    # The trainer takes the text "true", all that a command line can give, for the name of a folder.
    if wanted.lower() == "true":
        complete = [path for path in checkpoints if _is_complete(path)]
        if not complete:
            raise FileNotFoundError(
                f"resume_from_checkpoint is true, but output_dir={training_args.output_dir!r} holds no "
                f"{'complete ' if checkpoints else ''}checkpoint: start anew without it, in another folder if this one "
                "is not empty (checkpoints are written where save_strategy is 'steps' or 'epoch')"
            )
        return str(complete[-1])
    if wanted.lower() != "false":
        if not Path(wanted).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint={wanted!r} is no folder")
        if not _is_complete(Path(wanted)):
            raise FileNotFoundError(
                f"resume_from_checkpoint={wanted!r} is no complete checkpoint: its writing was interrupted. Take an "
                "earlier one; 'true' takes the last complete one in output_dir"
            )
        return wanted
    is_finished = any((output_dir / name).exists() for name in ("adapter_config.json", "config.json"))
    if is_finished or checkpoints:
        state = "a finished run" if is_finished else "the checkpoints of an interrupted run"
        raise FileExistsError(
            f"output_dir={training_args.output_dir!r} already holds {state}: choose another --output_dir, delete "
            "the folder" + (", or continue with --resume_from_checkpoint true" if checkpoints else "")
        )
    return None


def _is_complete(checkpoint: Path) -> bool:
    """Whether the trainer had finished writing it: its state is the last file (transformers 5.23, trainer.py:3409)."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
