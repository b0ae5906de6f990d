"""What a run's model says of the images of an analysis, taken from predictions.npz where that has it.

Shapes: N images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convnn.analysis.subject import Subject
from convnn.runs.predictions import KeptPredictions, read_predictions
from convnn.train.predictions import predict


@dataclass(frozen=True)
class Outputs:
    """Labels, classes and probabilities, a row an image."""

    label: np.ndarray
    """(N,) int64."""
    predicted: np.ndarray
    """(N,) int64: class of the highest logit."""
    probabilities: np.ndarray
    """(N, K) float64, each row of sum 1."""

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool."""
        return self.predicted == self.label

    @property
    def confidence(self) -> np.ndarray:
        """(N,) float64: probability of the predicted class."""
        return self.probabilities[np.arange(len(self.label)), self.predicted]


def class_outputs(subject: Subject) -> Outputs:
    """Return what the model says; it is asked only where the run folder does not have it.

    predictions.npz has probabilities in half precision: to 0.05 %, and those below 3e-8 as 0.
    """
    kept = read_predictions(subject.folder, subject.checkpoint) if subject.own_images else None
    found = None if kept is None else _taken(kept, subject)
    if found is None:
        _, predicted = predict(
            subject.model, subject.config, subject.split, subject.image_size, step=subject.step, index=subject.index
        )
        found = predicted.kept()
    assert found.probabilities is not None
    shares = found.probabilities.astype(np.float64)
    return Outputs(found.label, found.predicted, shares / shares.sum(1, keepdims=True))


def _taken(kept: KeptPredictions, subject: Subject) -> KeptPredictions | None:
    """Return the rows of the subject's images; None if they are not all there."""
    if kept.probabilities is None or not len(kept.index):
        return None
    order = np.argsort(kept.index)
    rows = order[np.searchsorted(kept.index, subject.index, sorter=order).clip(max=len(order) - 1)]
    label = subject.split.labels.cpu().numpy()
    if not (np.array_equal(kept.index[rows], subject.index) and np.array_equal(kept.label[rows], label)):
        return None
    return KeptPredictions(kept.index[rows], label, kept.predicted[rows], kept.probabilities[rows])
