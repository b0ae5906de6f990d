"""Data sets as uint8 tensors on the training device, and batches made from them there.

A data set is a function ``(DataConfig) -> Dataset`` named by ``data.target``. Shapes: N images, C channels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.config import ConfigError, DataConfig

MAX_BYTES = 8 << 30


@dataclass
class Split:
    """Images (N, C, h, w) uint8 and their class indices (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Split:
        """Return the images at ``index``."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass
class Dataset:
    """The splits of a data set. ``val`` is None unless a share of the training images is held out."""

    train: Split
    test: Split
    classes: list[str]
    val: Split | None = None


# ------------------------------------------------------------------------------------------------- the sets


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
            f"({_line(error)}); put {kind.filename} (md5 {kind.tgz_md5}) into {root.absolute()}, or set data.root"
        ) from error
    return Dataset(splits[0], splits[1], list(data.classes))


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


def load_imagefolder(config: DataConfig) -> Dataset:
    """Load ``root/train/CLASS/*`` and ``root/test/CLASS/*``, any format Pillow reads, as RGB squares in memory.

    Images are kept at ``data.load_size`` (default: the first image's shorter side); larger ones are scaled and
    cropped at the centre.

    Raises:
        ConfigError: for a missing or empty folder, differing classes, unreadable images, or too much data.
    """
    root = Path(config.root)
    files = {split: _image_files(root, split) for split in ("train", "test")}
    classes = sorted(files["train"])
    if sorted(files["test"]) != classes:
        only = sorted(set(files["test"]) ^ set(classes))
        raise ConfigError(f"data.root={root}: train and test have different classes, such as '{only[0]}'")
    rng = np.random.default_rng(config.split_seed)
    splits = []
    side = config.load_size
    for split, limit in (("train", config.limit), ("test", config.limit_test)):
        names = [(path, c) for c, name in enumerate(classes) for path in files[split][name]]
        labels = np.array([c for _, c in names])
        keep = _balanced(labels, limit, rng)
        paths, labels = [names[i][0] for i in keep], labels[keep]
        if side is None:
            side = min(_open(paths[0]).size)
        need = len(paths) * side * side * 3
        if need > MAX_BYTES:
            raise ConfigError(
                f"data.root={root}: {len(paths)} images of {side}x{side} need {need / 2**30:.1f} GiB in memory; "
                "lower data.load_size or set data.limit"
            )
        array = np.empty((len(paths), side, side, 3), np.uint8)
        with ThreadPoolExecutor() as pool:
            for i, image in enumerate(pool.map(lambda p: _square(p, side), paths)):  # noqa: B023
                array[i] = image
        splits.append(Split(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)))
    return Dataset(splits[0], splits[1], classes)


def _image_files(root: Path, split: str) -> dict[str, list[Path]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folder = root / split
    if not folder.is_dir():
        raise ConfigError(
            f"data.root={root}: no folder {folder.absolute()}; expected {split}/CLASS/IMAGE below data.root"
        )
    try:
        found = {
            d.name: sorted(f for f in d.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS)
            for d in folder.iterdir()
            if d.is_dir() and not d.name.startswith(".")
        }
    except OSError as error:
        raise ConfigError(f"data.root={root} cannot be read: {error}") from error
    if not found:
        raise ConfigError(f"data.root={root}: {folder} has no class folders; expected {split}/CLASS/IMAGE")
    empty = sorted(name for name, files in found.items() if not files)
    if empty:
        raise ConfigError(f"data.root={root}: {folder / empty[0]} has no images ({', '.join(IMG_EXTENSIONS)})")
    return found


def _open(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ConfigError(
            f"data.root: {path} cannot be read as an image ({_line(error)}); remove or replace it"
        ) from error


def _square(path: Path, side: int) -> np.ndarray:
    from PIL import Image, ImageOps

    image = _open(path)
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)


# --------------------------------------------------------------------------------------- subsets and splits


def _balanced(labels: np.ndarray, limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Return sorted indices of ``limit`` items, spread evenly over the classes."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        own = order[labels[order] == c]
        rank[own] = np.arange(len(own))
    # The first of every class, then the second of every class, ...; random within a rank.
    return np.sort(order[np.argsort(rank[order], kind="stable")][:limit])


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set that ``data.target`` names, cut it to its limits, and split off the validation images.

    Raises:
        ConfigError: if it cannot be had, or a split would be empty.
    """
    from convnn.swap import resolve_target

    dataset: Dataset = resolve_target(config.target, "data.target")(config)
    rng = np.random.default_rng(config.split_seed)
    train, test = (
        split.take(torch.from_numpy(_balanced(split.labels.numpy(), limit, rng)))
        for split, limit in ((dataset.train, config.limit), (dataset.test, config.limit_test))
    )
    dataset = replace(dataset, train=train, test=test)
    if config.val_fraction:
        count = round(config.val_fraction * len(dataset.train))
        if not 0 < count < len(dataset.train):
            raise ConfigError(
                f"data.val_fraction={config.val_fraction} of {len(dataset.train)} images leaves a split empty"
            )
        held = torch.from_numpy(_balanced(dataset.train.labels.numpy(), count, rng))
        rest = torch.ones(len(dataset.train), dtype=torch.bool)
        rest[held] = False
        dataset = replace(dataset, train=dataset.train.take(rest.nonzero().squeeze(1)), val=dataset.train.take(held))
    return dataset


# ------------------------------------------------------------------------------------------------- batches


@dataclass
class Batches:
    """Batches of a split, augmented and normalised on its device.

    Order and augmentation of an epoch depend on (seed, epoch) alone, so that it can be entered at any step.
    """

    split: Split
    batch_size: int
    config: DataConfig
    image_size: int
    train: bool = False
    seed: int = 0
    channels_last: bool = False
    rank: int = 0
    world_size: int = 1
    """Processes that share each batch, in the order of ranks."""
    mirrored: bool = False
    """A training share holds, with each image, its mirror image in the batch (the first goes with the last), which is
    what Mixup mixes it with; then the shares together are mixed as the whole batch is."""

    def __len__(self) -> int:
        """Batches per epoch. Training drops the images of an incomplete last batch, evaluation does not."""
        return len(self.split) // self.batch_size if self.train else math.ceil(len(self.split) / self.batch_size)

    def epoch(self, epoch: int = 0, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images (B, C, s, s) float32, labels (B,)) of an epoch from batch ``first`` on.

        Among several processes B is this one's part. In evaluation, where a batch may have fewer images than there are
        processes, one without a part gets an image and no label.
        """
        n, device = len(self.split), self.split.images.device
        order = None
        if self.train:
            entropy = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(entropy) >> 1)
            order = torch.randperm(n, generator=generator).to(device)
            shifts = torch.randint(0, 2 * self.config.crop_padding + 1, (n, 2), generator=generator).to(device)
            flips = (torch.rand(n, generator=generator) < 0.5).to(device)
            if self.mirrored and self.world_size > 1:
                order, shifts, flips = (self._paired(values) for values in (order, shifts, flips))
        for step in range(first, len(self)):
            part = self._share(step)
            if order is None:
                labels = self.split.labels[part]
                if not len(labels):  # all processes make as many forward passes
                    part = slice(step * self.batch_size, step * self.batch_size + 1)
                yield self._normalise(self.split.images[part]), labels
                continue
            images = self.split.images[order[part]]
            if self.config.crop_padding:
                images = random_crop(images, shifts[part], self.config.crop_padding)
            if self.config.flip:
                images = torch.where(flips[part, None, None, None], images.flip(-1), images)
            yield self._normalise(images), self.split.labels[order[part]]

    def _share(self, step: int) -> slice:
        """Return the rows of this process in the order of an epoch."""
        start = step * self.batch_size
        size = min(self.batch_size, len(self.split) - start)
        return slice(start + size * self.rank // self.world_size, start + size * (self.rank + 1) // self.world_size)

    def _paired(self, values: Tensor) -> Tensor:
        """Order the rows of each batch so that every process has, with a row, its mirror image: (N, ...) -> (N', ...).

        Rows that are in no whole batch are left out.
        """
        batches = values[: len(self) * self.batch_size].unflatten(0, (len(self), self.batch_size))
        pieces = batches.chunk(2 * self.world_size, dim=1)
        pairs = zip(pieces[: self.world_size], reversed(pieces), strict=False)
        return torch.cat([piece for pair in pairs for piece in pair], dim=1).flatten(0, 1)

    def _normalise(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32).div_(255)
        if x.shape[-1] != self.image_size or x.shape[-2] != self.image_size:
            size = (self.image_size, self.image_size)
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (
            torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (self.config.mean, self.config.std)
        )
        x = (x - mean) / std
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


def random_crop(images: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Crop each zero-padded image at its own (row, column) shift: (B, C, h, w), (B, 2) -> (B, C, h, w)."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (padding,) * 4)
    rows = shifts[:, 0, None] + torch.arange(height, device=images.device)  # (B, h)
    cols = shifts[:, 1, None] + torch.arange(width, device=images.device)  # (B, w)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2).contiguous()
