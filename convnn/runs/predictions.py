"""predictions.npz: what a run's model says of each test image. Imports no torch. Shapes: N images, K classes."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convnn.errors import ConfigError
from convnn.runs.contents import EVALUATIONS, PREDICTIONS
from convnn.runtime.files import write_atomically

PREFIX = {"last": "", "best": "best_"}
"""Of the names of the arrays, by the checkpoint that they are of."""
_DAMAGE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, RuntimeError),  # RuntimeError: a spoilt byte says that the archive is encrypted
)


@dataclass
class KeptPredictions:
    """The classes that the model of one epoch gives to the test images."""

    index: np.ndarray
    """(N,) integers: number of the image in the run's test set."""
    label: np.ndarray
    """(N,) integers."""
    predicted: np.ndarray
    """(N,) integers: class of the highest logit."""
    probabilities: np.ndarray | None = None
    """(N, K) float16, if they are kept."""
    epoch: int | None = None
    """Number of the epoch, from 0; None: an evaluation that does not say it."""

    def correct(self) -> np.ndarray:
        """Return (N,) bool: whether the image got its own class."""
        return self.predicted == self.label

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what a file holds, by name, in the smallest types that ``read_predictions`` takes back exactly."""
        top = int(max(self.label.max(initial=0), self.predicted.max(initial=0)))
        kind = np.min_scalar_type(top)
        found = {"index": self.index.astype(np.int32)}
        found |= {"label": self.label.astype(kind), "predicted": self.predicted.astype(kind)}
        if self.probabilities is not None:
            found["probabilities"] = self.probabilities.astype(np.float16)
        return found | ({} if self.epoch is None else {"epoch": np.asarray(self.epoch)})


def archive(file: BinaryIO, kept: Mapping[str, KeptPredictions]) -> None:
    """Write the predictions of one or both checkpoints, by ``last`` and ``best``, into an open file.

    Equal predictions make equal bytes. Images and labels are written once.
    """
    arrays: dict[str, Any] = {
        PREFIX[which] + name: values
        for which, found in kept.items()
        for name, values in found.arrays().items()
        if name not in ("index", "label")
    }
    first = next(iter(kept.values())).arrays()
    np.savez(file, index=first["index"], label=first["label"], **arrays)


def write_predictions(path: Path, kept: Mapping[str, KeptPredictions]) -> None:
    """Write ``archive`` to a path in one step.

    Raises:
        OSError: if the disk refuses; what stood there still does.
    """
    write_atomically(path, lambda file: archive(file, kept))


def read_predictions(folder: Path, which: str = "last") -> KeptPredictions | None:
    """Return what a run folder knows of each test image; None if it has none of that checkpoint.

    The run's own file counts first, then the one that ``scripts/evaluate.py run=DIR checkpoint=...`` left.

    Args:
        folder: of the run.
        which: ``last`` or ``best``.

    Raises:
        ConfigError: if a file is damaged.
    """
    own = _read(folder / PREDICTIONS, PREFIX[which])
    return own if own is not None else _read(folder / EVALUATIONS / which / PREDICTIONS, "")


def _read(path: Path, prefix: str) -> KeptPredictions | None:
    """Return the arrays of a file whose names have a prefix; None if there are none."""
    if not path.exists():
        return None
    try:
        with np.load(path) as found:
            if f"{prefix}predicted" not in found:
                return None
            index, label, predicted = (found[n].astype(np.int64) for n in ("index", "label", f"{prefix}predicted"))
            optional: dict[str, Any] = {name: found.get(prefix + name) for name in ("probabilities", "epoch")}
        shapes = {part.shape for part in (index, label, predicted)}
        if len(shapes) != 1 or index.ndim != 1:
            raise ValueError(f"arrays of {', '.join(map(str, sorted(shapes)))}")
        probabilities, epoch = optional["probabilities"], optional["epoch"]
        if probabilities is not None and (probabilities.ndim != 2 or len(probabilities) != len(index)):
            raise ValueError(f"probabilities of {probabilities.shape} for {len(index)} images")
        return KeptPredictions(index, label, predicted, probabilities, None if epoch is None else int(epoch))
    except _DAMAGE as error:
        raise ConfigError(f"{path} is damaged ({' '.join(str(error).split())[:120]}); remove it") from error
