"""Data sets: uint8 images in memory, or image files that are read as batches need them (see ``data.stream``).

A data set is a function ``(DataConfig) -> Dataset`` named by ``data.target``. Shapes: N images, C channels.
"""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from convnn.config.schema import DataConfig
from convnn.data.folders import FileSplit, list_images, open_image, open_square
from convnn.data.splits import Dataset, Split, balanced
from convnn.errors import ConfigError, first_line

MAX_BYTES = 8 << 30
"""Largest split of an image folder that is kept in memory."""


def load_digits(config: DataConfig) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, 8x8 grey: every fifth image of each class is for testing."""
    from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        is_test[(labels == c).nonzero().squeeze(1)[::5]] = True
    return Dataset(
        Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test]), list("0123456789")
    )


def load_synthetic(config: DataConfig) -> Dataset:
    """Draw noise images with a class-dependent colour, for benchmarks and tests; ``load_size`` pixels, default 32."""
    generator = torch.Generator().manual_seed(0)
    side = config.load_size or 32
    channels = len(config.mean) if len(config.mean) > 1 else 3
    hues = torch.randint(60, 196, (config.num_classes, channels, 1, 1), generator=generator)

    def draw(n: int) -> Split:
        labels = torch.arange(n) % config.num_classes
        noise = torch.randint(-60, 60, (n, channels, side, side), generator=generator)
        return Split((hues[labels] + noise).to(torch.uint8), labels)

    return Dataset(draw(config.size), draw(max(config.size // 4, 1)), [str(i) for i in range(config.num_classes)])


def load_cifar(config: DataConfig) -> Dataset:
    """Load CIFAR-10 or CIFAR-100 (``config.name``) through torchvision, which downloads and verifies its files.

    Raises:
        ConfigError: if the files are missing or damaged and cannot be fetched.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[config.name]
    root = Path(config.root)
    existed = root.exists()
    splits = []
    try:
        for train in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = kind(root, train=train, download=config.download)
            images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
            splits.append(Split(images, torch.tensor(data.targets)))
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        archive = root / kind.filename
        if archive.exists() and archive.stat().st_size == 0:
            archive.unlink()
        if not existed and root.exists() and not any(root.iterdir()):
            root.rmdir()
        raise ConfigError(
            f"data={config.name}: no valid files in {(root / kind.base_folder).absolute()} and no download "
            f"({first_line(error)}); put {kind.filename} (md5 {kind.tgz_md5}) into {root.absolute()}, or set data.root"
        ) from error
    return Dataset(splits[0], splits[1], list(data.classes))


def load_imagefolder(config: DataConfig) -> Dataset:
    """Load ``root/train/CLASS/*`` and ``root/test/CLASS/*`` (or ``val``), any format Pillow reads, as RGB.

    Images are squares of ``data.load_size`` pixels (default: the first image's shorter side); others are scaled and
    cropped at the centre. They are kept in memory, or stay files that are streamed: see ``data.stream``.

    Raises:
        ConfigError: for a missing or empty folder, differing classes, unreadable images, or too much data.
    """
    root = Path(config.root)
    listed = [list_images(root, "train"), list_images(root, "test", "val")]
    classes = listed[0][2]
    if listed[1][2] != classes:
        only = sorted(set(listed[1][2]) ^ set(classes))
        raise ConfigError(f"data.root={root}: train and test have different classes, such as '{only[0]}'")
    rng = np.random.default_rng(config.split_seed)
    side = config.load_size
    splits = []
    for (paths, labels, _), limit in zip(listed, (config.limit, config.limit_test), strict=True):
        keep = balanced(labels, limit, rng)
        side = side or min(open_image(paths[keep[0]]).size)
        splits.append(FileSplit(paths[keep], torch.from_numpy(labels[keep]), side))
    train, test = splits
    need = max(len(split) * math.prod(split.shape) for split in splits)
    stream = config.stream == "true" or (config.stream == "auto" and (need > MAX_BYTES or config.file_transforms()))
    if stream:
        return Dataset(train, test, classes)
    if need > MAX_BYTES:
        raise ConfigError(
            f"data.root={root}: {need / 2**30:.1f} GiB of {train.side}x{train.side} images exceed the "
            f"{MAX_BYTES / 2**30:.0f} GiB for memory; set data.stream=auto, lower data.load_size or set data.limit"
        )
    return Dataset(_in_memory(train), _in_memory(test), classes)


def _in_memory(split: FileSplit) -> Split:
    array = np.empty((len(split), split.side, split.side, 3), np.uint8)
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(pool.map(lambda path: np.asarray(open_square(path, split.side)), split.paths)):
            array[i] = image
    return Split(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), split.labels)


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set that ``data.target`` names, keep ``data.limit`` images, and hold out the validation images.

    Raises:
        ConfigError: if it cannot be had, or a split would be empty.
    """
    from convnn.config.targets import resolve_target

    dataset: Dataset = resolve_target(config.target, "data.target")(config)
    if config.file_transforms() and not isinstance(dataset.train, FileSplit):
        raise ConfigError(f"data.{config.file_transforms()[0]} needs files that are streamed, not data={config.name}")
    rng = np.random.default_rng(config.split_seed)
    train, test = (
        split.take(torch.from_numpy(balanced(split.labels.numpy(), limit, rng)))
        for split, limit in ((dataset.train, config.limit), (dataset.test, config.limit_test))
    )
    dataset = replace(dataset, train=train, test=test)
    if config.val_fraction:
        count = round(config.val_fraction * len(dataset.train))
        if not 0 < count < len(dataset.train):
            raise ConfigError(
                f"data.val_fraction={config.val_fraction} of {len(dataset.train)} images leaves a split empty"
            )
        held = torch.from_numpy(balanced(dataset.train.labels.numpy(), count, rng))
        rest = torch.ones(len(dataset.train), dtype=torch.bool)
        rest[held] = False
        dataset = replace(dataset, train=dataset.train.take(rest.nonzero().squeeze(1)), val=dataset.train.take(held))
    return dataset
