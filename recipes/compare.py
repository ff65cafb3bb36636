"""A comparison: plans the runs, does what is missing, and writes report, figures and JSON.

    python recipes/compare.py --config recipes/toy/compare.yaml        # three seeds; within an hour on two cores
    python recipes/compare.py --config recipes/toy/compare_quick.yaml  # one seed; minutes

Each run is one JSON under `runs/` of the output folder, written when the run is done; a run whose JSON is there and
was made from the same settings is not done again. So an interrupted comparison continues with the same command.
"""

import json
import signal
import sys

from comparison import readme, report, summary
from comparison.arguments import CompareArguments
from comparison.plan import Plan
from comparison.rates import choose_learning_rates, fixed_learning_rates, lacking_rates, rule
from comparison.runs import Run
from comparison.workers import Progress, Workers
from records.files import write_text
from records.provenance import read_provenance
from training import launch

from trl_tinylora.sources import refuse_unfit_base


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
        folder = self.arguments.path("runs")
        return {run.name: record for run in runs if (record := run.kept(folder)) is not None}

    def do(self, runs: list[Run]) -> dict[str, dict]:
        """Does what is missing of these runs and has not failed yet. Returns the records there are then, by name."""
        if not self.arguments.report_only:
            done, failed = self.kept(runs), self.progress.failed
            missing = [run for run in runs if run.name not in done and run.name not in failed]
            needed = {run.needs for run in missing}
            # Rows that were drawn may be gone, for the work folder is no result, although a run has to train on them.
            lost = [
                run
                for run in self.samples
                if run.name in needed
                and run not in missing
                and run.name not in failed
                and not any((self.arguments.work / run.name).glob("*.jsonl"))
            ]
            self.progress.open |= {run.name for run in [*lost, *missing]}
            self.workers.do([*lost, *missing])
        return self.kept(runs)

    def announce(self) -> None:
        """Prints how many runs there are, and where they go."""
        progress, machine = self.progress, self.provenance["machine"]
        print(
            f"{len(progress.algorithms)} runs, {len(progress.algorithms) - len(progress.open)} of them already there; "
            f"{self.workers.jobs} at a time on {machine['gpu'] or machine['cpu']}. Results in "
            f"{self.arguments.output_dir}, logs in {self.arguments.work}",
            flush=True,
        )

    def run(self) -> dict | None:
        """Does everything. Returns the summary, or None where a learning rate could not be chosen."""
        arguments, swept = self.arguments, {}
        # The longest first, and in one go, so that no worker waits for the others before the end.
        first = [*self.samples, self.untrained]
        with self.workers:
            if self.sweep:
                self.do([*first, *self.sweep])
                swept = self.kept(self.sweep)
                rates = choose_learning_rates(list(swept.values()), arguments.grading)
                if lacking := lacking_rates(arguments, rates):
                    print(f"No learning rate for {lacking}: every run of their sweep is missing or failed.")
                    return None
                chosen = {"rule": rule(arguments.grading), "sweep_seed": arguments.sweep_seed, "chosen": rates}
                write_text(arguments.path("learning_rates.json"), json.dumps(chosen, indent=1) + "\n")
            else:
                rates = fixed_learning_rates(arguments)
            finals = self.plan.final(rates)
            # Some controls need no final run.
            controls = self.plan.controls(self.do([*first, *finals, *self.plan.controls({})]))
            self.do(controls)
        records = self.kept([self.untrained, *self.samples, *finals, *controls])
        missing = [name for name in self.progress.algorithms if name not in records | swept]
        seconds = sum(record["wall_seconds"] for record in swept.values())
        return summary.summarize(
            list(records.values()), rates, missing, self.plan.allowed_differences, seconds, arguments.grading
        )


def main(arguments: CompareArguments) -> int:
    """
    Plans, runs what is missing, reports.

    Args:
        arguments (`CompareArguments`): The comparison.
    Returns:
        `int`: Exit status: 1 if a run failed or is missing.
    Raises:
        ValueError: If the base model is none.
    """
    comparison = Comparison(arguments)
    if not arguments.report_only:
        settings = comparison.untrained.settings
        refuse_unfit_base(settings["model_name_or_path"], settings.get("model_revision"))
        comparison.announce()
    found = comparison.run()
    if found is None:
        return 1
    report.write(found, arguments.path())
    if arguments.update_readme is not None:
        readme.update_readme(arguments.update_readme, found)
    print("\n" + report.table(found))
    print(f"\nReport, figures and a JSON a run: {arguments.output_dir}")
    if found["missing"]:
        print(f"Missing or failed: {', '.join(found['missing'])}. The same command tries them again.")
    return 1 if found["missing"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = launch.run(main, (CompareArguments,))
    except KeyboardInterrupt:
        status = "Interrupted. What is finished is kept: the same command continues."
    sys.exit(status)
