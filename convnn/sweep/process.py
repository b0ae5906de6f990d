"""One point of a sweep: its state on disk, its process, and the signals that reach it. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from convnn.config.overrides import quoted
from convnn.errors import EXIT_DIVERGED, EXIT_FAILED
from convnn.runs.status import COMPLETE, DIVERGED, FAILED, INTERRUPTED, KILLED, PRUNED, RUNNING
from convnn.runtime.distributed import LOST_PEER, usable_cores
from convnn.runtime.files import read_json, write_json
from convnn.runtime.locks import lock
from convnn.runtime.signals import PARENT, STOP_SIGNALS, StopSignals
from convnn.sweep import warm as warm_points
from convnn.sweep.budget import SPENT, Budget
from convnn.sweep.gpus import reserve_gpu
from convnn.sweep.plan import Point
from convnn.sweep.state import lock_file, point_state, prune_file, status_file, stop_file, sweep_has_ended

TRAIN = ("-m", "convnn.cli.train")
"""How Python is told to train; tests put a stand-in here."""
TORCHRUN = ("-m", "convnn.sweep.several", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR2")
"""How Python is told to start several processes of what follows."""
GRACE_SECONDS = 120.0
"""Time that a process has for its checkpoint after a signal."""


@dataclass(frozen=True)
class Start:
    """How a point's process is started, where that is not the usual way."""

    processes: int = 1
    """Processes of the run on each machine, which torchrun starts."""
    meet: tuple[str, ...] = ("--standalone", "--local-addr=127.0.0.1")
    """Options of torchrun that say how the processes of several machines meet."""
    reserve: bool = True
    """Wait for a free GPU; not in a job of a cluster, to which the GPUs that it sees belong."""
    record: dict[str, Any] = field(default_factory=dict)
    """More for the status file."""

    @property
    def several(self) -> bool:
        """Whether the run has more than one process."""
        return self.processes > 1 or "--standalone" not in self.meet

    def command(self, folder: Path, point: Point, extra_overrides: Sequence[str]) -> list[str]:
        """Return the command that trains a point."""
        program: Sequence[str] = TRAIN
        if self.several:
            program = (*TORCHRUN, f"--nproc-per-node={self.processes}", *self.meet, *TRAIN)
        run = (f"run.dir={quoted(str(folder / point.folder))}", "run.if_exists=skip")
        return [sys.executable, *program, *point.overrides, *extra_overrides, *run]


def run_point(
    folder: Path,
    point: Point,
    *,
    token: str | None = None,
    extra_overrides: tuple[str, ...] = (),
    device: str = "auto",
    jobs_per_device: int = 1,
    parallel: int = 1,
    warm: bool = False,
    budget: Budget | None = None,
    start: Start | None = None,
) -> str:
    """Train a point in a process of its own and return its status; nothing that goes wrong there raises here.

    A point that another process runs at this moment is left alone (``running``), and one whose sweep was asked to
    stop is not begun.

    Args:
        folder: of the sweep.
        point: what to run.
        token: of the sweep, see ``stop_file``.
        extra_overrides: those that are not part of the point, such as the tracker's group.
        device: the run's ``device``, for the reservation of a GPU.
        jobs_per_device: runs that may share a GPU.
        parallel: jobs that share this machine's cores.
        warm: fork the process from one that has loaded torch, where that is possible.
        budget: of the sweep; a point that it does not admit is not begun, and one that runs when it is spent stops.
        start: how the process is started.
    """
    stop, budget, start = stop_file(folder, token), budget or Budget(folder), start or Start()
    with ExitStack() as stack:
        (folder / "status").mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        held = lock(lock_file(folder, point), wait=1.0)
        if held is None:
            return RUNNING
        stack.enter_context(held)
        before = point_state(folder, point, locked_here=True)
        if before.status == COMPLETE or stop.exists() or sweep_has_ended(token) or not budget.admits(point):
            return before.status
        signals = stack.enter_context(_worker_signals())
        (prune := prune_file(folder, point)).unlink(missing_ok=True)  # which a search that was killed has left
        signal_to_send = partial(_signal_to_send, signals, (stop, prune), token, budget)
        count = start.processes if start.reserve else 0
        with reserve_gpu(device, jobs_per_device, lambda: signal_to_send() is not None, count) as gpu:
            if gpu is None or not budget.admits(point):
                status = before.status
            else:
                environment = os.environ | gpu | _threads(parallel, start) | {PARENT: str(os.getpid())}
                record = {"name": point.name, "log": point.log, "token": token, "seconds": before.seconds}
                record |= {"attempts": before.attempts + 1} | start.record
                command = start.command(folder, point, extra_overrides)
                status = _attempt(
                    folder, point, record, command, environment, signal_to_send, warm and not start.several
                )
                if status == INTERRUPTED and not (signals.seen or stop.exists()):
                    status = _told_why(folder, point, budget)
    signals.pass_on()  # also where the point did not begin: a cluster's launcher then requeues the job
    return status


