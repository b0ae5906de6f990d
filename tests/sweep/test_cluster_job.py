"""What a job of a cluster does for its point, and the call that follows jobs, with a scheduler of the test's own."""

import json
import os
import signal
import sys
import threading

import pytest
from fake_slurm import FakeScheduler
from sweeps import point_of, wait_for

from convnn.errors import ConfigError
from convnn.runtime.scheduler import Job, SchedulerError
from convnn.sweep import cluster_job, on_cluster, process
from convnn.sweep.budget import Budget
from convnn.sweep.on_cluster import ClusterSweep
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import Plan, Point, save_plan
from convnn.sweep.process import Start
from convnn.sweep.sbatch import Settings
from convnn.sweep.state import status_file
from convnn.sweep.submission import Submission, save_submission


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(process, "TRAIN", ("-m", "fake_train"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def submitted(tmp_path, *points, call="c", **orders):
    save_plan(Plan(list(points), [], {}), tmp_path, ["sweep.py"], "sweep")
    submission = Submission("sweep-1", [p.fingerprint for p in points], call, [], [], 10, sweep={"name": "g", **orders})
    save_submission(tmp_path, submission)
    scheduler = FakeScheduler()
    scheduler.names = {10: "sweep-1"}
    scheduler.found = {f"10_{i}": Job("RUNNING", node="n1") for i in range(len(points))}
    return scheduler


def run(tmp_path, scheduler, index=0, **environment):
    names = {
        "SLURM_ARRAY_JOB_ID": "10",
        "SLURM_ARRAY_TASK_ID": str(index),
        "SLURM_JOB_ID": "11",
        "SLURMD_NODENAME": "n1",
    }
    return cluster_job.run_job(tmp_path, "sweep-1", names | environment, scheduler)


def record(tmp_path, point):
    return json.loads(status_file(tmp_path, point).read_text())


def test_a_job_trains_its_point_and_says_which_it_was(fake, tmp_path):
    points = [point_of("seed=1"), point_of("seed=2")]
    assert run(tmp_path, submitted(tmp_path, *points), 1) == 0
    found = record(tmp_path, points[1])
    assert (found["status"], found["job"], found["node"], found["restarts"]) == ("complete", "10_1", "n1", 0)
    assert (tmp_path / points[1].folder / "calls").read_text() == "None g\n" and not status_file(
        tmp_path, points[0]
    ).exists()


@pytest.mark.parametrize(
    "signum, state, requeued",
    [(signal.SIGUSR2, "RUNNING", True), (signal.SIGTERM, "RUNNING", True), (signal.SIGTERM, "COMPLETING", False)],
)
def test_a_job_that_is_stopped_goes_back_into_the_queue_unless_it_is_ending(signum, state, requeued, fake, tmp_path):
    """RUNNING: a preemption with grace, or a limit that is near. COMPLETING: cancelled, or requeued already."""
    point = point_of("data.name=sleep")
    scheduler = submitted(tmp_path, point)

    def ask():
        wait_for("points/*/ready", tmp_path)
        scheduler.found = {"10_0": Job(state)}
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=ask)
    thread.start()
    assert run(tmp_path, scheduler) == 0
    thread.join()
    assert (scheduler.found["10_0"].restarts == 1) is requeued
    assert record(tmp_path, point)["status"] == "interrupted"
    assert (tmp_path / point.folder / "checkpoints" / "last.pt").read_text() == f"after {signum}"


def test_jobs_that_get_nowhere_give_up(fake, tmp_path):
    point = point_of("data.name=kill")
    scheduler = submitted(tmp_path, point, requeues=1)
    for _ in range(2):
        assert run(tmp_path, scheduler) == 1
        (tmp_path / point.folder / "mended").unlink()
        assert record(tmp_path, point)["status"] == "killed"
    assert run(tmp_path, scheduler) == 1
    found = record(tmp_path, point)
    assert found["status"] == "failed" and found["attempts"] == 2
    assert found["reason"].startswith("2 jobs in a row made no progress") and "killed by SIGKILL" in found["reason"]
    (tmp_path / point.folder / "mended").touch()
    submitted(tmp_path, point, call="another call", requeues=1)
    assert run(tmp_path, scheduler) == 0 and record(tmp_path, point)["status"] == "complete"


def test_several_processes_are_torchruns(tmp_path):
    point = Point("p", "0" * 16, ("seed=1",))
    plain, four = Start().command(tmp_path, point, ()), Start(4).command(tmp_path, point, ())
    assert plain[:3] == [sys.executable, "-m", "convnn.cli.train"]
    assert "convnn.sweep.several" in four and "--nproc-per-node=4" in four and "--standalone" in four
    assert four[-5:] == plain[-5:]
    environment = {"SLURM_JOB_ID": "30011", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "SLURM_RESTART_COUNT": "2"}
    meet = cluster_job.meeting(environment, 2)
    assert "--rdzv-endpoint=10.0.0.7:20011" in meet and "--rdzv-id=30011.2" in meet and "--nnodes=2" in meet


# ------------------------------------------------------------------------------------- the call that follows


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A call of a sweep of three points, whose jobs do at each look what the test says."""
    monkeypatch.setattr(on_cluster, "SHORTEST", 0.0)
    points = [Point(f"p{i}", f"{i:016x}", (f"seed={i}",)) for i in range(3)]
    options = SweepConfig(dir=str(tmp_path), report=False, name="s")

    def make(scheduler, **changes):
        own = SweepConfig(**(vars(options) | changes))
        settings = Settings(["--time=5"], light=["--time=5"])
        plan = Plan(points, [], {})
        return ClusterSweep(
            plan, tmp_path, own, "t", ["sweep.py"], Budget(tmp_path), settings=settings, scheduler=scheduler
        )

    make.points = points
    return make


def finish(sweep, point):
    folder = sweep.folder / point.folder
    folder.mkdir(parents=True, exist_ok=True)
    result = {"status": "complete", "fingerprint": point.fingerprint, "top1_last": 50.0, "exit_code": 0}
    (folder / "result.json").write_text(json.dumps(result))


def test_a_call_follows_its_jobs_to_the_end(call, capsys):
    scheduler = FakeScheduler()
    sweep = call(scheduler)
    steps = iter(range(100))

    def happen():
        step = next(steps)
        if step == 10:
            raise SchedulerError("squeue: no answer")  # as the controller is restarted
        if step == 8:
            scheduler.found["10_0"] = Job("RUNNING", node="n1")
        if step == 12:
            scheduler.found["10_0"] = Job("PENDING", 1)
        if step == 14:
            scheduler.found["10_1"] = Job("NODE_FAIL")
            del scheduler.found["10_2"]
        if step > 16:
            for number, job in list(scheduler.found.items()):
                if job.alive:
                    scheduler.found[number] = Job("COMPLETED")
            for point in sweep.plan.points[:2]:
                finish(sweep, point)

    scheduler.on_jobs = happen
    assert sweep.run([]) == 1
    text = capsys.readouterr().out
    assert "submitted 3 points as job 10" in text and "submitted 1 point as job 20" in text
    assert "running     p0  on n1 (job 10_0)" in text and "queued      p0  requeued (1), job 10_0" in text
    assert "[0/3] queued      p1  to be submitted again: job 10_1 ended before it began (NODE_FAIL)" in text
    assert text.count("warning: squeue: no answer; asking again") == 1
    assert "cancelled   p2  its job 10_2 was cancelled" in text and "2 complete" in text


def test_a_call_that_detaches_leaves_a_job_that_sums_up(call, capsys, monkeypatch):
    scheduler = FakeScheduler()
    assert call(scheduler, detach=True).run([]) == 0
    assert call(scheduler, detach=True).run([]) == 0  # the same again submits nothing
    text = capsys.readouterr().out
    assert text.count("submitted") == 1 and "job 20 sums up after them" in text and list(scheduler.names) == [10, 20]
    options, script = scheduler.scripts[20]
    assert "--dependency=afterany:10" in options and "export CONVNN_SWEEP_CALL=t-" in script
    sweep = call(scheduler, detach=True)
    scheduler.found = {
        "10_0": Job("COMPLETED"),
        "10_1": Job("NODE_FAIL"),
        "10_2": Job("CANCELLED"),
        "20": Job("RUNNING"),
    }
    finish(sweep, sweep.plan.points[0])
    name = script.partition("CONVNN_SWEEP_CALL=")[2].splitlines()[0]
    monkeypatch.setenv("CONVNN_SWEEP_CALL", name)
    assert call(scheduler, detach=True).run([]) == 0
    assert "submitted 1 point as job 30" in capsys.readouterr().out  # the lost one; the cancelled one stays
    assert scheduler.names[40].endswith("-end") and "--dependency=afterany:30" in scheduler.scripts[40][0]


def test_a_scheduler_that_refuses_is_one_line(call):
    scheduler = FakeScheduler()
    scheduler.silent = True
    with pytest.raises(ConfigError, match="submitit_slurm: "):
        call(scheduler).run([])
