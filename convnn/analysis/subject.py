"""A finished run to look at: its model, and the test images of an analysis. Shapes: N images, B batch, C channels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convnn.config.load import load_config
from convnn.config.schema import Config, DataConfig
from convnn.data.datasets import load_dataset
from convnn.data.splits import AnySplit, Dataset, balanced
from convnn.data.stream import make_batches
from convnn.runtime.device import pick_device, set_determinism
from convnn.train.restore import load_run


class Datasets:
    """Loads data sets, and keeps the last one: the runs of a sweep share it."""

    def __init__(self) -> None:
        self._key = ""
        self._last: Dataset | None = None

    def __call__(self, config: DataConfig) -> Dataset:
        """Return the data set of a configuration."""
        key = json.dumps(asdict(config), sort_keys=True, default=str)
        if self._last is None or key != self._key:
            self._key, self._last = key, load_dataset(config)
        return self._last


@dataclass
class Subject:
    """A run's model and images."""

    folder: Path
    config: Config
    model: nn.Module
    """In evaluation mode, on ``device``; it takes images as ``batches`` yields them."""
    split: AnySplit
    """The test images that are looked at; pixels (N, C, h, w) uint8 in ``split.images``, or files."""
    index: np.ndarray
    """(N,) their numbers in the whole test set."""
    classes: list[str]
    image_size: int
    """Side in pixels of what the model takes."""
    channels: int
    step: int
    """Of the checkpoint."""
    device: torch.device
    seed: int = 0
    """Of the analysis' own draws, such as noise: the same for all runs, whose own seed is ``config.seed``."""
    train: AnySplit | None = None
    """The images that the run was trained on, all of them, without augmentation."""
    checkpoint: str = "last"
    """``last`` or ``best``."""
    own_images: bool = True
    """Whether ``index`` numbers the run's own test set; else the user named other data."""
    _images: Tensor | None = field(default=None, repr=False)

    def limited(self, count: int | None) -> Subject:
        """Return the run with only so many of the images, evenly over the classes, the same ones each time."""
        rows = balanced(self.split.labels.numpy(), count, np.random.default_rng(0))
        return replace(self, split=self.split.take(torch.from_numpy(rows)), index=self.index[rows], _images=None)

    def batches(self, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images (B, C, s, s) float32 as the model takes them, and labels (B,), on ``device``."""
        data = replace(self.config.data, workers=0)
        for images, labels in make_batches(self.split, size, data, self.image_size).epoch():
            yield images.to(self.device), labels.to(self.device)

    @property
    def images(self) -> Tensor:
        """All images as the model takes them, (N, C, s, s) float32 on ``device``; read once."""
        if self._images is None:
            self._images = torch.cat([images for images, _ in self.batches()])
        return self._images

    @property
    def labels(self) -> Tensor:
        """Classes of the images, (N,) int64 on ``device``."""
        return self.split.labels.to(self.device)

    def generator(self) -> torch.Generator:
        """Return a random generator on the CPU, the same at each call."""
        return torch.Generator().manual_seed(self.seed)


def open_subject(folder: Path, checkpoint: str, device: str, data_root: str | None, load: Datasets) -> Subject:
    """Return a finished run with all of its test images.

    Args:
        folder: of the run.
        checkpoint: ``last`` or ``best``.
        device: as ``device=`` of train.py.
        data_root: where the data is now; None: where it was.
        load: loads it.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or does not fit.
        ConfigError: if the folder is none of a run, or its data cannot be had or is another.
    """
    config = load_config(folder)
    config.device = device
    if data_root is not None:
        config.data.root = data_root
    found = load_run(config, folder, checkpoint, other_data=data_root is not None, load=load)
    assert found.dataset is not None
    chosen, test = pick_device(device), found.dataset.test
    set_determinism(config.train.deterministic)
    return Subject(
        folder,
        config,
        found.model.eval().to(chosen),
        test,
        np.arange(len(test)),
        found.classes,
        found.image_size,
        found.shape[0],
        found.checkpoint["step"],
        chosen,
        train=found.dataset.train,
        checkpoint=checkpoint,
        own_images=data_root is None,
    )
