"""The pictures of one run: what its layers choose on an image, and its curves over epochs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from convnn.config.schema import Config, DataConfig
from convnn.data.batches import Batches
from convnn.data.images import open_image
from convnn.data.splits import AnySplit
from convnn.data.stream import make_batches
from convnn.errors import ConfigError, first_line
from convnn.figures.neighbors import Pixel, default_pixels, draw_blends, draw_neighbors, draw_weights
from convnn.figures.style import save_figure
from convnn.models.inspect import choosing_layers, neighbors_of
from convnn.ops.neighborhood import Neighborhood
from convnn.runs.contents import PICTURES_LIST, pictures_of_run
from convnn.runtime.owned import Owner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("convnn")
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SIDE_MULTIPLE = 32
"""Sides of images that are not square become multiples of this, or of what it shares with the model's own side."""


@dataclass
class ShownImage:
    """An image as the model takes it, (1, C, h, w), and as it is seen, (C, h, w) from 0 to 1."""

    x: Tensor
    picture: Tensor


def image_of_test_set(split: AnySplit, index: int, config: DataConfig, image_size: int) -> ShownImage:
    """Return an image of the test set.

    Raises:
        ConfigError: if there is no such image.
    """
    if not -len(split) <= index < len(split):
        raise ConfigError(f"index={index}: the test set has images 0 to {len(split) - 1}")
    part = split.take(torch.tensor([index % len(split)]))
    x = next(make_batches(part, 1, replace(config, workers=0), image_size).epoch())[0]
    mean, std = _mean_and_std(config)
    return ShownImage(x, (x[0].cpu() * std + mean).clamp(0, 1))


def read_image(path: Path, channels: int, config: DataConfig, image_size: int, square: bool) -> ShownImage:
    """Return an image file, scaled so that its shorter side is the model's; ``square``: cut at the centre.

    Raises:
        ConfigError: if it cannot be read.
    """
    from PIL import Image, ImageOps

    image = open_image(os.fsencode(path), "image=").convert("L" if channels == 1 else "RGB")
    step, scale = math.gcd(image_size, _SIDE_MULTIPLE), image_size / min(image.size)
    w, h = (image_size if square else max(round(side * scale / step), 1) * step for side in image.size)
    image = ImageOps.fit(image, (w, h), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, h, w, -1).permute(0, 3, 1, 2)
    picture, (mean, std) = pixels[0] / 255, _mean_and_std(config)
    return ShownImage(((picture - mean) / std)[None], picture)


def _mean_and_std(config: DataConfig) -> list[Tensor]:
    return [torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std)]


def read_image_for_model(model: nn.Module, path: Path, config: Config, channels: int, image_size: int) -> ShownImage:
    """Return an image file in its own proportions if the model takes them, else cut to a square."""
    shown = read_image(path, channels, config.data, image_size, square=False)
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            model.eval()(shown.x)
    except (AssertionError, ValueError, RuntimeError):  # whatever a backbone makes of another size than its own
        return read_image(path, channels, config.data, image_size, square=True)
    return shown


def draw_run(
    model: nn.Module, shown: ShownImage, pixels: Sequence[Pixel] = (), layers: Sequence[str] = (), head: int = 0
) -> dict[str, Figure]:
    """Draw what a model's layers choose on an image.

    Args:
        model: in any mode.
        shown: the image.
        pixels: queries, (row, column) in the image as the model takes it; default: three.
        layers: names of the layers to draw; default: all, of many evenly spread ones.
        head: of layers that have several.

    Returns:
        Figures by name: ``neighbors``, ``blends`` for layers that have a blend, ``weights`` for layers with weights.

    Raises:
        ConfigError: if no layer of the model chooses neighbours, or none whose tokens have a place on the image.
    """
    if not choosing_layers(model):
        raise ConfigError("this run has no layer that chooses neighbours (swap.txt says what was replaced)")
    pixels = list(pixels) or default_pixels(shown.picture)
    found = _only_layers(_on_the_image(neighbors_of(model, shown.x)), layers)
    figures: dict[str, Any] = {"neighbors": draw_neighbors(shown.picture, found, pixels, head=head)}
    by_blend = {blend: neighbors_of(model, shown.x, blend=blend) for blend in BLENDS}
    if by_blend[0.0].keys() & found.keys():
        chosen = {blend: {n: one for n, one in at.items() if n in found} for blend, at in by_blend.items()}
        figures["blends"] = draw_blends(shown.picture, chosen, pixels[0], head=head)
    figures["weights"] = draw_weights(shown.picture, found, pixels)
    return {name: figure for name, figure in figures.items() if figure is not None}


def _on_the_image(found: dict[str, Neighborhood]) -> dict[str, Neighborhood]:
    """Leave out layers whose tokens have no known place on the image: those inside windows, and sequences.

    Raises:
        ConfigError: if none is left.
    """
    placed = {name: one for name, one in found.items() if len(one.index) == 1 and not _on_a_line(one)}
    if not placed:
        what = f"{next(iter(found))} and all other layers"
        raise ConfigError(f"no picture of neighbours: {what} choose inside windows or on a line, not on the image")
    return placed


def _on_a_line(found: Neighborhood) -> bool:
    return found.geometry.height == 1 and found.geometry.width > 1


def _only_layers(found: dict[str, Neighborhood], layers: Sequence[str]) -> dict[str, Neighborhood]:
    unknown = [name for name in layers if name not in found]
    if unknown:
        raise ConfigError(f"layers={unknown[0]}: this run has {', '.join(found)}")
    return {name: found[name] for name in layers} if layers else found


def draw_at_end(model: nn.Module, test: Batches, folder: Path) -> list[Path]:
    """Draw a finished run's pictures into its folder; return the PNG files. What goes wrong is a warning, no error."""
    try:
        from convnn.figures.curves import draw_curves

        figures = draw_curves(folder)
        if choosing_layers(model):
            try:
                figures = draw_run(model, image_of_test_set(test.split, 0, test.config, test.image_size)) | figures
            except ConfigError as error:
                log.info("%s", error)
        return save_figures(figures, folder)
    except Exception as error:  # a package is missing, the disk is full: the run itself is complete
        log.warning("no pictures (%s); try scripts/visualize.py run=%s", first_line(error), folder)
        return []


def save_figures(figures: dict[str, Figure], folder: Path, out: Path | None = None) -> list[Path]:
    """Write figures as ``NAME.png`` and ``NAME.svg``; return the PNG files.

    Args:
        figures: by name.
        folder: of the run, whose ``pictures`` they go to.
        out: another place.

    Raises:
        ConfigError: if the folder cannot be written, or holds other files of these names.
    """
    owner = Owner("picture", PICTURES_LIST, older=Owner.older if out else pictures_of_run)
    out = out or folder / "pictures"
    try:
        with owner.written_aside(out) as aside:
            for name, figure in figures.items():
                save_figure(figure, aside / name, dpi=100)
    except OSError as error:
        raise ConfigError(f"out={out}: {first_line(error)}") from error
    return [out / f"{name}.png" for name in figures]
