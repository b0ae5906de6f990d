"""Accuracy of each class, and which classes are taken for which.

The confusion matrix has the images of class i that were taken for class j in row i, column j. Accuracy of a class is
the share of its images on the diagonal (its recall). Shapes: N images, K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from convnn.analysis.base import Analysis, ArmResults, Mean, Result, series_means
from convnn.analysis.drawing import INTERVAL, draw_headline, drawn_arms, figure_of, legend_name, looks_of, short_names
from convnn.analysis.outputs import class_outputs
from convnn.analysis.subject import Subject
from convnn.figures.style import COLOUR_MAP, evenly_spread, plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CLASSES = 12
"""Of which accuracies are drawn; of more, those that differ the most between arms."""
MAX_NAMES = 20
"""At a confusion matrix."""


def confusion(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count images by class and predicted class: (N,), (N,) -> (K, K) int64."""
    return np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes)


def measure(subject: Subject) -> Result:
    """Count over the test images."""
    found, names = class_outputs(subject), subject.classes
    counts = confusion(found.label, found.predicted, len(names))
    images = counts.sum(1)
    accuracy = [int(counts[i, i]) / int(n) if n else None for i, n in enumerate(images)]
    mistaken = counts.copy()
    np.fill_diagonal(mistaken, 0)
    i, j = np.unravel_index(int(mistaken.argmax()), mistaken.shape)
    return {
        "images": images.tolist(),
        "most_mistaken": {"class": names[i], "for": names[j], "images": int(mistaken[i, j])},
        "series": {"accuracy": {"at": list(names), "values": accuracy}},
        "arrays": {"confusion": counts},
    }


def headline(result: Result) -> dict[str, float]:
    """Return the accuracy of the worst and of the best class, and their standard deviation over classes."""
    values = [v for v in result["series"]["accuracy"]["values"] if v is not None]
    return {"worst_class": min(values), "best_class": max(values), "class_spread": float(np.std(values))}


def mean_shares(arm: ArmResults) -> np.ndarray:
    """Return which share of a class's images is taken for which class, averaged over seeds: (K, K), rows of sum 1."""
    counts = [result["arrays"]["confusion"] for result in arm.results.values()]
    return np.mean([c / np.maximum(c.sum(1, keepdims=True), 1) for c in counts], axis=0)


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw the accuracy of classes, the worst one along the spectrum, and the confusion at the first and last arm."""
    ordered, short = drawn_arms(arms), short_names(arms)
    alike = _of_most_classes(ordered)
    first, last = alike[0], alike[-1]

    def panels(axes: list[Any]) -> dict[str, Any]:
        entries = _draw_accuracies(axes[0], arms)
        draw_headline(axes[1], arms, headline, "worst_class", "accuracy of the worst class")
        names = [str(at) for at in series_means(first, "accuracy")[0]]
        _draw_matrix(axes[2], 100 * mean_shares(first), names, f"{short[first.name]}: taken for (%)", difference=False)
        if first is last:
            axes[3].set_visible(False)
        else:
            change = 100 * (mean_shares(last) - mean_shares(first))
            title = f"{short[last.name]} less {short[first.name]} (points)"
            _draw_matrix(axes[3], change, names, title, difference=True)
        return entries

    return figure_of(4, panels, f"Classes ({INTERVAL})")


def _of_most_classes(arms: Sequence[ArmResults]) -> list[ArmResults]:
    """Return the arms of the classes that most of them have: others have no difference."""
    classes = [tuple(series_means(arm, "accuracy")[0]) for arm in arms]
    most = Counter(classes).most_common(1)[0][0]
    return [arm for arm, own in zip(arms, classes, strict=True) if own == most]


def _draw_accuracies(axes: Axes, arms: Sequence[ArmResults]) -> dict[str, Any]:
    """Draw a group of points a class, one for each arm that has it; return the entries of those that are drawn."""
    short, ordered = short_names(arms), drawn_arms(arms)
    looks = looks_of(ordered)
    names = list(series_means(_of_most_classes(ordered)[0], "accuracy")[0])
    arms = [arm for arm in ordered if set(names) & set(series_means(arm, "accuracy")[0])]
    by_arm: list[dict[Any, Mean]] = [dict(zip(*series_means(arm, "accuracy"), strict=True)) for arm in arms]
    spread = {name: np.ptp([found[name].mean for found in by_arm if name in found]) for name in names}
    if len(names) > MAX_CLASSES:
        chosen = set(sorted(names, key=lambda name: -spread[name])[:MAX_CLASSES])
        names = [name for name in names if name in chosen]
    entries: dict[str, Any] = {}
    for i, (arm, found) in enumerate(zip(arms, by_arm, strict=True)):
        xs = np.arange(len(names)) + 0.7 * ((i + 0.5) / len(arms) - 0.5)
        means = [found.get(name, Mean.of([])) for name in names]
        half = [m.high - m.mean if np.isfinite(m.high) else 0.0 for m in means]
        look = {"markersize": 5, "elinewidth": 1.2, "linestyle": "none", **looks[arm.name]}
        entries[legend_name(arm.name, short)] = axes.errorbar(xs, [m.mean for m in means], half, **look)
    axes.set_xticks(range(len(names)), [plain_text(str(n), 16) for n in names], rotation=35, ha="right", fontsize=11)
    axes.set_ylabel("accuracy of the class")
    return entries


def _draw_matrix(axes: Axes, values: np.ndarray, names: Sequence[str], title: str, *, difference: bool) -> None:
    top = max(float(np.abs(values).max()), 1e-9)
    scale = {"cmap": "RdBu_r", "vmin": -top, "vmax": top} if difference else {"cmap": COLOUR_MAP, "vmin": 0}
    image = axes.imshow(values, interpolation="nearest", **scale)  # type: ignore[arg-type]
    axes.figure.colorbar(image, ax=axes, aspect=18)
    axes.grid(False)
    shown = evenly_spread(list(range(len(names))), MAX_NAMES)
    texts = [plain_text(names[i], 16) for i in shown]
    axes.set_xticks(shown, texts, rotation=60, ha="right", fontsize=10)
    axes.set_yticks(shown, texts, fontsize=10)
    axes.set_ylabel("class")
    axes.set_title(plain_text(title, 50), fontsize=12)


ANALYSIS = Analysis(
    title="Classes and confusion",
    source="confusion matrix: images by class and predicted class",
    measure=measure,
    headline=headline,
    draw=draw,
)
