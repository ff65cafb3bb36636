"""A short run that samples by `AdapterRollout`; writes what each process saw. Launched by test_processes.py."""

import json
import sys
from pathlib import Path

from sampled import Recorder, make_trainer

from trl_tinylora import AdapterRollout


if __name__ == "__main__":
    toy, folder, *server = sys.argv[1:]
    recorder = Recorder(AdapterRollout(server[0]) if server else AdapterRollout(enforce_eager=True))
    trainer = make_trainer(Path(toy), folder, recorder, eval_strategy="no")
    trainer.train()
    kept = ("n_prompts", "from_policy", "from_base", "completion_ids")
    calls = [{name: call[name] for name in kept} | {"values": call["values"].tolist()} for call in recorder.calls]
    Path(folder, f"{trainer.accelerator.process_index}.json").write_text(json.dumps(calls))
    recorder.rollout.close()