def _attempt(
    folder: Path,
    point: Point,
    record: dict[str, Any],
    command: list[str],
    environment: dict[str, str],
    signal_to_send: Callable[[], int | None],
    warm: bool,
) -> str:
    """Run a point's process to its end, and record how it began and ended; return the point's status."""
    begun, before = time.monotonic(), record["seconds"]
    record |= {"status": RUNNING, "reason": None, "exit_code": None, "started": _now(), "finished": None}
    write_json(status_file(folder, point), record)
    code, output, sent = _run_command(command, folder / point.log, environment, signal_to_send, warm)
    record |= {"exit_code": code, "finished": _now()}
    record["seconds"] = round(before + time.monotonic() - begun, 1)
    record["status"], record["reason"] = _status_and_reason(folder, point, code, output, sent)
    write_json(status_file(folder, point), record)
    return str(record["status"])


def _told_why(folder: Path, point: Point, budget: Budget) -> str:
    """Record that a search or the end of the budget stopped a point, if one did; return the point's status."""
    status, reason = INTERRUPTED, SPENT if budget.spent() else None
    with suppress(OSError):
        status, reason = PRUNED, prune_file(folder, point).read_text()
        prune_file(folder, point).unlink()
    if reason is not None:
        record = read_json(status_file(folder, point)) or {}
        write_json(status_file(folder, point), record | {"status": status, "reason": reason})
    return status


def _signal_to_send(signals: StopSignals, asked: Sequence[Path], token: str | None, budget: Budget) -> int | None:
    """Return the signal for a run that is to stop, or None: TERM, which ends it at once while it still imports."""
    if signals.seen == signal.SIGUSR2:
        return signal.SIGUSR2
    ends = signals.seen or any(map(Path.exists, asked)) or sweep_has_ended(token) or budget.spent()
    return signal.SIGTERM if ends else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _threads(parallel: int, start: Start) -> dict[str, str]:
    """Share the cores among parallel jobs and their processes, unless the user has."""
    if (parallel == 1 and not start.several) or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = usable_cores()
    jobs = cores if parallel < 1 else parallel
    return {"OMP_NUM_THREADS": str(max(1, cores // (jobs * start.processes)))}


@contextmanager
def _worker_signals() -> Iterator[StopSignals]:
    """Catch signals in a worker process. Where the sweep itself runs the point, its own handlers stay in place."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(getattr(handler, "__self__", None), StopSignals):
        yield handler.__self__  # type: ignore[union-attr]
    else:
        with StopSignals() as signals:
            yield signals


def _run_command(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    signal_to_send: Callable[[], int | None],
    warm: bool,
) -> tuple[int, str, int | None]:
    """Run a command to its end, or until it has to stop; return exit code, end of output, and the signal sent."""
    try:
        with log.open("a+b") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            start = output.tell()
            forked = warm_points.start(command, output.fileno(), environment) if warm else None
            child = forked or _started(command, output, environment)
            sent = _wait(child, signal_to_send)
            if forked and forked.lost and sent is None:
                warm_points.give_up()
                child = _started(command, output, environment)  # which goes on where that one stopped
                sent = _wait(child, signal_to_send)
            output.seek(0, os.SEEK_END)
            output.seek(max(start, output.tell() - 4000))
            return child.returncode, output.read().decode(errors="replace"), sent
    except OSError as error:
        return EXIT_FAILED, f"error: {error}", None


def _started(command: list[str], output: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # so that a terminal's Ctrl-C reaches the sweep alone, which passes it on
    )


def _wait(
    child: subprocess.Popen[bytes] | warm_points.WarmPoint, signal_to_send: Callable[[], int | None]
) -> int | None:
    """Wait for a process to end, pass a signal on to it, and kill it if it stays; return the signal sent, or None."""
    sent, since = None, 0.0
    while child.poll() is None:
        if sent is None:
            sent, since = signal_to_send(), time.monotonic()
            if sent is not None:
                child.send_signal(sent)
        elif time.monotonic() - since > GRACE_SECONDS:
            child.kill()
        time.sleep(0.1)
    if child.returncode < 0:  # nobody is left to end what it had started
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
    return sent


def _status_and_reason(folder: Path, point: Point, code: int, output: str, sent: int | None) -> tuple[str, str | None]:
    """Return status and reason of a process that has ended; ``sent``: the signal that it was sent, if any."""
    if code == 0 and point_state(folder, point, locked_here=True).status == COMPLETE:
        return COMPLETE, None
    lines = [line.strip() for line in output.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    told = [line for line in lines if line.startswith(("error:", "diverged:"))]
    lost = [line for line in told if LOST_PEER in line]
    told = [line for line in told if line not in lost]
    last = (told or lines or ["no output"])[-1][:500]
    stopped = -code if code < 0 else code - 128  # by the signal itself, where it came before the handlers
    if sent is not None and code != -signal.SIGKILL:
        stopped = sent
    if stopped in STOP_SIGNALS:
        return INTERRUPTED, f"stopped by {signal.Signals(stopped).name}"
    if code < 0:
        name = signal.Signals(-code).name
        return KILLED, f"killed by {name}" + (" (often: out of memory)" if name == "SIGKILL" else "")
    signum = next((match[1] for line in lines if (match := re.match(r"exitcode\s*: -(\d+) ", line))), None)
    if code and not told and (lost or signum):  # of several: torchrun says how one of this machine ended
        how = f"was killed by {signal.Signals(int(signum)).name}" if signum else "has ended without a word"
        return KILLED, f"one of the run's processes {how}"
    if code == EXIT_DIVERGED or (code and last.startswith("diverged:")):  # torchrun's own exit code is 1
        return DIVERGED, last
    return FAILED, last if code else f"exit code 0 without a complete result: {last}"
