"""Images with labels, in memory or as files, and subsets of them. Shapes: N images, C channels."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnn.data.classes import class_order
from convnn.data.images import in_threads


@dataclass
class Split:
    """Images (N, C, h, w) uint8 and their class indices (N,) int64."""

    images: Tensor
    labels: Tensor
    paths: np.ndarray | None = None
    """Of the files that the images were read from, if from files."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image."""
        return self.images.shape[1], self.images.shape[2], self.images.shape[3]

    def take(self, index: Tensor) -> Split:
        """Return the images at ``index``."""
        paths = None if self.paths is None else self.paths[index.numpy()]
        return Split(self.images[index], self.labels[index], paths)

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device), self.paths)


@dataclass
class FileSplit:
    """Image files (N,) and their class indices (N,) int64; a file is read when a batch needs it."""

    paths: np.ndarray
    """As bytes, ImageNet's million names in one array: forked workers share it."""
    labels: Tensor
    side: int
    """Pixels of the square that an image becomes, unless the network wants another size."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image."""
        return 3, self.side, self.side

    def take(self, index: Tensor) -> FileSplit:
        """Return the files at ``index``."""
        return FileSplit(self.paths[index.numpy()], self.labels[index], self.side)

    def to(self, device: torch.device) -> FileSplit:
        """Return the split with its labels on a device, where its batches will be."""
        return FileSplit(self.paths, self.labels.to(device), self.side)


AnySplit = Split | FileSplit


@dataclass
class Dataset:
    """The splits of a data set, all with labels that index ``classes``."""

    train: AnySplit
    test: AnySplit
    classes: list[str]
    val: AnySplit | None = None
    """Images to choose the best checkpoint on; None: it is chosen on the test set."""

    def splits(self) -> dict[str, AnySplit]:
        """Return the splits that there are, by name."""
        val = {} if self.val is None else {"val": self.val}
        return {"train": self.train, **val, "test": self.test}

    def ordered_as(self, classes: list[str]) -> Dataset:
        """Return the data set with labels that index ``classes``: the same names, in whatever order.

        Raises:
            ConfigError: if the names differ; it says how.
        """
        if self.classes == classes:
            return self
        order = torch.tensor(class_order(classes, self.classes, ("the run", "the data")))
        mapped: dict[str, Any] = {
            name: replace(split, labels=order.to(split.labels.device)[split.labels])
            for name, split in self.splits().items()
        }
        return replace(self, classes=list(classes), **mapped)

    def content_fingerprint(self) -> str:
        """Return a hash of the classes and of all splits, see ``split_fingerprint``; 16 hexadecimal digits."""
        splits = {name: split_fingerprint(split) for name, split in self.splits().items()}
        return hashlib.sha256(json.dumps([self.classes, splits]).encode()).hexdigest()[:16]


def split_fingerprint(split: AnySplit) -> str:
    """Return a hash of a split's labels and images, in their order; 16 hexadecimal digits.

    Of images from files it is their names (without folders) and sizes that count, so that it is the same in memory and
    streamed, and where the folder moved; of others the pixels.
    """
    digest = hashlib.sha256(split.labels.cpu().numpy().astype("<i8").tobytes())
    if split.paths is None:
        digest.update(repr(split.shape).encode())
        digest.update(np.ascontiguousarray(split.images.cpu().numpy()).data)
    else:
        sizes = in_threads(lambda path: os.stat(path).st_size, split.paths)  # noqa: PTH116
        for path, size in zip(split.paths, sizes, strict=True):
            digest.update(b"%b\0%d\0" % (os.path.basename(path), size))  # noqa: PTH119
    return digest.hexdigest()[:16]


def balanced(labels: np.ndarray, limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Return sorted indices of ``limit`` items drawn at random, as evenly over the classes as possible."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    order = rng.permutation(len(labels))
    # The first of every class, then the second of every class, ...; random within a rank.
    return np.sort(order[np.argsort(_ranks(labels, order)[order], kind="stable")][:limit])


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return sorted indices of about ``count`` items, in each class its share, at least one and not all.

    The classes that round up are those whose share has the largest fraction, so that there are ``count`` in all
    unless small classes need more. Every class must have two items.
    """
    order = rng.permutation(len(labels))
    ranks = _ranks(labels, order)
    sizes = np.bincount(labels)
    shares = count * sizes / len(labels)
    taken = np.floor(shares).astype(np.int64)
    following = order[(ranks == taken[labels])[order]]  # of each class the first that is not taken
    place = np.full(len(sizes), len(labels))
    place[labels[following]] = np.arange(len(following))
    up = np.lexsort((place, taken - shares))[: count - taken.sum()]
    taken[up] += 1
    taken = np.clip(taken, 1, np.maximum(sizes - 1, 1))
    return np.flatnonzero(ranks < taken[labels])


def _ranks(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return how many items of its class come before each item in an order, (N,)."""
    rank = np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        own = order[labels[order] == c]
        rank[own] = np.arange(len(own))
    return rank
