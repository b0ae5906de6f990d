"""A whole sweep: plan it, hand the points to a Hydra launcher, show how far it is, and sum it up. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from convnn.config.overrides import is_hydra, is_sweep, key_of, merge_overrides, sweep_text
from convnn.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError
from convnn.report.build import make_report
from convnn.report.content import Report
from convnn.runs.status import COMPLETE, FAILURES, INTERRUPTED, PARTIAL, TODO
from convnn.runtime.files import is_locked, lock, read_json
from convnn.runtime.signals import StopSignals
from convnn.sweep.budget import Budget
from convnn.sweep.describe import cost_line, describe_plan, invalid_lines, moved_axes
from convnn.sweep.job import job_options, launch
from convnn.sweep.options import SweepConfig, sweep_options
from convnn.sweep.plan import Plan, Point, keep_known_names, make_plan, save_plan
from convnn.sweep.progress import Progress
from convnn.sweep.same_data import check_points
from convnn.sweep.state import PointState, lock_file, point_state, stop_file
from convnn.sweep.warm import close as close_warm
from convnn.text import command_line

_REFUSED = {
    "run.dir": "the points' folders are made by sweep.py; set sweep.dir",
    "run.if_exists": "points are always continued; remove a point's folder to run it anew",
    "resume": "the same command again continues a sweep; train.py resume=DIR continues one run",
    "from_run": "train.py from_run=DIR begins one run",
    "sweep.point": "it is set by sweep.py",
    "sweep.token": "it is set by sweep.py",
    "sweep.deadline": "it is set by sweep.py; sweep.budget=30m is a time from now",
    "hydra.mode": "sweep.py is always a multirun",
    "hydra.job.chdir": "jobs stay in the folder where sweep.py was called",
}

_PLUGINS = {"joblib": ("hydra_joblib_launcher", "parallel"), "submitit": ("hydra_submitit_launcher", "slurm")}


def run_sweep(argv: Sequence[str], command: Sequence[str] | None = None) -> int:
    """Carry out the sweep of a command line and return its exit code.

    Args:
        argv: command line of sweep.py.
        command: what the user called, for the records.

    Raises:
        ConfigError: one line, naming the key and the way out; nothing has run then.
    """
    own: list[str] = []
    launcher: list[str] = []
    given: list[str] = []
    for arg in argv:
        (own if is_sweep(arg) else launcher if is_hydra(arg) else given).append(arg)
    for arg in argv:
        if key_of(arg) in _REFUSED:
            raise ConfigError(f"{arg}: {_REFUSED[key_of(arg)]}")
    _check_launcher(launcher)
    options = sweep_options(own, launcher)
    if any(key_of(o) == "hydra/sweeper" for o in launcher):
        return _sweep_with_other_sweeper(options, given, launcher)
    return carry_out(options, given, launcher, command or ["sweep.py", *argv])


def carry_out(
    options: SweepConfig,
    given: Sequence[str],
    launcher: Sequence[str],
    command: Sequence[str],
) -> int:
    """Carry out a sweep and return its exit code: 0 all complete, 1 some failed or left, 128 + signal when stopped.

    Args:
        options: what to run.
        given: overrides of the points, which count more than the options'.
        launcher: overrides for Hydra, such as the launcher.
        command: what the user called, for the records.

    Raises:
        ConfigError: one line, naming the key and the way out; nothing has run then.
    """
    launcher = [*launcher, *_check_launcher(launcher)]
    folder = Path(options.dir)
    budget = Budget.from_now(folder, options.budget)
    token = f"{platform.node()}-{os.getpid()}"
    if not (given or options.axes or options.points):
        raise ConfigError("the sweep has no points; give it values (operator.k=1,4,9) or a grid (grid=spectrum)")
    plan = make_plan(options, given)
    keep_known_names(plan, folder)
    check_points(plan, folder)
    for line in moved_axes(plan):
        print(f"warning: {line}")
    if options.dry_run != "false":
        print(describe_plan(plan, folder, options))
        print(cost_line(plan, folder, timed=options.dry_run == "timed"))
        return EXIT_CONFIG if plan.invalid and options.on_invalid == "fail" else 0
    if plan.invalid:
        print(invalid_lines(plan))
        if options.on_invalid == "fail":
            raise ConfigError(f"{len(plan.invalid)} points cannot work; change them, or set sweep.on_invalid=skip")
    sweep = Sweep(plan, folder, options, token, list(command), budget)
    return sweep.run(list(launcher))


def _check_launcher(launcher: Sequence[str]) -> list[str]:
    """Return more overrides that a launcher needs; raise ConfigError for one that is not installed."""
    chosen = next((o.split("=", 1)[1] for o in launcher if key_of(o) == "hydra/launcher"), "basic")
    package, extra = next((v for k, v in _PLUGINS.items() if chosen.startswith(k)), ("", ""))
    if (package and importlib.util.find_spec("hydra_plugins") is None) or (
        package and importlib.util.find_spec(f"hydra_plugins.{package}") is None
    ):
        raise ConfigError(f"hydra/launcher={chosen} needs a plugin; install it with: uv sync --extra {extra}")
    if chosen == "submitit_slurm":
        if shutil.which("srun") is None:
            raise ConfigError(
                "hydra/launcher=submitit_slurm: there is no srun here; run it on a machine of the cluster, or use "
                "hydra/launcher=submitit_local"
            )
        if not any(key_of(o) == "hydra.launcher.max_num_timeout" for o in launcher):
            return ["hydra.launcher.max_num_timeout=100"]  # a job at its time limit is requeued, and resumes
    return []


def _sweep_with_other_sweeper(options: SweepConfig, given: Sequence[str], launcher: Sequence[str]) -> int:
    """Let another of Hydra's sweepers choose the points one by one; each is skipped, resumed and recorded as ever."""
    if options.points or options.dry_run != "false":
        raise ConfigError("hydra/sweeper: sweep.points and sweep.dry_run need the default sweeper")
    axes = [f"{key}={sweep_text(values)}" for key, values in options.axes.items()]
    overrides = merge_overrides(options.base, axes, given)
    token = f"{platform.node()}-{os.getpid()}"
    stop = stop_file(Path(options.dir), token)
    Path(options.dir).mkdir(parents=True, exist_ok=True)
    budget = Budget.from_now(Path(options.dir), options.budget)
    try:
        with StopSignals(lambda _: stop.touch()) as signals, contextlib.suppress(SystemExit):
            launch([*overrides, *job_options(options, token, budget), *launcher, *_check_launcher(launcher)])
    finally:
        stop.unlink(missing_ok=True)
    records = [r for path in Path(options.dir).glob("status/*.json") if (r := read_json(path))]
    bad = [r for r in records if r.get("token") == token and r["status"] != COMPLETE]
    for record in bad:
        print(f"{record['status']}: {record['name']}: {record['reason']}; log {record['log']}")
    if signals.seen is not None:
        return 128 + signals.seen
    if budget.spent():
        print(f"sweep.budget={options.budget} is spent")
    return EXIT_FAILED if bad or budget.spent() else 0


