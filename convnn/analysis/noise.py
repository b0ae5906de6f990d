"""Robustness to noise of one band of frequencies.

Park & Kim, *How Do Vision Transformers Work?*, ICLR 2022 (arXiv 2202.06709), figure 2b: random noise d is cut to a band
M of frequencies, x' = x + F^-1(F(d) * M), and accuracy is measured on x'. Yin et al., *A Fourier Perspective on Model
Robustness in Computer Vision*, NeurIPS 2019 (arXiv 1906.08988), section 4, hold the norm of the noise fixed for all
frequencies. So here: Gaussian noise in rings of equal width of the radial frequency up to pi, the same root mean square
``RMS`` of the pixels' range 0 to 1 in every image and band. Nothing is clipped, which would spill into other bands. The
noise of an image is the same for all networks. Shapes: B batch, C channels, s side of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convnn.analysis.base import Analysis, ArmResults, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, figure_of
from convnn.analysis.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BANDS = 8
"""Rings from 0 to pi."""
RMS = 0.2
"""Of the noise, where pixels go from 0 to 1: an l2 norm of 11 for 32 x 32 pixels of three channels."""


def band_masks(height: int, width: int, bands: int = BANDS) -> Tensor:
    """Return which frequencies of ``torch.fft.fft2`` belong to each band, (bands, height, width) bool.

    Band b holds radial frequencies above b pi / bands up to (b + 1) pi / bands; the constant belongs to the first, and
    the corners beyond pi to none.
    """
    rows, columns = (2 * torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    radius = (rows.square()[:, None] + columns.square()[None]).sqrt()
    place = (radius * bands - 1e-9).ceil().sub(1).clamp(min=0)
    return torch.stack([place == band for band in range(bands)])


def band_noise(spectrum: Tensor, mask: Tensor) -> Tensor:
    """Return noise cut to a band, of root mean square 1 in every image: (B, C, h, w).

    Args:
        spectrum: of the noise, as ``torch.fft.fft2`` returns it, (B, C, h, w).
        mask: of the band, (h, w).
    """
    cut = torch.fft.ifft2(spectrum * mask).real
    return cut / cut.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-30)


@torch.no_grad()
def measure(subject: Subject) -> Result:
    """Measure the accuracy of a run's model with noise of each band, and without."""
    generator = subject.generator()
    std = torch.tensor(subject.config.data.std, device=subject.device).view(1, -1, 1, 1)
    right = torch.zeros(BANDS + 1)
    masks = None
    for images, labels in subject.batches(128):
        masks = band_masks(*images.shape[-2:]) if masks is None else masks
        spectrum = torch.fft.fft2(torch.randn(images.shape, generator=generator))
        right[0] += (subject.model(images).argmax(1) == labels).sum().cpu()
        for band, mask in enumerate(masks, 1):
            added = RMS * band_noise(spectrum, mask).to(subject.device) / std
            right[band] += (subject.model(images + added).argmax(1) == labels).sum().cpu()
    clean, *noisy = (100 * right / len(subject.split)).tolist()
    at = [(band + 0.5) / BANDS for band in range(BANDS)]
    return {
        "clean": clean,
        "series": {
            "accuracy": {"at": at, "values": noisy},
            "drop": {"at": at, "values": [clean - value for value in noisy]},
        },
    }


def headline(result: Result) -> dict[str, float]:
    """Return the accuracy lost, in points, to noise below pi / 2 and above, on average over the bands."""
    drop = result["series"]["drop"]["values"]
    half = math.ceil(len(drop) / 2)
    return {
        "drop_low_frequency": sum(drop[:half]) / half,
        "drop_high_frequency": sum(drop[half:]) / (len(drop) - half),
    }


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw accuracy and what it loses by band, and the loss below and above pi / 2 along the spectrum."""

    def panels(axes: list[Any]) -> dict[str, Any]:
        entries = draw_series(axes[0], arms, "accuracy", "top-1 with noise (%)", "frequency of the noise (π)")
        draw_series(axes[1], arms, "drop", "top-1 lost (points)", "frequency of the noise (π)")
        draw_headline(axes[2], arms, headline, "drop_low_frequency", "lost below π/2 (points)")
        draw_headline(axes[3], arms, headline, "drop_high_frequency", "lost above π/2 (points)")
        return entries

    return figure_of(4, panels, f"Noise of one band of frequencies ({INTERVAL})")


ANALYSIS = Analysis(
    title="Noise of one band of frequencies",
    source="Park & Kim, ICLR 2022 (arXiv 2202.06709), figure 2b; Yin et al., NeurIPS 2019 (arXiv 1906.08988)",
    measure=measure,
    headline=headline,
    draw=draw,
    images=500,
)
