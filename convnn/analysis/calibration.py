"""Calibration: whether a network is right as often as it is sure.

Guo, Pleiss, Sun & Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017 (arXiv 1706.04599), equations 2
to 5.

    ECE   = sum over bins of (images of the bin / images) |accuracy - mean confidence|, 15 bins ((i - 1) / 15, i / 15]
    NLL   = mean over images of -log probability of the right class
    Brier = mean over images of the squared distance of the probabilities from the right class (Brier 1950): 0 to 2

Confidence is the probability of the class that was chosen. ECE is biased upwards where bins hold few images.
Shapes: N images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convnn.analysis.base import Analysis, ArmResults, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, figure_of
from convnn.analysis.outputs import class_outputs
from convnn.analysis.subject import Subject
from convnn.figures.style import NEUTRAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15
FEWEST = 10
"""Images of a bin whose accuracy is drawn; all count in the ECE."""
LEAST = 6e-8
"""Probability that stands for a smaller one in the NLL: the smallest that half precision has."""


@dataclass(frozen=True)
class Reliability:
    """Confidence and accuracy in bins of equal width, (bins,) each; NaN in a bin without images."""

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error."""
        gap = np.abs(self.accuracy - self.confidence)
        return float((self.images * np.where(self.images > 0, gap, 0)).sum() / self.images.sum())


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Sort images into bins ((i - 1) / bins, i / bins] of confidence; 0 is in the first.

    Args:
        confidence: (N,) in 0..1.
        correct: (N,) bool.
        bins: of equal width.
    """
    place = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, np.asarray(x, np.float64), bins) for x in (confidence, correct)]
    means = [np.divide(x, count, out=np.full(bins, np.nan), where=count > 0) for x in sums]
    return Reliability(count, *means)


def negative_log_likelihood(probabilities: np.ndarray, label: np.ndarray) -> float:
    """Return the mean of -log p of the right class, in nats: (N, K), (N,) -> one number."""
    own = probabilities[np.arange(len(label)), label]
    return float(-np.log(own.clip(min=LEAST)).mean())


def brier_score(probabilities: np.ndarray, label: np.ndarray) -> float:
    """Return the mean squared distance of the probabilities from the right class: (N, K), (N,) -> 0 to 2."""
    return float(np.square(probabilities - np.eye(probabilities.shape[1])[label]).sum(1).mean())


def measure(subject: Subject) -> Result:
    """Measure calibration on the test images."""
    found = class_outputs(subject)
    table = reliability(found.confidence, found.correct)
    middles = [round((i + 0.5) / BINS, 4) for i in range(BINS)]
    series = {
        "accuracy": np.where(table.images >= FEWEST, table.accuracy, np.nan),
        "images": table.images / table.images.sum(),
    }
    return {
        "ece": table.error,
        "nll": negative_log_likelihood(found.probabilities, found.label),
        "brier": brier_score(found.probabilities, found.label),
        "confidence": float(found.confidence.mean()),
        "accuracy": float(found.correct.mean()),
        "series": {
            name: {"at": middles, "values": [None if np.isnan(v) else float(v) for v in values]}
            for name, values in series.items()
        },
    }


def headline(result: Result) -> dict[str, float]:
    """Return ECE, NLL, Brier score, and by how much confidence exceeds accuracy."""
    own = {name: result[name] for name in ("ece", "nll", "brier")}
    return own | {"overconfidence": result["confidence"] - result["accuracy"]}


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw the reliability diagram, how many images have which confidence, and the numbers along the spectrum."""

    def panels(axes: list[Any]) -> dict[str, Any]:
        axes[0].plot([0, 1], [0, 1], color=NEUTRAL, linewidth=1, linestyle="--")
        entries = draw_series(axes[0], arms, "accuracy", "accuracy", "confidence")
        axes[0].set(xlim=(0, 1), ylim=(0, 1))
        draw_series(axes[1], arms, "images", "share of the images", "confidence")
        axes[1].set_ylim(bottom=0)
        draw_headline(axes[2], arms, headline, "ece", "ECE, 15 bins")
        draw_headline(axes[3], arms, headline, "overconfidence", "confidence less accuracy")
        axes[3].axhline(0, color=NEUTRAL, linewidth=1)
        draw_headline(axes[4], arms, headline, "nll", "NLL (nats)")
        draw_headline(axes[5], arms, headline, "brier", "Brier score")
        return entries

    return figure_of(6, panels, f"Calibration ({INTERVAL})")


ANALYSIS = Analysis(
    title="Calibration and confidence",
    source="Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), equations 2 to 5",
    measure=measure,
    headline=headline,
    draw=draw,
)
