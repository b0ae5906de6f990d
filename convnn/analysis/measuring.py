"""Measures the runs of several arms: what their folders keep is taken from there."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from convnn.analysis.base import Analysis, ArmResults, NotApplicable, Result
from convnn.analysis.kept import Settings, keep_result, kept_result
from convnn.analysis.registry import load_analysis
from convnn.analysis.subject import Datasets, Subject, open_subject
from convnn.errors import CheckpointError, ConfigError, first_line
from convnn.ops.neighborhood import same_draws
from convnn.runtime.files import sha256_of

log = logging.getLogger("convnn")


@dataclass(frozen=True)
class Asked:
    """What is to be measured, and how."""

    names: Sequence[str]
    checkpoint: str = "last"
    images: int | None = None
    """Test images, evenly over the classes; None: as many as each analysis takes by itself."""
    device: str = "auto"
    data_root: str | None = None


@dataclass(frozen=True)
class ArmRuns:
    """Finished runs that differ in their seed alone."""

    name: str
    values: Mapping[str, Any]
    folders: Mapping[int, Path]
    """By seed."""


@dataclass
class Measured:
    """What became of the runs."""

    arms: dict[str, list[ArmResults]]
    """By analysis; without runs that failed or that it does not apply to."""
    measured: int = 0
    kept: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """By analysis, why it does not apply to some runs, each reason once."""
    failed: list[str] = field(default_factory=list)
    """Why runs, or analyses of them, failed: a line each."""
    failed_runs: set[Path] = field(default_factory=set)


def measure_arms(arms: Sequence[ArmRuns], asked: Asked, tell: Callable[[str], None] = lambda line: None) -> Measured:
    """Return the results of all runs, by analysis and arm.

    A run that cannot be looked at, such as one with a damaged checkpoint, is told and left out. So is an analysis that
    fails on a run; the others go on.

    Args:
        arms: the runs.
        asked: what to measure.
        tell: called with a line as each analysis of a run is done.
    """
    analyses = {name: load_analysis(name) for name in asked.names}
    found = Measured({name: [] for name in analyses})
    load = Datasets()
    for arm in arms:
        results: dict[str, dict[int, Result]] = {name: {} for name in analyses}
        for seed, folder in arm.folders.items():
            one = _OneRun(folder, f"{arm.name} seed={seed}", asked, load, found, tell)
            for name, analysis in analyses.items():
                result = one.result(name, analysis)
                if result is not None:
                    results[name][seed] = result
        for name, by_seed in results.items():
            if by_seed:
                found.arms[name].append(ArmResults(arm.name, arm.values, by_seed))
    return found


@dataclass
class _OneRun:
    folder: Path
    label: str
    asked: Asked
    load: Datasets
    found: Measured
    tell: Callable[[str], None]
    subject: Subject | None = None
    broken: bool = False

    def result(self, name: str, analysis: Analysis) -> Result | None:
        """Return the result of an analysis, kept or measured; None where there is none, which is told."""
        if self.broken:
            return None
        start = time.perf_counter()
        try:
            settings = self._settings(analysis)
            result = kept_result(self.folder, name, settings)
            if result is not None:
                self.found.kept += 1
                self.tell(f"{name}  {self.label}: {_shown(analysis.headline(result))} (kept)")
                return result
            result = self._measured(analysis)
            headline = {key: value for key, value in analysis.headline(result).items() if math.isfinite(value)}
        except NotApplicable as error:
            reasons = self.found.left_out.setdefault(name, [])
            if str(error) not in reasons:
                reasons.append(str(error))
            self.tell(f"{name}  {self.label}: does not apply: {first_line(error)}")
            return None
        except (CheckpointError, ConfigError, OSError) as error:
            self.broken = True
            self._failed(f"{self.label}: failed", f"{self.folder}", first_line(error))
            return None
        except Exception as error:
            log.debug("%s of %s failed", name, self.folder, exc_info=True)
            self.subject = None  # the model may be left in any state
            reason = type(error).__name__ + (f": {first_line(error)}" if str(error).strip() else "")
            self._failed(f"{name}  {self.label}: failed", f"{self.folder}: {name}", reason)
            return None
        self.found.measured += 1
        self.tell(f"{name}  {self.label}: {_shown(headline)} ({time.perf_counter() - start:.1f} s)")
        try:
            keep_result(self.folder, name, settings, result, headline, _facts(analysis))
        except OSError as error:
            self.tell(f"warning: {name} of {self.folder} is not kept: {error.strerror or first_line(error)}")
        return result

    def _failed(self, told: str, where: str, reason: str) -> None:
        self.found.failed_runs.add(self.folder)
        self.found.failed.append(f"{where}: {reason}")
        self.tell(f"{told}: {reason}")

    def _settings(self, analysis: Analysis) -> Settings:
        path = self.folder / "checkpoints" / f"{self.asked.checkpoint}.pt"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such checkpoint")
        return {
            "version": analysis.version,
            "images": self.asked.images or analysis.images,
            "checkpoint": self.asked.checkpoint,
            "sha256": sha256_of(path),
            "data": str(Path(self.asked.data_root).resolve()) if self.asked.data_root else None,
        }

    def _measured(self, analysis: Analysis) -> Result:
        if self.subject is None:
            asked = self.asked
            self.subject = open_subject(self.folder, asked.checkpoint, asked.device, asked.data_root, self.load)
        subject = self.subject.limited(self.asked.images or analysis.images)
        with same_draws(subject.device):
            torch.manual_seed(subject.seed)
            return analysis.measure(subject)


def _facts(analysis: Analysis) -> dict[str, Any]:
    return {"title": analysis.title, "source": analysis.source}


def _shown(headline: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in headline.items())
