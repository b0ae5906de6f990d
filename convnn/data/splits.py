"""Images with labels, in memory or as files, and subsets of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convnn.data.folders import FileSplit


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


def balanced(labels: np.ndarray, limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Return sorted indices of ``limit`` items drawn at random, as evenly over the classes as possible."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.int64)  # of an item within its class, in random order
    for c in np.unique(labels):
        own = order[labels[order] == c]
        rank[own] = np.arange(len(own))
    # The first of every class, then the second of every class, ...; random within a rank.
    return np.sort(order[np.argsort(rank[order], kind="stable")][:limit])
