"""
The whole matrix: trainer x tying x checkpointing x accumulation in every mode against one process, and its table.

Run by test_matrix.py. On two CPU cores about an hour. A mode that matrix.json holds already, from the same commit, is
not run.
"""

import json
import os
import tempfile
from pathlib import Path
from statistics import median

from cases import NUMERIC, TOLERANCE
from records.files import write_text
from records.provenance import read_provenance
from runs import launch_recipe, run_cases, try_cases
from tiny import ROWS, make_base, write_split


OUTPUT = Path(__file__).with_name("matrix.json")
MODES = ("ddp", "zero1", "zero2", "zero3", "zero3, values partitioned", "fsdp2", "fsdp2 at load")
TRANSFERS = 1000
BUILDS = 5
SAVING = {"save_strategy": "steps", "save_steps": 2}


# What TinyLoRA costs a step beyond the frozen base: on one module of the first block alone, so that the backward pass
# runs through the whole base, against all modules, and rank-1 LoRA on all modules.
STEP_BASE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
STEPS, WARM_UP = 24, 4
STEP_CASES = [
    {"name": f"{name}-{turn}", "trainer": "sft", "max_steps": STEPS, **case}
    for turn in (1, 2)
    for name, case in (
        ("one module", {"fields": {"target_modules": ["layers.0.self_attn.q_proj"]}}),
        ("all modules", {"fields": {"n_tie": "all", "u": 13}, "builds": BUILDS}),
        ("LoRA", {"lora": {"r": 1, "target_modules": "all-linear"}}),
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


def step_cost(launcher, adjust, base, rows, folder):
    """Medians over two turns in one launch: a step's seconds and bytes; seconds of building, spread and whole."""
    found = run_cases(launcher, adjust(STEP_CASES), base, rows, folder, timeout=3600)
    costs = {}
    for name in ("one module", "all modules", "LoRA"):
        turns = [found[f"{name}-{turn}"][0] for turn in (1, 2)]
        costs[name] = {
            "seconds": median(s for turn in turns for s in turn["step_seconds"][WARM_UP:]),
            "bytes": median(b for turn in turns for b in turn["step_bytes"][WARM_UP:]),
        }
    built = [found[f"all modules-{turn}"][0]["build_seconds"] for turn in (1, 2)]
    costs["build"] = {kind: median(s for turn in built for s in turn[kind]) for kind in ("spread", "whole")}
    return costs


def launched(mode, base, data, folder):
    """How far the recipes, started as the README says, are from one process: `sft.py` by its values, `grpo.py` runs."""
    alone = launch_recipe("single", "sft.py", base, data, folder / "alone")
    spread = launch_recipe(mode, "sft.py", base, data, folder / "sft")
    assert launch_recipe(mode, "grpo.py", base, data, folder / "grpo").isfinite().all()
    return float((alone - spread).abs().max())


def measure(mode, base, data, folder, expected, step_base):
    """What one mode gives: the largest difference, the weight transfers, a killed run, the cost of a step."""
    launcher, adjust = ("ddp", partitioned) if mode.endswith("partitioned") else (mode, lambda cases: cases)
    found = run_cases(launcher, adjust(NUMERIC), base, ROWS, folder / "numeric", timeout=3600)
    differences = {
        name: max(abs(a - b) for rank in ranks for a, b in zip(rank["values"], expected[name], strict=True))
        for name, ranks in found.items()
    }
    reentrant = {name: ranks[0]["reentrant_backwards"] > 0 for name, ranks in found.items()}
    synced = {
        "name": "synced", "trainer": "grpo", "max_steps": 2, "dtype": "bfloat16", "bf16": True, "transfers": TRANSFERS,
    }  # fmt: skip
    transfers = run_cases(launcher, adjust([synced]), base, ROWS, folder / "transfers", timeout=3600)["synced"]
    result = {
        "cases": len(differences),
        "agree": sum(difference <= TOLERANCE for difference in differences.values()),
        "largest_difference": max(differences.values()),
        "reentrant_by_default": {t: reentrant[f"{t}-tiled-default-1"] for t in ("sft", "grpo")},
        "reentrant_where_asked_for": sum(reentrant[name] for name in reentrant if "-reentrant-" in name),
        "transfers": TRANSFERS,
        "base_kept": all(rank["base_kept"] for rank in transfers),
        "yielded_the_same": all(rank["yielded"] == rank["yielded_last"] for rank in transfers),
        "difference_of_a_killed_and_resumed_run": None,
        "difference_of_a_launched_recipe": None,
        "step": step_cost(launcher, adjust, step_base, ROWS, folder / "step"),
    }
    if launcher == mode:
        result["difference_of_a_launched_recipe"] = launched(mode, base, data, folder / "recipes")
    if mode != "fsdp2 at load":
        case = {"name": "killed", "trainer": "sft", "fields": {"n_tie": 4}, "max_steps": 6, "arguments": SAVING}
        whole = run_cases(launcher, adjust([{**case, "name": "whole"}]), base, ROWS, folder / "whole")["whole"]
        gone, _ = try_cases(launcher, adjust([{**case, "kill_after": 5}]), base, ROWS, folder / "killed")
        assert gone == {}, "the run that was to be killed ended"
        again = {**case, "arguments": {**SAVING, "resume_from_checkpoint": "true"}}
        resumed = run_cases(launcher, adjust([again]), base, ROWS, folder / "killed")["killed"]
        result["difference_of_a_killed_and_resumed_run"] = max(
            abs(a - b) for a, b in zip(resumed[0]["values"], whole[0]["values"], strict=True)
        )
    return result


def table(record):
    """The record as Markdown."""
    lines = [
        "| mode | combinations that agree | largest difference of a value | reentrant by TRL's defaults (SFT / GRPO) "
        f"| {TRANSFERS:,} weight transfers leave the base | killed and resumed against uninterrupted "
        "| recipes launched |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, result in record["modes"].items():
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
    lines += [f"| {mode} |" + " not run |" * 6 for mode in MODES if mode not in record["modes"]]
    provenance = record["provenance"]
    named = ", ".join(
        f"{name} {provenance['versions'][name]}"
        for name in ("torch", "trl", "peft", "transformers", "accelerate", "deepspeed")
    )
    commit = f"; commit {provenance['git']['commit'][:7]}" if provenance["git"] else ""
    cores = provenance["machine"]["cores"]
    lines += [
        "",
        "A combination is one of {SFT, GRPO} x {all tied, tiled, structured, untied} x {no checkpointing, TRL's "
        "default, reentrant, non-reentrant} x {accumulation 1, 4}: 20 steps on two processes against one process, "
        f"the largest difference allowed {TOLERANCE:.0e} on values of 0.04 to 0.2. The last column: the largest "
        "difference of a value of recipes/sft.py under the launcher from one process; recipes/grpo.py, which draws "
        "other samples on two processes, ended. fsdp2 is accelerate's own on the CPU, for which the test undoes its "
        "choice of DDP there; in the last column it is DDP. "
        f"{named}; {cores} CPU cores{commit}. `make test-distributed` renews it.",
        "",
        "What a step costs with all 56 modules of a small Qwen2 adapted, over the same step with one module of the "
        "first block adapted (the frozen base's whole backward pass is in both), in turns in one launch; and what "
        "finding the factors costs on the model as the mode shards it over the same on the whole model:",
        "",
        "| mode | time: TinyLoRA, 13 values | LoRA, rank 1 | bytes between processes: one module | TinyLoRA | LoRA "
        "| building, sharded over whole |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for mode, result in record["modes"].items():
        one, every, lora = (result["step"][name] for name in ("one module", "all modules", "LoRA"))
        lines.append(
            f"| {mode} | {every['seconds'] / one['seconds']:.2f} | {lora['seconds'] / one['seconds']:.2f} "
            f"| {one['bytes']:,.0f} | {every['bytes']:,.0f} | {lora['bytes']:,.0f} "
            f"| {result['step']['build']['spread'] / result['step']['build']['whole']:.2f} |"
        )
    return "\n".join(lines)


def failed_modes(record):
    """The modes that do not agree with one process, or change the base."""
    return [
        mode
        for mode, result in record["modes"].items()
        if result["agree"] < result["cases"]
        or not (result["base_kept"] and result["yielded_the_same"])
        or (result["difference_of_a_killed_and_resumed_run"] or 0) > TOLERANCE
        or (result["difference_of_a_launched_recipe"] or 0) > TOLERANCE
    ]


def read():
    """The committed record."""
    return json.loads(OUTPUT.read_text())


def run_all():
    """Runs what the record of this commit lacks; returns the record."""
    record, provenance = read() if OUTPUT.exists() else None, read_provenance()
    if record is None or record["provenance"]["git"] != provenance["git"]:
        record = {"provenance": provenance, "modes": {}}
    with tempfile.TemporaryDirectory() as folder:
        run(record, Path(folder), OUTPUT)
    return record


def run(record, folder, output):
    """Runs the modes that the record lacks, and writes it after each."""
    missing = [mode for mode in MODES if mode not in record["modes"]]
    if not missing:
        return
    # A folder of its own for the reason that conftest.py has.
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    base, step_base = make_base(folder / "base"), make_base(folder / "step-base", **STEP_BASE)
    data = folder / "data"
    write_split(data, "train")
    print(f"one process, {len(NUMERIC)} combinations", flush=True)
    alone = run_cases("single", NUMERIC, base, ROWS, folder / "single", timeout=3600)
    expected = {name: ranks[0]["values"] for name, ranks in alone.items()}
    for number, mode in enumerate(missing, start=1):
        print(f"{mode} ({number} of {len(missing)})", flush=True)
        record["modes"][mode] = measure(mode, base, data, folder / mode.replace(", ", "-"), expected, step_base)
        write_text(output, json.dumps(record, indent=2) + "\n")
