"""The table of every launcher against one process, from what tests/distributed/test_matrix.py measured."""

from pathlib import Path


RECORD = Path(__file__).resolve().parents[2] / "tests" / "distributed" / "matrix.json"
MODES = ("ddp", "zero1", "zero2", "zero3", "zero3, values partitioned", "fsdp2", "fsdp2 at load")
VERSIONS = ("torch", "trl", "peft", "transformers", "accelerate", "deepspeed")


def table(record: dict) -> str:
    """
    What every mode gave, and what a step costs in it.

    Args:
        record (`dict`): Content of matrix.json; a mode that it lacks was not run.
    Returns:
        `str`: Markdown.
    """
    return "\n\n".join((_agreement(record), _caption(record), _costs(record)))


def _agreement(record: dict) -> str:
    lines = [
        "| mode | combinations that agree | largest difference of a value | reentrant by TRL's defaults (SFT / GRPO) "
        f"| {record['transfers']:,} weight transfers leave the base | killed and resumed against uninterrupted "
        "| recipes launched |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode in MODES:
        if mode not in record["modes"]:
            lines.append(f"| {mode} |" + " not run |" * 6)
            continue
        result = record["modes"][mode]
        resumed = result["difference_of_a_killed_and_resumed_run"]
        recipes = result["difference_of_a_launched_recipe"]
        default = result["reentrant_by_default"]
        cells = (
            mode,
            f"{result['agree']} of {result['cases']}",
            f"{result['largest_difference']:.0e}",
            " / ".join("yes" if default[trainer] else "no" for trainer in ("sft", "grpo")),
            "bit for bit" if result["base_kept"] and result["yielded_the_same"] else "**changed**",
            "refused by transformers" if resumed is None else "bit for bit" if resumed == 0 else f"{resumed:.0e}",
            "-" if recipes is None else f"{recipes:.0e}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _caption(record: dict) -> str:
    provenance = record["provenance"]
    versions = ", ".join(f"{name} {provenance['versions'][name]}" for name in VERSIONS)
    commit = f"; commit {provenance['git']['commit'][:7]}" if provenance["git"] else ""
    least, most = record["largest_values"]
    return (
        "A combination is one of {SFT, GRPO} x {all tied, tiled, structured, untied} x {no checkpointing, TRL's "
        "default, reentrant, non-reentrant} x {accumulation 1, 4}: "
        f"{record['steps']} steps on two processes against one process, the largest difference allowed "
        f"{record['tolerance']:.0e} on values of {least:.1g} to {most:.1g}. "
        "The last column: the largest difference of a value of recipes/sft.py under the launcher from one process; "
        "recipes/grpo.py, which draws other samples on two processes, ended. fsdp2 is accelerate's own on the CPU, for "
        "which the test undoes its choice of DDP there; in the last column it is DDP. "
        f"{versions}; {provenance['machine']['cores']} CPU cores{commit}. `make test-distributed` renews it."
    )


def _costs(record: dict) -> str:
    lines = [
        "What a step costs with all 56 modules of a small Qwen2 adapted, over the same step with one module of the "
        "first block adapted (the frozen base's whole backward pass is in both), in turns in one launch; and what "
        "finding the factors costs on the model as the mode shards it over the same on the whole model:",
        "",
        "| mode | time: TinyLoRA, 13 values | LoRA, rank 1 | bytes between processes: one module | TinyLoRA | LoRA "
        "| building, sharded over whole |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for mode in (mode for mode in MODES if mode in record["modes"]):
        step = record["modes"][mode]["step"]
        one, every, lora = (step[name] for name in ("one module", "all modules", "LoRA"))
        lines.append(
            f"| {mode} | {every['seconds'] / one['seconds']:.2f} | {lora['seconds'] / one['seconds']:.2f} "
            f"| {one['bytes']:,.0f} | {every['bytes']:,.0f} | {lora['bytes']:,.0f} "
            f"| {step['build']['sharded'] / step['build']['whole']:.2f} |"
        )
    return "\n".join(lines)
