"""Worker processes that read files, from one epoch to the next, for all streams of a run.

Shapes: B batch, C channels, s side of an image in pixels.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from convnn.config.schema import DataConfig
from convnn.errors import ConfigError, first_line

MAX_WORKERS = 16


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


@dataclass(frozen=True)
class Files:
    """The files of a split, and how one becomes a tensor (C, s, s) uint8."""

    paths: np.ndarray
    read: Callable[[bytes], Tensor]


@dataclass(frozen=True)
class _Sample:
    """What a worker is asked for."""

    split: int
    entropy: tuple[int, ...] | None
    """Of the epoch, to which the image's number is added; None: nothing is drawn."""
    index: int


class _Samples:
    """The data set of the workers: sample -> (C, s, s) uint8, or the message of an error in reading the file."""

    def __init__(self, splits: list[Files]) -> None:
        self.splits = splits

    def __getitem__(self, sample: _Sample) -> Tensor | str:
        files = self.splits[sample.split]
        try:
            if sample.entropy is None:
                return files.read(files.paths[sample.index])
            with seeded(*sample.entropy, sample.index):
                return files.read(files.paths[sample.index])
        except ConfigError as error:
            return str(error)  # an exception would arrive with the worker's traceback in its message


@dataclass
class _Order:
    """The batch sampler of the workers: it has the batches of the epoch that is under way."""

    split: int = 0
    entropy: tuple[int, ...] | None = None
    batches: Sequence[Tensor] = ()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[_Sample]]:
        for batch in self.batches:
            yield [_Sample(self.split, self.entropy, index) for index in batch.tolist()]


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


class Readers:
    """Worker processes, started at the first epoch and kept until ``close``: starting them may take a minute.

    Splits that share them are read one after the other. An epoch that is left before its last batch, by an exception
    for instance, ends them; the next one starts them anew.
    """

    def __init__(self, config: DataConfig, device: torch.device, world_size: int = 1) -> None:
        """Prepare.

        Args:
            config: has their number, and the batches that each reads ahead.
            device: where batches go.
            world_size: training processes, each with readers of its own.
        """
        self.workers, self.prefetch = count_workers(config.workers, world_size), config.prefetch
        self.device = device
        self.busy = False
        self._splits: list[Files] = []
        self._order = _Order()
        self._loader: DataLoader | None = None
        self._batches: Any = None

    def add(self, files: Files) -> int:
        """Take another split; return its number. Workers that run already, which do not know it, are ended."""
        self.close()
        self._splits.append(files)
        return len(self._splits) - 1

    def read(self, split: int, batches: Sequence[Tensor], entropy: tuple[int, ...] | None) -> Generator[Tensor]:
        """Yield the images (B, C, s, s) uint8 of each batch of indices into a split, on the device."""
        self._order.split, self._order.batches, self._order.entropy = split, batches, entropy
        self._loader = self._loader or self._start()
        left, self.busy = len(batches), True
        try:
            with self.explained(RuntimeError, ConnectionError, EOFError):  # a worker's end shows as any of them
                self._batches = iter(self._loader)
                for images in self._batches:
                    if isinstance(images, str):
                        raise ConfigError(images)
                    left -= 1
                    yield images.to(self.device, non_blocking=True)
        except Exception:
            left = -1
            raise
        finally:
            self.busy = False
            if left:
                self.close()

    @contextmanager
    def explained(self, *kinds: type[Exception]) -> Iterator[None]:
        """Turn what tells of a worker's end, which torch raises wherever the main thread is, into a ConfigError."""
        caught = kinds or (RuntimeError,)
        try:
            yield
        except caught as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise ConfigError(
                f"data.workers={self.workers}: a worker ended ({first_line(error)}); "
                "with too little memory, lower data.workers, data.prefetch or the batch size"
            ) from error

    def _start(self) -> DataLoader:
        samples: Any = _Samples(self._splits)
        return DataLoader(
            samples,
            batch_sampler=self._order,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            persistent_workers=self.workers > 0,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # or it would draw from the training's
        )

    def close(self) -> None:
        """End the workers."""
        stop = getattr(self._batches, "_shutdown_workers", None)  # dropping the iterator is not enough in a traceback
        self._loader = self._batches = None
        if stop is not None:
            with suppress(RuntimeError):  # the news that a worker was killed may come as late as here
                stop()
