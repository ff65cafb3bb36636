"""Tasks: the one place for a data set's prompt, gold answer, grading and reward, shared by RL, SFT and evaluation.

Nothing here imports the rest of the package: the toy's base is pretrained with these modules where there is no PEFT.
"""

import importlib
from types import ModuleType


TASKS = ("gsm8k", "math")


def get_task(name: str) -> ModuleType:
    """The module of a task: `build_prompt`, `gold_answer`, `grade`, `has_marker`, the rewards and the loading.

    Args:
        name (`str`): One of [`TASKS`].
    Returns:
        `module`: [`~trl_tinylora.tasks.gsm8k`] or [`~trl_tinylora.tasks.math`].
    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return importlib.import_module(f".{name}", __name__)
