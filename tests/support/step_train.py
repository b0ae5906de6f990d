"""Stands in for train.py in tests of clusters: steps of a given length, a checkpoint after each, and on from it."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from convnn.runtime.signals import follow_parent

follow_parent()
given = dict(arg.lstrip("+").split("=", 1) for arg in sys.argv[1:])
folder = Path(given["run.dir"].strip("'"))
points = json.loads((folder.parents[1] / "plan.json").read_text())["points"]
own = next(point["fingerprint"] for point in points if point["name"] == folder.name)
checkpoint = folder / "checkpoints" / "last.pt"
checkpoint.parent.mkdir(parents=True, exist_ok=True)
step = int(checkpoint.read_text().split()[0]) if checkpoint.exists() else 0
with (folder / "calls").open("a") as file:
    job = f"{os.environ.get('SLURM_ARRAY_JOB_ID')}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    file.write(f"from {step} job {job} cuda {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
seen: list[int] = []
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
    signal.signal(signum, lambda number, frame: seen.append(number))
while step < int(given.get("data.options.steps", 4)):
    with (folder / "steps").open("a") as file:
        file.write(f"{step}\n")
    time.sleep(0.25)
    if given.get("data.options.fault") == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    step += 1
    checkpoint.write_text(f"{step} {'x' * step}")  # another size each time
    if seen:
        sys.exit(128 + seen[0])
with (folder / "metrics.jsonl").open("w") as file:
    file.write(json.dumps({"epoch": 0, "test_top1": 50.0}) + "\n")
result = {"status": "complete", "fingerprint": own, "top1_last": 50.0, "params": 1, "gflops": 1.0, "exit_code": 0}
(folder / "result.json").write_text(json.dumps(result))
