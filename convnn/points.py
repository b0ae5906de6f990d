"""One point of a sweep: its state on disk, its process, and the signals that reach it. Imports no torch."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convnn.cli import CONF_DIR, EXIT_DIVERGED, PARENT
from convnn.files import is_locked, lock, read_json, write_json
from convnn.grid import Point, quoted
from convnn.lease import device_lease
from convnn.rundir import read_result

TRAIN = CONF_DIR.parent / "train.py"
FAILED = ("failed", "killed", "diverged")
GRACE_SECONDS = 120.0
"""Time that a process has for its checkpoint after a signal."""


@dataclass(frozen=True)
class PointState:
    """Where a point stands."""

    status: str
    """``todo``, ``partial`` (begun), ``running``, ``complete``, ``failed``, ``killed``, ``diverged``,
    ``interrupted``."""
    reason: str | None = None
    attempts: int = 0
    top1: float | None = None
    """Last-epoch test accuracy in percent, of a complete run."""


def status_file(folder: Path, point: Point) -> Path:
    """Return where a point's last attempt is recorded."""
    return folder / "status" / f"{point.fingerprint}.json"


def lock_file(folder: Path, point: Point) -> Path:
    """Return the file that whoever runs a point keeps locked."""
    return folder / "status" / f"{point.fingerprint}.lock"


def point_state(folder: Path, point: Point, *, mine: bool = False) -> PointState:
    """Return a point's state from what lies in the sweep's folder; a complete result counts more than all else.

    ``mine`` says that this process holds the point's lock, so that nobody runs it.
    """
    record = read_json(status_file(folder, point)) or {}
    attempts = record.get("attempts")
    attempts = attempts if isinstance(attempts, int) else 0
    result = read_result(folder / point.folder)
    if result and result.get("status") == "complete" and result.get("fingerprint") == point.fingerprint:
        return PointState("complete", None, attempts, result.get("top1_last"))
    status = record.get("status")
    if status == "running" and (mine or not is_locked(lock_file(folder, point))):
        return PointState("interrupted", "its process ended without a word", attempts)
    if status in ("running", "interrupted", *FAILED):
        return PointState(status, record.get("reason"), attempts)
    begun = (folder / point.folder / "checkpoints").is_dir()
    return PointState("partial" if begun else "todo", None, attempts)


# ---------------------------------------------------------------------------------------------- stopping


def sweep_is_gone(token: str | None) -> bool:
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


class StopSignals:
    """Notes TERM, INT and USR2. A second one, more than two seconds later, has its usual effect."""

    def __init__(self, on_first: Callable[[int], None] | None = None) -> None:
        self.seen: int | None = None
        self._first, self._on_first = 0.0, on_first
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, old in self._old.items():
            signal.signal(signum, old)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.seen is None:
            self.seen, self._first = signum, time.monotonic()
            if self._on_first is not None:
                self._on_first(signum)
        elif time.monotonic() - self._first > 2:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def pass_on(self) -> None:
        """Hand the signal to the handler that stood before, such as a cluster launcher's, which then requeues the job.

        Call it after leaving the context.
        """
        old = self._old.get(self.seen) if self.seen is not None else None
        if callable(old) and old is not signal.default_int_handler:
            old(self.seen, None)


# ------------------------------------------------------------------------------------------------ running


