"""A finished run as an object: its configuration, metrics and model, to look at and to use."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from convnn.config.load import load_config
from convnn.config.schema import Config
from convnn.data.files import files_split, image_files
from convnn.data.images import reading
from convnn.data.splits import AnySplit, Split
from convnn.errors import ConfigError
from convnn.runs.metrics import read_metrics
from convnn.runtime.device import pick_device
from convnn.runtime.files import read_json
from convnn.train import restore
from convnn.train.predictions import Predictions, predict

if TYPE_CHECKING:
    import pandas

Images = Tensor | np.ndarray | str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass
class LoadedModel:
    """A trained model with all that it takes to use it; what ``load_exported`` returns."""

    folder: Path
    config: Config
    model: nn.Module
    """In evaluation mode, on the CPU until ``predict`` has moved it; the averaged one if there is one. It takes images
    as ``predict`` scales them."""
    classes: list[str]
    """Names, in the order of the model's logits."""
    shape: list[int]
    """Channels, rows and columns of the images that the run was trained on."""
    image_size: int
    """Side in pixels of what the model takes."""
    step: int
    """Of the checkpoint."""

    def predict(self, images: Images, named: str = "images=") -> Predictions:
        """Return the classes that the model gives to images, with their probabilities.

        They are scaled and cut as in an evaluation; precision and determinism are those of the run.

        Args:
            images: (N, C, h, w) uint8 of the run's channels; or a file, a folder (all image files in it), or files.
            named: what messages about files that cannot be read begin with.

        Raises:
            ConfigError: for no images, files that cannot be read, or another shape or type.
        """
        with reading(named):
            split, base = self._split(images)
            config, step = self.config, self.step
            return predict(self.model, config, split, self.image_size, step=step, base=base)[1]

    def _split(self, images: Images) -> tuple[AnySplit, Path | None]:
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images)
        if isinstance(images, Tensor):
            if images.ndim != 4 or images.shape[1] != self.shape[0] or images.dtype != torch.uint8 or not len(images):
                found = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
                raise ConfigError(f"images of {found} are not (N, {self.shape[0]}, h, w) uint8")
            return Split(images.cpu(), torch.zeros(len(images), dtype=torch.int64)), None
        if isinstance(images, str | os.PathLike):
            place = Path(images)
            paths, base = image_files(place), place if place.is_dir() else place.parent
        else:
            try:
                listed = [os.fsencode(file) for file in images]
            except TypeError as error:
                raise ConfigError(
                    f"images are a uint8 array, a file, a folder, or a list of files ({error})"
                ) from error
            if not listed:
                raise ConfigError("images is an empty list")
            paths, base = np.array(listed), None
        return files_split(paths, np.zeros(len(paths)), self.shape, self.image_size), base


@dataclass
class FinishedRun(LoadedModel):
    """What ``load_run`` returns."""

    result: dict[str, Any]
    """result.json: status, accuracies, times; empty for a run that has not ended."""

    @property
    def metrics(self) -> pandas.DataFrame:
        """metrics.jsonl, a row for each epoch.

        Raises:
            ConfigError: without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError("run.metrics needs pandas; install it (pip install convnn[report])") from error
        return pandas.DataFrame(read_metrics(self.folder / "metrics.jsonl"))


def load_run(
    folder: str | os.PathLike[str], *, checkpoint: str = "last", device: str = "auto", data_root: str | None = None
) -> FinishedRun:
    """Return the run of a folder; its data is not needed.

    Args:
        folder: of the run.
        checkpoint: ``last`` or ``best``.
        device: that ``predict`` computes on, as ``device=`` of train.py; ``auto`` is settled here.
        data_root: where the data is, for folders of before runs recorded their classes and the size of their images.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or does not fit.
        ConfigError: if the folder is none of a run, or there is no such device.
    """
    place, chosen = Path(folder), str(pick_device(device))
    config = load_config(place)
    config.device = chosen
    if data_root is not None:
        config.data.root = data_root
    found = restore.load_run(config, place, checkpoint, splits=(), other_data=data_root is not None)
    result = read_json(place / "result.json") or {}
    step = found.checkpoint["step"]
    model = found.model.eval()
    return FinishedRun(place, config, model, found.classes, found.shape, found.image_size, step, result)
