"""One call of a sweep: hand its points to a launcher of this machine, show how far it is, sum it up. No torch."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from convnn.errors import EXIT_FAILED, ConfigError
from convnn.report.build import make_report
from convnn.report.content import Report
from convnn.runs.status import CANCELLED, COMPLETE, FAILURES, INTERRUPTED, PARTIAL, TODO
from convnn.runtime.files import read_json
from convnn.runtime.locks import is_locked, lock, lock_owner
from convnn.runtime.signals import StopSignals, hangup_as_term
from convnn.sweep.budget import Budget
from convnn.sweep.job import job_options, launch
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import Plan, Point, save_plan
from convnn.sweep.progress import Progress
from convnn.sweep.state import PointState, lock_file, log_of, point_state, status_file, stop_file
from convnn.sweep.warm import close as close_warm
from convnn.text import command_line


@dataclass
class Sweep:
    """A planned sweep in its folder."""

    plan: Plan
    folder: Path
    options: SweepConfig
    token: str
    command: list[str]
    budget: Budget
    taken_over: set[tuple[str, str]] = field(default_factory=set)
    """Points of other sweeps that this one has been given, and whose they were."""

    def states(self) -> dict[str, PointState]:
        """Return the state of every point, by fingerprint."""
        return {p.fingerprint: point_state(self.folder, p) for p in self.plan.points}

    def todo(self) -> list[Point]:
        """Return the points that are to be run."""
        states = self.states()
        skip = (COMPLETE, *(FAILURES if not self.options.retry_failed else ()))
        return [p for p in self.plan.points if states[p.fingerprint].status not in skip]

    def run(self, launcher: list[str]) -> int:
        """Run what is to be run, and sum up; return the exit code."""
        self.prepare()
        own = [*job_options(self.options, self.token, self.budget), *launcher]
        stop = stop_file(self.folder, self.token)
        stop.unlink(missing_ok=True)
        todo = self.todo()
        print(self.opening(todo), flush=True)
        try:
            with (
                StopSignals(lambda _: stop.touch()) as signals,
                hangup_as_term(),
                Progress(self.folder, self.options.name, todo),
            ):
                while todo and signals.seen is None:
                    with contextlib.suppress(SystemExit):  # a launcher's own failure: the points' states tell
                        launch([*own, "sweep.point=" + ",".join(f"p{p.fingerprint}" for p in todo)])
                    todo = self.left_by_others(lambda: signals.seen is not None or self.budget.spent())
        finally:
            stop.unlink(missing_ok=True)
            close_warm()
        return self.sum_up(signals.seen)

    def sum_up(self, signum: int | None) -> int:
        """Report, unless a signal ended the call, and say how it ended; return the exit code."""
        reported = signum is None and self._report()
        print(self._closing(failures=not reported, by_budget=signum is None), flush=True)
        if signum is not None:
            return 128 + signum
        return EXIT_FAILED if any(s.status != COMPLETE for s in self.states().values()) else 0

    def prepare(self) -> None:
        """Write the plan."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / ".plan.lock"
            held = lock(path, wait=60.0)
            if held is None:
                raise ConfigError(f"sweep.dir={self.folder}: {lock_owner(path)} has been writing its plan for a minute")
            with held:
                save_plan(self.plan, self.folder, self.command, self.options.name)
        except OSError as error:
            raise ConfigError(f"sweep.dir={self.folder} cannot be written: {error.strerror}") from error

    def left_by_others(self, stopped: Callable[[], bool]) -> list[Point]:
        """Wait for the points that another sweep holds at this moment; return those that it did not get to an end."""
        left = []
        for point in self.plan.points:
            path = lock_file(self.folder, point)
            while not stopped() and is_locked(path):
                time.sleep(0.5)
            open_ = point_state(self.folder, point).status in (TODO, PARTIAL, INTERRUPTED)
            owner = (read_json(status_file(self.folder, point)) or {}).get("token", self.token)
            taken = point.fingerprint, owner
            if open_ and owner != self.token and taken not in self.taken_over and not stopped():
                self.taken_over.add(taken)  # once: it may be refused, as by a spent budget
                left.append(point)  # also of a sweep that has died by now
        return left

    def opening(self, todo: Sequence[Point]) -> str:
        """Return the line that says what there is and what is to be run."""
        counts = Counter(s.status for s in self.states().values())
        parts = [f"{n} {status}" for status, n in sorted(counts.items())]
        extra = f", {self.plan.duplicates} equal in effect merged" if self.plan.duplicates else ""
        return f"sweep {self.folder}: {len(self.plan.points)} points ({', '.join(parts)}{extra}), {len(todo)} to run"

    def _report(self) -> bool:
        """Write tables and plots, and show the table; return whether that was done."""
        if not self.options.report:
            return False
        try:
            report = make_report([self.folder], self.folder / "report")
        except (ConfigError, OSError) as error:  # nothing to report, a package is missing, the disk refuses
            print(f"no report: {error}")
            return False
        print(report.text())
        self._publish(report)
        return True

    def _publish(self, report: Report) -> None:
        """Give the group's report run, in the tools that the runs are in, the table and the plots."""
        tracked = [config.tracker for config in self.plan.configs.values() if config.tracker.running]
        if not tracked:
            return
        from convnn.runs.tracking import publish_report

        rows, runs = (json.loads(t.to_json(orient="records")) for t in (report.summary, report.runs))
        images = [p.png for p in (*report.pictures, *report.difference_pictures)]
        publish_report(tracked[0], self.folder, self.options.name, rows, runs, images)
        if "wandb" in tracked[0].running:
            print(f"upload all runs with: wandb sync {self.folder}/points/*/wandb/offline-run-* "
                  f"{self.folder}/wandb/offline-run-*")  # fmt: skip

    def _closing(self, failures: bool, by_budget: bool) -> str:
        states = self.states()
        lines = []
        for point in self.plan.points:
            state = states[point.fingerprint]
            if failures and state.status in (*FAILURES, CANCELLED):
                lines.append(f"{state.status}: {point.name}: {state.reason}{log_of(self.folder, point)}")
        counts = Counter(s.status for s in states.values())
        summary = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        lines.append(f"sweep {self.folder}: {summary}")
        left = sum(counts[status] for status in (TODO, PARTIAL, INTERRUPTED, CANCELLED))
        if left and by_budget and self.options.budget:
            lines.append(f"sweep.budget={self.options.budget} leaves {left} points to another call")
        if self.todo():
            lines.append("the same command goes on from here: " + command_line(self.command))
        return "\n".join(lines)
