"""Sweeps started as processes, with a stand-in for training."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convnn.config.compose import CONF_DIR
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import make_plan

ROOT = CONF_DIR.parent


FAKE = Path(__file__).with_name("fake_train.py")


@pytest.fixture
def driver(tmp_path):
    """A folder for PYTHONPATH that puts the stand-in for train.py in place, in workers too."""
    return stand_in_for_train(tmp_path / "path", FAKE)


def stand_in_for_train(folder, program):
    """Make a folder for PYTHONPATH that lets sweeps start another program instead of training, warm or not."""
    folder.mkdir()
    shutil.copy(program, folder)
    code = f"from convnn.sweep import process, warm\nprocess.TRAIN, warm.LIBRARIES = ('-m', {program.stem!r}), ()\n"
    (folder / "sitecustomize.py").write_text(code)
    return folder


def sweep(driver, tmp_path, *overrides, wait=True):
    command = [
        sys.executable,
        str(ROOT / "sweep.py"),
        f"sweep.dir={tmp_path}/sweep",
        "tracker=jsonl",
        "sweep.report=false",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{driver}:{ROOT}"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, *overrides], env=environment, cwd=tmp_path, **output)
    if not wait:
        return process
    text, _ = process.communicate(timeout=120)
    return process.returncode, text


def statuses(tmp_path, by="label"):
    found = {}
    for path in (tmp_path / "sweep" / "status").glob("*.json"):
        record = json.loads(path.read_text())
        found[record["name"].split("-")[0] if by == "label" else record["name"]] = record
    return found


def point_of(*overrides):
    (point,) = make_plan(SweepConfig(), ["tracker=jsonl", *overrides]).points
    return point


def wait_for(pattern, tmp_path, seconds=60):
    end = time.monotonic() + seconds
    while not list(tmp_path.glob(pattern)):
        assert time.monotonic() < end, f"no {pattern}"
        time.sleep(0.1)


def alive(tmp_path):
    """Processes whose command line or environment names the test's folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            seen = path.read_bytes() + path.with_name("environ").read_bytes()
            if str(tmp_path).encode() in seen and int(path.parent.name) != os.getpid():
                found.add(path.parent.name)
    return sorted(found)
