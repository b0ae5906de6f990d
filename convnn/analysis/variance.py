"""Feature variance by depth: how much the tokens of an image differ from each other.

Park & Kim, *How Do Vision Transformers Work?*, ICLR 2022 (arXiv 2202.06709), section 3 and figure 9: attention averages
feature maps, so that their variance falls, and convolutions raise it.

    variance = mean over images and channels of the sample variance over tokens
    relative = variance over tokens (divided by their number) / mean square: 0: all tokens alike, 1: of mean 0

The first is theirs, as their notebook computes it, and has the features' unit; the second does not depend on a layer's
scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convnn.analysis.base import Analysis, ArmResults, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, figure_of
from convnn.analysis.features import depths, feature_maps
from convnn.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def token_moments(maps: Tensor) -> Tensor:
    """Return sample variance over tokens, variance and mean square of maps (B, C, h, w), summed over images: (3,)."""
    tokens = maps.double().flatten(2)
    variance = tokens.var(dim=2, correction=0).mean(1).sum()
    n = tokens.shape[2]
    sample = variance * n / (n - 1) if n > 1 else variance.new_full((), torch.nan)
    return torch.stack([sample, variance, tokens.square().mean((1, 2)).sum()])


@torch.no_grad()
def measure(subject: Subject) -> Result:
    """Measure all depths of a run's model."""
    names = depths(subject.model)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    for images, _ in subject.batches():
        for name, maps in feature_maps(subject.model, names, images).items():
            sums[name] += token_moments(maps).cpu()
    found = [(sums[name] / len(subject.split)).tolist() for name in names]
    return {
        "series": {
            "variance": {"at": names, "values": [v if v == v else None for v, _, _ in found]},
            "relative": {"at": names, "values": [v / square if square else 0.0 for _, v, square in found]},
        }
    }


def headline(result: Result) -> dict[str, float]:
    """Return the mean over depth of the relative variance, and that of the last depth."""
    values = result["series"]["relative"]["values"]
    return {"feature_variance": sum(values) / len(values), "feature_variance_last": values[-1]}


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw both variances over depth, and the relative one along the spectrum."""

    def panels(axes: list[Any]) -> dict[str, Any]:
        entries = draw_series(axes[0], arms, "variance", "variance over tokens")
        draw_series(axes[1], arms, "relative", "relative to the mean square")
        draw_headline(axes[2], arms, headline, "feature_variance", "relative, mean over depth")
        draw_headline(axes[3], arms, headline, "feature_variance_last", "relative, last depth")
        return entries

    return figure_of(4, panels, f"Feature variance by depth ({INTERVAL})")


ANALYSIS = Analysis(
    title="Feature variance by depth",
    source="Park & Kim, How Do Vision Transformers Work?, ICLR 2022 (arXiv 2202.06709), figure 9",
    measure=measure,
    headline=headline,
    draw=draw,
    images=512,
)
