"""docs/wandb_sweep.yaml: the command that W&B's agent builds from it trains; the server is not tried."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import TINY
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from convnn.config.compose import CONF_DIR, compose_config
from convnn.config.overrides import merge_overrides

ROOT = CONF_DIR.parent
SWEEP = yaml.safe_load((ROOT / "docs" / "wandb_sweep.yaml").read_text())


def sampled(seed):
    """A choice of each parameter, as the server makes it."""
    draw = random.Random(seed)
    found = {}
    for name, given in SWEEP["parameters"].items():
        log = given.get("distribution") == "log_uniform_values"
        assert log or given.get("distribution") == "uniform" or given.keys() == {"values"}
        number = draw.uniform(given.get("min", 0), given.get("max", 0))
        found[name] = {"value": draw.choice(given["values"]) if "values" in given else number}
    return found


def agents_command(seed):
    """What wandb_agent.py makes of the file's command and a choice."""
    parts = create_sweep_command(list(SWEEP["command"]))
    known = {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [SWEEP["program"]]}
    known |= create_sweep_command_args({"args": sampled(seed)})
    command = []
    for part in parts:
        command += known[part[2:-1]] if part.startswith("${") else [part]
    return command


def test_the_command_is_a_configuration_with_the_metric_that_is_named():
    command = agents_command(0)
    assert command[:3] == ["/usr/bin/env", sys.executable, "train.py"]
    config = compose_config(command[3:])
    chosen = {name: one["value"] for name, one in sampled(0).items()}
    assert (config.optim.lr, config.operator.blend, config.operator.k) == tuple(chosen.values())
    assert config.tracker.name == "wandb" and config.data.val_fraction > 0
    assert SWEEP["metric"] == {"name": "val_top1", "goal": "maximize"}


@pytest.mark.long
def test_the_command_trains_and_logs_the_metric(tmp_path):
    command = agents_command(1)
    small = merge_overrides(
        command[3:], TINY, ["tracker=jsonl", "data.val_fraction=0.2", "train.max_steps=1", f"run.dir={tmp_path}/r"]
    )
    small = [o for o in small if not o.startswith("tracker.mode")]
    environment = os.environ | {"WANDB_SWEEP_ID": "s", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command[:3], *small], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(Path(tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert SWEEP["metric"]["name"] in row
    blend = sampled(1)["operator.blend"]["value"]
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["operator"]["blend"] == blend
