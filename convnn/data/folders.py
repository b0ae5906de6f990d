"""Image folders: listing their files and classes, and reading one file. Shapes: N images, C channels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, device

from convnn.errors import ConfigError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class FileSplit:
    """Image files (N,) and their class indices (N,) int64; a file is read when a batch needs it."""

    paths: np.ndarray
    """Paths as bytes in one array, whose memory forked workers share; a list of strings would be copied into each as
    its reference counts change."""
    labels: Tensor
    side: int
    """Pixels of the square that an image becomes; timm's transforms make it the size that the network sees instead."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image."""
        return 3, self.side, self.side

    def take(self, index: Tensor) -> FileSplit:
        """Return the files at ``index``."""
        return FileSplit(self.paths[index.numpy()], self.labels[index], self.side)

    def to(self, device: device) -> FileSplit:
        """Return the split with its labels on a device, where its batches will be."""
        return FileSplit(self.paths, self.labels.to(device), self.side)


def list_images(root: Path, *names: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the paths (N,) as bytes, class indices (N,) and class names of ``root/NAME/CLASS/**``.

    Args:
        root: folder of the data set.
        names: of the split's folder; the first one that has class folders counts.

    Raises:
        ConfigError: if there is none, or a class has no images.
    """
    folders = [root / name for name in names]
    folder = next((f for f in folders if _classes(root, f)), next((f for f in folders if f.is_dir()), folders[0]))
    if not folder.is_dir():
        raise ConfigError(
            f"data.root={root}: no folder {' or '.join(str(f.absolute()) for f in folders)}; "
            f"expected {'|'.join(names)}/CLASS/IMAGE below data.root"
        )
    classes = _classes(root, folder)
    if not classes:
        raise ConfigError(f"data.root={root}: {folder} has no class folders; expected {folder.name}/CLASS/IMAGE")
    paths: list[bytes] = []
    labels = []
    for c, name in enumerate(classes):
        own = _images(root, folder / name)
        paths += own
        labels.append(np.full(len(own), c))
    return np.array(paths), np.concatenate(labels), classes


def _classes(root: Path, folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"data.root={root} cannot be read: {error}") from error


def _images(root: Path, folder: Path) -> list[bytes]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    def refuse(error: OSError) -> None:
        raise ConfigError(f"data.root={root} cannot be read: {error}") from error

    found = sorted(
        os.fsencode(os.path.join(place, name))  # noqa: PTH118 a Path for each of a million files is slow
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    if not found:
        raise ConfigError(f"data.root={root}: {folder} has no images ({', '.join(IMG_EXTENSIONS)})")
    return found


def open_image(path: bytes) -> Image:
    """Read a file as an RGB image.

    Raises:
        ConfigError: naming the file, if Pillow cannot read it.
    """
    from PIL import Image

    name = os.fsdecode(path)
    try:
        with Image.open(name) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"data.root: {name} cannot be read as an image ({first_line(error)}); remove or replace it"
        ) from error


def open_square(path: bytes, side: int) -> Image:
    """Read a file as an RGB square of ``side`` pixels: scaled and cropped at the centre where it is none."""
    from PIL import Image, ImageOps

    image = open_image(path)
    return image if image.size == (side, side) else ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
