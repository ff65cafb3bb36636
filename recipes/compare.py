"""A comparison: plans the runs, does what is missing, and writes report, figures and JSON.

    python recipes/compare.py --config recipes/toy/compare.yaml        # sweeps learning rates, then several seeds
    python recipes/compare.py --config recipes/toy/compare_quick.yaml  # one seed, the rates that the full one chose

Each run is one JSON under `runs/` of the output folder, written when the run is done; a run whose JSON is there and
was made from the same settings is not done again. So an interrupted comparison continues with the same command.
"""

import json
import signal
import sys

import report
import trl
from completions import write_text
from plan import (
    ALLOWED_DIFFERENCES,
    CompareArguments,
    Plan,
    Run,
    choose_learning_rates,
    lacking_rates,
    read_learning_rates,
)
from provenance import read_provenance
from workers import Progress, Workers


RULE = "best mean of greedy and sampled strict accuracy on the validation problems; the smaller rate of equals"


class Comparison:
    """
    The state of a comparison: which runs are done, and which are next.

    Args:
        arguments (`CompareArguments`): The comparison.
    """

    def __init__(self, arguments: CompareArguments):
        self.arguments = arguments
        self.plan = Plan(arguments)
        self.provenance = read_provenance()
        self.sweep = self.plan.sweep()
        self.samples = self.plan.samples()
        self.untrained = self.plan.untrained()
        names = {run.name: run.algorithm for run in [self.untrained, *self.samples, *self.sweep]}
        names |= self.plan.final_names()
        names |= dict.fromkeys(self.plan.control_names())
        # The settings of a final run are known after the sweep; until then a JSON of its name counts as done.
        done = {name for name in names if arguments.path("runs", f"{name}.json").is_file()}
        self.progress = Progress(arguments, names, done)
        self.workers = Workers(arguments, self.provenance, self.progress)

    def kept(self, runs: list[Run]) -> dict[str, dict]:
        """Records of the runs that are done, by name."""
        return {run.name: record for run in runs if (record := run.kept(self.arguments)) is not None}

    def do(self, runs: list[Run]) -> dict[str, dict]:
        """Does what is missing of these runs and has not failed yet. Returns the records there are then, by name."""
        if not self.arguments.report_only:
            failed = self.progress.failed
            missing = [run for run in runs if run.name not in failed and run.kept(self.arguments) is None]
            again = [run for run in self.samples if run not in missing and run.name not in failed]
            lost = [run for run in again if self._is_needed(run, missing)]
            self.progress.open |= {run.name for run in [*lost, *missing]}
            self.workers.do([*lost, *missing])
        return self.kept(runs)

    def _is_needed(self, samples: Run, missing: list[Run]) -> bool:
        """Whether rows that were drawn are gone (the work folder is no result) although a run has to train on them."""
        folder = self.arguments.work / samples.name
        return not any(folder.glob("*.jsonl")) and any(run.options.get("samples") == samples.name for run in missing)

    def rates(self) -> dict:
        """The learning rates, swept or read."""
        if not self.sweep:
            return read_learning_rates(self.arguments)
        return choose_learning_rates(list(self.kept(self.sweep).values()))


def main(arguments: CompareArguments) -> int:
    """
    Plans, runs what is missing, reports.

    Args:
        arguments (`CompareArguments`): The comparison.
    Returns:
        `int`: Exit status: 1 if a run failed or is missing.
    """
    comparison = Comparison(arguments)
    progress, provenance = comparison.progress, comparison.provenance
    if arguments.learning_rates is not None:
        comparison.rates()  # refuses before work starts
    if not arguments.report_only:
        device = provenance["machine"]["gpu"] or provenance["machine"]["cpu"]
        print(
            f"{len(progress.algorithms)} runs, {len(progress.algorithms) - len(progress.open)} of them already there; "
            f"{comparison.workers.jobs} at a time on {device}. Results in {arguments.output_dir}, logs in "
            f"{arguments.work}",
            flush=True,
        )
    # The longest first, and in one go, so that no worker waits for the others before the end.
    first, swept = [*comparison.samples, comparison.untrained], {}
    with comparison.workers:
        if comparison.sweep:
            comparison.do([*first, *comparison.sweep])
            swept = comparison.kept(comparison.sweep)
        rates = comparison.rates()
        lacking = lacking_rates(arguments, rates)
        if lacking:
            print(f"No learning rate could be chosen for {lacking}: every run of their sweep is missing or failed.")
            return 1
        if comparison.sweep:
            chosen = {"rule": RULE, "sweep_seed": arguments.sweep_seed, "chosen": rates}
            write_text(arguments.path("learning_rates.json"), json.dumps(chosen, indent=1) + "\n")
        finals = comparison.plan.final(rates)
        # Some controls need no final run.
        controls = comparison.plan.controls(comparison.do([*first, *finals, *comparison.plan.controls({})]))
        comparison.do(controls)

    records = comparison.kept([comparison.untrained, *comparison.samples, *finals, *controls])
    summary = report.summarize(
        list(records.values()),
        rates,
        [name for name in progress.algorithms if name not in records | swept],
        ALLOWED_DIFFERENCES,
        sum(record["wall_seconds"] for record in swept.values()),
    )
    report.write(summary, arguments.path())
    if arguments.update_readme is not None:
        report.update_readme(arguments.update_readme, arguments.readme_section, summary)
    print("\n" + report.table(summary))
    print(f"\nReport, figures and a JSON a run: {arguments.output_dir}")
    if summary["missing"]:
        print(f"Missing or failed: {', '.join(summary['missing'])}. The same command tries them again.")
    return 1 if summary["missing"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = main(*trl.TrlParser((CompareArguments,)).parse_args_and_config())
    except KeyboardInterrupt:
        status = "Interrupted. What is finished is kept: the same command continues."
    sys.exit(status)
