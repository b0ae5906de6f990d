"""Data sets: uint8 tensors, or files that are read batch by batch (see stream.py).

A data set is a function ``(DataConfig) -> Dataset`` named by ``data.target``. Shapes: N images, C channels.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from convnn.config.schema import DataConfig
from convnn.data.checks import checked, warn_of_missing
from convnn.data.cifar import load_cifar
from convnn.data.classes import class_order, listed
from convnn.data.folders import counted, list_images, say_what_is_left_out, split_folders
from convnn.data.images import image_size, in_threads, open_image, open_square
from convnn.data.splits import Dataset, FileSplit, Split, balanced, stratified
from convnn.errors import ConfigError

__all__ = ["load_cifar", "load_dataset", "load_digits", "load_imagefolder", "load_synthetic"]
log = logging.getLogger("convnn")
MAX_BYTES = 8 << 30
"""Largest split of an image folder that is kept in memory."""


def load_digits(config: DataConfig) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, 8x8 grey: every fifth image of each class is for testing."""
    found = find_spec("sklearn")  # loading the package takes longer than the rest of a run's start
    file = Path(found.origin if found and found.origin else "").parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        table = np.loadtxt(file, delimiter=",")
        pixels, target = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
    else:
        from sklearn.datasets import load_digits as load

        bunch = load()
        pixels, target = bunch.images, bunch.target
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(target).long()
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


def load_imagefolder(config: DataConfig) -> Dataset:
    """Load ``root/train/CLASS/**`` and ``root/test/CLASS/**``, any format that Pillow reads, as RGB.

    ``root/val`` is the validation set, or the test set where there is none. Images become squares of
    ``data.load_size`` pixels (default: the median of all files' shorter sides), scaled and cropped at the centre. They
    are kept in memory, or stay files that are streamed: see ``data.stream``. One log line says what was found.

    Raises:
        ConfigError: for a missing or empty folder, differing classes, unreadable images, or too much data.
    """
    root = Path(config.root).expanduser()
    folders = split_folders(root, config.val_folder)
    say_what_is_left_out(root, folders)
    _check_one_validation(config, "val" in folders)
    found = {name: list_images(root, folder) for name, folder in folders.items()}
    classes = found["train"].classes
    for name, folder in folders.items():
        try:
            class_order(classes, found[name].classes, ("train", folder.name))
        except ConfigError as error:
            raise ConfigError(f"data.root={root}: {error}") from error
    rng = np.random.default_rng(config.split_seed)
    kept = {name: np.arange(len(listing.paths)) for name, listing in found.items()}
    for name, limit in (("train", config.limit), ("test", config.limit_test)):
        kept[name] = balanced(found[name].labels, limit, rng)
    paths = {name: found[name].paths[keep] for name, keep in kept.items()}
    side, how = _side(config, np.concatenate(list(paths.values())))
    splits = {
        name: FileSplit(paths[name], torch.from_numpy(found[name].labels[keep]), side) for name, keep in kept.items()
    }
    parts = [f"{len(split)} {_role(name, folders)}" for name, split in splits.items()]
    log.info("data.root=%s: %d classes (%s), %s images, %s", root, len(classes), listed(classes), ", ".join(parts), how)
    others = sum((listing.others for listing in found.values()), Counter[str]())
    if others:
        log.info("data.root=%s: files left out: %s", root, counted(others))
    _warn_if_black(root, paths["train"])
    need = max(len(split) * math.prod(split.shape) for split in splits.values())
    if config.stream == "true" or (config.stream == "auto" and (need > MAX_BYTES or config.file_transforms())):
        return Dataset(splits["train"], splits["test"], classes, splits.get("val"))
    if need > MAX_BYTES:
        raise ConfigError(
            f"data.root={root}: {need / 2**30:.1f} GiB of {side}x{side} images exceed the "
            f"{MAX_BYTES / 2**30:.0f} GiB for memory; set data.stream=auto, lower data.load_size or set data.limit"
        )
    memory = {name: _in_memory(split) for name, split in splits.items()}
    return Dataset(memory["train"], memory["test"], classes, memory.get("val"))


def _check_one_validation(config: DataConfig, has_own: bool) -> None:
    if has_own and config.val_fraction:
        raise ConfigError(
            f"data.val_fraction={config.val_fraction} holds out training images, but data={config.name} has a "
            "validation set of its own; set data.val_fraction=0, or for a folder data.val_folder=false"
        )


