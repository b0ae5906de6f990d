"""Points as jobs of a cluster, with a scheduler of the test's own: nothing is lost, nothing is submitted twice."""

import json
from dataclasses import replace

import pytest
from fake_slurm import POINTS, SETTINGS, FakeScheduler, record

from convnn.runtime.scheduler import Job, SchedulerError
from convnn.sweep.attempts import next_record
from convnn.sweep.cluster import Cluster
from convnn.sweep.overview import overview
from convnn.sweep.plan import Point
from convnn.sweep.submission import chunks, read_submissions, shares


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path, POINTS, FakeScheduler(), "call", limit=2)


def submit(cluster, points=None):
    made = cluster.submit(lambda states: points or cluster.points, SETTINGS, "a sweep", {})
    return [n for s in made for n in map(s.number, range(len(s.points)))]


def words(cluster):
    return [state.status for state in cluster.look().values()]


def complete(cluster, point):
    folder = cluster.folder / point.folder
    folder.mkdir(parents=True, exist_ok=True)
    result = {"status": "complete", "fingerprint": point.fingerprint, "params": 1, "gflops": 1.0, "top1_last": 50.0}
    (folder / "result.json").write_text(json.dumps(result | {"exit_code": 0}))
    (folder / "metrics.jsonl").write_text('{"epoch": 0, "test_top1": 50.0}\n')


def test_points_follow_their_jobs(cluster):
    assert words(cluster) == ["todo"] * 5 and cluster.scheduler.asked == 1
    assert submit(cluster) == ["10_0", "10_1", "10_2", "10_3", "10_4"]
    found = cluster.scheduler.found
    found["10_1"] = Job("RUNNING", node="node7")
    found["10_2"] = Job("PENDING", restarts=2)
    found["10_3"] = Job("COMPLETED")
    complete(cluster, POINTS[3])
    states = list(cluster.look().values())
    assert [s.status for s in states] == ["queued", "running", "queued", "complete", "queued"]
    assert [s.reason for s in states[:3]] == ["job 10_0", "on node7 (job 10_1)", "requeued (2), job 10_2"]
    assert list(cluster.alive.values()) == ["10_0", "10_1", "10_2", "10_4"] and cluster.lost == []
    assert submit(cluster) == []  # what is queued or runs, or is complete, is not submitted again
    assert submit(Cluster(cluster.folder, POINTS, cluster.scheduler, "another call")) == []


def test_a_lost_job_is_made_up_for_but_not_for_ever(cluster):
    submit(cluster, POINTS[:1])
    numbers = []
    for _ in range(3):
        (number,) = cluster.alive.values() if cluster.alive else [None]
        cluster.look()
        (number,) = cluster.alive.values()
        numbers.append(number)
        cluster.scheduler.found[number] = Job("NODE_FAIL")
        cluster.look()
        if cluster.lost:
            submit(cluster, cluster.lost)
    assert numbers == ["10_0", "20_0", "30_0"]
    state = cluster.look()[POINTS[0].fingerprint]
    assert state.status == "failed" and "job 30_0 ended before it began (NODE_FAIL), the last of 3" in state.reason


@pytest.mark.parametrize(
    "ended, expected", [("killed", "lost"), ("interrupted", "lost"), ("failed", "failed"), ("diverged", "diverged")]
)
def test_what_a_job_recorded_counts(ended, expected, cluster):
    submit(cluster, POINTS[:1])
    cluster.scheduler.found["10_0"] = Job("FAILED")
    record(cluster, POINTS[0], status=ended, reason="why", job="10_0")
    assert cluster.look()[POINTS[0].fingerprint].status == ended
    assert cluster.lost == (POINTS[:1] if expected == "lost" else [])


def test_a_failure_of_an_earlier_job_does_not_end_the_next(cluster):
    record(cluster, POINTS[0], status="failed", reason="why", job="5_0")
    submit(cluster, POINTS[:1])
    cluster.scheduler.found["10_0"] = Job("PREEMPTED")
    cluster.look()
    assert cluster.lost == POINTS[:1]


def test_cancelled_jobs_are_told_from_lost_ones(cluster):
    submit(cluster)
    cluster.look()
    found = cluster.scheduler.found
    found["10_0"] = Job("CANCELLED")  # as it ran
    record(cluster, POINTS[0], status="interrupted", reason="stopped by SIGTERM", job="10_0")
    del found["10_1"]  # seen as it waited, and gone without a trace: SLURM forgets a task that never began
    del found["10_2"], found["10_3"]
    cluster.scheduler.accounts = {"10_2": "CANCELLED", "10_3": "NODE_FAIL"}
    states = cluster.look()
    assert [s.status for s in states.values()] == ["cancelled", "cancelled", "cancelled", "interrupted", "queued"]
    assert cluster.lost == [POINTS[3]] and states[POINTS[1].fingerprint].reason == "its job 10_1 was cancelled"
    late = Cluster(cluster.folder, POINTS, cluster.scheduler, "call")  # which saw nothing of that
    assert [s.status for s in late.look().values()][:3] == ["cancelled"] * 3


