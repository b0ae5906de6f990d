"""Two machines work on one sweep's folder: names of hosts by UTS namespaces, which need no rights."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from sweeps import ROOT, stand_in_for_train, statuses, wait_for

NAMED = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
STEPS = 50


def names_a_host():
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMED, "a-host", "hostname"], capture_output=True, text=True).stdout == "a-host\n"


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not names_a_host(), reason="this system lets no user name a host"),
]


@pytest.fixture
def on(tmp_path):
    """Return a function that starts the sweep on a host."""
    path = stand_in_for_train(tmp_path / "path", ROOT / "tests" / "support" / "step_train.py")
    begun = []

    def start(host):
        own = [f"sweep.dir={tmp_path}/sweep", "tracker=jsonl", "sweep.report=false", "device=cpu", "seed=0,1"]
        process = subprocess.Popen(
            [*NAMED, host, sys.executable, str(ROOT / "sweep.py"), *own, f"+data.options.steps={STEPS}"],
            env=os.environ | {"PYTHONPATH": f"{path}:{ROOT}"}, cwd=tmp_path, text=True,
            stdout=(tmp_path / f"{host}.txt").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.wait()


def records(tmp_path):
    return {name.split("-")[-2]: record for name, record in statuses(tmp_path, by="name").items()}


def steps(tmp_path, name):
    (path,) = tmp_path.glob(f"sweep/points/*-{name}-*/steps")
    return [int(line) for line in path.read_text().split()]


@pytest.mark.parametrize("dies", [True, False])
def test_a_dead_peers_point_is_taken_over_and_a_living_ones_is_not(dies, on, tmp_path):
    sweeps = {host: on(host) for host in ("host-a", "host-b")}
    wait_for("sweep/points/*-s0-*/steps", tmp_path)
    wait_for("sweep/points/*-s1-*/steps", tmp_path)
    begun = {point: r["token"].rpartition("-")[0] for point, r in records(tmp_path).items()}
    assert set(begun.values()) == set(sweeps), begun
    peer, other = begun["s0"], begun["s1"]
    if dies:
        os.killpg(sweeps[peer].pid, signal.SIGKILL)
    assert sweeps[other].wait(120) == 0, (tmp_path / f"{other}.txt").read_text()
    assert sweeps[peer].wait(120) == (-signal.SIGKILL if dies else 0)
    found = {point: (r["status"], r["attempts"]) for point, r in records(tmp_path).items()}
    assert found == {"s0": ("complete", 1 + dies), "s1": ("complete", 1)}
    assert records(tmp_path)["s0"]["token"].startswith(other if dies else peer)
    assert steps(tmp_path, "s1") == list(range(STEPS))
    made = steps(tmp_path, "s0")
    assert sorted(set(made)) == list(range(STEPS)) and len(made) <= STEPS + dies
    assert "Traceback" not in "".join(path.read_text() for path in tmp_path.glob("host-?.txt"))
