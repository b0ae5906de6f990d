"""Stands in for train.py in tests of sweeps: leaves what a run leaves, or fails in the way that ``data.name`` says."""

import json
import os
import signal
import sys
import time
from pathlib import Path

given = dict(arg.lstrip("+").split("=", 1) for arg in sys.argv[1:])
given = {key: value[1:-1] if value[:1] == "'" else value for key, value in given.items()}
plan = Path(given["run.dir"]).parents[1] / "plan.json"
if given.get("data.name") in ("sleep", "deaf") or "\\" in str(sys.argv) or not plan.exists():
    from convnn.config.compose import compose_config
    from convnn.config.identity import fingerprint
    from convnn.runtime.signals import follow_parent  # about a second; only where it counts

    follow_parent()
    config = compose_config(sys.argv[1:])
    given |= {"run.dir": config.run.dir, "tracker.group": config.tracker.group, "seed": config.seed}
    given["data.name"], own = config.data.name, fingerprint(config)
    seconds = config.data.options.get("seconds", 0)
else:
    known = {point["fingerprint"][:8]: point["fingerprint"] for point in json.loads(plan.read_text())["points"]}
    own, seconds = known[given["run.dir"][-8:]], given.get("data.options.seconds", 0)
folder = Path(given["run.dir"])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
with (folder / "calls").open("a") as file:
    file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {given['tracker.group']}\n")
mended = (folder / "mended").exists() or (folder.parent / "mended").exists()
fault = "fine" if mended else given.get("data.name")
(folder / "mended").touch()
print("a line of output")
if fault == "raise":
    raise RuntimeError("a fault of the test")
if fault == "exit":
    sys.exit(0)
if fault == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if fault == "lost":
    print("error: rank 1: another process of the run has ended (gloo)")
    sys.exit(1)
if fault == "torchrun":
    print("  exitcode  : -9 (pid: 7)\n  error_file: <N/A>\n====")
    sys.exit(1)
if fault == "diverge":
    print("diverged: loss is not finite at step 3")
    sys.exit(3)
if fault in ("sleep", "deaf"):

    def stop(signum, frame):
        (folder / "checkpoints" / "last.pt").write_text(f"after {signum}")
        sys.exit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(signum, stop if fault == "sleep" else signal.SIG_IGN)
    (folder / "ready").touch()
    time.sleep(60)
time.sleep(float(seconds))
top1 = 50.0 + int(given.get("seed", 0))
with (folder / "metrics.jsonl").open("w") as file:
    for epoch in range(6):  # the best epoch is the second, one point above the last
        file.write(json.dumps({"epoch": epoch, "test_top1": top1 + (epoch == 1)}) + "\n")
result = {
    "status": "complete",
    "fingerprint": own,
    "params": 130_015_690,
    "gflops": 0.5,
    "epochs": 6,
    "top1_last": top1,
    "top1_best_on_test": top1 + 1,
    "exit_code": 0,
}
(folder / "result.json").write_text(json.dumps(result))