def test_jobs_of_another_name_are_not_lost(cluster):
    submit(cluster)
    cluster.scheduler.names[10] = "renamed"
    assert words(cluster) == ["queued"] * 5 and cluster.lost == [] and submit(cluster) == []


def test_a_cancelled_array_that_has_forgotten_its_tasks(cluster):
    submit(cluster)
    cluster.scheduler.found = {"10": Job("CANCELLED"), "10_0": Job("CANCELLED")}
    record(cluster, POINTS[0], status="interrupted", reason="stopped by SIGTERM", job="10_0")
    record(cluster, POINTS[1], status="killed", reason="killed by SIGKILL", job="10_1")  # before, and forgotten too
    late = Cluster(cluster.folder, POINTS, cluster.scheduler, "call")
    assert words(late) == ["cancelled", "killed", *["cancelled"] * 3] and late.lost == [POINTS[1]]


def test_why_a_job_waits_is_told_where_it_is_not_what_all_wait_for(cluster):
    submit(cluster)
    found = cluster.scheduler.found
    found["10_1"] = Job("PENDING", reason="PartitionTimeLimit")
    found["10_2"] = Job("PENDING", restarts=1, reason="JobHeldUser")
    found["10_3"] = Job("SUSPENDED", node="n1", reason="None")
    found["10_4"] = Job("FAILED", reason="BadConstraints")
    (cluster.folder / "hydra" / "slurm-10.out").write_text("module: command not found")
    reasons = [state.reason for state in cluster.look().values()]
    waiting = ["job 10_0", "job 10_1: PartitionTimeLimit", "requeued (1), job 10_2: JobHeldUser"]
    assert reasons[:4] == [*waiting, "suspended, on n1 (job 10_3)"]
    assert "ended before it began (FAILED, BadConstraints); it said more in" in reasons[4]
    assert reasons[4].endswith("hydra/slurm-10.out")
    assert cluster.others(SETTINGS.options) == [] and cluster.others(["--time=9"]) == ["10"]


def test_own_options_come_last_and_a_percent_is_no_pattern(tmp_path):
    cluster = Cluster(tmp_path / "50%normal", POINTS, FakeScheduler(), "call")
    submit(cluster)
    options = cluster.scheduler.scripts[10][0]
    assert options[-2] == f"--output={tmp_path}/50%%normal/hydra/slurm-%A.out" and (cluster.folder / "hydra").is_dir()
    assert [o.partition("=")[0] for o in options[-3:]] == ["--job-name", "--output", "--chdir"]


def test_one_job_follows_all_points_that_there_are_by_now(cluster):
    submit(cluster, POINTS[:1])
    cluster.look()
    assert cluster.submit_end(SETTINGS, "a sweep", "").job == 20
    submit(cluster, POINTS)
    cluster.look()
    assert cluster.submit_end(SETTINGS, "a sweep", "").job == 40  # the first knows nothing of the others
    assert "--dependency=afterany:10:30" in cluster.scheduler.scripts[40][0]
    assert cluster.submit_end(SETTINGS, "a sweep", "") is None


def test_after_ctrl_c_nothing_is_lost_or_cancelled_by_others(cluster):
    submit(cluster, POINTS[:2])
    record(cluster, POINTS[0], status="interrupted", reason="stopped by SIGTERM", job="10_0")
    cluster.look()
    assert cluster.cancel([p.fingerprint for p in POINTS]) == ["10_0", "10_1"] and cluster.scheduler.found == {}
    assert words(cluster)[:2] == ["interrupted", "todo"] and cluster.lost == []
    assert submit(cluster, POINTS[:2]) == ["20_0", "20_1"]


def test_a_call_that_was_killed_as_it_submitted(cluster):
    submit(cluster, POINTS[:2])
    for name, kept in (("taken", True), ("never", False)):
        (path,) = cluster.folder.glob("status/jobs/*.json")
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"job": None}))
        if not kept:
            cluster.scheduler.found.clear()
        again = Cluster(cluster.folder, POINTS, cluster.scheduler, "call")
        again.recover()
        assert [s.job for s in read_submissions(cluster.folder)] == ([10] if kept else []), name
    assert len(submit(again, POINTS[:2])) == 2


def test_a_scheduler_that_is_silent_says_nothing_about_jobs(cluster):
    submit(cluster)
    cluster.scheduler.silent = True
    with pytest.raises(SchedulerError):
        cluster.look()
    lines, done = overview(cluster.folder, POINTS, scheduler=cluster.scheduler)
    assert "no answer" in lines[0] and not done
    cluster.scheduler.silent = False
    assert words(cluster) == ["queued"] * 5 and cluster.lost == []


def test_a_refused_submission_leaves_nothing(cluster):
    cluster.scheduler.silent = True
    with pytest.raises(SchedulerError):
        cluster.scheduler.submit([], "")
    cluster.scheduler.submit = lambda *a: (_ for _ in ()).throw(SchedulerError("sbatch: over the limit"))
    cluster.scheduler.silent = False
    with pytest.raises(SchedulerError, match="over the limit"):
        submit(cluster)
    assert read_submissions(cluster.folder) == []


