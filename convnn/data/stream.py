"""Batches of image files, read and transformed (by timm's transforms) in worker processes during training.

Order and augmentation depend on (seed, epoch, index of the image) alone: not on the number of workers, nor on the
step at which a resumed run starts an epoch. Shapes: B batch, C channels, s side of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop
from torchvision.transforms.functional import pil_to_tensor

from convnn.config.schema import DataConfig
from convnn.data.batches import Batches
from convnn.data.images import open_image, open_square
from convnn.data.readers import Files, Readers
from convnn.data.splits import AnySplit, FileSplit


class ByteErasing(RandomErasing):
    """timm's RandomErasing, made for normalised images, on uint8 ones: noise beyond [0, 255] is clipped."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config.random_erasing, mode=config.erasing_mode, device="cpu")
        self.mean, self.std = (255 * torch.tensor(v).view(-1, 1, 1) for v in (config.mean, config.std))

    def __call__(self, image: Tensor) -> Tensor:
        """(C, s, s) uint8 -> (C, s, s) uint8."""
        erased = super().__call__((image - self.mean) / self.std)
        return (erased * self.std + self.mean).round_().clamp_(0, 255).to(torch.uint8)


def file_transform(config: DataConfig, image_size: int, train: bool) -> Callable[[Any], Tensor]:
    """Return timm's transforms for training or evaluation, composed: Pillow image -> (C, s, s) uint8."""
    if not train:
        drawn = config.interpolation == "random"
        return create_transform(
            image_size,
            crop_pct=config.crop_pct or 1.0,
            interpolation="bicubic" if drawn else config.interpolation,
            use_prefetcher=True,
        )
    crop, colour, to_tensor = create_transform(
        image_size,
        is_training=True,
        # A crop of the whole area with sides 1:1 is the largest square at the centre.
        scale=_span(config.scale or [1, 1]),
        ratio=_span(config.ratio if config.scale else [1, 1]),
        hflip=0.5 if config.flip else 0.0,
        color_jitter=config.color_jitter or None,  # type: ignore[arg-type]
        auto_augment=config.rand_augment,
        interpolation=config.interpolation,
        mean=tuple(config.mean),
        use_prefetcher=True,
        separate=True,
    )
    steps = [crop]
    if config.crop_padding:
        steps.append(RandomCrop(image_size, config.crop_padding))
    steps += [colour, to_tensor]
    if config.random_erasing:
        steps.append(ByteErasing(config))
    return Compose(steps)


def _span(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[1]


def square_transform(path: bytes, side: int) -> Tensor:
    """Read a file as a square (C, side, side) uint8, the same as an image folder in memory has of it."""
    return pil_to_tensor(open_square(path, side))


def _transformed(path: bytes, transform: Callable[[Any], Tensor]) -> Tensor:
    return transform(open_image(path))


class Stream(Batches):
    """``Batches`` of a ``FileSplit``: workers read and transform the files of the batches to come.

    Without timm's transforms the batches are those of the same folder in memory. The workers live from the start of an
    epoch until it is read to its end, closed, or left by an exception; with ``share``, from the first epoch on.
    """

    split: FileSplit

    def __post_init__(self) -> None:
        super().__post_init__()
        self._timm = bool(self.config.file_transforms())
        read: Callable[[bytes], Tensor] = partial(square_transform, side=self.split.side)
        if self._timm:
            read = partial(_transformed, transform=file_transform(self.config, self.image_size, self.train))
        self._files = Files(self.split.paths, read)
        self._readers: Readers | None = None
        self._number = 0

    def share(self, readers: Readers) -> None:
        """Have this split read by workers that other splits use too."""
        self._readers, self._number = readers, readers.add(self._files)

    def _read(self, order: Tensor, parts: Sequence[slice], epoch: int) -> Generator[Tensor]:
        entropy = (self.seed, epoch) if self._timm and self.train else None
        readers, number = self._readers, self._number
        if readers is None or readers.busy:
            readers = Readers(self.config, self.device, self.world_size)
            number = readers.add(self._files)
        try:
            yield from readers.read(number, [order[part] for part in parts], entropy)
        finally:
            if readers is not self._readers:
                readers.close()

    def _augment(self, images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
        return images if self._timm else super()._augment(images, shifts, flips)


def make_batches(split: AnySplit, *args: Any, **kwargs: Any) -> Batches:
    """Return ``Batches(split, ...)``, or ``Stream(split, ...)`` for files."""
    return (Stream if isinstance(split, FileSplit) else Batches)(split, *args, **kwargs)
