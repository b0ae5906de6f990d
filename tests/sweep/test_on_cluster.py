"""One call of a sweep on a cluster, with a scheduler of the test's own: what it tells, follows and hands on."""

import signal
from types import SimpleNamespace

import pytest
from fake_slurm import POINTS, SETTINGS, FakeScheduler, record

from convnn.errors import ConfigError
from convnn.runtime.scheduler import Job, SchedulerError
from convnn.sweep import on_cluster
from convnn.sweep.budget import Budget
from convnn.sweep.cluster import Cluster
from convnn.sweep.on_cluster import ClusterSweep
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import Plan


def call_of(tmp_path, scheduler, points=POINTS, **options):
    options = SweepConfig(dir=str(tmp_path), report=False, **options)
    given = Plan(list(points), [], {}), tmp_path, options, "a-1", ["sweep.py", "seed=1"], Budget(tmp_path)
    return ClusterSweep(*given, settings=SETTINGS, scheduler=scheduler)


def refusing(scheduler, which):
    """Let a scheduler refuse submissions."""
    hand_in = scheduler.submit

    def submit(options, script):
        if which(options):
            raise SchedulerError("sbatch: over the limit")
        return hand_in(options, script)

    scheduler.submit = submit
    return scheduler


def is_array(options):
    return any(option.startswith("--array") for option in options)


def test_arrays_before_one_that_is_refused_are_told_and_followed(tmp_path, capsys):
    scheduler = FakeScheduler(largest=2)
    refusing(scheduler, lambda options: is_array(options) and len(scheduler.names) == 1)
    assert call_of(tmp_path, scheduler, detach=True).run([]) == 0
    said = capsys.readouterr().out
    assert "submitted 2 points as job 10" in said
    assert "warning: sbatch: over the limit; what was submitted goes on" in said
    assert "2 points are queued or running as job 10; job 20 sums up after them" in said


def test_a_queue_that_is_silent_after_the_submission_is_asked_again(tmp_path, monkeypatch, capsys):
    scheduler, silent = FakeScheduler(), []
    monkeypatch.setattr(on_cluster, "SHORTEST", 0.0)
    jobs = scheduler.jobs

    def ask(names):
        if scheduler.names and len(silent) < 3:
            silent.append(1)
            raise SchedulerError("squeue: Socket timed out")
        return jobs(names)

    scheduler.jobs = ask
    assert call_of(tmp_path, scheduler, detach=True).run([]) == 0
    said = capsys.readouterr().out
    assert "warning: squeue: Socket timed out" in said and "job 20 sums up after them" in said
    silent[:] = [1, 1]
    scheduler.jobs = lambda names: (_ for _ in ()).throw(SchedulerError("squeue: gone"))
    with pytest.raises(ConfigError, match="hydra/launcher=submitit_slurm: squeue: gone"):
        call_of(tmp_path, scheduler).run([])


def test_without_the_job_that_follows_them_all_the_call_says_so(tmp_path):
    scheduler = refusing(FakeScheduler(), lambda options: not is_array(options))
    with pytest.raises(ConfigError, match="over the limit; job 10 goes on, but none follows: the same command with"):
        call_of(tmp_path, scheduler, detach=True).run([])


@pytest.mark.parametrize("retry", [True, False])
def test_the_job_that_sums_up_hands_on_what_was_killed(retry, tmp_path, monkeypatch, capsys):
    """It leaves again at once, with another job to follow, instead of waiting in person."""
    scheduler, options = FakeScheduler(), {"detach": True, "retry_failed": retry}
    assert call_of(tmp_path, scheduler, POINTS[:1], **options).run([]) == 0
    scheduler.found["10_0"] = Job("FAILED")
    known = {"status": "killed", "reason": "killed by SIGKILL", "job": "10_0"}
    record(Cluster(tmp_path, POINTS, scheduler, ""), POINTS[0], **known)
    scheduler.found["20"] = Job("RUNNING")
    monkeypatch.setenv(on_cluster.CALL, "a-1")
    capsys.readouterr()
    assert call_of(tmp_path, scheduler, POINTS[:1], **options).run([]) == 0
    assert "1 points are queued or running as job 30; job 40 sums up after them" in capsys.readouterr().out


def test_a_full_disk_is_waited_for(tmp_path, capsys):
    call = call_of(tmp_path, FakeScheduler())
    for _ in range(2):
        with call._patience():
            raise OSError(28, "No space left on device")
    assert capsys.readouterr().out == f"warning: sweep.dir={tmp_path}: No space left on device; asking again\n"


@pytest.mark.parametrize("own", [True, False])
def test_a_spent_budget_cancels_what_this_call_has_queued_alone(own, tmp_path, monkeypatch):
    scheduler, signals, looks = FakeScheduler(), SimpleNamespace(seen=None), []

    def call(token, budget):
        given = Plan(POINTS[:2], [], {}), tmp_path, SweepConfig(dir=str(tmp_path)), token, [], budget
        return ClusterSweep(*given, settings=SETTINGS, scheduler=scheduler)

    first = call("a-1", Budget(tmp_path))
    first._submit(first._wanted)
    spent = Budget(tmp_path, deadline=0.0)
    second = first if own else call("b-2", spent)
    second.budget = spent

    def wait(*_):
        looks.append(1)
        signals.seen = signal.SIGTERM if len(looks) > 1 else None
        return signals.seen is None

    monkeypatch.setattr(second, "_wait", wait)
    second._follow(second.states(), signals)
    states = [state.status for state in second.states().values()]
    assert states == (["cancelled"] * 2 if own else ["queued"] * 2)
