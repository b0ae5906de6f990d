"""What a run keeps of its test set's evaluations: predictions.npz, of the last epoch and of the best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from convnn.data.batches import Batches
from convnn.errors import ConfigError
from convnn.runs.contents import PREDICTIONS
from convnn.runs.folder import RunFolder
from convnn.runs.predictions import KeptPredictions, read_predictions, write_predictions
from convnn.runtime import distributed
from convnn.train.evaluate import best_classes

log = logging.getLogger("convnn")


class TestOutputs:
    """Collects what the model says of the test images of an epoch, and writes what the run keeps of it.

    The best epoch's are written when it has ended, those of the last beside them before its checkpoint, so that a run
    that goes on from a checkpoint finds in the file what it had collected by then.
    """

    __test__ = False  # pytest takes it for tests

    def __init__(self, keep: str, batches: Batches, folder: RunFolder) -> None:
        """Collect nothing yet.

        Args:
            keep: ``probabilities``, ``classes`` or ``off``.
            batches: of the test set.
            folder: of the run.
        """
        self.keep, self.batches, self.folder = keep, batches, folder
        self._parts: list[tuple[Tensor, ...]] = []

    def taking(self, split: str) -> Callable[[Tensor, Tensor], None] | None:
        """Return what takes the logits (B, K) float32 and labels (B,) of each batch of an evaluation that begins now.

        None: nothing of this split is kept. What an evaluation before left is forgotten.
        """
        if split != "test" or self.keep == "off":
            return None
        self._parts = []
        return self._add

    def _add(self, output: Tensor, labels: Tensor) -> None:
        shares = (output.softmax(1).half(),) if self.keep == "probabilities" else ()
        self._parts.append(tuple(part.cpu() for part in (labels, best_classes(output)[:, 0], *shares)))

    def write(self, epoch: int, best: Mapping[str, float], is_last: bool) -> None:
        """Write those of an epoch that is the best so far or the last; every process must ask, the first writes.

        Args:
            epoch: whose evaluation was collected, from 0.
            best: of the run's state; its epoch is the best so far.
            is_last: the run ends with this epoch.
        """
        if self.keep == "off" or not (is_last or best["epoch"] == epoch):
            return
        found = self._gathered(epoch)
        if not self.folder.writes:
            return
        kept = {"last": found} if is_last else {}
        of_best = found if best["epoch"] == epoch else self._written_best(best["epoch"])
        if of_best is not None:
            kept["best"] = of_best
        write_predictions(self.folder.path / PREDICTIONS, kept)

    def _gathered(self, epoch: int) -> KeptPredictions:
        """Return what all processes collected, in the order of the test set."""
        mine = [torch.cat(part).numpy() for part in zip(*self._parts, strict=True)] if self._parts else None
        parts = [part for part in distributed.gather((self.batches.numbers(), mine)) if part[1] is not None]
        index = np.concatenate([numbers for numbers, _ in parts])
        order = np.argsort(index)
        label, predicted, *shares = (np.concatenate(same)[order] for same in zip(*(p for _, p in parts), strict=True))
        return KeptPredictions(index[order], label, predicted, shares[0] if shares else None, epoch)

    def _written_best(self, epoch: float) -> KeptPredictions | None:
        """Return those of the best epoch from the file that it left, or None with a word in the log."""
        try:
            found = read_predictions(self.folder.path, "best")
        except ConfigError as error:
            log.warning("%s", error)
            found = None
        if found is not None and found.epoch == epoch:
            return found
        log.warning(
            "%s has the last epoch's predictions alone, as those of the best epoch, %d, are not there; "
            "scripts/evaluate.py run=%s checkpoint=best writes them",
            PREDICTIONS, epoch + 1, self.folder.path,
        )  # fmt: skip
        return None