def run_point(
    folder: Path,
    point: Point,
    *,
    token: str | None = None,
    more: tuple[str, ...] = (),
    device: str = "auto",
    jobs_per_device: int = 1,
    parallel: int = 1,
) -> str:
    """Train a point in a process of its own and return its status; nothing that goes wrong there raises here.

    A point that another process runs at this moment is left alone (``running``), and one whose sweep was asked to
    stop is not begun.

    Args:
        folder: of the sweep.
        point: what to run.
        token: of the sweep, see ``stop_file``.
        more: overrides that are not part of the point, such as the tracker's group.
        device: the run's ``device``, for the lease.
        jobs_per_device: runs that may share a GPU.
        parallel: jobs that share this machine's cores.
    """
    stop = stop_file(folder, token)
    with ExitStack() as stack:
        (folder / "status").mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        held = lock(lock_file(folder, point), wait=1.0)
        if held is None:
            return "running"
        stack.enter_context(held)
        before = point_state(folder, point, mine=True)
        if before.status == "complete" or stop.exists() or sweep_is_gone(token):
            return before.status
        signals = stack.enter_context(_own_signals())
        record: dict[str, Any] = {
            "status": "running",
            "reason": None,
            "exit_code": None,
            "name": point.name,
            "log": point.log,
            "token": token,
            "attempts": before.attempts + 1,
            "started": _now(),
            "finished": None,
        }

        def stopped() -> int | None:
            """Return the signal for the run, if it is to stop: TERM, which ends it at once while it still imports."""
            if signals.seen == signal.SIGUSR2:
                return signal.SIGUSR2
            return signal.SIGTERM if signals.seen or stop.exists() or sweep_is_gone(token) else None

        with device_lease(device, jobs_per_device, lambda: stopped() is not None) as lease:
            if lease is None:
                return before.status
            environment = os.environ | lease | _threads(parallel) | {PARENT: str(os.getpid())}
            write_json(status_file(folder, point), record)
            command = [sys.executable, str(TRAIN), *point.overrides]
            command += [*more, f"run.dir={quoted(str(folder / point.folder))}", "run.if_exists=resume"]
            try:
                code, output, asked = _run(command, folder / point.log, environment, stopped)
            except OSError as error:
                code, output, asked = 1, f"error: {error}", None
        record |= {"exit_code": code, "finished": _now()}
        record["status"], record["reason"] = _outcome(folder, point, code, output, asked)
        write_json(status_file(folder, point), record)
    signals.pass_on()
    return record["status"]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _threads(parallel: int) -> dict[str, str]:
    """Share the cores among parallel jobs, unless the user has."""
    if parallel == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = cores if parallel < 1 else parallel
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))}


@contextmanager
def _own_signals() -> Iterator[StopSignals]:
    """Catch signals in a worker process. Where the sweep itself runs the point, its own handlers stay in place."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(getattr(handler, "__self__", None), StopSignals):
        yield handler.__self__  # type: ignore[union-attr]
    else:
        with StopSignals() as signals:
            yield signals


def _run(
    command: list[str], log: Path, environment: dict[str, str], stopped: Callable[[], int | None]
) -> tuple[int, str, int | None]:
    """Run a command to its end, or until it has to stop; return exit code, end of output, and the signal sent."""
    with log.open("a+b") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        start = output.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        sent, since = None, 0.0
        while child.poll() is None:
            if sent is None:
                sent, since = stopped(), time.monotonic()
                if sent is not None:
                    child.send_signal(sent)
            elif time.monotonic() - since > GRACE_SECONDS:
                child.kill()
            time.sleep(0.1)
        if child.returncode < 0:  # nobody is left to end what it had started
            with suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
        output.seek(0, os.SEEK_END)
        output.seek(max(start, output.tell() - 4000))
        return child.returncode, output.read().decode(errors="replace"), sent


def _outcome(folder: Path, point: Point, code: int, output: str, asked: int | None) -> tuple[str, str | None]:
    """Return status and reason of an ended process, which was ``asked`` to stop by a signal or not."""
    if code == 0 and point_state(folder, point, mine=True).status == "complete":
        return "complete", None
    lines = [line.strip() for line in output.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    told = [line for line in lines if line.startswith(("error:", "diverged:"))]
    last = (told or lines or ["no output"])[-1][:500]
    stopped = -code if code < 0 else code - 128  # by the signal itself, where it came before the handlers
    if asked is not None and code != -signal.SIGKILL:
        stopped = asked
    if stopped in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        return "interrupted", f"stopped by {signal.Signals(stopped).name}"
    if code < 0:
        name = signal.Signals(-code).name
        return "killed", f"killed by {name}" + (" (often: out of memory)" if name == "SIGKILL" else "")
    if code == EXIT_DIVERGED:
        return "diverged", last
    return "failed", last if code else f"exit code 0 without a complete result: {last}"
