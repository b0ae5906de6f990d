"""Robustness to corrupted images: errors by kind of corruption and severity.

Hendrycks & Dietterich, *Benchmarking Neural Network Robustness to Common Corruptions and Perturbations*, ICLR 2019
(arXiv 1903.12261). The corruptions are those of ``convnn.data.corruptions``, made here; nothing is downloaded.

    mean corruption error = mean over kinds and severities of the error (1 - accuracy)
    relative              = that less the error on the images as they are

Theirs divides each kind by AlexNet's error, which there is not for every data set; this one does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convnn.analysis.base import Analysis, ArmResults, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series
from convnn.analysis.subject import Subject
from convnn.data.corruptions import FAMILIES, LEVELS, corrupted
from convnn.data.splits import Split, split_fingerprint
from convnn.figures.style import RC_PARAMS, add_legend, add_title
from convnn.train.moved import decoded
from convnn.train.restore import Asked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEVERITIES = (1, 2, 3, 4, 5)
MOST_BYTES = 2**29
"""Copies that would take more memory are not kept for the next run, but made again."""


class Copies:
    """Corrupted copies of images; those of the last images stay, as the runs of a sweep share them."""

    def __init__(self) -> None:
        self._key, self._kept = "", dict[tuple[str, int], Tensor]()

    def __call__(self, base: Split, index: np.ndarray) -> Iterator[tuple[str, int, Split]]:
        """Yield name, severity and the corrupted images of every kind.

        Args:
            base: images (N, C, h, w) uint8.
            index: (N,) their numbers in the whole split, which seed what is drawn for them.
        """
        key = split_fingerprint(base) + repr(index.tolist())
        keeps = base.images.numel() * len(LEVELS) * len(SEVERITIES) <= MOST_BYTES
        if key != self._key:
            self._key, self._kept = key, {}
        for name in LEVELS:
            for severity in SEVERITIES:
                images = self._kept.get((name, severity))
                if images is None:
                    images = corrupted(base.images, index.tolist(), name, severity)
                    if keeps:
                        self._kept[name, severity] = images
                yield name, severity, Split(images, base.labels)


_COPIES = Copies()


@torch.no_grad()
def error_of(subject: Subject, split: Split) -> float:
    """Return the share of the images that the model gets wrong."""
    wrong = 0
    for images, labels in replace(subject, split=split, _images=None).batches(128):
        wrong += int((subject.model(images).argmax(1) != labels).sum())
    return wrong / len(split)


def measure(subject: Subject) -> Result:
    """Measure all kinds at all severities; severity 0 are the images as they are."""
    base = decoded(subject.split, subject.config, subject.image_size, subject.index, Asked())
    clean = error_of(subject, base)
    errors: dict[str, list[float]] = {name: [clean] for name in LEVELS}
    for name, _, split in _COPIES(base, subject.index):
        errors[name].append(error_of(subject, split))
    errors |= {family: np.mean([errors[name] for name in names], 0).tolist() for family, names in FAMILIES.items()}
    errors["mean"] = np.mean([errors[name] for name in LEVELS], 0).tolist()
    at = [0, *SEVERITIES]
    return {"clean": clean, "series": {name: {"at": at, "values": values} for name, values in errors.items()}}


def headline(result: Result) -> dict[str, float]:
    """Return the mean corruption error, that of the families, and by how much it exceeds the error without."""
    means = {
        name: float(np.mean(result["series"][name]["values"][1:]))
        for name in ("mean", *FAMILIES)
    }  # fmt: skip
    own = {f"{name}_error": means[name] for name in FAMILIES}
    more = round(means["mean"] - result["clean"], 12) + 0.0  # else what is left of rounding; no -0 either
    return {"corruption_error": means["mean"], "relative_corruption_error": more} | own


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw the errors of every kind over severity, their mean, and the mean errors along the spectrum."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(RC_PARAMS | {"font.size": 12, "axes.titlesize": 12}):
        figure = Figure(figsize=(17, 10))
        axes = figure.subplots(3, 5).flatten().tolist()
        entries: dict[str, Any] = {}
        for i, name in enumerate((*LEVELS, "mean")):
            entries = draw_series(axes[i], arms, name, "error" if i % 5 == 0 else "", "severity")
            axes[i].set_title("mean of all kinds" if name == "mean" else name.replace("_", " "))
            axes[i].set_xticks([0, *SEVERITIES])
        curves = axes[: len(LEVELS) + 1]
        ends = [panel.get_ylim() for panel in curves]  # sharing an axis afterwards would take the first one's
        for panel in curves:
            panel.set_ylim(max(min(low for low, _ in ends), 0), min(max(high for _, high in ends), 1))
        for panel, name, label in (
            (axes[-2], "corruption_error", "mean corruption error"),
            (axes[-1], "relative_corruption_error", "that less the clean error"),
        ):
            draw_headline(panel, arms, headline, name, label)
        if len(entries) > 1:
            add_legend(figure, entries)
        add_title(figure, f"Errors on corrupted images; severity 0: as they are ({INTERVAL})")
        figure.set_layout_engine("constrained")
        figure.draw_without_rendering()
    return figure


ANALYSIS = Analysis(
    title="Robustness to corruptions",
    source="Hendrycks & Dietterich, ICLR 2019 (arXiv 1903.12261), without AlexNet's errors as a measure",
    measure=measure,
    headline=headline,
    draw=draw,
    images=100,
)
