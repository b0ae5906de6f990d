"""Sweeps on a real SLURM, of tests/support/slurm.sh: nothing is lost, nothing is run twice, every end is told."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweeps import ROOT, stand_in_for_train

SUPPORT = ROOT / "tests" / "support"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="slurm.sh needs root"),
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="bash tests/support/slurm.sh install"),
    pytest.mark.xdist_group("slurm"),
]


def asked(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster for the tests of this file."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents[:2]):  # munged runs as a user of its own, and wants to get there
        parent.chmod(0o755)
    done = subprocess.run([SUPPORT / "slurm.sh", "up", folder], capture_output=True, text=True, timeout=120)
    try:
        assert done.returncode == 0, done.stderr
        os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
        yield
    finally:
        subprocess.run([SUPPORT / "slurm.sh", "down", folder], capture_output=True, timeout=120)
        os.environ.pop("SLURM_CONF", None)


class Trial:
    """A sweep's folder and the calls that work on it."""

    def __init__(self, tmp_path):
        self.folder = tmp_path / "sweep"
        self.tmp_path = tmp_path
        self.path = stand_in_for_train(tmp_path / "path", SUPPORT / "step_train.py")
        self.calls = []

    def start(self, *overrides, steps=4):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{self.path}:{ROOT}"}
        own = ["tracker=jsonl", "sweep.report=false", "device=cpu", f"+data.options.steps={steps}"]
        own += ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", f"sweep.dir={self.folder}"]
        output = (self.tmp_path / f"call{len(self.calls)}.txt").open("w+")
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "sweep.py"), *own, *overrides],
            env=environment, cwd=self.tmp_path, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        process.text = lambda: Path(output.name).read_text()
        self.calls.append(process)
        return process

    def end(self, process, seconds=90):
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"does not end: {process.text()}\n{asked('squeue')}")
        assert "Traceback" not in process.text() and "slurmstepd" not in process.text(), process.text()
        return code, process.text()

    def records(self):
        found = [json.loads(path.read_text()) for path in sorted(self.folder.glob("status/*.json"))]
        return {record["name"].split("-")[-2]: record for record in found}

    def jobs(self):
        """Numbers of all jobs that were ever submitted for points."""
        found = [json.loads(path.read_text()) for path in self.folder.glob("status/jobs/*.json")]
        return sorted(f"{s['job']}_{i}" for s in found for i in range(len(s["points"])))

    def job_of(self, name):
        """Number of the latest job of a point, such as s1."""
        plan = json.loads((self.folder / "plan.json").read_text())["points"]
        key = next(p["fingerprint"] for p in plan if f"-{name}-" in p["name"])
        found = [json.loads(path.read_text()) for path in self.folder.glob("status/jobs/*.json")]
        job, index = max((s["job"], s["points"].index(key)) for s in found if key in s["points"])
        return f"{job}_{index}"

    def steps(self, name):
        (path,) = self.folder.glob(f"points/*-{name}-*/steps")
        return [int(line) for line in path.read_text().split()]

    def ran_once(self, steps):
        """Whether each complete point has made every step, at most the one after its last checkpoint anew."""
        for name, record in self.records().items():
            if record["status"] == "complete":
                made = self.steps(name)
                assert sorted(set(made)) == list(range(steps)), (name, made)
                assert len(made) < steps + record["attempts"], (name, made)


@pytest.fixture
def trial(slurm, tmp_path):
    trial = Trial(tmp_path)
    try:
        yield trial
    finally:
        for process in trial.calls:
            if process.poll() is None:
                process.kill()
        subprocess.run(["scancel", "--user=root"], timeout=60)
        wait(lambda: not asked("squeue", "-h"))


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, asked("squeue")
        time.sleep(0.2)
    return found


def state(number):
    return {line.split()[0]: line.split()[1] for line in asked("squeue", "-hr", "-o", "%F_%K %T").splitlines()}.get(
        number
    )


def kill(number):
    """Kill what runs in a job: the process that keeps the records, and the one that trains."""
    raw = asked("squeue", "-hr", "-j", number, "-o", "%A").strip()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            called = path.with_name("cmdline").read_bytes()
            if f"SLURM_JOB_ID={raw}\0".encode() in path.read_bytes() and b"python" in called and b"srun" not in called:
                os.kill(int(path.parent.name), signal.SIGKILL)


def start_now(number):
    """SLURM holds a job that was requeued for two minutes: at once its node may not be done with it, and it fails."""
    wait(lambda: state(number) == "PENDING")
    time.sleep(2)
    asked("scontrol", "update", f"JobId={number}", "StartTime=now")


def test_two_sweeps_at_once_run_each_point_once(trial):
    first, second = (trial.start(f"seed={seeds}") for seeds in ("0,1,2", "1,2,3"))
    for process in (first, second):
        code, text = trial.end(process)
        assert code == 0, text
    assert set(trial.records()) == {"s0", "s1", "s2", "s3"}
    assert [r["attempts"] for r in trial.records().values()] == [1, 1, 1, 1] and len(trial.jobs()) == 4
    trial.ran_once(4)
    code, text = trial.end(trial.start("seed=0,1,2,3"))
    assert code == 0 and "0 to run" in text and len(trial.jobs()) == 4


