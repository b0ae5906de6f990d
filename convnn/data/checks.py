"""What a data set must be, checked once, whichever function it comes from."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnn.config.schema import DataConfig
from convnn.data.classes import check_spelling, listed
from convnn.data.splits import AnySplit, Dataset, FileSplit, Split
from convnn.errors import ConfigError, first_line

log = logging.getLogger("convnn")


def checked(dataset: Any, config: DataConfig) -> Dataset:
    """Return what ``data.target`` returned, with arrays as tensors, labels as int64 and class names as text.

    Raises:
        ConfigError: if it is no ``Dataset``, or its images, labels and classes do not fit together.
    """
    target = f"data.target={config.target}"
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"{target} returned {_kind(dataset)}; it must return a convnn.data.Dataset")
    if isinstance(dataset.classes, str) or not isinstance(dataset.classes, list | tuple | np.ndarray):
        raise ConfigError(f"{target}: classes is {_kind(dataset.classes)}; give a list with the name of each class")
    classes = [str(name) for name in dataset.classes]
    check_spelling(classes, target)
    if len(classes) < 2:
        raise ConfigError(f"{target} has {len(classes)} classes ({listed(classes)}); classification needs two or more")
    for name in ("train", "test"):
        if getattr(dataset, name) is None:
            raise ConfigError(f"{target}: {name} is None; give a convnn.data.Split(images, labels)")
    splits: dict[str, Any] = {
        name: _checked_split(split, len(classes), f"{target}: {name}") for name, split in dataset.splits().items()
    }
    shapes = {name: split.shape for name, split in splits.items()}
    first = shapes["train"]
    for name, shape in shapes.items():
        if shape[0] != first[0] or (shape != first and config.image_size is None):
            raise ConfigError(
                f"{target}: images of train are {first} and of {name} {shape} (channels, rows, columns); "
                "give all one shape" + ("" if shape[0] != first[0] else ", or set data.image_size")
            )
    return replace(dataset, classes=classes, **splits)


def _checked_split(split: Any, classes: int, what: str) -> AnySplit:
    if not isinstance(split, Split | FileSplit):
        raise ConfigError(f"{what} is {_kind(split)}; give a convnn.data.Split(images, labels)")
    if isinstance(split, FileSplit):
        if not isinstance(split.side, int) or split.side < 1:
            raise ConfigError(f"{what}: side is {split.side!r}; give the images' side in pixels")
        count = len(split.paths)
        paths = np.array([os.fsencode(path) for path in split.paths])
        fixed: AnySplit = replace(split, paths=paths, labels=_labels(split.labels, what))
    else:
        images = _images(split.images, what)
        count = len(images)
        fixed = replace(split, images=images, labels=_labels(split.labels, what))
    if count != len(fixed.labels):
        raise ConfigError(f"{what} has {count} images and {len(fixed.labels)} labels; give each image one label")
    if not count:
        raise ConfigError(f"{what} has no images")
    low, high = int(fixed.labels.min()), int(fixed.labels.max())
    if low < 0 or high >= classes:
        raise ConfigError(f"{what} has labels from {low} to {high}; for {classes} classes give 0 to {classes - 1}")
    return fixed


def _images(images: Any, what: str) -> Tensor:
    images = _tensor(images, f"{what} images")
    if images.dtype != torch.uint8:
        unit = images.is_floating_point() or images.dtype == torch.bool
        way = "(255 * images).round().to(torch.uint8) for values in [0, 1]" if unit else "images.to(torch.uint8)"
        raise ConfigError(f"{what} images are {_type(images)}; give uint8 from 0 to 255, such as {way}")
    shape = tuple(images.shape)
    if len(shape) != 4:
        raise ConfigError(f"{what} images have the shape {shape}; give (images, channels, rows, columns)")
    if shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4):
        raise ConfigError(f"{what} images have the shape {shape}, channels last; give images.permute(0, 3, 1, 2)")
    if 0 in shape[1:]:
        raise ConfigError(f"{what} images have the shape {shape}: no pixels")
    return images


def _labels(labels: Any, what: str) -> Tensor:
    labels = _tensor(labels, f"{what} labels").cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ConfigError(f"{what} labels are {_type(labels)}; give integers, the index of each image's class")
    if labels.dim() != 1:
        raise ConfigError(f"{what} labels have the shape {tuple(labels.shape)}; give one integer for each image")
    return labels.long()


def _tensor(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(np.require(native, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} ({_kind(values)}) cannot be made a tensor: {first_line(error)}") from error


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def warn_of_missing(dataset: Dataset, config: DataConfig) -> None:
    """Say so if a split has no images of some class, as a low ``data.limit`` leaves it."""
    for name, split in dataset.splits().items():
        present = set(split.labels.unique().tolist())
        missing = [c for i, c in enumerate(dataset.classes) if i not in present]
        if missing:
            log.warning(
                "data=%s: %s has no images of %d of the %d classes (%s)",
                *(config.name, name, len(missing), len(dataset.classes), listed(missing)),
            )
