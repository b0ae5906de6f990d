"""Locks between processes, of one machine and of several that share a file system. Imports no torch.

On a disk of this machine the system's own lock (``flock``) is all there is: it ends with its process, however that
ends. Shared file systems may have none, or one that other machines do not see. There a lock is a file as well,
``*.held``, that comes into being with its content in one step (a hard link) and says whose it is. What is assumed of
the file system: a link is made by one machine alone, and who opens a file sees what was written before it was closed.
No clock is read.

Such a file outlives a process that is killed. Its owner is known to be gone by this machine's process table, or, of a
job of a cluster on another machine, by the scheduler's word; of others nobody can tell, and the lock stays.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from convnn.runtime.files import read_json
from convnn.runtime.scheduler import SchedulerError, Slurm

_NETWORK = re.compile(
    "nfs4?|lustre|gpfs|beegfs|ceph|cifs|smb3|glusterfs|9p|virtiofs|afs|orangefs|pvfs2|wekafs|panfs|ocfs2|gfs2"
    "|fuse[.](ceph|sshfs|glusterfs|juicefs)"
)
"""Types of file systems whose flock other machines may not see."""
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)

_NO_LINK = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock."""

    pid: int
    host: str
    boot: str
    """Of the host, as its system names it; empty where it does not."""
    begun: str
    """When the process began, in the system's ticks, lest its number is another's by now."""
    job: str
    """Number of the cluster's job, such as 35_2, or empty."""
    restarts: int
    """How often that job had been requeued."""
    nonce: str
    """Different in each lock that was ever taken."""

    @classmethod
    def this_process(cls) -> Owner:
        """Return this process as an owner."""
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        pid = os.getpid()
        return cls(pid, platform.node(), _boot(), _begun(pid), job, restarts, secrets.token_hex(8))

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}" + (f" (job {self.job})" if self.job else "")

    def gone(self, scheduler: Slurm | None = None) -> bool:
        """Return whether this owner is known to have ended."""
        if self.host == platform.node() and self.boot == _boot():
            return _begun(self.pid) != self.begun
        if not self.job:
            return self.host == platform.node() and bool(self.boot)  # this machine was started anew
        try:
            job = (scheduler or Slurm()).job(self.job)
        except SchedulerError:
            return False
        return job is None or not job.alive or job.waiting or job.restarts > self.restarts


class Lock:
    """A lock that this process holds until it is closed."""

    def __init__(self, file: TextIO, held: Path | None, owner: Owner) -> None:
        self._file, self._held, self._owner = file, held, owner

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back; its file still says who had it."""
        if self._held is not None and _read(self._held) == self._owner:
            self._held.unlink(missing_ok=True)
        self._held = None
        self._file.close()

    def is_of(self, path: Path) -> bool:
        """Return whether the file that was locked is still the one of this name."""
        try:
            return path.stat().st_ino == os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def clear(self) -> None:
        """Let the file say of nobody that he had it."""
        with suppress(OSError):
            self._file.truncate(0)


def lock(path: Path, *, wait: float = 0.0) -> Lock | None:
    """Lock a file until the lock is closed or this process ends; None if another process has it.

    The file then says who has the lock.

    Args:
        path: of the file; made if missing.
        wait: seconds to try for; ``is_locked`` holds it for a moment too.
    """
    file = path.open("a+")
    owner = Owner.this_process()
    end = time.monotonic() + wait
    while True:
        flocked = _flock(file, fcntl.LOCK_EX)
        if flocked is not False:
            held = _held(path) if flocked is None or _is_shared(path) else None
            try:
                if held is None or _take(held, owner):
                    break
            except OSError:
                file.close()
                raise
            if flocked:
                fcntl.flock(file, fcntl.LOCK_UN)
        if time.monotonic() >= end:
            file.close()
            return None
        time.sleep(0.05 if flocked is False else 1.0)  # where another machine or the scheduler is asked, seldom
    file.truncate(0)
    file.write(f"{owner}\n")
    file.flush()
    return Lock(file, held, owner)


def _flock(file: TextIO, kind: int) -> bool | None:
    """Try the system's lock; return whether it was had, or None where there is none."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _held(path: Path) -> Path:
    return path.with_name(path.name + ".held")


def _take(held: Path, owner: Owner) -> bool:
    """Make the file that says who has a lock, unless it is there and its owner may live."""
    for _ in range(3):
        if _link(held, owner):
            return True
        other = _read(held)
        if other is None:
            if held.exists():  # of no content that we write
                return False
            continue
        if not other.gone():
            return False
        claim = held.with_name(f"{held.name}.{other.nonce}")  # one process alone removes what a dead one left
        if not _take(claim, owner):
            return False
        if _read(held) == other:
            held.unlink(missing_ok=True)
        claim.unlink(missing_ok=True)
    return False


def _link(held: Path, owner: Owner) -> bool:
    """Make a file with its content in one step; return whether it is this process that made it."""
    temporary = held.with_name(f".{held.name}.{owner.nonce}.{owner.pid}.tmp")
    temporary.write_text(json.dumps(asdict(owner)))
    try:
        held.hardlink_to(temporary)
    except FileExistsError:  # over a network an answer may be lost, and the system's second try says so
        return _read(held) == owner
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return _made_alone(held, temporary.read_bytes())
    else:
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _made_alone(held: Path, content: bytes) -> bool:
    """Make a file where there are no hard links."""
    try:
        handle = os.open(held, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return True


def _read(held: Path) -> Owner | None:
    values = read_json(held)
    if values is None or set(values) != {f.name for f in fields(Owner)}:
        return None
    return Owner(**values)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _begun(pid: int) -> str:
    """Return when a process began; empty if there is none of this number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "" if Path("/proc/self/stat").exists() else "unknown"


def _is_shared(path: Path) -> bool:
    """Return whether other machines may write into a file's folder."""
    return _NETWORK.fullmatch(_type_of(path.parent.stat().st_dev)) is not None  # the file may go at any moment


@lru_cache(maxsize=64)
def _type_of(device: int) -> str:
    """Return the type of the file system of a device number; empty where the system does not tell."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                return after.split()[0]
    return ""


def release(held: Lock) -> None:
    """Give a lock back. What it says of its owner goes, so that only owners that died are still named."""
    held.clear()
    held.close()


def is_locked(path: Path) -> bool:
    """Return whether some process has locked a file at this moment."""
    try:
        with path.open() as file:
            if _flock(file, fcntl.LOCK_SH) is False:
                return True
    except FileNotFoundError:
        return False
    owner = _read(_held(path))
    return owner is not None and not owner.gone()


def lock_owner(path: Path) -> str:
    """Return who holds, or last held, a lock."""
    try:
        return path.read_text().strip() or "unknown"
    except OSError:
        return "unknown"
