"""Stands in for train.py where a sweep itself is measured: leaves a complete result at once. Imports no convnn."""

import json
import sys
from pathlib import Path

folder = next(Path(arg.partition("=")[2].strip("'")) for arg in sys.argv[1:] if arg.startswith("run.dir="))
points = json.loads((folder.parents[1] / "plan.json").read_text())["points"]
known = {point["fingerprint"][:8]: point["fingerprint"] for point in points}
folder.mkdir(parents=True, exist_ok=True)
result = {"status": "complete", "fingerprint": known[folder.name[-8:]], "top1_last": 50.0, "exit_code": 0}
(folder / "result.json").write_text(json.dumps(result))
