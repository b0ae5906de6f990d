"""Which test images the runs of an arm have right, from what they predicted. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from convnn.errors import ConfigError
from convnn.report.arms import Arm
from convnn.report.results import Run
from convnn.runs.predictions import read_predictions

CHECKPOINTS = {"top1_last": "last", "top1_best_on_test": "best", "top1_at_best_val": "best"}
"""Metrics that images of the test set decide, and the checkpoint whose predictions they are."""
TOLERANCE = 0.1
"""Points by which predictions may differ from the run's own figure, as where another device made them."""
MISSING = "no predictions.npz"
OTHER_IMAGES = "other test images"


@dataclass(frozen=True)
class Right:
    """Of one run: which images it has right."""

    index: np.ndarray
    """(N,) places in the test set, ascending."""
    label: np.ndarray
    """(N,)"""
    right: np.ndarray
    """(N,) bool."""


@dataclass
class Predictions:
    """Reads each run once."""

    metric: str
    missing: list[Run] = field(default_factory=list)
    """Runs without predictions."""
    problems: list[str] = field(default_factory=list)
    """Of files that are there and cannot be used, a line each."""
    _read: dict[int, Right | str] = field(default_factory=dict)

    def matrices(self, arm: Arm, other: Arm, seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[int]] | str:
        """Return (seeds, images) of both arms and the seeds that have predictions in both; or why there is none."""
        if self.metric not in CHECKPOINTS:
            return f"{self.metric} is not of single test images"
        pairs = [(seed, self._of(arm, seed), self._of(other, seed)) for seed in seeds]
        usable = [(seed, a, b) for seed, a, b in pairs if isinstance(a, Right) and isinstance(b, Right)]
        if not usable:
            return next((one for _, *both in pairs for one in both if isinstance(one, str)), "no common seed")
        first = usable[0][1]
        for _, *both in usable:
            for one in both:
                if not (np.array_equal(one.index, first.index) and np.array_equal(one.label, first.label)):
                    return OTHER_IMAGES
        a = np.stack([one.right for _, one, _ in usable])
        b = np.stack([one.right for _, _, one in usable])
        return a, b, [seed for seed, *_ in usable]

    def _of(self, arm: Arm, seed: int) -> Right | str:
        run = arm.runs[seed]
        if id(run) not in self._read:
            self._read[id(run)] = self._right_of(run, arm.scores[seed])
        return self._read[id(run)]

    def _right_of(self, run: Run, score: float) -> Right | str:
        try:
            found = read_predictions(run.folder, CHECKPOINTS[self.metric])
        except ConfigError as error:
            self.problems.append(str(error))
            return "damaged predictions.npz"
        if found is None:
            self.missing.append(run)
            return MISSING
        order = np.argsort(found.index, kind="stable")
        right = (found.predicted == found.label)[order]
        own = 100 * float(right.mean()) if len(right) else float("nan")
        if not abs(own - score) <= max(TOLERANCE, 150 / max(len(right), 1)):
            self.problems.append(
                f"{run.name}: predictions.npz has {own:.2f} % right, the run's {self.metric} is {score:.2f}; not used"
            )
            return "predictions of another result"
        return Right(found.index[order], found.label[order], right)
