"""The learning rate of a run that names how far a step shall move the policy, in place of a rate."""

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from training.arguments import RecipeArguments
from trl_tinylora import find_learning_rate
from trl_tinylora.tasks import get_task


# More completions than these move the rate by less than the sampling does.
MOST_PROMPTS = 64
# Whose first step goes as far in every parameter, as the rate supposes.
OPTIMIZERS = ("adam", "lion")


def refuse_unfit_optimizer(script_args: RecipeArguments, training_args: TrainingArguments) -> None:
    """
    Raises where a run names `relative_kl` and an optimiser whose steps go otherwise.

    Args:
        script_args (`RecipeArguments`): With `relative_kl`.
        training_args ([`~transformers.TrainingArguments`]): The trainer's own arguments.
    Raises:
        ValueError: With the way out.
    """
    optimizer = getattr(training_args.optim, "value", training_args.optim)
    if script_args.relative_kl is not None and not any(name in optimizer for name in OPTIMIZERS):
        raise ValueError(f"relative_kl is for Adam and its like, and optim is {optimizer!r}: give a learning_rate")


def set_learning_rate(trainer: Trainer, script_args: RecipeArguments, rows: Dataset) -> None:
    """
    Sets a trainer's learning rate where `relative_kl` asks for one, before it makes its optimiser.

    Args:
        trainer ([`~transformers.Trainer`]): Before training.
        script_args (`RecipeArguments`): With `relative_kl`.
        rows ([`~datasets.Dataset`]): Of the training, in its order, as the task loads them.
    Raises:
        ValueError: As of [`~trl_tinylora.find_learning_rate`].
    """
    if script_args.relative_kl is None:
        return
    args, accelerator = trainer.args, trainer.accelerator
    found = [None]
    if accelerator.is_main_process:
        # A completion's length has no part in the ratio: without a limit of its own, one that most end within.
        limits = {"max_new_tokens": getattr(args, "max_completion_length", 256)}
        limits |= {"temperature": getattr(args, "temperature", 1.0)}
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        first = rows.select(range(min(per_step, MOST_PROMPTS, len(rows))))
        asked = get_task(script_args.task).for_rl(first, script_args.system_prompt, script_args.instruction)["prompt"]
        model, tokenizer = trainer.model, trainer.processing_class
        found = [find_learning_rate(model, tokenizer, asked, relative_kl=script_args.relative_kl, **limits)]
    given = args.learning_rate
    (args.learning_rate,) = broadcast_object_list(found)
    accelerator.print(
        f"Learning rate {args.learning_rate:.3g}, in place of {given:g}: Adam's first step moves the policy by "
        f"{script_args.relative_kl:g} of its entropy",
        flush=True,
    )
