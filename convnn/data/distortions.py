"""What a corruption does to one image, on the CPU in NumPy and SciPy; ``convnn.data.corruptions`` has the levels.

Shapes: an image is (C, h, w) float32 in 0..1, and so is what is returned (it may leave 0..1).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.random import Generator

from convnn.errors import ConfigError

Image = np.ndarray


def shot_noise(x: Image, photons: float, draws: Generator) -> Image:
    """Count photons, on average ``photons`` of full brightness."""
    return draws.poisson(x * photons) / photons


def impulse_noise(x: Image, share: float, draws: Generator) -> Image:
    """Set a share of the values to 0 or 1, each as likely."""
    drawn = draws.random(x.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn > 1 - share / 2, 1, x))


def defocus_blur(x: Image, level: tuple[float, float], draws: Generator) -> Image:
    """Average over a disk of a radius in pixels, whose rim a Gaussian of a deviation in pixels softens."""
    return _filtered(x, *_soft_disk(*level), "reflect")


@lru_cache(maxsize=16)
def _soft_disk(radius: float, rim: float) -> tuple[np.ndarray, np.ndarray]:
    from scipy.ndimage import gaussian_filter

    soft = 1 if radius <= 8 else 2  # pixels that the Gaussian reaches
    reach = math.floor(radius) + soft
    place = np.arange(-reach, reach + 1)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).astype(np.float64)
    disk = gaussian_filter(disk / disk.sum(), rim, radius=soft, mode="constant")
    used = np.argwhere(disk > 1e-9)
    return used - reach, disk[tuple(used.T)]


def motion_blur(x: Image, level: tuple[float, float], draws: Generator) -> Image:
    """Smear along a line within 45 degrees of the rows: half a Gaussian of a deviation, cut after 2 radius pixels."""
    radius, sigma = level
    step = np.arange(2 * radius + 1)
    weight = np.exp(-(step**2) / (2 * sigma**2))
    angle = math.radians(draws.uniform(-45, 45))
    line = np.rint(np.outer(step, (math.sin(angle), math.cos(angle)))).astype(int)
    return _filtered(x, line, weight / weight.sum(), "edge")


def fog(x: Image, level: tuple[float, float], draws: Generator) -> Image:
    """Add a plasma fractal of a strength, whose details fade by a factor, and scale back to the image's brightest."""
    strength, decay = level
    top = float(x.max())
    height, width = x.shape[1:]
    return (x + strength * plasma(max(height, width), decay, draws)[:height, :width]) * top / (top + strength)


def plasma(side: int, decay: float, draws: Generator) -> np.ndarray:
    """Return a random landscape of the diamond-square algorithm, from 0 to 1: (s, s), s the power of two >= ``side``.

    Args:
        side: in pixels.
        decay: by which the deviation of the heights, squared, falls from a scale to the next one.
        draws: source of the heights.
    """
    step = size = 1 << max(side - 1, 1).bit_length()
    heights = np.zeros((size, size))
    rough = 100.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        square = corners + np.roll(corners, -1, 0)
        square = square + np.roll(square, -1, 1)
        heights[half::step, half::step] = middle = square / 4 + rough**2 * draws.uniform(-1, 1, corners.shape)
        for axis in (0, 1):  # middles of the edges that run along the columns, then of those along the rows
            ends = corners + np.roll(corners, -1, 1 - axis) + middle + np.roll(middle, 1, axis)
            edge = ends / 4 + rough**2 * draws.uniform(-1, 1, corners.shape)
            heights[(slice(0, None, step), slice(half, None, step))[:: 1 if axis == 0 else -1]] = edge
        step, rough = half, rough / decay
    heights -= heights.min()
    return heights / heights.max()


def brightness(x: Image, added: float, draws: Generator) -> Image:
    """Add to the value of HSV, the largest of an image's channels, and keep hue and saturation; black turns grey."""
    value = x.max(0, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def pixelate(x: Image, share: float, draws: Generator) -> Image:
    """Shrink the sides to a share of theirs and back, with Pillow's boxes."""
    from PIL import Image as Pillow

    height, width = x.shape[1:]
    found = []
    for channel in np.rint(x * 255).astype(np.uint8):
        small = Pillow.fromarray(channel).resize((max(int(width * share), 1), max(int(height * share), 1)), _box())
        found.append(np.asarray(small.resize((width, height), _box())))
    return np.stack(found) / 255


def elastic_transform(x: Image, share: float, draws: Generator) -> Image:
    """Move every pixel by a smooth random field (Simard, Steinkraus and Platt, 2003), mirrored at the border.

    Args:
        x: the image.
        share: root mean square of the displacement along an axis, as a share of the longer side.
        draws: source of the field, which a Gaussian of 0.06 of the side smooths.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    side = max(x.shape[1:])
    grid = np.indices(x.shape[1:]).astype(np.float64)
    for axis in (0, 1):
        field = gaussian_filter(draws.uniform(-1, 1, x.shape[1:]), 0.06 * side, mode="mirror")
        field -= field.mean()  # else the whole image moves, which a network hardly sees
        grid[axis] += share * side * field / max(float(np.sqrt((field**2).mean())), 1e-12)
    return np.stack([map_coordinates(channel, grid, order=1, mode="mirror") for channel in x])


def jpeg_compression(x: Image, quality: float, draws: Generator) -> Image:
    """Write Pillow's JPEG file of a quality and read it.

    Raises:
        ConfigError: for other than 1 or 3 channels.
    """
    from PIL import Image as Pillow

    if len(x) not in (1, 3):
        raise ConfigError(f"corruption=jpeg_compression needs images of 1 or 3 channels, not {len(x)}")
    file = io.BytesIO()
    array = np.rint(x * 255).astype(np.uint8).transpose(1, 2, 0)
    Pillow.fromarray(array[..., 0] if len(x) == 1 else array).save(file, "JPEG", quality=int(quality))
    with Pillow.open(file) as read:
        return np.array(read).reshape(array.shape).transpose(2, 0, 1) / 255


CHANGES: dict[str, Callable[[Image, Any, Generator], Image]] = {
    change.__name__: change
    for change in (
        *(shot_noise, impulse_noise, defocus_blur, motion_blur, fog, brightness),
        *(pixelate, elastic_transform, jpeg_compression),
    )
}
"""By the corruption's name: what is done to an image at a level, with a source of draws."""


def _filtered(x: Image, offsets: np.ndarray, weights: np.ndarray, border: Literal["edge", "reflect"]) -> Image:
    """Return each pixel's weighted sum of those at (n, 2) offsets of rows and columns."""
    reach = int(np.abs(offsets).max())
    height, width = x.shape[1:]
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)), border)
    return sum(
        weight * padded[:, reach + row : reach + row + height, reach + column : reach + column + width]
        for (row, column), weight in zip(offsets.tolist(), weights.tolist(), strict=True)
    )


def _box() -> Any:
    from PIL import Image as Pillow

    return Pillow.Resampling.BOX