def test_arrays_stay_within_the_sites_limit(cluster):
    assert [len(part) for part in chunks([str(i) for i in range(2000)], 1001)] == [1000, 1000]
    assert chunks([], 5) == [] and chunks(["a"], 5) == [["a"]]
    cluster.scheduler.largest = 2
    submit(cluster)
    arrays = [next(o for o in options if o.startswith("--array")) for options, _ in cluster.scheduler.scripts.values()]
    assert arrays == ["--array=0-1%2", "--array=0-1%2", "--array=0-0%2"]  # six at once, shared by three arrays
    assert [sorted(p.name for p in cluster.folder.glob("status/jobs/*"))] and len(list(cluster.folder.rglob("*"))) < 9


def limits(cluster, parallel, largest):
    """Submit all points; return the options of each array that bound how many jobs run at once."""
    before = set(cluster.scheduler.scripts)
    cluster.scheduler.largest = largest
    cluster.submit(lambda states: cluster.points, replace(SETTINGS, parallel=parallel), "a sweep", {})
    bounding = ("--array", "--dependency")
    return [
        [o for o in options if o.startswith(bounding)]
        for number, (options, _) in cluster.scheduler.scripts.items()
        if number not in before
    ]


def test_no_more_jobs_run_at_once_than_the_settings_say(cluster):
    """Arrays that the site's limit cuts share array_parallelism; those without a share wait for one that has."""
    assert [shares(3, 8), shares(3, 2), shares(1, 256)] == [[3, 3, 2], [1, 1, 0], [256]]
    assert limits(cluster, parallel=2, largest=2) == [
        ["--array=0-1%1"],
        ["--array=0-1%1"],
        ["--array=0-0%1", "--dependency=afterany:10"],
    ]


def test_points_submitted_again_keep_within_what_the_others_leave(cluster):
    assert limits(cluster, parallel=3, largest=10) == [["--array=0-4%3"]]
    for index in (0, 1, 2):
        del cluster.scheduler.found[f"10_{index}"]
        record(cluster, POINTS[index], status="killed", job=f"10_{index}")
    assert limits(cluster, parallel=3, largest=10) == [["--array=0-2%1"]]  # two are left of the first
    del cluster.scheduler.found["20_0"]
    record(cluster, POINTS[0], status="killed", job="20_0")
    assert limits(cluster, parallel=3, largest=10) == [["--array=0-0%3", "--dependency=afterany:10:20"]]


def test_progress_is_what_was_saved(tmp_path):
    first = next_record({}, tmp_path, "a")
    assert first["stalled"] == 0 and next_record(first, tmp_path, "a")["stalled"] == 1
    assert next_record(next_record(first, tmp_path, "a"), tmp_path, "b")["stalled"] == 0  # another call
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").write_text("weights")
    assert next_record(first | {"stalled": 2}, tmp_path, "a")["stalled"] == 0


def test_the_overview_lists_what_is_open(cluster):
    submit(cluster)
    cluster.scheduler.found["10_1"] = Job("RUNNING", node="n3")
    complete(cluster, POINTS[0])
    cluster.scheduler.found["10_0"] = Job("COMPLETED")
    record(cluster, POINTS[2], status="failed", reason="no such file", job="10_2")
    cluster.scheduler.found["10_2"] = Job("FAILED")
    (cluster.folder / "logs").mkdir()
    (cluster.folder / "logs" / "p2.log").touch()
    cluster.look()
    cluster.submit_end(SETTINGS, "a sweep", "#!/bin/bash")
    before = sorted(cluster.folder.rglob("*"))
    lines, done = overview(cluster.folder, POINTS, scheduler=cluster.scheduler)
    assert lines[0] == "running     p1  on n3 (job 10_1)" and lines[1] == "queued      p3  job 10_3"
    assert lines[3] == f"failed      p2  no such file; log {cluster.folder}/logs/p2.log"
    assert lines[4].endswith("5 points: 1 complete, 1 running, 2 queued, 1 failed") and not done
    assert lines[5].startswith("job 20 sums up") and sorted(cluster.folder.rglob("*")) == before
    assert cluster.submit_end(SETTINGS, "a sweep", "") is None  # one is enough
    assert "--dependency=afterany:10" in cluster.scheduler.scripts[20][0]


def test_the_overview_of_a_large_sweep_is_short(tmp_path):
    points = [Point(f"p{i}", f"{i:016x}", (f"seed={i}",)) for i in range(60)]
    cluster = Cluster(tmp_path, points, FakeScheduler(), "call")
    submit(cluster)
    short, long = (overview(tmp_path, points, everything=e, scheduler=cluster.scheduler)[0] for e in (False, True))
    assert len(short) == 22 and short[20] == "queued      40 more; all=true lists them" and len(long) == 61
