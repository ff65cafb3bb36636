"""The model card's section that says how an adapter was trained."""

from records.provenance import read_provenance
from transformers import Trainer


def describe_training(trainer: Trainer, dataset_name: str) -> str:
    """
    How an adapter was trained, for its model card.

    Args:
        trainer ([`~transformers.Trainer`]): After training.
        dataset_name (`str`): Name or path of the rows.
    Returns:
        `str`: Markdown.
    """
    args, last = trainer.args, (trainer.state.log_history or [{}])[-1]
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if isinstance(value, (int, float)))
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return (
        f"## Training\n\n{type(trainer).__name__} on `{dataset_name}`: {trainer.state.global_step} steps of {batch} "
        f"rows (of completions in RL), {args.world_size} process{'es' if args.world_size > 1 else ''}, learning rate "
        f"{args.learning_rate:g} ({schedule}), seed {args.seed}. {made_with()}.\n\nLast record: {metrics}."
    )


def made_with() -> str:
    """Returns the versions and the commit that something is made with."""
    made = read_provenance()
    commit = f", commit {made['git']['commit'][:12]}" if made["git"] else ""
    return ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers", "trl", "peft")) + commit
