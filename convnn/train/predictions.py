"""What a run's model says of each image: as arrays, and as the files of an evaluation. Shapes: N images, K classes."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convnn.config.schema import Config
from convnn.data.corruptions import corrupted
from convnn.data.splits import AnySplit
from convnn.data.stream import make_batches
from convnn.runs.contents import EVALUATION_LIST, PREDICTIONS
from convnn.runs.predictions import KeptPredictions, write_predictions
from convnn.runtime.device import make_autocast, pick_device, set_determinism
from convnn.runtime.files import write_json
from convnn.runtime.owned import Owner, naming
from convnn.train.evaluate import best_classes, evaluate

FEW = 256
"""Images that the program reads itself, as workers would take longer to start."""


@dataclass
class Predictions:
    """The classes that a model gives to the images of a split."""

    index: np.ndarray
    """(N,) int64: number of the image in its whole split."""
    label: np.ndarray
    """(N,) int64."""
    predicted: np.ndarray
    """(N,) int64: class of the highest logit."""
    probabilities: np.ndarray
    """(N, K) float32."""
    files: list[str] | None = None
    """(N,) names, where the images are files."""

    def kept(self) -> KeptPredictions:
        """Return what predictions.npz has of them."""
        return KeptPredictions(self.index, self.label, self.predicted, self.probabilities)

    def per_class(self, classes: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return (class, images, correct, accuracy in percent or empty without images) of every class."""
        size = np.bincount(self.label, minlength=len(classes))
        right = np.bincount(self.label[self.predicted == self.label], minlength=len(classes))
        return [
            (name, int(n), int(k), 100 * int(k) / int(n) if n else "")
            for name, n, k in zip(classes, size, right, strict=True)
        ]

    def per_image(self, classes: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return (file or index, label, predicted, probability of the predicted class) of every image."""
        names: Sequence[Any] = self.files or self.index.tolist()
        return [
            (name, classes[label], classes[found], f"{shares[found]:.6f}")
            for name, label, found, shares in zip(names, self.label, self.predicted, self.probabilities, strict=True)
        ]

    def top(self, classes: Sequence[str], count: int) -> list[tuple[str, list[tuple[str, str]]]]:
        """Return for every image its file or index, and its likeliest classes, each with its probability."""
        height = self.probabilities.copy()
        height[np.arange(len(height)), self.predicted] = np.inf  # the first of several that are equal after rounding
        order = np.argsort(-height, axis=1, kind="stable")[:, :count]
        names: Sequence[Any] = self.files or self.index.tolist()
        return [
            (str(name), [(classes[c], f"{shares[c]:.4f}") for c in best])
            for name, best, shares in zip(names, order, self.probabilities, strict=True)
        ]


def predict(
    model: nn.Module,
    config: Config,
    split: AnySplit,
    image_size: int,
    *,
    step: int,
    index: np.ndarray | None = None,
    corruption: str | None = None,
    severity: int = 3,
    base: Path | None = None,
) -> tuple[tuple[float, float, float], Predictions]:
    """Return mean loss, top-1 and top-5 in percent, and the predictions, of a run's model on images.

    Precision, determinism and draws are those of the run; the device is the one that ``config`` names.

    Args:
        model: of the run; it is moved to the device.
        config: of the run.
        split: the images.
        image_size: side in pixels of what the model takes.
        step: of the checkpoint.
        index: (N,) their numbers in the whole split, which seed a corruption; default: 0 to N - 1.
        corruption: of ``convnn.data.corruptions``; None: none.
        severity: 1 to 5.
        base: folder that names of files are relative to.
    """
    train, device = config.train, pick_device(config.device)
    set_determinism(train.deterministic)
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    own = np.arange(len(split)) if index is None else index
    data = replace(config.data, workers=0) if len(split) <= FEW else config.data
    size = train.eval_batch_size or train.batch_size
    batches = make_batches(split.to(device), size, data, image_size, channels_last=train.channels_last)
    if corruption is not None:
        batches.change = lambda images, rows: corrupted(images, own[rows].tolist(), corruption, severity)
    found: list[tuple[Tensor, Tensor]] = []

    def keep(output: Tensor, labels: Tensor) -> None:
        found.append((best_classes(output)[:, 0].cpu(), output.softmax(1).cpu()))

    autocast = make_autocast(train.amp, device)
    scores = evaluate(model.to(device), batches, autocast, seeds=(config.seed, step), each=keep)
    best, shares = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    files = None if split.paths is None else [os.path.relpath(os.fsdecode(path), base or ".") for path in split.paths]
    return scores, Predictions(own, split.labels.cpu().numpy(), best, shares, files)


def write_evaluation(out: Path, scores: dict[str, Any], found: Predictions, classes: Sequence[str]) -> None:
    """Write scores.json, per_class.csv, per_image.csv and predictions.npz into a folder, all of them or none.

    Raises:
        ConfigError: if a file would replace one that no evaluation wrote.
        OSError: if the disk refuses.
    """
    tables = {
        "per_class.csv": (("class", "images", "correct", "accuracy"), found.per_class(classes)),
        "per_image.csv": (
            ("file" if found.files else "index", "label", "predicted", "probability"),
            found.per_image(classes),
        ),
    }
    with Owner("evaluation", EVALUATION_LIST).written_aside(out) as aside:
        with naming(aside / "scores.json"):
            write_json(aside / "scores.json", scores)
        for name, (header, rows) in tables.items():
            with naming(aside / name):
                (aside / name).write_bytes(csv_text(header, rows))
        with naming(aside / PREDICTIONS):
            write_predictions(aside / PREDICTIONS, {"last": found.kept()})


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a table as the content of a CSV file."""
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue().encode(errors="surrogateescape")