def _role(name: str, folders: dict[str, Path]) -> str:
    """Return how the log names a split: by its folder, and by its part where the name does not say it."""
    folder = folders[name].name
    if name == "val":
        return f"{folder} (the validation set)"
    return f"{folder} (the test set)" if name != folder else folder


def _side(config: DataConfig, paths: np.ndarray) -> tuple[int, str]:
    """Return the side in pixels of the squares that image files become, and how that came."""
    if config.load_size:
        return config.load_size, f"as squares of {config.load_size} pixels"
    if config.image_size and config.file_transforms():  # which make that size of the whole file
        return config.image_size, f"as squares of {config.image_size} pixels"
    sizes = np.array(in_threads(image_size, paths))
    shorter = np.sort(sizes.min(1))
    side = int(shorter[(len(shorter) - 1) // 2])
    if shorter[0] != shorter[-1]:
        span = f"from {shorter[0]} to {shorter[-1]}"
        return side, f"as squares of {side} pixels, the median of shorter sides {span} (data.load_size sets another)"
    cut = ", cut at the centre" if (sizes != side).any() else ""
    return side, f"as squares of {side} pixels{cut}"


def _warn_if_black(root: Path, paths: np.ndarray) -> None:
    """Say so if images are black, as 8-bit values in 16-bit files are."""
    for path in paths[:: math.ceil(len(paths) / 8)]:
        if np.asarray(open_image(path)).max() > 1:
            return
    log.warning("data.root=%s: images are black; values of few bits in deeper files? save them as 8 bits", root)


def _in_memory(split: FileSplit) -> Split:
    array = np.empty((len(split), split.side, split.side, 3), np.uint8)

    def read(index: int) -> None:
        array[index] = np.asarray(open_square(split.paths[index], split.side))

    in_threads(read, range(len(split)))
    return Split(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), split.labels, split.paths)


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set that ``data.target`` names, keep ``data.limit`` images, and hold out the validation images.

    Raises:
        ConfigError: if it cannot be had or is no proper data set, or a split would lack a class.
    """
    from convnn.config.targets import resolve_target

    dataset = checked(resolve_target(config.target, "data.target")(config), config)
    needs = config.file_transforms() or (["stream=true"] if config.stream == "true" else [])
    if needs and not isinstance(dataset.train, FileSplit):
        raise ConfigError(f"data.{needs[0]} needs files that are streamed, not data={config.name}")
    _check_one_validation(config, dataset.val is not None)
    rng = np.random.default_rng(config.split_seed)
    train, test = (
        split.take(torch.from_numpy(balanced(split.labels.numpy(), limit, rng)))
        for split, limit in ((dataset.train, config.limit), (dataset.test, config.limit_test))
    )
    dataset = replace(dataset, train=train, test=test)
    warn_of_missing(dataset, config)
    if max(map(abs, config.mean), default=0) > 1:
        log.warning("data.mean=%s is of pixels up to 255; means and deviations are of pixels from 0 to 1", config.mean)
    if config.val_fraction:
        held = torch.from_numpy(_held_out(dataset, config, rng))
        rest = torch.ones(len(dataset.train), dtype=torch.bool)
        rest[held] = False
        dataset = replace(dataset, train=dataset.train.take(rest.nonzero().squeeze(1)), val=dataset.train.take(held))
    return dataset


def _held_out(dataset: Dataset, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Return the indices of the training images that are held out for validation: of each class its share."""
    labels, n = dataset.train.labels.numpy(), len(dataset.train)
    count = round(config.val_fraction * n)
    what = f"data.val_fraction={config.val_fraction} of {n} images"
    if not 0 < count < n:
        raise ConfigError(f"{what} leaves a split empty")
    sizes = np.bincount(labels, minlength=len(dataset.classes))
    single = [dataset.classes[c] for c in np.flatnonzero(sizes == 1)]
    if single:
        raise ConfigError(f"{what}: classes of one image ({listed(single)}) cannot be on both sides; set it to 0")
    present = np.count_nonzero(sizes)
    if min(count, n - count) < present:
        least = math.ceil(1000 * present / n) / 1000
        raise ConfigError(
            f"{what} leaves {min(count, n - count)} images for {present} classes on one side; "
            f"choose from {least:g} to {1 - least:g}, or 0"
        )
    return stratified(labels, count, rng)
