"""Locks between processes and machines."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from convnn.runtime import locks
from convnn.runtime.locks import Owner, is_locked, lock, lock_owner, release
from convnn.runtime.scheduler import Job, SchedulerError

FLOCKS = {"none": errno.ENOSYS, "none in reach": errno.ENOLCK, "of this machine alone": None}


@pytest.fixture(params=FLOCKS)
def shared(request, monkeypatch):
    """A file system of several machines, without a lock that they all see."""
    number = FLOCKS[request.param]

    def flock(file, kind):
        if number is not None:
            raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_type_of", lambda device: "nfs4")


def elsewhere(monkeypatch, host="other", boot="another"):
    monkeypatch.setattr(locks.platform, "node", lambda: host)
    monkeypatch.setattr(locks, "_boot", lambda: boot)


def test_a_lock_on_this_machine_is_the_systems_alone(tmp_path):
    with lock(tmp_path / "l"):
        assert lock(tmp_path / "l") is None and is_locked(tmp_path / "l")
        assert lock_owner(tmp_path / "l").startswith(f"pid {os.getpid()} on ")
        assert [p.name for p in tmp_path.iterdir()] == ["l"]
    assert not is_locked(tmp_path / "l")
    release(lock(tmp_path / "l"))
    assert lock_owner(tmp_path / "l") == "unknown" and not is_locked(tmp_path / "missing")


def test_one_machine_has_a_lock_that_others_see(shared, tmp_path, monkeypatch):
    path = tmp_path / "l"
    held = lock(path)
    assert held is not None and is_locked(path)
    assert lock(path) is None  # from this machine
    elsewhere(monkeypatch)
    assert lock(path) is None and is_locked(path) and "other" not in lock_owner(path)
    monkeypatch.undo()
    monkeypatch.setattr(locks, "_type_of", lambda device: "nfs4")
    held.close()
    assert not is_locked(path) and sorted(p.name for p in tmp_path.iterdir()) == ["l"]
    with lock(path):
        assert is_locked(path)


def test_a_killed_process_of_this_machine_is_known_to_be_gone(shared, tmp_path):
    code = "from convnn.runtime import locks; import os, pathlib, sys; locks._type_of = lambda d: 'nfs4'\n"
    code += "held = locks.lock(pathlib.Path(sys.argv[1])); print(held, flush=True); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "l")], check=False, capture_output=True)
    assert (tmp_path / "l.held").exists() and not is_locked(tmp_path / "l")
    with lock(tmp_path / "l") as held:
        assert held and lock_owner(tmp_path / "l").startswith(f"pid {os.getpid()} ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l"]


@pytest.mark.parametrize("answer", ["", "lost"])
def test_links_that_the_file_system_does_not_count(answer, shared, tmp_path, monkeypatch):
    """As with sshfs, whose files have one name each by what it says; an answer may be lost besides."""
    link, stat = Path.hardlink_to, Path.stat

    def linked(self, target):
        link(self, target)
        if answer == "lost":
            raise FileExistsError

    monkeypatch.setattr(Path, "hardlink_to", linked)
    monkeypatch.setattr(
        Path, "stat", lambda self, **more: os.stat_result((*stat(self, **more)[:3], 1, *stat(self, **more)[4:]))
    )
    with lock(tmp_path / "l") as held:
        assert held and lock(tmp_path / "l") is None
    assert [p.name for p in tmp_path.iterdir()] == ["l"]


class Says:
    def __init__(self, job):
        self.found = job

    def job(self, number):
        assert number == "35_2"
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    "said, gone",
    [
        (None, True),
        (Job("RUNNING"), False),
        (Job("RUNNING", 1), True),  # requeued since, and runs elsewhere
        (Job("PENDING", 1), True),
        (Job("COMPLETED"), True),
        (SchedulerError("squeue: no answer"), False),
    ],
)
def test_the_scheduler_says_which_jobs_of_other_machines_are_gone(said, gone, shared, tmp_path, monkeypatch):
    for key, value in (("ARRAY_JOB_ID", "35"), ("ARRAY_TASK_ID", "2"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"SLURM_{key}", value)
    path = tmp_path / "l"
    held = lock(path)
    elsewhere(monkeypatch)
    monkeypatch.setattr(locks, "Slurm", lambda: Says(said))
    assert is_locked(path) is not gone
    second = lock(path)
    assert (second is not None) is gone and "job 35_2" in lock_owner(path)
    if second:
        held._owner and held.close()  # one that comes back from the dead does not take the lock of the next away
        assert is_locked(path) is not gone or (tmp_path / "l.held").exists()


def test_an_owner_elsewhere_without_a_job_stays(shared, tmp_path, monkeypatch):
    held = lock(tmp_path / "l")
    elsewhere(monkeypatch)
    assert held and lock(tmp_path / "l") is None
    here = Owner.this_process()
    assert not here.gone() and replace(here, begun="1").gone() and replace(here, boot="an earlier one").gone()


def test_of_many_one_breaks_a_dead_lock(shared, tmp_path, monkeypatch):
    """Threads stand in for machines; each that has the lock looks whether it is alone."""
    path, inside, most = tmp_path / "l", [], []
    gone = replace(Owner.this_process(), begun="1")
    (tmp_path / "l").touch()
    assert locks._link(tmp_path / "l.held", gone)

    def work():
        end = time.monotonic() + 20
        while time.monotonic() < end:
            held = lock(path)
            if held is not None:
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.005)
                inside.pop()
                held.close()
                return
            time.sleep(0.002)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 12 and max(most) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["l"]


def test_without_hard_links(shared, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", refuse)
    with lock(tmp_path / "l"):
        assert lock(tmp_path / "l") is None
    assert not is_locked(tmp_path / "l")
