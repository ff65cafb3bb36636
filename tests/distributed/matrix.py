"""
The whole matrix: trainer x tying x checkpointing x accumulation in every mode against one process; prints the table.

    python tests/distributed/matrix.py --output matrix.json --update_readme recipes/README.md

On two CPU cores half an hour. A mode that is in the output already, from the same commit, is not run again.
"""

import argparse
import json
import tempfile
from pathlib import Path

from cases import NUMERIC, TOLERANCE
from evaluate import write_text
from provenance import read_provenance
from report import replace_section
from runs import run_cases, try_cases
from tiny import PAIRS, make_base


MODES = ("ddp", "zero1", "zero2", "zero3", "zero3, values partitioned", "fsdp2")
TRANSFERS = 1000
SAVING = {"save_strategy": "steps", "save_steps": 2}


def partitioned(cases):
    """The same cases under ZeRO-3 with nothing kept whole: by default it leaves parameters as small as the values so."""
    config = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    return [{**case, "arguments": {**case.get("arguments", {}), "deepspeed": config}} for case in cases]


def measure(mode, base, rows, folder, expected):
    """What one mode gives: the largest difference, the weight transfers, a killed run."""
    launcher, adjust = ("ddp", partitioned) if mode.endswith("partitioned") else (mode, lambda cases: cases)
    found = run_cases(launcher, adjust(NUMERIC), base, rows, folder / "numeric", timeout=3600)
    differences = {
        name: max(abs(a - b) for rank in ranks for a, b in zip(rank["values"], expected[name], strict=True))
        for name, ranks in found.items()
    }
    reentrant = {name: ranks[0]["reentrant_backwards"] > 0 for name, ranks in found.items()}
    synced = {
        "name": "synced", "trainer": "grpo", "max_steps": 2, "dtype": "bfloat16", "bf16": True, "transfers": TRANSFERS,
    }  # fmt: skip
    transfers = run_cases(launcher, adjust([synced]), base, rows, folder / "transfers", timeout=3600)["synced"]
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
    }
    if mode != "fsdp2":
        case = {"name": "killed", "trainer": "sft", "fields": {"n_tie": 4}, "max_steps": 6, "arguments": SAVING}
        whole = run_cases(launcher, adjust([{**case, "name": "whole"}]), base, rows, folder / "whole")["whole"]
        gone, _ = try_cases(launcher, adjust([{**case, "kill_after": 5}]), base, rows, folder / "killed")
        assert gone == {}, "the run that was to be killed ended"
        again = {**case, "arguments": {**SAVING, "resume_from_checkpoint": "true"}}
        resumed = run_cases(launcher, adjust([again]), base, rows, folder / "killed")["killed"]
        result["difference_of_a_killed_and_resumed_run"] = max(
            abs(a - b) for a, b in zip(resumed[0]["values"], whole[0]["values"], strict=True)
        )
    return result


def table(record):
    """The record as Markdown."""
    lines = [
        "| mode | combinations that agree | largest difference of a value | reentrant by TRL's defaults (SFT / GRPO) "
        f"| {TRANSFERS:,} weight transfers leave the base | killed and resumed against uninterrupted |",
        "|---|---|---|---|---|---|",
    ]
    for mode, result in record["modes"].items():
        resumed = result["difference_of_a_killed_and_resumed_run"]
        default = result["reentrant_by_default"]
        cells = (
            mode,
            f"{result['agree']} of {result['cases']}",
            f"{result['largest_difference']:.0e}",
            " / ".join("yes" if default[trainer] else "no" for trainer in ("sft", "grpo")),
            "bit for bit" if result["base_kept"] and result["yielded_the_same"] else "**changed**",
            "refused by transformers" if resumed is None else "bit for bit" if resumed == 0 else f"{resumed:.0e}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    versions = record["provenance"]["versions"]
    named = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "trl", "peft", "transformers", "accelerate", "deepspeed")
    )
    machine = record["provenance"]["machine"]
    git = record["provenance"]["git"]
    lines += [
        "",
        f"Each combination is one of {{SFT, GRPO}} x {{all tied, tiled, structured, untied}} x {{no checkpointing, TRL's "
        f"default, reentrant, non-reentrant}} x {{accumulation 1, 4}}: 20 steps on two processes, against one process, the "
        f"largest difference allowed {TOLERANCE:.0e} on values of 0.04 to 0.2. {named}; {machine['cores']} CPU cores"
        + (f"; commit {git['commit'][:7]}" if git else "")
        + ". `make test-distributed` renews it.",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON; continued where it is from the same commit")
    parser.add_argument("--update_readme", type=Path, help="README whose section `distributed` is renewed")
    parser.add_argument("--report_only", action="store_true", help="run nothing, print the table of the JSON")
    arguments = parser.parse_args()
    record = json.loads(arguments.output.read_text()) if arguments.output.exists() else None
    if not arguments.report_only:
        provenance = read_provenance()
        if record is None or record["provenance"]["git"] != provenance["git"]:
            record = {"provenance": provenance, "modes": {}}
        with tempfile.TemporaryDirectory() as folder:
            run(record, Path(folder), arguments.output)
    print(table(record))
    if arguments.update_readme:
        readme = arguments.update_readme.read_text(encoding="utf-8")
        write_text(arguments.update_readme, replace_section(readme, "distributed", table(record)))
    failed = [
        mode
        for mode, result in record["modes"].items()
        if result["agree"] < result["cases"]
        or not (result["base_kept"] and result["yielded_the_same"])
        or (result["difference_of_a_killed_and_resumed_run"] or 0) > TOLERANCE
    ]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run(record, folder, output):
    """Runs the modes that the record lacks, and writes it after each."""
    missing = [mode for mode in MODES if mode not in record["modes"]]
    if not missing:
        return
    base = make_base(folder / "base")
    rows = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in PAIRS
    ]
    print(f"one process, {len(NUMERIC)} combinations", flush=True)
    alone = run_cases("single", NUMERIC, base, rows, folder / "single", timeout=3600)
    expected = {name: ranks[0]["values"] for name, ranks in alone.items()}
    for number, mode in enumerate(missing, start=1):
        print(f"{mode} ({number} of {len(missing)})", flush=True)
        record["modes"][mode] = measure(mode, base, rows, folder / mode.replace(", ", "-"), expected)
        write_text(output, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
