"""Corrupted copies of images, as ImageNet-C and CIFAR-C define them (Hendrycks and Dietterich, arXiv 1903.12261).

Shapes: B images, C channels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from convnn.errors import ConfigError
from convnn.ops.settings import check_choice, check_range

SMALL = 64
"""Sides up to this many pixels take the levels of CIFAR-C, others those of ImageNet-C."""

LEVELS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
"""By corruption, for severities 1 to 5 of small and of other images: deviation of the noise and of the blur's Gaussian
in pixels, share of the contrast that is kept, and quality of the JPEG file."""


def check_corruption(name: str | None, severity: int) -> None:
    """Raise ConfigError unless there is such a corruption; None is none."""
    if name is not None:
        check_choice("corruption", name, LEVELS)
    check_range("severity", severity, 1, 5)


def corrupted(images: Tensor, index: Sequence[int], name: str, severity: int) -> Tensor:
    """Return corrupted images; the same for an image of the same index, whatever the batch and the device.

    Args:
        images: (B, C, h, w) uint8.
        index: number of each image in its data set, which seeds its noise.
        name: one of ``LEVELS``.
        severity: 1 to 5.

    Raises:
        ConfigError: for an unknown name, or images of which there is no JPEG file.
    """
    check_corruption(name, severity)
    level = LEVELS[name][max(images.shape[-2:]) > SMALL][severity - 1]
    if name == "jpeg_compression":
        return torch.stack([_jpeg(image.cpu(), int(level)) for image in images]).to(images.device)
    change: Callable[[Tensor, float], Tensor] = {"gaussian_blur": _blurred, "contrast": _flattened}.get(name, _as_it_is)
    x = change(images.float() / 255, level)
    if name == "gaussian_noise":
        shape = tuple(images.shape[1:])
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in index]
        x = x + level * torch.stack(noise).to(x.device)
    return (255 * x.clamp(0, 1)).round().to(torch.uint8)


def _as_it_is(x: Tensor, level: float) -> Tensor:
    return x


def _blurred(x: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    reach = min(math.ceil(4 * sigma), min(x.shape[-2:]) - 1)  # beyond the border images are mirrored
    return gaussian_blur(x, [2 * reach + 1] * 2, [sigma] * 2) if reach else x


def _flattened(x: Tensor, share: float) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return (x - means) * share + means


def _jpeg(image: Tensor, quality: int) -> Tensor:
    from PIL import Image

    if len(image) not in (1, 3):
        raise ConfigError(f"corruption=jpeg_compression needs images of 1 or 3 channels, not {len(image)}")
    file = io.BytesIO()
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if len(image) == 1 else array).save(file, "JPEG", quality=quality)
    with Image.open(file) as read:
        return torch.from_numpy(np.array(read).reshape(array.shape)).permute(2, 0, 1)
