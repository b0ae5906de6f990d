"""Log-amplitude of feature maps by frequency and depth: whether a network keeps fine detail or smooths it.

Park & Kim, *How Do Vision Transformers Work?*, ICLR 2022 (arXiv 2202.06709), figures 2a and 8: the 2-D Fourier
transform of every feature map, its amplitudes' logarithm averaged over images and channels, along the diagonal of
frequencies from (0, 0) to the highest, (pi, pi), less its value at (0, 0):

    delta(f) = mean log(|F_ff| + 1e-6) - mean log(|F_00| + 1e-6)

Frequencies are those of a map itself: pi is the finest that it can hold, whatever its size. The value at pi over depth
is what attention lowers and convolution raises in their networks. Shapes: B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convnn.analysis.base import Analysis, ArmResults, NotApplicable, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, figure_of
from convnn.analysis.features import depths, feature_maps
from convnn.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 1e-6
"""Added to amplitudes, as in the authors' notebook."""


def log_amplitudes(maps: Tensor) -> Tensor:
    """Return the mean over channels of the log-amplitude on the diagonal, (B, C, h, w) -> (B, n) float64.

    The n frequencies go from 0 to pi in equal steps: min(h, w) // 2 + 1 of them. Of a map that is not square the
    diagonal joins the same frequency of both axes, rounded to the nearest there is.
    """
    height, width = maps.shape[-2:]
    steps = min(height, width) // 2
    shares = torch.arange(steps + 1, dtype=torch.float64) / max(steps, 1)
    rows, columns = ((shares * (side // 2)).round().long().to(maps.device) for side in (height, width))
    amplitude = torch.fft.fft2(maps.double()).abs()[..., rows, columns]
    return (amplitude + _LEAST).log().mean(1)


def frequencies(count: int) -> list[float]:
    """Return the frequencies of ``log_amplitudes``, in units of pi."""
    return [round(i / max(count - 1, 1), 4) for i in range(count)]


@torch.no_grad()
def measure(subject: Subject) -> Result:
    """Measure all depths of a run's model whose maps have more than one token a side."""
    names = depths(subject.model)
    sums: dict[str, Tensor] = {}
    for images, _ in subject.batches():
        for name, maps in feature_maps(subject.model, names, images).items():
            if min(maps.shape[-2:]) > 1:
                sums[name] = sums.get(name, 0) + log_amplitudes(maps).sum(0).cpu()
    if not sums:
        raise NotApplicable("no feature map has more than one token a side")
    relative = {name: (one - one[0]).div(len(subject.split)).tolist() for name, one in sums.items()}
    series = {"high_frequency": {"at": list(relative), "values": [values[-1] for values in relative.values()]}}
    for name, values in relative.items():
        series[f"spectrum of {name}"] = {"at": frequencies(len(values)), "values": values}
    return {"series": series}


def headline(result: Result) -> dict[str, float]:
    """Return the relative log-amplitude at pi: its mean over depth, and that of the last depth."""
    values = result["series"]["high_frequency"]["values"]
    return {"high_frequency": sum(values) / len(values), "high_frequency_last": values[-1]}


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw the highest frequency over depth and along the spectrum, and the first and last depth by frequency."""
    names = next(iter(arms[0].results.values()))["series"]["high_frequency"]["at"]
    finest = names[len(names) // 2]
    ends = {result["series"]["high_frequency"]["at"][-1] for arm in arms for result in arm.results.values()}
    last = names[-1] if len(ends) == 1 else "last depth"

    def panels(axes: list[Any]) -> dict[str, Any]:
        entries = draw_series(axes[0], arms, "high_frequency", "Δ log-amplitude at π")
        draw_headline(axes[1], arms, headline, "high_frequency_last", f"Δ log-amplitude at π, {last}")
        for panel, name in ((axes[2], finest), (axes[3], names[-1])):
            draw_series(panel, arms, f"spectrum of {name}", f"Δ log-amplitude, {name}", "frequency (π)")
        return entries

    return figure_of(4, panels, f"Feature maps by frequency ({INTERVAL})")


ANALYSIS = Analysis(
    title="Feature maps by frequency",
    source="Park & Kim, How Do Vision Transformers Work?, ICLR 2022 (arXiv 2202.06709), figures 2a and 8",
    measure=measure,
    headline=headline,
    draw=draw,
    images=256,
)
