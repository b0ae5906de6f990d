"""Data sets as uint8 tensors on the training device (or as files, see streaming.py), and batches made from them there.

A data set is a function ``(DataConfig) -> Dataset`` named by ``data.target``. Shapes: N images, C channels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.config import ConfigError, DataConfig
from convnn.folders import FileSplit, first_line, list_images, open_image, open_square

MAX_BYTES = 8 << 30


@dataclass
class Split:
    """Images (N, C, h, w) uint8 and their class indices (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image."""
        return self.images.shape[1], self.images.shape[2], self.images.shape[3]

    def take(self, index: Tensor) -> Split:
        """Return the images at ``index``."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


AnySplit = Split | FileSplit


@dataclass
class Dataset:
    """The splits of a data set. ``val`` is None unless a share of the training images is held out."""

    train: AnySplit
    test: AnySplit
    classes: list[str]
    val: AnySplit | None = None


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
        keep = _balanced(labels, limit, rng)
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
    if config.file_transforms() and not isinstance(dataset.train, FileSplit):
        raise ConfigError(f"data.{config.file_transforms()[0]} needs files that are streamed, not data={config.name}")
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

    Order and augmentation of an epoch depend on (seed, epoch) alone, so that it can be entered at any step. The joint
    batch has ``batch_size`` images; of ``world_size`` processes each yields its own rows, in the order of ranks.
    """

    split: AnySplit
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

    def __post_init__(self) -> None:
        self.device = self.split.labels.device
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (self.config.mean, self.config.std)
        )

    def __len__(self) -> int:
        """Batches per epoch. Training drops the images of an incomplete last batch, evaluation does not."""
        return len(self.split) // self.batch_size if self.train else math.ceil(len(self.split) / self.batch_size)

    def epoch(self, epoch: int = 0, first: int = 0) -> Generator[tuple[Tensor, Tensor]]:
        """Yield (images (B, C, s, s) float32, labels (B,)) of an epoch from batch ``first`` on.

        Among several processes B is this one's part. In evaluation, where a batch may have fewer images than there are
        processes, one without a part gets an image and no label, so that all make as many forward passes.
        """
        n = len(self.split)
        order = torch.arange(n)
        if self.train:
            entropy = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(entropy) >> 1)
            order = torch.randperm(n, generator=generator)
            shifts = torch.randint(0, 2 * self.config.crop_padding + 1, (n, 2), generator=generator).to(self.device)
            flips = (torch.rand(n, generator=generator) < 0.5).to(self.device)
            if self.mirrored and self.world_size > 1:
                order, shifts, flips = (self._paired(values) for values in (order, shifts, flips))
        parts = [self._share(step) for step in range(first, len(self))]
        read = [slice(part.start, max(part.stop, part.start + 1)) for part in parts]
        with closing(self._read(order, read, epoch)) as batches:
            order = order.to(self.device)
            for part, images in zip(parts, batches, strict=True):
                if self.train:
                    images = self._augment(images, shifts[part], flips[part])
                yield self._normalise(images), self.split.labels[order[part]]

    def _read(self, order: Tensor, parts: Sequence[slice], epoch: int) -> Generator[Tensor]:
        """Yield the images (B, C, h, w) uint8 of each part of the order."""
        assert isinstance(self.split, Split)
        order = order.to(self.device)
        for part in parts:
            yield self.split.images.index_select(0, order[part])

    def _augment(self, images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
        if not (self.config.crop_padding or self.config.flip):
            return images
        return random_crop(images, shifts, self.config.crop_padding, flips if self.config.flip else None)

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
        wanted = torch.channels_last if self.channels_last else torch.contiguous_format
        size = (self.image_size, self.image_size)
        if images.shape[-2:] == size:
            x = images.to(torch.float32, memory_format=wanted).div_(255)
        else:
            x = images.to(torch.float32).div_(255)
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
            x = x.contiguous(memory_format=wanted)
        return x.sub_(self._mean).div_(self._std)


def random_crop(images: Tensor, shifts: Tensor, padding: int, flips: Tensor | None = None) -> Tensor:
    """Crop each zero-padded image at its own (row, column) shift, and mirror the crop where ``flips`` says so.

    (B, C, h, w), (B, 2), (B,) -> (B, C, h, w), in one gather.
    """
    batch, channels, height, width = images.shape
    rows, cols = (torch.arange(size, device=images.device) for size in (height, width))
    if flips is not None:
        cols = torch.where(flips[:, None], cols.flip(0), cols)  # (B, w)
    rows, cols = shifts[:, 0, None] + rows, shifts[:, 1, None] + cols
    index = (rows[:, :, None] * (width + 2 * padding) + cols[:, None, :]).view(batch, 1, -1)  # (B, 1, h w)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, index.expand(-1, channels, -1)).view(images.shape)