@dataclass
class Sweep:
    """A planned sweep in its folder."""

    plan: Plan
    folder: Path
    options: SweepConfig
    token: str
    command: list[str]
    budget: Budget

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
        self._prepare()
        own = [*job_options(self.options, self.token, self.budget), *launcher]
        stop = stop_file(self.folder, self.token)
        stop.unlink(missing_ok=True)
        todo = self.todo()
        print(self._opening(todo), flush=True)
        try:
            with StopSignals(lambda _: stop.touch()) as signals, Progress(self.folder, self.options.name, todo):
                while todo and signals.seen is None:
                    with contextlib.suppress(SystemExit):  # a launcher's own failure: the points' states tell
                        launch([*own, "sweep.point=" + ",".join(f"p{p.fingerprint}" for p in todo)])
                    todo = self._left_by_others(lambda: signals.seen is not None or self.budget.spent())
        finally:
            stop.unlink(missing_ok=True)
            close_warm()
        reported = signals.seen is None and self._report()
        print(self._closing(failures=not reported, by_budget=signals.seen is None))
        if signals.seen is not None:
            return 128 + signals.seen
        return EXIT_FAILED if any(s.status != COMPLETE for s in self.states().values()) else 0

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(lock(self.folder / ".plan.lock", wait=60.0)):  # type: ignore[type-var]
                save_plan(self.plan, self.folder, self.command, self.options.name)
        except OSError as error:
            raise ConfigError(f"sweep.dir={self.folder} cannot be written: {error.strerror}") from error

    def _left_by_others(self, stopped: Callable[[], bool]) -> list[Point]:
        """Wait for the points that another sweep holds at this moment; return those that it did not get to an end."""
        left = []
        for point in self.plan.points:
            path = lock_file(self.folder, point)
            if not is_locked(path):
                continue
            while not stopped() and is_locked(path):
                time.sleep(0.5)
            if point_state(self.folder, point).status in (TODO, PARTIAL, INTERRUPTED):
                left.append(point)
        return left

    def _opening(self, todo: Sequence[Point]) -> str:
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
        """Give the group's report run in W&B the table and the plots."""
        configs = [c for c in self.plan.configs.values() if c.tracker.name == "wandb" and c.tracker.mode != "disabled"]
        if configs:
            from convnn.runs.tracking import publish_report

            rows, runs = (json.loads(t.to_json(orient="records")) for t in (report.summary, report.runs))
            images = [p.png for p in (*report.pictures, *report.difference_pictures)]
            publish_report(configs[0].tracker, self.folder, self.options.name, rows, runs, images)
            print(f"upload all runs with: wandb sync {self.folder}/points/*/wandb/offline-run-* "
                  f"{self.folder}/wandb/offline-run-*")  # fmt: skip

    def _closing(self, failures: bool, by_budget: bool) -> str:
        states = self.states()
        lines = []
        for point in self.plan.points:
            state = states[point.fingerprint]
            if failures and state.status in FAILURES:
                lines.append(f"{state.status}: {point.name}: {state.reason}; log {self.folder / point.log}")
        counts = Counter(s.status for s in states.values())
        summary = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        lines.append(f"sweep {self.folder}: {summary}")
        left = sum(counts[status] for status in (TODO, PARTIAL, INTERRUPTED))
        if left and by_budget and self.options.budget:
            lines.append(f"sweep.budget={self.options.budget} leaves {left} points to another call")
        if self.todo():
            lines.append("the same command goes on from here: " + command_line(self.command))
        return "\n".join(lines)
