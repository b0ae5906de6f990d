"""Long runs and long sweeps take no more memory, files, sockets or processes at their end than at their start."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny
from sweeps import alive, stand_in_for_train

from convnn.config.compose import CONF_DIR
from convnn.train.run import run
from convnn.train.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")]
MIB = 2**20


def resources(pid="self"):
    """Return resident bytes, open files, sockets among them, and threads of a process."""
    proc = Path(f"/proc/{pid}")
    pages = int((proc / "statm").read_text().split()[1])
    links = []
    for path in (proc / "fd").iterdir():
        try:
            links.append(str(path.readlink()))
        except OSError:
            continue
    sockets = sum(link.startswith("socket:") for link in links)
    return pages * os.sysconf("SC_PAGE_SIZE"), len(links), sockets, len(list((proc / "task").iterdir()))


def test_memory_and_files_of_a_long_run_are_flat(tmp_path, monkeypatch):
    """3,000 steps in 100 epochs, with a moving blend, EMA, Mixup, evaluation and checkpoints."""
    samples = []
    original = Trainer._end_epoch

    def end_epoch(self, *args):
        original(self, *args)
        samples.append(resources())

    monkeypatch.setattr(Trainer, "_end_epoch", end_epoch)
    overrides = ["data.size=240", "train.batch_size=8", "train.epochs=100", "train.ema=0.9", "train.mixup=0.2"]
    result = run(tiny(*overrides, "operator=spectrum", "schedule=linear", "swap.last=2", f"run.dir={tmp_path}/r"))
    assert result["steps"] == 3000 and len(samples) == 100
    early, late = samples[19], samples[-1]
    print("\nepoch 20 and 100: bytes, files, sockets, threads", early, late)
    assert late[0] - early[0] < 16 * MIB
    assert late[1:] == early[1:]


def test_a_sweep_of_200_points_leaves_nothing_behind(tmp_path):
    driver, temporary = tmp_path / "driver", tmp_path / "temporary"
    temporary.mkdir()
    stand_in = Path(__file__).resolve().parents[1] / "support" / "quick_train.py"
    stand_in_for_train(driver, stand_in)
    environment = os.environ | {"PYTHONPATH": f"{driver}:{CONF_DIR.parent}", "TMPDIR": str(temporary)}
    command = [sys.executable, str(CONF_DIR.parent / "sweep.py"), f"sweep.dir={tmp_path}/sweep", "tracker=jsonl"]
    command += ["sweep.report=false", "operator.k=range(1,11)", "operator.blend=range(0,1,0.25)", "seed=0,1,2,3,4"]
    samples = []
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            done = len(list(tmp_path.glob("sweep/points/*/result.json")))
            try:
                samples.append((done, *resources(process.pid)))
            except OSError:
                break
        assert process.wait() == 0, (tmp_path / "output").read_text()[-2000:]
    assert len(list(tmp_path.glob("sweep/points/*/result.json"))) == 200
    early = next(s for s in samples if s[0] >= 40)
    late = [s for s in samples if s[0] < 200][-1]
    print(f"\nafter {early[0]} and {late[0]} points: bytes, files, sockets, threads", early[1:], late[1:])
    # Hydra keeps the configuration of each job, 0.2 MiB, to the end of a multirun.
    assert late[1] - early[1] < 0.3 * MIB * (late[0] - early[0])
    assert abs(late[2] - early[2]) <= 3 and late[3] <= early[3] and late[4] <= early[4]
    assert alive(tmp_path) == [] and list(temporary.iterdir()) == []
