"""Loss and accuracy over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn.data.batches import Batches
from convnn.errors import StoppedError
from convnn.ops.precision import has_float64
from convnn.runtime import distributed
from convnn.runtime.device import seed_step


@dataclass
class Meter:
    """Sums over samples, kept on the device in float64, or where it has none in float32 (counts 16 million images)."""

    sums: Tensor

    @classmethod
    def new(cls, device: torch.device) -> Meter:
        """Return an empty meter."""
        return cls.of([0.0] * 4, device)

    @classmethod
    def of(cls, sums: Sequence[float], device: torch.device) -> Meter:
        """Return a meter that stands at these sums (4,)."""
        dtype = torch.float64 if has_float64(device) else torch.float32
        return cls(torch.tensor(sums, dtype=dtype, device=device))

    def add(self, loss: Tensor, output: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss and its logits (B, classes)."""
        top = best_classes(output) == labels[:, None]
        n = self.sums.new_full((), len(labels))  # filled there: to copy a number to a GPU would wait for it
        self.sums += torch.stack([loss.to(self.sums.dtype) * n, top[:, 0].sum(), top.any(1).sum(), n])

    def means(self) -> tuple[float, float, float]:
        """Return mean loss, top-1 and top-5 in percent, averaged over samples; NaN of none."""
        loss, top1, top5, n = self.sums.tolist()
        n = n or math.nan
        return loss / n, 100 * top1 / n, 100 * top5 / n


def best_classes(output: Tensor) -> Tensor:
    """Return the classes of the five highest logits, the highest first, or of all where there are fewer."""
    return output.topk(min(5, output.shape[1]), dim=1).indices


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    autocast: Callable[[], Any] = nullcontext,
    stop: Callable[[], int | None] | None = None,
    seeds: tuple[int, int] | None = None,
    each: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[float, float, float]:
    """Return mean loss, top-1 and top-5 (percent) over all samples of a split, whichever process has them.

    Args:
        model: in any mode, which it keeps.
        batches: of the split.
        autocast: context of the forward passes.
        stop: asked before every batch.
        seeds: seed of the run and its step, from which with the number of an image what is drawn for it follows
            (``eval_candidates=resample``); None: the generators stay as they are.
        each: gets the logits (B, classes) and the labels (B,) of every batch.

    Raises:
        StoppedError: when ``stop()`` names a signal.
    """
    training = model.training
    model.eval()
    meter = Meter.new(batches.device)
    with closing(batches.epoch()) as epoch:
        for number, (images, labels) in enumerate(epoch):
            if seeds is not None:
                seed_step(*seeds, batches.device, evaluation=True, image=number * batches.batch_size)
            if stop is not None and (signum := stop()) is not None:
                raise StoppedError(signum)
            with autocast():
                output = model(images)
            if len(labels):
                output = output.float()
                meter.add(F.cross_entropy(output, labels), output, labels)
                if each is not None:
                    each(output, labels)
    if batches.world_size > 1:
        meter.sums = distributed.reduce(meter.sums)
    model.train(training)
    return meter.means()
