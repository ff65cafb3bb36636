"""RL: TRL's `GRPOTrainer`, unmodified, on problems with a checkable answer.

    python recipes/grpo.py --config recipes/toy/grpo.yaml --output_dir results/grpo-13
    accelerate launch --config_file recipes/accelerate/single.yaml recipes/grpo.py --config recipes/toy/grpo.yaml

Differs from `sft.py` in the trainer, its arguments, the reward, the columns of the rows, what vLLM samples from and
what is logged of its weights; every other line is equal.
"""

import trl
from training.arguments import AdapterArguments, RLArguments, build_peft_config
from training.callbacks import callbacks_for
from training.card import describe_training
from training.launch import prepare, refuse_another_adapter, run
from training.rate import set_learning_rate

from trl_tinylora import SamplingFidelityCallback, TinyLoraConfig
from trl_tinylora.storage.card import put_section
from trl_tinylora.tasks import get_task


ARGUMENTS = (RLArguments, trl.GRPOConfig, trl.ModelConfig, AdapterArguments)


def main(
    script_args: RLArguments,
    training_args: trl.GRPOConfig,
    model_args: trl.ModelConfig,
    adapter_args: AdapterArguments,
) -> trl.GRPOTrainer:
    """
    Trains, and saves the adapter (or the whole model) and the tokenizer into `training_args.output_dir`.

    Args:
        script_args (`RLArguments`): The rows and the reward.
        training_args ([`~trl.GRPOConfig`]): The trainer's own arguments.
        model_args ([`~trl.ModelConfig`]): The model, and the `lora_*` arguments.
        adapter_args (`AdapterArguments`): What is trained.
    Returns:
        [`~trl.GRPOTrainer`]: After training.
    Raises:
        ValueError: If arguments contradict each other, or one is missing or names nothing that can be trained.
        FileExistsError: If the output folder already holds a run.
        FloatingPointError: If the run diverges; what was saved before stays.
    """
    resume_from_checkpoint = prepare(script_args, training_args, model_args, adapter_args)
    peft_config = build_peft_config(adapter_args, model_args)
    rollout = script_args.rollout_function(training_args, adapter_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    } | (training_args.model_init_kwargs or {})

    task = get_task(script_args.task)

    def load(split):
        return task.load_rows(script_args.dataset_name, split, script_args.dataset_config, script_args.limit)

    # Shuffled here, so that with `shuffle_dataset: false` and `train_sampling_strategy: sequential` RL and SFT see the
    # same problems in the same order.
    train_rows = load(script_args.dataset_train_split).shuffle(seed=training_args.seed)
    eval_rows = load(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None
    asked = script_args.system_prompt, script_args.instruction

    trainer = trl.GRPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        reward_funcs=script_args.reward_functions(),
        train_dataset=task.for_rl(train_rows, *asked),
        eval_dataset=task.for_rl(eval_rows, *asked) if eval_rows is not None else None,
        quantization_config=trl.get_quantization_config(model_args),
        peft_config=peft_config,
        rollout_func=rollout,
        callbacks=callbacks_for(adapter_args, training_args, f"{len(train_rows)} rows of {script_args.dataset_name}"),
    )
    if training_args.use_vllm and isinstance(peft_config, TinyLoraConfig):
        trainer.add_callback(SamplingFidelityCallback(trainer))
    refuse_another_adapter(trainer.model, resume_from_checkpoint)
    set_learning_rate(trainer, script_args, train_rows)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    if rollout is not None:
        rollout.close()
    trainer.save_model(training_args.output_dir)
    trainer.save_state()
    if peft_config is not None and trainer.accelerator.is_main_process:
        put_section(training_args.output_dir, "training", describe_training(trainer, script_args.dataset_name))
    trainer.accelerator.print(f"Saved to {training_args.output_dir}", flush=True)
    # The first process writes; the others wait, for the launcher ends all as soon as one is gone in a bad way.
    trainer.accelerator.wait_for_everyone()
    return trainer


if __name__ == "__main__":
    run(main, ARGUMENTS).end()
