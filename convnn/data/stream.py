"""Batches of image files, read and transformed (by timm's transforms) in worker processes during training.

Order and augmentation depend on (seed, epoch, index of the image) alone: not on the number of workers, nor on the
step at which a resumed run starts an epoch. Shapes: B batch, C channels, s side of an image in pixels.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms import Compose, RandomCrop
from torchvision.transforms.functional import pil_to_tensor

from convnn.config.schema import DataConfig
from convnn.data.batches import Batches
from convnn.data.images import open_image, open_square
from convnn.data.splits import AnySplit, FileSplit
from convnn.errors import ConfigError, first_line

MAX_WORKERS = 16


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


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch, and restore them on exit."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.random.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


class _Files:
    """The data set of the workers: index -> (C, s, s) uint8, or the message of an error in reading the file."""

    def __init__(self, paths: np.ndarray, read: Callable[[bytes], Tensor], entropy: tuple[int, ...] | None) -> None:
        self.paths, self.read, self.entropy = paths, read, entropy

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            if self.entropy is None:  # nothing is drawn
                return self.read(self.paths[index])
            with seeded(*self.entropy, index):
                return self.read(self.paths[index])
        except ConfigError as error:
            return str(error)  # an exception would arrive with the worker's traceback in its message


def _transformed(path: bytes, transform: Callable[[Any], Tensor]) -> Tensor:
    return transform(open_image(path))


def _collate(samples: list[Tensor | str]) -> Tensor | str:
    fault = next((sample for sample in samples if isinstance(sample, str)), None)
    return default_collate(samples) if fault is None else fault


def _start_worker(worker: int) -> None:
    """Ignore INT, USR2 and the first TERM: launchers send signals to all processes, and the training process answers.

    A worker ends with the training process, or by a second TERM.
    """
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def first(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, first)


def count_workers(workers: int | None, world_size: int = 1) -> int:
    """Return the number of processes that ``data.workers`` means for one of ``world_size`` training processes."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // world_size, MAX_WORKERS))


class Stream(Batches):
    """``Batches`` of a ``FileSplit``: workers read and transform the files of the batches to come.

    Without timm's transforms the batches are those of the same folder in memory. The workers live from the start of an
    epoch until it is read to its end, closed, or left by an exception.
    """

    split: FileSplit

    def __post_init__(self) -> None:
        super().__post_init__()
        self._timm = bool(self.config.file_transforms())
        self._read_file: Callable[[bytes], Tensor] = partial(square_transform, side=self.split.side)
        if self._timm:
            transform = file_transform(self.config, self.image_size, self.train)
            self._read_file = partial(_transformed, transform=transform)

    def _read(self, order: Tensor, parts: Sequence[slice], epoch: int) -> Generator[Tensor]:
        workers = count_workers(self.config.workers, self.world_size)
        entropy = (self.seed, epoch) if self._timm and self.train else None
        files: Any = _Files(self.split.paths, self._read_file, entropy)
        loader: DataLoader = DataLoader(
            files,
            batch_sampler=[order[part].tolist() for part in parts],
            num_workers=workers,
            prefetch_factor=self.config.prefetch if workers else None,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or it would draw from the training's
        )
        batches = iter(loader)
        try:
            for images in batches:
                if isinstance(images, str):
                    raise ConfigError(images)
                yield images.to(self.device, non_blocking=True)
        except (RuntimeError, ConnectionError, EOFError) as error:  # a worker's end shows as any of them
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise ConfigError(
                f"data.workers={workers}: a worker ended ({first_line(error)}); "
                "with too little memory, lower data.workers, data.prefetch or the batch size"
            ) from error
        finally:
            stop = getattr(batches, "_shutdown_workers", None)  # dropping the iterator is not enough in a traceback
            if stop is not None:
                with suppress(RuntimeError):  # the news that a worker was killed may come as late as here
                    stop()

    def _augment(self, images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
        return images if self._timm else super()._augment(images, shifts, flips)


def make_batches(split: AnySplit, *args: Any, **kwargs: Any) -> Batches:
    """Return ``Batches(split, ...)``, or ``Stream(split, ...)`` for files."""
    return (Stream if isinstance(split, FileSplit) else Batches)(split, *args, **kwargs)
