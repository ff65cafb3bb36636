"""Every combination of trainer, tying, checkpointing and accumulation that is compared with one process."""

from itertools import product


# The largest difference seen between one and two processes is 5e-7, after 20 steps (matrix.json): float32 sums in
# another order. Twice that.
TOLERANCE = 1e-6

TYING = {
    "all": {"n_tie": "all", "u": 3},
    "tiled": {"n_tie": 4},
    "structured": {"n_tie": 2, "tying": "structured"},
    "untied": {"n_tie": 1},
}

NUMERIC = [
    {
        "name": f"{trainer}-{tying}-{checkpointing}-{accumulation}",
        "trainer": trainer,
        "fields": TYING[tying],
        "checkpointing": checkpointing,
        "accumulation": accumulation,
    }
    for trainer, tying, checkpointing, accumulation in product(
        ("sft", "grpo"), TYING, ("off", "default", "reentrant", "non-reentrant"), (1, 4)
    )
]


def partitioned(cases):
    """The same cases under ZeRO-3 that keeps nothing whole: by default it leaves small parameters, the values, so."""
    config = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return [{**case, "arguments": {**case.get("arguments", {}), "deepspeed": config}} for case in cases]
