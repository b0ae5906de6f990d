"""Corrupted copies of images, as ImageNet-C and CIFAR-C define them (Hendrycks and Dietterich, arXiv 1903.12261).

Shapes: B images, C channels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from convnn.data.distortions import CHANGES
from convnn.ops.settings import check_choice, check_range

SMALL = 64
"""Sides up to this many pixels take the levels of CIFAR-C, others those of ImageNet-C."""

Level = float | tuple[float, float]

LEVELS: dict[str, tuple[tuple[Level, ...], tuple[Level, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "defocus_blur": (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "motion_blur": (((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "fog": (
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "elastic_transform": ((0.01, 0.02, 0.03, 0.04, 0.05),) * 2,
}
"""By corruption, for severities 1 to 5 of small and of other images; what a level is, ``convnn.data.distortions`` says,
and docs/data.md. All but those of ``elastic_transform`` are the published ones."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("gaussian_blur", "defocus_blur", "motion_blur"),
    "weather": ("fog", "brightness"),
    "digital": ("contrast", "pixelate", "jpeg_compression", "elastic_transform"),
}
"""The corruptions by what they stand for, as the paper groups them."""


def check_corruption(name: str | None, severity: int) -> None:
    """Raise ConfigError unless there is such a corruption; None is none."""
    if name is not None:
        check_choice("corruption", name, LEVELS)
    check_range("severity", severity, 1, 5)


def corrupted(images: Tensor, index: Sequence[int], name: str, severity: int) -> Tensor:
    """Return corrupted images; the same for an image of the same index, whatever the batch and the device.

    What is drawn for an image is the same at every severity.

    Args:
        images: (B, C, h, w) uint8.
        index: number of each image in its data set, which seeds what is drawn for it.
        name: one of ``LEVELS``.
        severity: 1 to 5.

    Raises:
        ConfigError: for an unknown name, or images of which there is no JPEG file.
    """
    check_corruption(name, severity)
    level = LEVELS[name][max(images.shape[-2:]) > SMALL][severity - 1]
    if name in CHANGES:
        return _one_by_one(images, index, name, level)
    assert isinstance(level, (int, float))
    x = images.float() / 255
    if name == "gaussian_blur":
        x = _blurred(x, level)
    elif name == "contrast":
        x = _flattened(x, level)
    else:
        shape = tuple(images.shape[1:])
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in index]
        x = x + level * torch.stack(noise).to(x.device)
    return (255 * x.clamp(0, 1)).round().to(torch.uint8)


def _one_by_one(images: Tensor, index: Sequence[int], name: str, level: Level) -> Tensor:
    seed = zlib.crc32(name.encode())  # so that two corruptions of an image have nothing in common
    found = [
        CHANGES[name](image, level, np.random.default_rng([seed, i]))
        for image, i in zip(images.cpu().numpy().astype(np.float32) / np.float32(255), index, strict=True)
    ]
    values = np.rint(np.stack(found).clip(0, 1) * 255).astype(np.uint8)
    return torch.from_numpy(values).to(images.device)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    reach = min(math.ceil(4 * sigma), min(x.shape[-2:]) - 1)  # beyond the border images are mirrored
    return gaussian_blur(x, [2 * reach + 1] * 2, [sigma] * 2) if reach else x


def _flattened(x: Tensor, share: float) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return (x - means) * share + means
