"""What a model says of completions that something else sampled, and a trainer whose completions are noted."""

import torch
from trl import GRPOConfig, GRPOTrainer

from trl_tinylora import TinyLoraConfig
from trl_tinylora.tasks import gsm8k


TEMPERATURE = 0.8
# Of log-probabilities in float32: seen are 5e-7 where the values are zero, and 3e-5 where the toy has logits of 30.
NOISE = 1e-4


@torch.no_grad()
def logprobs_of(model, prompt_ids, completion_ids, temperature=1.0, **inputs):
    """The log-probability of each token of a completion, in float32, as a tensor."""
    ids = torch.tensor([list(prompt_ids) + list(completion_ids)])
    logits = model(input_ids=ids, **inputs).logits[0, len(prompt_ids) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None])[:, 0]


def distance(model, sampled, temperature=1.0):
    """The largest difference of log-probabilities, over the `prompt_ids`, `completion_ids` and `logprobs` sampled."""
    rows = zip(sampled["prompt_ids"], sampled["completion_ids"], sampled["logprobs"], strict=True)
    return max(
        float((logprobs_of(model, prompt, completion, temperature) - torch.tensor(logprobs)).abs().max())
        for prompt, completion, logprobs in rows
    )


def set_values(model, scale, seed=0, adapter="default"):
    """Values of a TinyLoRA adapter from a normal distribution of this standard deviation."""
    values = model.base_model.bank.trl_tinylora_v[adapter].values_GK
    with torch.no_grad():
        values.copy_(scale * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed)))


class Recorder:
    """An `AdapterRollout` that notes what it returned and how far it was from the trainer's model at that moment."""

    def __init__(self, rollout):
        self.rollout, self.calls = rollout, []

    def __call__(self, prompts, trainer):
        sampled = self.rollout(prompts, trainer)
        values = trainer.model.base_model.bank.vectors("default").whole_values()
        with trainer.model.disable_adapter():
            from_base = distance(trainer.model, sampled, TEMPERATURE)
        self.calls.append(
            {
                "n_prompts": len(prompts),
                "is_training": trainer.model.training,
                "values": values,
                "from_policy": distance(trainer.model, sampled, TEMPERATURE),
                "from_base": from_base,
                **sampled,
            }
        )
        return sampled


def make_trainer(toy, folder, rollout, **arguments):
    """A short run of 13 values on the toy, evaluated once, that samples by `rollout`."""
    data = toy.parent / "data"
    return GRPOTrainer(
        model=str(toy),
        reward_funcs=gsm8k.strict_reward,
        args=GRPOConfig(
            **{
                "output_dir": str(folder),
                "max_steps": 3,
                "max_completion_length": 32,
                "learning_rate": 0.05,
                "temperature": TEMPERATURE,
                "num_generations": 4,
                "num_generations_eval": 2,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 4,
                "eval_strategy": "steps",
                "eval_steps": 3,
                "vllm_max_model_length": 256,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "bf16": False,
                "use_cpu": True,
                **arguments,
            }
        ),
        train_dataset=gsm8k.for_rl(gsm8k.load_rows(str(data), "train")),
        eval_dataset=gsm8k.for_rl(gsm8k.load_rows(str(data), "test")).select(range(4)),
        peft_config=TinyLoraConfig(u=13, n_tie="all"),
        rollout_func=rollout,
    )
