"""Image files for a model that is trained already: a folder of classes, a folder of images, one image."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from convnn.data.classes import listed
from convnn.data.folders import VALIDATION, is_hidden, list_images
from convnn.data.images import image_suffixes, in_threads, open_square
from convnn.data.splits import AnySplit, FileSplit, Split
from convnn.errors import ConfigError

log = logging.getLogger("convnn")
_SPLITS = {"train", "test", *VALIDATION}


def image_files(place: Path) -> np.ndarray:
    """Return an image file, or all of a folder at any depth in the order of their names, as paths in bytes.

    Raises:
        ConfigError: if there is none.
    """
    if place.is_file():
        return np.array([os.fsencode(place)])
    if not place.is_dir():
        raise ConfigError(f"image={place}: there is no such file or folder")
    found = []
    for where, folders, files in os.walk(place):
        folders[:] = [name for name in folders if not is_hidden(name)]
        names = (name for name in files if not is_hidden(name))
        found += [Path(where) / name for name in names if Path(name).suffix.lower() in image_suffixes()]
    if not found:
        raise ConfigError(f"image={place} holds no image files")
    return np.array([os.fsencode(path) for path in sorted(found)])


def class_folder(folder: Path, classes: Sequence[str], shape: Sequence[int], side: int) -> AnySplit:
    """Return the images in ``folder/CLASS/**`` with labels that index ``classes``: by name.

    Args:
        folder: with a folder for each class, or for some of them, which is said.
        classes: that the model knows.
        shape: channels, rows and columns of the images that it was trained on.
        side: in pixels of the squares that the images become, see ``files_split``.

    Raises:
        ConfigError: if there are other classes.
    """
    if not folder.is_dir():
        raise ConfigError(f"data={folder}: there is no such folder")
    try:
        found = list_images(folder, folder)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"data.root={folder}", f"data={folder}", 1)) from error
    unknown = sorted(set(found.classes) - set(classes))
    if unknown:
        way = f"the run has {listed(classes)}"
        if split := next((name for name in ("test", *VALIDATION, "train") if name in unknown), None):
            way = f"give the folder of one split: data={folder / split}"
        raise ConfigError(f"data={folder} has classes that the run lacks: {listed(unknown)}; {way}")
    missing = [name for name in classes if name not in found.classes]
    if missing:
        log.warning(
            "data=%s has no images of %d of the %d classes (%s)", folder, len(missing), len(classes), listed(missing)
        )
    order = np.array([list(classes).index(name) for name in found.classes])
    return files_split(found.paths, order[found.labels], shape, side)


def files_split(paths: np.ndarray, labels: np.ndarray, shape: Sequence[int], side: int) -> AnySplit:
    """Return image files as a model takes them.

    Args:
        paths: (N,) bytes.
        labels: (N,) class indices.
        shape: channels, rows and columns of the images that the model was trained on.
        side: in pixels of the squares that files become where those are none.

    Raises:
        ConfigError: for a number of channels that image files do not have.
    """
    channels, height, width = shape
    side = width if height == width else side
    known = torch.from_numpy(np.asarray(labels, np.int64))
    if channels == 3:
        return FileSplit(paths, known, side)
    if channels != 1:
        raise ConfigError(f"the run's images have {channels} channels; image files have 1 or 3")
    grey = in_threads(lambda path: np.asarray(open_square(path, side).convert("L")), paths)
    return Split(torch.from_numpy(np.stack(grey))[:, None], known, paths)