def test_a_points_life(trial):
    """Requeued, its job killed, cancelled as it runs and as it waits: the sweep goes on to its end and tells all."""
    process = trial.start("seed=0,1,2,3,4", "hydra.launcher.array_parallelism=4", steps=40)
    wait(lambda: len(list(trial.folder.glob("points/*/steps"))) == 4)
    job = {name: trial.job_of(name) for name in ("s0", "s1", "s2", "s3", "s4")}
    asked("scancel", job["s4"])
    asked("scancel", job["s2"])
    asked("scontrol", "requeue", job["s0"])
    start_now(job["s0"])
    kill(job["s1"])
    code, text = trial.end(process)
    found = {name: (r["status"], r["attempts"]) for name, r in trial.records().items()}
    assert code == 1
    expected = {"s0": ("complete", 2), "s1": ("complete", 2), "s2": ("cancelled", 1), "s3": ("complete", 1)}
    assert found == expected | {"s4": ("cancelled", 0)}, text
    assert trial.job_of("s0") == job["s0"] and trial.job_of("s1") != job["s1"]
    trial.ran_once(40)
    assert "requeued (1)" in text and re.search(rf"running .*on node\d \(job {job['s3']}\)", text)
    assert text.count("cancelled") >= 2 and f"its job {job['s4']} was cancelled" in text
    code, text = trial.end(trial.start("seed=0,1,2,3,4", steps=40))
    assert code == 0 and "2 to run" in text
    assert {r["status"] for r in trial.records().values()} == {"complete"}


@pytest.mark.parametrize("grace", [0, 30])
def test_preempted_points_come_back(grace, trial):
    asked("scontrol", "update", "PartitionName=main", f"GraceTime={grace}")
    process = trial.start("seed=0,1", steps=30)
    wait(lambda: len(list(trial.folder.glob("points/*/steps"))) == 2)
    urgent = asked(
        "sbatch", "--parsable", "-p", "urgent", "--exclusive", "-N2", "-o/dev/null", "--wrap=sleep 2"
    ).strip()
    wait(lambda: "RUNNING" in asked("squeue", "-h", "-j", urgent, "-o", "%T"))
    for name in ("s0", "s1"):
        start_now(trial.job_of(name))
    code, text = trial.end(process)
    assert code == 0, text
    assert [r["attempts"] for r in trial.records().values()] == [2, 2] and len(trial.jobs()) == 2
    trial.ran_once(30)


def test_a_time_limit_that_is_near(trial):
    process = trial.start("seed=0", steps=30)
    wait(lambda: list(trial.folder.glob("points/*/steps")))
    number = trial.job_of("s0")
    asked("scancel", "--signal=USR2", number)  # what SLURM sends before the limit
    start_now(number)
    assert trial.end(process)[0] == 0
    assert trial.records()["s0"]["attempts"] == 2 and len(trial.jobs()) == 1
    trial.ran_once(30)


def test_jobs_that_get_nowhere_end(trial):
    process = trial.start("seed=0", "+data.options.fault=killed", "sweep.requeues=1")
    code, text = trial.end(process)
    assert code == 1 and "2 jobs in a row made no progress" in text and "killed by SIGKILL" in text
    assert trial.records()["s0"]["status"] == "failed" and trial.records()["s0"]["attempts"] == 2


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGHUP])
def test_a_parent_that_is_gone_loses_nothing(signum, trial):
    overrides = ("seed=0,1,2", "hydra.launcher.array_parallelism=2")
    first = trial.start(*overrides, steps=60)
    wait(lambda: len(list(trial.folder.glob("points/*/steps"))) == 2)
    os.killpg(first.pid, signum)
    assert first.wait(20) == (-signum if signum == signal.SIGKILL else 128 + signal.SIGTERM)
    assert signum == signal.SIGKILL or "3 jobs go on without this call" in first.text()
    code, text = trial.end(trial.start(*overrides, steps=60))
    assert code == 0 and "0 to run" in text and "1 queued, 2 running" in text
    assert len(trial.jobs()) == 3 and [r["attempts"] for r in trial.records().values()] == [1, 1, 1]
    trial.ran_once(60)


def test_ctrl_c_cancels_what_waits_and_stops_what_runs(trial):
    process = trial.start("seed=0,1,2", "hydra.launcher.array_parallelism=1", steps=40)
    wait(lambda: list(trial.folder.glob("points/*/steps")))
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    code, text = trial.end(process)
    assert code == 130 and "3 jobs cancelled" in text and "1 interrupted, 2 todo" in text, text
    assert asked("squeue", "-h") == "" and list(trial.folder.glob(".stop*")) == []
    code, text = trial.end(trial.start("seed=0,1,2", steps=40))
    assert code == 0 and "3 to run" in text
    trial.ran_once(40)


def test_nobody_logged_in(trial):
    """The call leaves; a killed job is made up for, and the report is written, by the job that follows all others."""
    process = trial.start("seed=0,1", "sweep.detach=true", "sweep.report=true", steps=60)
    code, text = trial.end(process)
    assert code == 0 and "2 points are queued or running" in text and "sums up after them" in text
    again = trial.end(trial.start("seed=0,1", "sweep.detach=true", "sweep.report=true", steps=60))[1]
    assert "0 to run" in again and "submitted" not in again and "sums up" not in again.splitlines()[-2]
    wait(lambda: len(list(trial.folder.glob("points/*/steps"))) == 2)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "status.py", trial.folder], capture_output=True, text=True
    )
    assert f"(job {trial.job_of('s0')})" in done.stdout, done.stdout + done.stderr
    kill(trial.job_of("s1"))
    wait(lambda: (trial.folder / "report" / "index.html").exists(), 120)
    assert {r["status"] for r in trial.records().values()} == {"complete"} and len(trial.jobs()) == 3
    trial.ran_once(60)
