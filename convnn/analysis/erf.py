"""Effective receptive field: which input pixels the central unit of a feature map depends on, by depth.

Luo et al., *Understanding the Effective Receptive Field in Deep Convolutional Neural Networks*, NeurIPS 2016 (arXiv
1701.04128), section 2: set the gradient of the central unit to 1, that of all others to 0, and look at the gradient of
the input. Here, with u the unit in the middle of a map, summed over its channels,

    mass(p) = mean over images of (sum over input channels of |du / dx_p|) / (the same summed over all pixels p)

so that every image counts alike and the masses of all pixels sum to 1; images on which the unit has no gradient, since
a ReLU is off, do not count. The field's ``pixels`` are those of mass other than 0, per image: exactly 9 for one 3x3
convolution. What a choice of neighbours depends on has no gradient and is not in it; the weights of the chosen ones
are. Distances are from the centre of mass of the mean field: strides move it from the middle of the image, by amounts
that depend on the padding. Shapes: B batch, C channels, h, w sides of a map, s side of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from convnn.analysis.base import Analysis, ArmResults, NotApplicable, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, drawn_arms, figure_of, short_names
from convnn.analysis.features import depths, feature_maps
from convnn.analysis.subject import Subject
from convnn.figures.style import COLOUR_MAP, evenly_spread, plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAPS = 5
"""Arms whose fields are drawn as pictures."""


def field_masses(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Return the mass of each input pixel at each depth, (B, s, s) float64, of sum 1; all 0 if it reaches no pixel.

    Args:
        model: in evaluation mode.
        names: of the modules whose central unit is taken.
        images: (B, C, s, s) as the model takes them.
    """
    images = images.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        maps = feature_maps(model, names, images)
        fields = {}
        for name in names:
            unit = maps[name][:, :, maps[name].shape[2] // 2, maps[name].shape[3] // 2].sum()
            (gradient,) = torch.autograd.grad(unit, images, retain_graph=True)
            mass = gradient.double().abs().sum(1)
            fields[name] = mass / mass.sum((1, 2), keepdim=True).clamp(min=1e-300)
    return fields


def half_mass(mass: Tensor) -> Tensor:
    """Return how many pixels, those of most mass first, hold half of it: (B, s, s) -> (B,) float64."""
    summed = mass.flatten(1).sort(dim=1, descending=True).values.cumsum(1)
    return (summed < 0.5 * summed[:, -1:]).sum(1).double() + 1


def radii(shape: tuple[int, int], unit: tuple[float, float]) -> Tensor:
    """Return the distance of each pixel from a place on the image, in pixels."""
    rows, columns = (torch.arange(side, dtype=torch.float64) - at for side, at in zip(shape, unit, strict=True))
    return (rows.square()[:, None] + columns.square()[None]).sqrt()


def centre(mass: Tensor) -> tuple[float, float]:
    """Return row and column of a field's centre of mass, in pixels; NaN where it has none."""
    rows, columns = (mass.double().sum(axis) for axis in (1, 0))
    row, column = (float((line * torch.arange(len(line))).sum() / line.sum()) for line in (rows, columns))
    return row, column


def measure(subject: Subject) -> Result:
    """Measure the fields of all depths of a run's model."""
    model, names = subject.model, depths(subject.model)
    sums: dict[str, Tensor] = {}
    numbers = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    for images, _ in subject.batches(32):
        for name, mass in field_masses(model, names, images).items():
            mass = mass.cpu()
            sums[name] = sums.get(name, 0) + mass.sum(0)
            alive = mass[mass.sum((1, 2)) > 0]
            counted = [(alive > 0).sum().double(), half_mass(alive).sum(), torch.tensor(len(alive))]
            numbers[name] += torch.stack([one.double() for one in counted])
    last = names[-1]
    if not numbers[last][2]:
        raise NotApplicable(f"the central unit of {last} has no gradient on any of the images")
    found = {name: (sums[name] / numbers[name][2].clamp(min=1)).float() for name in names}
    distance = {name: radii((mass.shape[0], mass.shape[1]), centre(mass)) for name, mass in found.items()}
    series: dict[str, Any] = {}
    for i, key in enumerate(("pixels", "half_mass")):
        values = [float(n[i] / n[2]) if n[2] else None for n in numbers.values()]
        series[key] = {"at": names, "values": values}
    spread = [float((found[name] * distance[name]).sum()) if numbers[name][2] else None for name in names]
    series["radius"] = {"at": names, "values": spread}
    steps = list(range(1, math.ceil(float(distance[last].max())) + 1))
    shares = [float(found[last][distance[last] <= step].sum()) for step in steps]
    series["within"] = {"at": steps, "values": shares}
    return {"series": series, "arrays": {"fields": np.stack([one.numpy() for one in found.values()])}}


def headline(result: Result) -> dict[str, float]:
    """Return, of the last depth, the pixels that hold half of the mass, and the mean distance of the mass."""
    return {f"erf_{key}": result["series"][key]["values"][-1] for key in ("half_mass", "radius")}


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw fields of the last depth, how they grow over depth, the mass by radius, and the area along the spectrum."""
    shown, short = evenly_spread(drawn_arms(arms), _MAPS), short_names(arms)

    def panels(axes: list[Any]) -> dict[str, Any]:
        entries = draw_series(axes[0], arms, "half_mass", "pixels that hold half the mass")
        draw_headline(axes[1], arms, headline, "erf_half_mass", "half the mass, last depth (pixels)")
        draw_series(axes[2], arms, "radius", "mean distance (pixels)")
        draw_series(axes[3], arms, "within", "share of mass, last depth", "within so many pixels")
        for panel in axes[:4]:
            panel.set_ylim(bottom=0)
        for panel, arm in zip(axes[4:], shown, strict=True):
            _draw_field(panel, arm, short[arm.name])
        return entries

    return figure_of(4, panels, f"Effective receptive field, maps of the last depth ({INTERVAL})", tiles=len(shown))


def _draw_field(axes: Any, arm: ArmResults, title: str) -> None:
    from matplotlib.colors import PowerNorm

    fields = [result["arrays"]["fields"][-1] for result in arm.results.values()]
    mean = np.mean([one for one in fields if one.shape == fields[0].shape], axis=0)
    axes.imshow(mean, cmap=COLOUR_MAP, norm=PowerNorm(0.5, vmin=0))  # the square root shows the rim too
    axes.set_title(plain_text(title, 20), fontsize=12)
    axes.set_xticks([])
    axes.set_yticks([])


ANALYSIS = Analysis(
    title="Effective receptive field",
    source="Luo et al., Understanding the Effective Receptive Field, NeurIPS 2016 (arXiv 1701.04128), section 2",
    measure=measure,
    headline=headline,
    draw=draw,
    images=64,
    version=2,
)
