"""An Optuna study beside the runs of a sweep: its trials, what the runs report to it, and its verdicts. No torch."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from convnn.config.compose import COMPOSE_ERRORS, hydra_context, translate
from convnn.config.overrides import key_of
from convnn.config.schema import Config
from convnn.errors import ConfigError, first_line
from convnn.ops.settings import check_fields, choice, number
from convnn.runs.metrics import is_number, read_metrics
from convnn.runtime.files import write_text
from convnn.sweep.options import SweepRun
from convnn.sweep.plan import Point
from convnn.sweep.space import Space
from convnn.sweep.state import prune_file

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("convnn")

_NAME = "convnn"
JOURNAL = "study.journal"
"""Of ``optuna.storages.JournalStorage``: every event is a line, so that a kill loses at most the last one."""


@dataclass
class SearchConfig:
    """How ``hydra/sweeper=optuna`` searches: keys of ``hydra.sweeper``."""

    _target_: str = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    """Hydra's own, which hands the trials that were chosen to the launcher."""
    n_trials: int = number(20, 1)
    """Trials of the study, those of earlier calls included."""
    n_jobs: int | None = number(None, 1)
    """Trials at a time; null: ``hydra.launcher.n_jobs`` where the launcher has it, else 1."""
    sampler: str = choice("tpe", "random")
    """What chooses the next trial."""
    seed: int | None = 0
    """Of the sampler; null: another each time."""
    pruner: str = choice("median", "none")
    """``median``: a run ends early whose best accuracy so far is below the median of what others had by then."""
    startup_trials: int = number(5, 0)
    """Complete trials before any is pruned."""
    warmup_epochs: int = number(1, 0)
    """Epochs of a run before it may be pruned."""


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=SearchConfig, provider="convnn")


def search_settings(launcher: Sequence[str]) -> SearchConfig:
    """Return what the command line says of ``hydra.sweeper``, ``n_jobs`` as a number.

    Raises:
        ConfigError: one line, naming the key and the way out.
    """
    try:
        with hydra_context():
            found = compose("sweep", list(launcher), return_hydra_config=True).hydra
        values: Any = OmegaConf.to_container(found.sweeper)
        parallel = found.launcher.get("n_jobs")
        settings = SearchConfig(**values)
    except (*COMPOSE_ERRORS, ValueError, TypeError) as error:
        raise (
            translate(error, launcher, SweepRun)
            if isinstance(error, COMPOSE_ERRORS)
            else ConfigError(f"hydra.sweeper: {error}")
        ) from error
    check_fields(settings, "hydra.sweeper")
    settings.n_jobs = settings.n_jobs or max(int(parallel or 1), 1)
    return settings


@dataclass
class Running:
    """A trial whose run may be going on."""

    trial: optuna.Trial
    point: Point
    config: Config
    metric: str = ""
    """Column of metrics.jsonl that counts, once there is one."""
    reported: set[int] = field(default_factory=set)
    """Epochs."""

    def report(self, folder: Path, *, judge: bool) -> float | None:
        """Tell the study the accuracies that are new, and return the latest in percent; None before the first epoch.

        Args:
            folder: of the sweep.
            judge: ask the pruner, and have the run stopped if it says so.
        """
        value = None
        for row in read_metrics(folder / self.point.folder / "metrics.jsonl"):
            self.metric = self.metric or ("val_top1" if "val_top1" in row else "test_top1")
            if not is_number(found := row.get(self.metric)):
                continue
            value, epoch = float(found), int(row["epoch"])
            if epoch in self.reported:
                continue
            self.trial.report(value, epoch)
            self.reported.add(epoch)
            last = epoch + 1 >= self.config.train.epochs  # what is nearly over is not worth stopping
            if judge and not last and self.trial.should_prune():
                write_text(prune_file(folder, self.point), f"pruned after epoch {epoch + 1} at {value:.2f} %")
        return value


class Follower:
    """Watches the files of runs within a ``with`` block, whatever launcher has started them."""

    def __init__(self, folder: Path, batch: Sequence[Running]) -> None:
        self.folder, self.batch = folder, batch
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        for running in self.batch:  # one that had ended by itself when it was told to
            prune_file(self.folder, running.point).unlink(missing_ok=True)

    def _watch(self) -> None:
        try:
            while not self._end.wait(0.3):
                for running in self.batch:
                    running.report(self.folder, judge=True)
        except Exception as error:  # the runs go on, and are told when they have ended
            log.warning("runs are no longer watched, so that none is pruned: %s", first_line(error))


def open_study(folder: Path, settings: SearchConfig, space: Space, *, looks: bool = False) -> optuna.Study:
    """Return the study of a sweep's folder, a new one if there is none; nobody else may write to it.

    Args:
        folder: of the sweep.
        settings: of the search.
        space: what it chooses among.
        looks: there is one, to which somebody else may write: leave it as it is.

    Raises:
        ConfigError: if Optuna is not installed, or the study there searches something else.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError("hydra/sweeper=optuna needs optuna; install it with: uv sync --extra optuna") from error
    optuna.logging.set_verbosity(logging.WARNING)
    path = folder / JOURNAL
    if not looks:
        _drop_torn_line(path)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    pruner = optuna.pruners.NopPruner() if settings.pruner == "none" else optuna.pruners.MedianPruner(
        n_startup_trials=settings.startup_trials, n_warmup_steps=settings.warmup_epochs
    )  # fmt: skip
    if looks:
        return optuna.load_study(storage=storage, study_name=_NAME)
    study = optuna.create_study(
        storage=storage, study_name=_NAME, direction="maximize", load_if_exists=True, pruner=pruner
    )
    seed = None if settings.seed is None else settings.seed + len(study.trials)  # a call that goes on draws anew
    study.sampler = (
        optuna.samplers.RandomSampler(seed)
        if settings.sampler == "random"
        else optuna.samplers.TPESampler(seed=seed, constant_liar=(settings.n_jobs or 1) > 1)
    )
    searched = _as_text(space)
    known = study.user_attrs.get("search")
    begun = any(t.state.name in ("COMPLETE", "PRUNED", "RUNNING") for t in study.get_trials(deepcopy=False))
    if known is None or (known != searched and not begun):  # of trials that all failed nothing is compared
        study.set_user_attr("search", searched)
    elif known != searched:
        differs = sorted(set(known) ^ set(searched))
        raise ConfigError(f"{path} is a study of other runs ({'; '.join(differs[:5])}); choose another sweep.dir")
    return study


def _as_text(space: Space) -> list[str]:
    """Return what makes trials comparable: all overrides but those that decide nothing about a run's outcome."""
    unused = ("run", "tracker", "diagnostics", "checkpoint", "device", "debug")
    fixed = [o for o in space.fixed if key_of(o).split(".")[0] not in unused]
    return sorted([*fixed, *(f"{key}={text}" for key, text in space.texts.items())])


def _drop_torn_line(path: Path) -> None:
    """Remove the end of a line that a lost machine left, after which Optuna would read nothing more."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
