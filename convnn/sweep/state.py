"""Where each point of a sweep stands, from the files in its folder. Imports no torch."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from convnn.runs.record import read_result
from convnn.runs.status import CANCELLED, COMPLETE, FAILURES, INTERRUPTED, PARTIAL, PRUNED, RUNNING, TODO
from convnn.runtime.files import read_json
from convnn.runtime.locks import is_locked
from convnn.sweep.plan import Point


@dataclass(frozen=True)
class PointState:
    """Where a point stands."""

    status: str
    """One of ``convnn.runs.status``: TODO, PARTIAL, QUEUED, RUNNING, INTERRUPTED, PRUNED, CANCELLED, COMPLETE or
    one of FAILURES."""
    reason: str | None = None
    attempts: int = 0
    top1: float | None = None
    """Last-epoch test accuracy in percent, of a complete run."""
    seconds: float = field(default=0.0, compare=False)
    """What its attempts took, as far as they ended with a word."""


def status_file(folder: Path, point: Point) -> Path:
    """Return where a point's last attempt is recorded."""
    return folder / "status" / f"{point.fingerprint}.json"


def lock_file(folder: Path, point: Point) -> Path:
    """Return the file that whoever runs a point keeps locked."""
    return folder / "status" / f"{point.fingerprint}.lock"


def log_of(folder: Path, point: Point) -> str:
    """Return where a failed point's log is, to follow its reason; nothing if it never began."""
    return f"; log {folder / point.log}" if (folder / point.log).exists() else ""


def prune_file(folder: Path, point: Point) -> Path:
    """Return the file that asks whoever runs a point to stop it, as a search sees no promise in it; it says why."""
    return folder / "status" / f"{point.fingerprint}.prune"


def point_state(folder: Path, point: Point, *, locked_here: bool = False) -> PointState:
    """Return a point's state from what lies in the sweep's folder; a complete result counts more than all else.

    ``locked_here`` says that this process holds the point's lock, so that nobody runs it.
    """
    record = read_json(status_file(folder, point)) or {}
    attempts = record.get("attempts")
    attempts = attempts if isinstance(attempts, int) else 0
    seconds = record.get("seconds")
    seconds = float(seconds) if isinstance(seconds, (int, float)) else 0.0
    result = read_result(folder / point.folder)
    own = (point.fingerprint, point.before or point.fingerprint)
    if result and result.get("status") == COMPLETE and result.get("fingerprint") in own:
        return PointState(COMPLETE, None, attempts, result.get("top1_last"), seconds)
    status = record.get("status")
    if status == RUNNING and (locked_here or not is_locked(lock_file(folder, point))):
        return PointState(INTERRUPTED, "its process ended without a word", attempts, seconds=seconds)
    if status in (RUNNING, INTERRUPTED, CANCELLED, PRUNED, *FAILURES):
        return PointState(status, record.get("reason"), attempts, seconds=seconds)
    begun = (folder / point.folder / "checkpoints").is_dir()
    return PointState(PARTIAL if begun else TODO, None, attempts, seconds=seconds)


def sweep_has_ended(token: str | None) -> bool:
    """Return whether the sweep that a token names ran on this machine and has ended, however it ended."""
    host, _, pid = (token or "").rpartition("-")
    if host != platform.node() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def stop_file(folder: Path, token: str | None) -> Path:
    """Return the file whose presence asks all jobs of a sweep, wherever they run, to stop."""
    return folder / f".stop-{token}"
