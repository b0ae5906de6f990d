"""One call of a sweep whose points are jobs of a cluster: submit, follow, or leave and come back. Imports no torch.

The call follows jobs, not processes: what it knows lies in the folder and in the scheduler's queue. It may be killed at
any time; the next one goes on from there, and submits nothing that is in the queue.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convnn.errors import ConfigError
from convnn.runs.status import CANCELLED, COMPLETE, FAILURES, QUEUED, RUNNING
from convnn.runtime.scheduler import Scheduler, SchedulerError, Slurm
from convnn.runtime.signals import StopSignals, hangup_as_term
from convnn.sweep.call import Sweep
from convnn.sweep.cluster import Cluster
from convnn.sweep.plan import Point
from convnn.sweep.progress import Display
from convnn.sweep.sbatch import Settings
from convnn.sweep.state import PointState
from convnn.sweep.submission import Submission
from convnn.text import duration

CALL = "CONVNN_SWEEP_CALL"
"""Environment variable by which the job that sums up belongs to the call that submitted it."""
SHORTEST, LONGEST = 2.0, 30.0
"""Seconds between two looks at the queue; longer for more points."""
TRIES = 15
"""Looks at the queue, so far apart, until a call gives up that has only just submitted its jobs."""
LEAVING = 120.0
"""Seconds in which jobs that were cancelled have to end."""


@dataclass
class ClusterSweep(Sweep):
    """A planned sweep whose points are jobs."""

    settings: Settings = field(kw_only=True)
    scheduler: Scheduler = field(default_factory=Slurm, kw_only=True)

    def __post_init__(self) -> None:
        self.at_end = CALL in os.environ
        call = os.environ.get(CALL, f"{self.token}-{int(time.time())}")
        self.cluster = Cluster(self.folder, self.plan.points, self.scheduler, call, self.options.requeues)
        self._said: set[str] = set()
        self._handed_in: list[str] = []

    def states(self) -> dict[str, PointState]:
        """Return the state of every point, by the scheduler's word where a job lives."""
        return self.cluster.look()

    def todo(self) -> list[Point]:
        """Return the points that are to be submitted."""
        return self._wanted(self.states())

    def _wanted(self, states: Mapping[str, PointState]) -> list[Point]:
        skip = [COMPLETE, QUEUED, RUNNING]
        if self.at_end or not self.options.retry_failed:
            skip += FAILURES
        if self.at_end:
            skip += [CANCELLED]
        lost = {p.fingerprint for p in self.cluster.lost}  # killed from outside, which says nothing about the point
        return [p for p in self.plan.points if p.fingerprint in lost or states[p.fingerprint].status not in skip]

    def run(self, launcher: list[str]) -> int:
        """Submit what is to be run, follow it to its end or leave it, and sum up; return the exit code.

        Raises:
            ConfigError: if the scheduler refuses, or does not answer, before anything was submitted.
        """
        if "\\" in str(self.folder.resolve()):
            raise ConfigError(f"sweep.dir={self.folder}: sbatch takes no backslash in the names of its files")
        self.prepare()
        try:
            self.cluster.recover()
            print(self.opening(self.todo()), flush=True)
            self._submit(self._wanted)
            states = self.states()
        except (SchedulerError, OSError) as error:
            if not self._handed_in:
                raise ConfigError(f"hydra/launcher=submitit_slurm: {self._said_by(error)}") from error
            states = self._states_after(error)
        if others := self.cluster.others(self.settings.options):
            print(f"note: job {', '.join(others)} waits with other hydra.launcher settings than these; "
                  "they hold for what is submitted from now on", flush=True)  # fmt: skip
        if self.options.detach and self.cluster.alive:
            return self._leave()
        with StopSignals() as signals, hangup_as_term():
            self._follow(states, signals)
        if signals.seen is not None and signals.seen != signal.SIGINT:
            return 128 + signals.seen
        return self.sum_up(signals.seen)

    def _submit(self, wanted: Any) -> None:
        orders = {"name": self.options.name, "processes": self.processes, "nodes": self.settings.nodes}
        orders |= {"deadline": self.budget.deadline, "requeues": self.options.requeues}
        self.cluster.submit(wanted, self.settings, self.options.name, orders, self._tell)

    def _tell(self, submission: Submission) -> None:
        self._handed_in.append(str(submission.job))
        count = len(submission.points)
        print(f"submitted {count} point{'s' * (count > 1)} as job {submission.job} ({submission.name})", flush=True)

    def _said_by(self, error: Exception) -> str:
        return f"sweep.dir={self.folder}: {error.strerror or error}" if isinstance(error, OSError) else str(error)

    def _states_after(self, error: Exception) -> dict[str, PointState]:
        """Return the states where something failed after jobs had been submitted: what was submitted is followed.

        Raises:
            ConfigError: if the scheduler does not answer for a while.
        """
        print(f"warning: {self._said_by(error)}; what was submitted goes on", flush=True)
        for _ in range(TRIES):
            with contextlib.suppress(SchedulerError, OSError):
                return self.states()
            time.sleep(SHORTEST)
        jobs = ", ".join(self._handed_in)
        raise ConfigError(f"{self._said_by(error)}; job {jobs} goes on, and the same command follows it") from error

    @property
    def processes(self) -> int:
        """Processes of each point on each machine."""
        return self.options.processes or max(1, self.settings.gpus)

    # ------------------------------------------------------------------------------------- following

    def _follow(self, states: dict[str, PointState], signals: StopSignals) -> None:
        """Show how the jobs get on until all points have ended; submit those again whose jobs are lost."""
        following = [p for p in self.plan.points if self._open(p, states)]
        if not following:
            return
        print(self._counts(states), flush=True)
        display = Display(self.folder, self.options.name, following, states)
        end: float | None = None
        try:
            while any(self._open(p, states) for p in following):
                if not self._wait(signals, end):
                    if signals.seen != signal.SIGINT or end is not None:
                        break
                    end = time.monotonic() + LEAVING
                with self._patience():
                    if signals.seen is not None:
                        if end is not None and not self._cancel(signals, end):
                            break
                    elif self.budget.spent():
                        mine = {f: n for f, n in self.cluster.alive.items() if f in self.cluster.own}
                        self.scheduler.cancel(n for f, n in mine.items() if states[f].status == QUEUED)
                    states = self.states()
                    display.show(states | self._lost(states))
                    if self.cluster.lost and signals.seen is None and not self.budget.spent():
                        self._submit(lambda _: self.cluster.lost)
                        states = self.states()
        finally:
            display.bar.close()
        if signals.seen is not None:
            self._say_left(signals.seen)

    def _open(self, point: Point, states: Mapping[str, PointState]) -> bool:
        lost = point in self.cluster.lost and not self.budget.spent()
        return lost or states[point.fingerprint].status in (QUEUED, RUNNING)

    def _lost(self, states: Mapping[str, PointState]) -> dict[str, PointState]:
        """Return how points are shown whose jobs are gone, while they have not ended."""
        if self.budget.spent():
            return {}
        lost = {p.fingerprint: states[p.fingerprint].reason for p in self.cluster.lost}
        return {
            f: PointState(QUEUED, f"to be submitted again: {reason or 'its job is gone'}") for f, reason in lost.items()
        }

    def _wait(self, signals: StopSignals, end: float | None) -> bool:
        """Wait until it is time for another look; return whether no new signal came."""
        until = time.monotonic() + min(LONGEST, SHORTEST + len(self.plan.points) / 100)
        while time.monotonic() < until:
            if signals.seen is not None and end is None:
                return False
            time.sleep(0.1)
        return True

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Say once that the scheduler does not answer, or that the disk is full, and go on asking: it may pass."""
        try:
            yield
        except (SchedulerError, OSError) as error:
            said = self._said_by(error)
            if said not in self._said:
                self._said.add(said)
                print(f"warning: {said}; asking again", flush=True)

    def _cancel(self, signals: StopSignals, end: float) -> bool:
        """After Ctrl-C, cancel this call's jobs once; return whether to wait for them any longer."""
        mine = [key for key in self.cluster.alive if key in self.cluster.own]
        if "cancelled" not in self._said:
            numbers = self.cluster.cancel(mine)
            self._said.add("cancelled")  # only now: where the scheduler did not answer it is asked again
            print(
                f"Ctrl-C: {len(numbers)} job{'s' * (len(numbers) != 1)} cancelled; those that run leave a checkpoint",
                flush=True,
            )
            return bool(numbers)
        return bool(mine) and time.monotonic() < end

    def _say_left(self, signum: int) -> None:
        left = len(self.cluster.alive)
        if left:
            with contextlib.suppress(OSError):  # nobody may be there to read it
                jobs = f"{left} jobs go" if left > 1 else "1 job goes"
                print(f"{signal.Signals(signum).name}: {jobs} on without this call; "
                      f"the same command follows them: {shlex.join(self.command)}", flush=True)  # fmt: skip

    def _counts(self, states: Mapping[str, PointState]) -> str:
        running = sum(s.status == RUNNING for s in states.values())
        queued = sum(s.status == QUEUED for s in states.values())
        every = duration(min(LONGEST, SHORTEST + len(self.plan.points) / 100))
        return f"{queued} queued, {running} running; the queue is asked every {every}"

    # ------------------------------------------------------------------------------------- leaving

    def _leave(self) -> int:
        """Submit the job that sums up when all others are through, say where everything is, and leave."""
        environment = {CALL: self.cluster.call}
        numbers: Sequence[str] = sorted({n.partition("_")[0] for n in self.cluster.alive.values()}, key=int)
        lines = ["#!/bin/bash", *self.settings.setup]
        lines += [f"export {key}={shlex.quote(value)}" for key, value in environment.items()]
        lines += [f"exec {shlex.join([sys.executable, '-m', 'convnn.cli.sweep', *self.command[1:]])}", ""]
        try:
            end = self.cluster.submit_end(self.settings, self.options.name, "\n".join(lines))
        except (SchedulerError, OSError) as error:
            raise ConfigError(f"{self._said_by(error)}; job {', '.join(numbers)} goes on, but none follows: "
                              "the same command with sweep.detach=false does") from error  # fmt: skip
        print(f"{len(self.cluster.alive)} points are queued or running as job {', '.join(numbers)}"
              + (f"; job {end.job} sums up after them" if end else ""))  # fmt: skip
        print(f"how far it is: uv run scripts/status.py {shlex.quote(str(self.folder))}; "
              "the same command with sweep.detach=false follows it", flush=True)  # fmt: skip
        return 0
