"""Sweeps survive everything: faults of points, signals, kills, two sweeps at once; each launcher in turn."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from sweeps import ROOT, alive, statuses, sweep, wait_for

from convnn.config.overrides import quoted
from convnn.errors import ConfigError
from convnn.sweep import call, gpus
from convnn.sweep.budget import Budget
from convnn.sweep.call import Sweep
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import Plan, Point
from convnn.sweep.state import status_file
from convnn.sweep.sweep import run_sweep

SUBMITIT = pytest.param("submitit_local", marks=pytest.mark.slow)


FAULTS = (
    "+sweep.points={good:['seed=1'],raise:['data.name=raise'],exit:['data.name=exit'],kill:['data.name=kill'],"
    "diverge:['data.name=diverge'],last:['seed=2']}"
)


def check_faults(tmp_path, run):
    """Run a sweep with four kinds of faults twice: the second call, where all is mended, runs only those."""
    code, text = run(FAULTS)
    assert code == 1
    records = statuses(tmp_path)
    assert {name: r["status"] for name, r in records.items()} == {
        "good": "complete",
        "last": "complete",
        "raise": "failed",
        "exit": "failed",
        "kill": "killed",
        "diverge": "diverged",
    }
    reasons = {
        "raise": "RuntimeError: a fault of the test",
        "exit": "exit code 0 without a complete result",
        "kill": "killed by SIGKILL",
        "diverge": "diverged: loss is not finite at step 3",
    }
    for name, reason in reasons.items():
        assert reason in records[name]["reason"] and reason in text
        assert "a line of output" in (tmp_path / "sweep" / records[name]["log"]).read_text()
        assert records[name]["log"] in text
    code, text = run(FAULTS)
    assert code == 0 and "6 points (2 complete, 1 diverged, 2 failed, 1 killed), 4 to run" in text
    calls = {
        p.parent.name.split("-")[0]: len(p.read_text().splitlines()) for p in tmp_path.glob("sweep/points/*/calls")
    }
    assert calls == {"good": 1, "last": 1, "raise": 2, "exit": 2, "kill": 2, "diverge": 2}
    assert run(FAULTS)[0] == 0  # nothing is left


no_slurm = pytest.mark.skipif(shutil.which("srun") is not None, reason="SLURM is installed here")


@pytest.mark.parametrize("warm", ["auto", "false"])
@pytest.mark.long
def test_faults_do_not_sink_the_sweep_and_are_run_again(warm, driver, tmp_path):
    check_faults(tmp_path, lambda *o: sweep(driver, tmp_path, f"sweep.warm={warm}", *o))
    assert alive(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_faults_with_parallel_launchers(launcher, driver, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    check_faults(tmp_path, lambda *o: sweep(driver, tmp_path, f"hydra/launcher={launcher}", *more, *o))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_faults_of_real_runs(launcher, tmp_path):
    """The same with train.py itself: raises, exits, is killed, diverges; the others finish, and the report says so."""
    from helpers import TINY

    options = ["data.target=faulty.load", f"+data.options.once={tmp_path}/once"]
    points = [f"{fault}:['+data.options.fault={fault}']" for fault in ("raise", "exit", "kill")]
    points += ["diverge:['optim=sgd','optim.lr=1e30']", "good:['seed=1']", "last:['seed=2']"]
    own = [o for o in TINY if not o.startswith("tracker")]
    command = [sys.executable, str(ROOT / "sweep.py"), f"sweep.dir={tmp_path}/sweep", "tracker=jsonl", *own, *options]
    command += [f"+sweep.points={{{','.join(points)}}}", f"hydra/launcher={launcher}", "operator.k=9"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'support'}:{ROOT}"}
    expected = [
        (1, {"raise": "failed", "exit": "failed", "kill": "killed", "diverge": "diverged", "good": "complete"}),
        (1, {"raise": "complete", "exit": "complete", "kill": "complete", "diverge": "diverged", "good": "complete"}),
    ]
    for code, found in expected:
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        records = statuses(tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert {name: records[name]["status"] for name in found} == found
        text = (tmp_path / "sweep" / "report" / "table.md").read_text()
        for name, status in found.items():
            if status != "complete":
                assert records[name]["name"] in text and records[name]["log"] in text
    assert records["good"]["attempts"] == 1 and records["kill"]["attempts"] == 2
    assert "loss is not finite" in records["diverge"]["reason"]


@pytest.mark.long
def test_failed_points_can_be_left_alone(driver, tmp_path):
    overrides = ["+sweep.points={raise:['data.name=raise'],good:['seed=1']}"]
    assert sweep(driver, tmp_path, *overrides)[0] == 1
    code, text = sweep(driver, tmp_path, *overrides, "sweep.retry_failed=false")
    assert code == 1 and "0 to run" in text and "a fault of the test" in text
    assert statuses(tmp_path)["raise"]["attempts"] == 1


@pytest.mark.parametrize(
    "signum, launcher",
    [
        (signal.SIGTERM, "joblib"),
        pytest.param(signal.SIGHUP, "basic", marks=pytest.mark.slow),
        (signal.SIGINT, "basic"),
        pytest.param(signal.SIGTERM, "basic", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, "basic", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "submitit_local", marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_signals_leave_checkpoints_and_no_process(signum, launcher, driver, tmp_path):
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    overrides = ["data.name=sleep", "seed=0,1,2", f"hydra/launcher={launcher}", *more]
    process = sweep(driver, tmp_path, *overrides, wait=False)
    wait_for("sweep/points/*/ready", tmp_path)
    process.send_signal(signum)
    text, _ = process.communicate(timeout=60)
    code = 128 + (signal.SIGTERM if signum == signal.SIGHUP else signum)
    assert process.returncode == code and "interrupted" in text and "the same command goes on" in text
    begun = len(list(tmp_path.glob("sweep/points/*/ready")))
    assert len(list(tmp_path.glob("sweep/points/*/checkpoints/last.pt"))) == begun
    found = [r["status"] for r in statuses(tmp_path, by="name").values()]
    assert len(found) >= begun and set(found) == {"interrupted"}
    time.sleep(1)
    assert alive(tmp_path) == []
    (tmp_path / "sweep" / "points" / "mended").touch()
    code, text = sweep(driver, tmp_path, *overrides[:2])
    assert code == 0 and "3 complete" in text


@pytest.mark.long
def test_a_killed_sweep_takes_its_child_along(driver, tmp_path):
    process = sweep(driver, tmp_path, "data.name=sleep", wait=False)
    wait_for("sweep/points/*/ready", tmp_path)
    process.kill()
    process.wait()
    wait_for("sweep/points/*/checkpoints/last.pt", tmp_path)
    assert json.loads(next(tmp_path.glob("sweep/status/*.json")).read_text())["status"] == "running"
    code, text = sweep(driver, tmp_path, "data.name=sleep")
    assert code == 0 and "1 points (1 interrupted), 1 to run" in text


@pytest.mark.long
def test_two_sweeps_at_once_run_no_point_twice(driver, tmp_path):
    overrides = ["seed=0,1,2,3", "+data.options.seconds=0.5"]
    both = [sweep(driver, tmp_path, *overrides, wait=False) for _ in range(2)]
    texts = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    assert [len(p.read_text().splitlines()) for p in tmp_path.glob("sweep/points/*/calls")] == [1] * 4
    assert all("4 complete" in text for text in texts)


@pytest.mark.long
def test_invalid_points_stop_everything_or_are_left_out(driver, tmp_path):
    code, text = sweep(driver, tmp_path, "operator.k=0,9")
    assert code == 2 and "invalid  operator.k=0: operator.k=0 must lie in" in text
    assert text.splitlines()[-1].startswith("error: 1 points cannot work") and not (tmp_path / "sweep").exists()
    code, text = sweep(driver, tmp_path, "operator.k=0,9", "sweep.on_invalid=skip")
    assert code == 0 and "1 complete" in text
    (invalid,) = json.loads((tmp_path / "sweep" / "plan.json").read_text())["invalid"]
    assert invalid["overrides"] == ["tracker=jsonl", "operator.k=0"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["grid=spectrm"], "error: grid=spectrm: no such option; did you mean 'spectrum'?"),
        (["operator.kk=1,2"], "did you mean 'operator.k'"),
        (["hydra/launcher=joblb"], "hydra/launcher=joblb: no such option; did you mean 'joblib'"),
        (["hydra.launcher.n_jobs=2", "seed=0,1"], "unknown key 'hydra.launcher.n_jobs'"),
        (["hydra/launcher=joblib", "hydra.launcher.n_job=2"], "did you mean 'hydra.launcher.n_jobs'"),
        (["operator.blend=interval(0,1)"], "operator.blend=interval(0,1): a grid takes values such as 0,0.5,1"),
        (["hydra.job.chdir=true", "seed=0,1"], "jobs stay in the folder"),
        (["run.dir=x", "seed=0,1"], "set sweep.dir"),
        (["sweep.retry_failed=maybe", "seed=0,1"], "sweep.retry_failed"),
        (["operator.k=range(0,4,0)"], "operator.k"),
        (["hydra/sweeper=basic", "seed=0,1", "sweep.dry_run=true"], "need the default sweeper"),
        pytest.param(["hydra/launcher=submitit_slurm"], "there is no srun here", marks=no_slurm),
        (["sweep.dir=/proc/nowhere"], "cannot be written"),
    ],
)
@pytest.mark.long
def test_bad_commands_end_with_one_line(overrides, message, driver, tmp_path):
    code, text = sweep(driver, tmp_path, *overrides)
    assert code == 2 and message in text and "Traceback" not in text


def test_a_missing_plugin_names_the_extra(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for launcher, extra in (("joblib", "parallel"), ("submitit_slurm", "slurm")):
        with pytest.raises(ConfigError, match=f"uv sync --extra {extra}"):
            run_sweep(["seed=0,1", f"hydra/launcher={launcher}"])


@pytest.mark.long
def test_dry_run_tells_and_does_nothing(driver, tmp_path, capsys):
    assert sweep(driver, tmp_path, "seed=0,1")[0] == 0
    overrides = [f"sweep.dir={tmp_path}/sweep", "tracker=jsonl", "seed=0,1,2,2", "sweep.dry_run=true"]
    assert run_sweep([*overrides, "data=digits", "backbone.stem=small", "operator.k=4"]) == 0
    text = capsys.readouterr().out
    assert "3 points" in text and "3 todo; 1 equal in effect merged" in text and "FLOP" in text
    before = sorted(p.name for p in (tmp_path / "sweep" / "points").iterdir())
    assert len(before) == 2


@pytest.mark.long
def test_another_sweeper_uses_the_same_machinery(driver, tmp_path):
    for _ in range(2):
        code, text = sweep(driver, tmp_path, "seed=0,1", "hydra/sweeper=basic")
        assert code == 0, text
    assert [len(p.read_text().splitlines()) for p in tmp_path.glob("sweep/points/*/calls")] == [1, 1]
    code, text = sweep(driver, tmp_path, "data.name=raise", "seed=0,1", "optim.lr=0.1,-1", "hydra/sweeper=basic")
    assert code == 1 and "a fault of the test" in text and "optim.lr=-1.0 must lie" in text


@pytest.mark.long
def test_a_known_configuration_keeps_its_folder_under_any_name(driver, tmp_path):
    assert sweep(driver, tmp_path, "seed=1,2")[0] == 0
    code, text = sweep(driver, tmp_path, "seed=1,2", "run.name='../../a b'")
    assert code == 0 and "2 points (2 complete), 0 to run" in text
    code, text = sweep(driver, tmp_path, "seed=3", "run.name='../../a b'")
    assert code == 0 and not list(tmp_path.parent.glob("*a*b-*"))
    assert len(list((tmp_path / "sweep" / "points").iterdir())) == 3


@pytest.mark.long
def test_odd_folder_names(driver, tmp_path):
    for name in ("com,ma", "it's", "[x]=y#", " lead", "back\\slash"):
        place = tmp_path / "odd" / name
        code, text = sweep(driver, tmp_path, f"sweep.dir={quoted(str(place))}", "seed=1", "sweep.name='a b,c'")
        assert code == 0 and "1 complete" in text and (place / "points").is_dir(), (name, text)


@pytest.mark.long
def test_a_point_that_waits_for_its_gpu_is_waited_for(driver, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with gpus.reserve_gpu("auto", 1, lambda: False) as held:
        assert held
        both = [sweep(driver, tmp_path, "seed=1", wait=False) for _ in range(2)]
        time.sleep(4)
    texts = [p.communicate(timeout=60)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], texts
    assert [len(p.read_text().splitlines()) for p in tmp_path.glob("sweep/points/*/calls")] == [1]


def test_the_point_of_a_peer_that_died_is_taken_over(tmp_path):
    """Another call held it as this one came to it, and is gone before this one has ended."""
    point = Point("p", "0" * 16, ("seed=1",))
    mine = Sweep(Plan([point], [], {}), tmp_path, SweepConfig(dir=str(tmp_path)), "me-1", [], Budget(tmp_path))
    status_file(tmp_path, point).parent.mkdir()
    for status, token, left in (("running", "other-2", True), ("running", "me-1", False), ("failed", "other-2", False)):
        record = {"status": status, "token": token, "attempts": 1, "name": "p", "reason": None}
        status_file(tmp_path, point).write_text(json.dumps(record))
        assert bool(mine.left_by_others(lambda: False)) is left, (status, token)
        assert mine.left_by_others(lambda: False) == []  # once: where the point is refused, it stays as it is
    assert mine.left_by_others(lambda: True) == []


def test_a_plan_that_another_call_writes_is_waited_for_a_minute(tmp_path, monkeypatch):
    mine = Sweep(Plan([], [], {}), tmp_path, SweepConfig(dir=str(tmp_path)), "me-1", [], Budget(tmp_path))
    (tmp_path / ".plan.lock").write_text("pid 7 on other\n")
    waited = []
    monkeypatch.setattr(call, "lock", lambda path, wait: waited.append((path, wait)))
    with pytest.raises(ConfigError, match="pid 7 on other has been writing its plan for a minute"):
        mine.prepare()
    assert waited == [(tmp_path / ".plan.lock", 60.0)] and not (tmp_path / "plan.json").exists()


@pytest.mark.slow
def test_submitit_on_this_machine_shares_gpus_and_cores(driver, tmp_path, monkeypatch):
    """It hides all GPUs from a job without a number of them, and starts all jobs at once."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, text = sweep(driver, tmp_path, "seed=1,2,3", "+data.options.seconds=2", "hydra/launcher=submitit_local")
    assert code == 0, text
    seen = [path.read_text().split()[0] for path in tmp_path.glob("sweep/points/*/calls")]
    assert len(seen) == 3 and set(seen) == {"4", "7"}


@pytest.mark.parametrize("launcher", ["joblib", SUBMITIT])
@pytest.mark.long
def test_a_killed_sweep_takes_its_workers_along(launcher, driver, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    process = sweep(driver, tmp_path, "data.name=sleep", "seed=1,2", f"hydra/launcher={launcher}", wait=False)
    wait_for("sweep/points/*/ready", tmp_path)
    process.kill()
    process.wait()
    wait_for("sweep/points/*/checkpoints/last.pt", tmp_path)
    end = time.monotonic() + 30
    while alive(tmp_path):
        assert time.monotonic() < end, alive(tmp_path)
        time.sleep(0.5)
