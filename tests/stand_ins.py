"""Stand-ins for what some trainers of TRL take from vLLM's servers and from a GPU, so that they run on a CPU."""

import queue
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tiny import ROWS
from transformers import AutoModelForCausalLM, AutoTokenizer


class TeacherServer:
    """In place of TRL's client of a vLLM server: the base model scores the completions."""

    def __init__(self, base):
        self.model = AutoModelForCausalLM.from_pretrained(base).eval()

    def get_sequence_logprobs(self, sequences, prompt_lengths, top_logprobs, temperature):
        found = {"actual_logprobs": [], "logprobs": [], "logprob_token_ids": []}
        for ids, length in zip(sequences, prompt_lengths, strict=True):
            rows = log_probabilities(self.model, ids)[length - 1 :]
            best = rows.topk(top_logprobs)
            found["actual_logprobs"].append(rows.gather(1, torch.tensor(ids[length:])[:, None]).tolist())
            found["logprobs"].append(best.values.tolist())
            found["logprob_token_ids"].append(best.indices.tolist())
        return found


class Sampler:
    """In place of the processes that sample, and of the weights' way to their server, for two epochs of samples."""

    def __init__(self, base, sample_of):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
        self.rollout_buffer, self.metrics_queue, self.sent = queue.Queue(), queue.Queue(), []
        for _ in range(2):
            for index, row in enumerate(ROWS):
                self.rollout_buffer.put(sample_of(index, model=model, **tokens_of(row, tokenizer), **row))

    def send_weights(self, pairs):
        self.sent.append({name: tensor.clone() for name, tensor in pairs})

    def nothing(self, *args):
        pass

    start = stop = update_model_version = check_health = init_weight_transfer = pause = resume = destroy = nothing


def log_probabilities(model, ids):
    """Of every next token, for all positions but the last."""
    with torch.no_grad():
        return model(torch.as_tensor(ids)[None]).logits[0, :-1].log_softmax(-1)


def tokens_of(row, tokenizer):
    """A row's tokens, and which of them are the completion's."""
    template = {"tokenize": True, "return_dict": True}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **template)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **template)["input_ids"]
    return {"input_ids": np.array(whole), "completion_mask": np.arange(len(whole)) >= len(prompt)}


def grpo_samples(base):
    """For AsyncGRPOTrainer: the rows' own answers, every second one of which is bad."""
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    def sample(index, model, **parts):
        ids = torch.tensor(parts["input_ids"])
        taken = log_probabilities(model, ids).gather(1, ids[1:, None])[:, 0]
        settings = {"advantage": 1.0 - 2 * (index % 2), "group_id": index, "model_version": 0, "metrics": {}}
        return RolloutSample(old_log_probs=F.pad(taken, (1, 0)).numpy(), **parts, **settings)

    return Sampler(base, sample)


def distillation_samples(base):
    """For AsyncDistillationTrainer: the rows' own answers, of which the teacher prefers three tokens everywhere."""
    from trl.experimental.async_distillation.async_rollout_worker import RolloutSample

    def sample(index, model, **parts):
        shape = (len(parts["input_ids"]), 1)
        return RolloutSample(
            teacher_topk_ids=np.tile([5, 6, 7], shape),
            teacher_topk_logprobs=np.tile(np.log([0.5, 0.3, 0.2], dtype=np.float32), shape),
            model_version=0,
            metrics={},
            teacher_id="default",
            prompt_id=index,
            **parts,
        )

    return Sampler(base, sample)


def attention(query, key, value, ends_q, ends_k, *args, softmax_scale, **settings):
    """In place of FlashAttention 3, for sequences of different lengths one after another: (tokens, heads, width)."""
    found = []
    for start, end, first, last in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        q, k, v = (x.transpose(0, 1) for x in (query[start:end], key[first:last], value[first:last]))
        # Each query sees the keys up to its own, counted from the end.
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True)
        found.append(seen.transpose(0, 1))
    return torch.cat(found)


def on_a_cpu(module):
    """What an asynchronous trainer takes from a GPU, by its place: the attention's kernel and the device's speed."""
    places = {f"{module}.get_peak_flops_per_device": lambda *args: None}
    if "async_grpo" in module:
        kernel = SimpleNamespace(flash_attn_varlen_func=attention)
        places["trl.experimental.async_grpo.packing._flash_attn"] = lambda: kernel
    return places
