"""Batches made, augmented and normalised on the training device.

Shapes: N images, B batch, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.config.schema import DataConfig
from convnn.data.readers import Readers
from convnn.data.splits import AnySplit, Split


@dataclass
class Batches:
    """Batches of a split, augmented and normalised on its device.

    Order and augmentation of an epoch depend on (seed, epoch) alone, so that a resumed run can start it at any step.
    A batch has ``batch_size`` images over all processes; each of them yields its share, in the order of ranks.
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
    """Processes that share each batch."""
    mirrored: bool = False
    """Share training batches for timm's Mixup and CutMix, which mix image i of B with image B - 1 - i: both go to the
    same process, so that the shares are mixed as the whole batch would be in one process."""
    change: Callable[[Tensor, list[int]], Tensor] | None = None
    """Changes images (B, C, h, w) uint8, whose numbers in the split it is told, before they are normalised."""

    def __post_init__(self) -> None:
        self.device = self.split.labels.device
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (self.config.mean, self.config.std)
        )

    def __len__(self) -> int:
        """Batches per epoch; see ``data.drop_last`` for the last one of training."""
        if self.train and self.config.drop_last:
            return len(self.split) // self.batch_size
        return math.ceil(len(self.split) / self.batch_size)

    def numbers(self) -> np.ndarray:
        """Return the numbers of this process's images of an evaluation in their split, in order: (n,) int64."""
        return np.concatenate([np.arange(p.start, p.stop) for p in map(self._share, range(len(self)))])

    def images_of(self, step: int) -> int:
        """Return how many images the batch of a step has, over all processes."""
        return min(self.batch_size, len(self.split) - step * self.batch_size)

    def epoch(self, epoch: int = 0, first: int = 0) -> Generator[tuple[Tensor, Tensor]]:
        """Yield (images (B, C, s, s) float32, labels (B,)) of an epoch from batch ``first`` on.

        Among several processes B is this one's share. The last batch of an evaluation may have fewer images than there
        are processes; one whose share is empty gets an image without a label, so that all make the same number of
        forward passes.
        """
        n = len(self.split)
        order = torch.arange(n)
        if self.train:
            # All of the epoch's random numbers at once: batch ``first`` needs no replay of those before it.
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
                if self.change is not None and len(order[part]):
                    images = self.change(images, order[part].tolist())
                yield self._normalise(images), self.split.labels[order[part]]

    def share(self, readers: Readers) -> None:
        """Have files read by workers that others use too; images in memory need none."""

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
        size = self.images_of(step)
        return slice(start + size * self.rank // self.world_size, start + size * (self.rank + 1) // self.world_size)

    def _paired(self, values: Tensor) -> Tensor:
        """Order the rows of each batch so that i and B - 1 - i go to the same process: (N, ...) -> (N, ...)."""
        # Of 2 W equal pieces of a batch, process r gets pieces r and 2 W - 1 - r, which mirror each other.
        whole = len(self.split) // self.batch_size * self.batch_size
        ordered = []
        for batches in (values[:whole].unflatten(0, (-1, self.batch_size)), values[None, whole:]):
            pieces = batches.chunk(2 * self.world_size, dim=1)
            pairs = zip(pieces[: self.world_size], reversed(pieces), strict=False)
            ordered.append(torch.cat([piece for pair in pairs for piece in pair], dim=1).flatten(0, 1))
        return torch.cat(ordered)

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

    (B, C, h, w), (B, 2), (B,) -> (B, C, h, w).
    """
    # Each output pixel's place in its flattened padded image: crop and flip of the whole batch are then one gather,
    # where slicing would take a loop over the images.
    batch, channels, height, width = images.shape
    rows, cols = (torch.arange(size, device=images.device) for size in (height, width))
    if flips is not None:
        cols = torch.where(flips[:, None], cols.flip(0), cols)  # (B, w)
    rows, cols = shifts[:, 0, None] + rows, shifts[:, 1, None] + cols
    index = (rows[:, :, None] * (width + 2 * padding) + cols[:, None, :]).view(batch, 1, -1)  # (B, 1, h w)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, index.expand(-1, channels, -1)).view(images.shape)
