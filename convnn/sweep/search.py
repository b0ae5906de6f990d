"""A sweep whose points Optuna chooses one after the other, by the accuracies of those before. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.config.checks import check_kinds
from convnn.config.composer import Composer
from convnn.config.identity import effect, fingerprint, fingerprint_of
from convnn.config.overrides import key_of, merge_overrides, sweep_text
from convnn.config.schema import Config
from convnn.errors import EXIT_FAILED, ConfigError
from convnn.report.build import make_report
from convnn.runs.data_record import RecordReader
from convnn.runs.status import COMPLETE, FAILURES, PRUNED
from convnn.runtime.locks import lock
from convnn.runtime.signals import StopSignals, hangup_as_term
from convnn.sweep.budget import Budget
from convnn.sweep.job import job_options, launch
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import Plan, Point, keep_known_names, point_name, save_plan
from convnn.sweep.same_data import check_point
from convnn.sweep.space import Space, read_space
from convnn.sweep.state import log_of, point_state, stop_file
from convnn.sweep.study import JOURNAL, Follower, Running, SearchConfig, open_study, search_settings
from convnn.sweep.warm import close as close_warm
from convnn.text import command_line

if TYPE_CHECKING:
    import optuna

_TEST = "test_top1"
_FLATTERED = (
    "there are no validation images, so that trials are compared on the test images, which flatters the best one; "
    "set data.val_fraction=0.1"
)
_RETRIED = "retried"
"""Attribute of a study: numbers of failed trials whose choices were put to the front again; they do not count."""
_LOST = "lost"
"""Attribute of a trial that a kill ended before it was chosen whole; it does not count."""


def run_search(options: SweepConfig, given: Sequence[str], launcher: Sequence[str], command: Sequence[str]) -> int:
    """Carry out a search and return its exit code: 0 all trials told, 1 some left or none complete, 128 + signal.

    Args:
        options: of the sweep.
        given: overrides of the runs; those with several values or an interval are searched.
        launcher: overrides for Hydra.
        command: what the user called, for the records.

    Raises:
        ConfigError: one line, naming the key and the way out; nothing has run then.
    """
    if options.points:
        raise ConfigError("hydra/sweeper=optuna: sweep.points need the default sweeper; search over groups instead")
    if any(o.endswith("=submitit_slurm") for o in launcher):
        raise ConfigError("hydra/sweeper=optuna follows runs of this machine; use hydra/launcher=joblib here")
    settings = search_settings(launcher)
    axes = [f"{key}={sweep_text(values)}" for key, values in options.axes.items()]
    space = read_space(merge_overrides(options.base, axes, given))
    folder = Path(options.dir)
    if options.dry_run != "false":
        print("\n".join([f"{settings.n_trials} trials, chosen from", *(f"  {k}={t}" for k, t in space.texts.items())]))
        return 0
    if options.status:
        print(search_status(folder, settings, space, options, list(command)))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    held = lock(folder / ".search.lock", wait=1.0)
    if held is None:
        raise ConfigError(f"sweep.dir={folder}: another search goes on there; wait for it, or choose another folder")
    with contextlib.closing(held):
        token = f"{platform.node()}-{os.getpid()}"
        own = [o for o in launcher if key_of(o) != "hydra/sweeper" and not key_of(o).startswith("hydra.sweeper.")]
        budget = Budget.from_now(folder, options.budget)
        search = Search(folder, options, settings, space, open_study(folder, settings, space), budget, list(command))
        return search.run(token, [*job_options(options, token, budget), *own])


def search_status(folder: Path, settings: SearchConfig, space: Space, options: SweepConfig, command: list[str]) -> str:
    """Return how a search stands, which may be going on; nothing is written."""
    if not (folder / JOURNAL).exists():
        return f"search {folder}: not begun"
    study = open_study(folder, settings, space, looks=True)
    return Search(folder, options, settings, space, study, Budget.from_now(folder, None), command).summary()


@dataclass
class Search:
    """A study and the sweep's folder that has its runs."""

    folder: Path
    options: SweepConfig
    settings: SearchConfig
    space: Space
    study: optuna.Study
    budget: Budget
    command: list[str]
    composer: Composer = field(default_factory=Composer)
    left: set[int] = field(default_factory=set)
    """Trials that this call has not brought to an end, as their runs were stopped or are another's."""
    metric: str = ""
    """Column of metrics.jsonl by which trials are compared, once there is one."""
    alike: dict[str, Point] = field(default_factory=dict)
    """The points of earlier trials, by what has an effect: what differs in nothing else is not run again."""

    def run(self, token: str, job: list[str]) -> int:
        """Run trials until there are enough, and sum up; return the exit code."""
        for frozen in self.study.get_trials(deepcopy=False):  # so that the first of those that are alike has the run
            with contextlib.suppress(ConfigError, KeyError):
                self._point(self.space.overrides(frozen.params))
        if self.options.retry_failed:
            self._retry_failed()
        stop = stop_file(self.folder, token)
        stop.unlink(missing_ok=True)
        try:
            with StopSignals(lambda _: stop.touch()) as signals, hangup_as_term():
                while signals.seen is None and not (self.left and self.options.budget):
                    batch = self._batch()
                    if not batch:
                        break
                    self._train(batch, job)
        finally:
            stop.unlink(missing_ok=True)
            close_warm()
        if signals.seen is None and self.options.report:
            self._report()
        print(self.summary(), flush=True)
        if self._is_open():
            print("the same command goes on from here: " + command_line(self.command), flush=True)
        if signals.seen is not None:
            return 128 + signals.seen
        complete = any(t.state.name == "COMPLETE" for t in self.study.get_trials(deepcopy=False))
        return 0 if complete and not self._is_open() else EXIT_FAILED

    def _retry_failed(self) -> None:
        """Put the choices of failed trials to the front of what is tried next."""
        failed = [trial for trial in self._trials() if trial.state.name == "FAIL"]
        if failed:
            retried = [*self.study.user_attrs.get(_RETRIED, []), *(trial.number for trial in failed)]
            self.study.set_user_attr(_RETRIED, retried)
            for trial in failed:
                self.study.enqueue_trial(trial.params)

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that count."""
        retried = set(self.study.user_attrs.get(_RETRIED, []))
        trials = self.study.get_trials(deepcopy=False)
        return [
            t for t in trials if _LOST not in t.user_attrs and t.number not in retried and t.state.name != "WAITING"
        ]

    def _is_open(self) -> bool:
        trials = self._trials()
        return any(t.state.name == "RUNNING" for t in trials) or len(trials) < self.settings.n_trials

    def _batch(self) -> list[Running]:
        """Return the trials to run next: those that a call before this one has left, then new ones."""
        import optuna

        found: list[Running] = []
        for frozen in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if frozen.number in self.left or len(found) >= (self.settings.n_jobs or 1):
                continue
            if frozen.params.keys() != self.space.searched.keys():
                trial = optuna.Trial(self.study, frozen._trial_id)
                trial.set_user_attr(_LOST, True)
                self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
                continue
            running = self._running(optuna.Trial(self.study, frozen._trial_id), set(frozen.intermediate_values))
            if running and not self._settled(running, failures=True):
                found.append(running)
        while len(found) < (self.settings.n_jobs or 1) and len(self._trials()) < self.settings.n_trials:
            running = self._running(self.study.ask(self.space.searched), set())
            if running and not self._settled(running, failures=not self.options.retry_failed):
                found.append(running)
        return found

    def _running(self, trial: optuna.Trial, reported: set[int]) -> Running | None:
        """Return a trial with its run; None where its configuration cannot work, which the study is told."""
        overrides = self.space.overrides(trial.params)
        try:
            point, config = self._point(overrides)
            check_point(self.folder, point, config.data, RecordReader())
        except ConfigError as error:
            self._fail(trial, str(error))
            return None
        trial.set_user_attr("run", point.folder)
        return Running(trial, point, config, reported=reported)

    def _point(self, overrides: list[str]) -> tuple[Point, Config]:
        config = self.composer(overrides)
        check_kinds(config)
        plan = Plan([Point(point_name(config), fingerprint(config), tuple(overrides))], [], {})
        keep_known_names(plan, self.folder)
        return self.alike.setdefault(fingerprint_of(effect(config)), plan.points[0]), config

    def _train(self, batch: Sequence[Running], job: list[str]) -> None:
        """Hand the runs of some trials to the launcher, and tell the study how they ended."""
        points = {running.point.fingerprint: running.point for running in batch}
        for running in batch:
            print(f"trial {running.trial.number}: {self._choices(running.trial.params)}", flush=True)
        save_plan(Plan(list(points.values()), [], {}), self.folder, self.command, self.options.name)
        with Follower(self.folder, batch), contextlib.suppress(SystemExit):
            launch([*job, "sweep.point=" + ",".join(f"p{digest}" for digest in points)])
        for running in batch:
            if not self._settled(running, failures=True):
                self.left.add(running.trial.number)

    def _settled(self, running: Running, *, failures: bool) -> bool:
        """Tell the study how a run has ended, if it has; return whether it has.

        Args:
            running: the trial.
            failures: a run that failed has ended; else it is to be tried again.
        """
        import optuna

        state, trial = point_state(self.folder, running.point), running.trial
        if state.status not in (COMPLETE, PRUNED, *(FAILURES if failures else ())):
            return False
        value = running.report(self.folder, judge=False)
        if state.status == COMPLETE and value is not None:
            trial.set_user_attr("metric", running.metric)
            self.study.tell(trial, value)
            if not self.metric and running.metric == _TEST:
                print(f"warning: {_FLATTERED}")
            self.metric = running.metric
            best = self.study.best_trial
            text = f"trial {trial.number}: {value:.2f} %, best {best.value:.2f} % of trial {best.number}"
            print(text, flush=True)
        elif state.status == PRUNED:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            print(f"trial {trial.number}: {state.reason}", flush=True)
        else:
            self._fail(trial, f"{state.status}: {state.reason or 'no accuracy'}{log_of(self.folder, running.point)}")
        return True

    def _fail(self, trial: optuna.Trial, reason: str) -> None:
        import optuna

        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        print(f"trial {trial.number}: {reason}", flush=True)

    def _choices(self, params: Mapping[str, Any]) -> str:
        return " ".join(self.space.overrides(params)[len(self.space.fixed) :])

    def _report(self) -> None:
        """Write tables and plots of the runs."""
        try:
            make_report([self.folder], self.folder / "report")
            print(f"report: {self.folder / 'report' / 'index.html'}")
        except (ConfigError, OSError) as error:  # nothing to report, a package is missing, the disk refuses
            print(f"no report: {error}")

    def summary(self) -> str:
        """Return how the study stands, its best trial, and the command that trains that one."""
        trials = self._trials()
        counts = Counter("failed" if t.state.name == "FAIL" else t.state.name.lower() for t in trials)
        told = ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "none yet"
        lines = [f"search {self.folder}: {len(trials)} of {self.settings.n_trials} trials ({told})"]
        lines += [f"failed: trial {t.number}: {t.user_attrs['reason']}" for t in trials if "reason" in t.user_attrs]
        if counts["complete"]:
            best = self.study.best_trial
            train = command_line(["train.py", *self.space.overrides(best.params)])
            metric = best.user_attrs.get("metric", "")
            lines += [
                f"best: trial {best.number}, {metric.removesuffix('_top1')} top-1 {best.value:.2f} %: "
                + self._choices(best.params),
                *([f"note: {_FLATTERED}"] if metric == _TEST else []),
                f"its run: {self.folder / best.user_attrs['run']}",
                f"to train it again: {train}",
            ]
        return "\n".join(lines)
