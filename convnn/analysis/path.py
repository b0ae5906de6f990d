"""The loss on the straight way between two sets of weights: from those that a run began with to those it ended with.

Goodfellow, Vinyals & Saxe, *Qualitatively characterizing neural network optimization problems*, ICLR 2015 (arXiv
1412.6544), section 3. Parameters are (1 - t) first + t last. BatchNorm's statistics are not interpolated but
recomputed at each t, from the training images: reset, then averaged over batches of 64 (each counts the same) with all
else in evaluation mode, before the loss is measured in evaluation mode.

    rise = the most that the training loss climbs from one t to a later one; 0: it falls all the way (Lucas et al. 2021,
           arXiv 2104.11044)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn.analysis.base import Analysis, ArmResults, NotApplicable, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, figure_of
from convnn.analysis.subject import Subject
from convnn.analysis.training import training_images
from convnn.config.identity import loads_weights
from convnn.config.load import load_config
from convnn.models.build import build_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLACES = tuple(round(0.1 * i, 1) for i in range(11))
LEAST_FALL = 0.05
"""Share of the first loss; a share of a smaller fall says nothing."""
Batch = tuple[Tensor, Tensor]
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back at the end."""
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(kept)


@torch.no_grad()
def place_between(model: nn.Module, first: Mapping[str, Tensor], last: Mapping[str, Tensor], t: float) -> None:
    """Set the parameters of a model to (1 - t) first + t last, both by name; its buffers stay."""
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(first[name].to(parameter), last[name].to(parameter), t))


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Set each BatchNorm's running mean and variance to the average over batches; all else stays in evaluation mode.

    Raises:
        NotApplicable: if no batch has two images.
    """
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.track_running_stats]
    if not norms:
        return
    if all(len(images) < 2 for images, _ in batches):
        raise NotApplicable("BatchNorm's statistics need 2 images or more: images=2")
    before = [(norm.training, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # a cumulative average
    for images, _ in batches:
        if len(images) > 1:  # one image more or less would count as much as a batch
            model(images)
    for norm, (training, momentum) in zip(norms, before, strict=True):
        norm.train(training)
        norm.momentum = momentum


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean cross entropy over the images, in nats."""
    total = sum(F.cross_entropy(model(images).float(), labels, reduction="sum").item() for images, labels in batches)
    return total / sum(len(labels) for _, labels in batches)


def loss_between(
    model: nn.Module,
    first: Mapping[str, Tensor],
    last: Mapping[str, Tensor],
    places: Sequence[float],
    statistics: Sequence[Batch],
    measured: Mapping[str, Sequence[Batch]],
) -> dict[str, list[float]]:
    """Return the losses between two sets of weights.

    Args:
        model: in evaluation mode; it is left as it was.
        first: parameters by name, at t = 0.
        last: at t = 1.
        places: the values of t.
        statistics: batches from which BatchNorm's statistics are recomputed at each t.
        measured: batches by name, on which the loss is measured.

    Returns:
        A loss for each place, by the names of ``measured``.

    Raises:
        NotApplicable: as of ``recompute_statistics``.
    """
    found: dict[str, list[float]] = {name: [] for name in measured}
    with restored(model):
        for t in places:
            place_between(model, first, last, t)
            recompute_statistics(model, statistics)
            for name, batches in measured.items():
                found[name].append(mean_loss(model, batches))
    return found


def first_weights(subject: Subject) -> dict[str, Tensor]:
    """Return the parameters that a run began with: they follow from its configuration and seed.

    Raises:
        NotApplicable: if they came from a file, which may have changed since.
    """
    config = load_config(subject.folder)
    if loads_weights(asdict(config.backbone)):
        raise NotApplicable("it began from the weights of a file")
    shape = (subject.channels, *subject.split.shape[1:])
    network, _, _ = build_network(config, len(subject.classes), shape)
    return {name: value.detach() for name, value in network.named_parameters()}


def measure(subject: Subject) -> Result:
    """Measure on as many training images as the analysis has of test images, and on these."""
    first = first_weights(subject)
    last = {name: value.detach().clone() for name, value in subject.model.named_parameters()}
    train = list(replace(subject, split=training_images(subject), _images=None).batches())
    found = loss_between(subject.model, first, last, PLACES, train, {"train": train, "test": list(subject.batches())})
    return {"series": {name: {"at": list(PLACES), "values": values} for name, values in found.items()}}


def largest_rise(values: Sequence[float]) -> float:
    """Return the most by which a sequence climbs from a value to a later one; 0 if it never does."""
    return max(value - least for value, least in zip(values, accumulate(values, min), strict=True))


def headline(result: Result) -> dict[str, float]:
    """Return the largest rise of the training loss on the way, and the share of its fall that half the way has.

    The latter is not known, and left out, where the loss falls by less than ``LEAST_FALL`` of what it was.
    """
    losses = result["series"]["train"]["values"]
    fall = losses[0] - losses[-1]
    found = {"path_rise": largest_rise(losses)}
    if fall > 0 and fall >= LEAST_FALL * losses[0]:
        found["path_half"] = (losses[0] - losses[PLACES.index(0.5)]) / fall
    return found


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw both losses on the way, and the largest rise along the spectrum."""

    def panels(axes: list[Any]) -> dict[str, Any]:
        entries = draw_series(axes[0], arms, "train", "training loss (nats)", "t: from the first weights to the last")
        draw_series(axes[1], arms, "test", "test loss (nats)", "t: from the first weights to the last")
        draw_headline(axes[2], arms, headline, "path_rise", "largest rise of the training loss (nats)")
        draw_headline(axes[3], arms, headline, "path_half", "share of the fall at t = 0.5")
        return entries

    return figure_of(4, panels, f"Loss between first and last weights ({INTERVAL})")


ANALYSIS = Analysis(
    title="Loss between two checkpoints",
    source="Goodfellow et al., ICLR 2015 (arXiv 1412.6544), section 3; Lucas et al. 2021 (arXiv 2104.11044)",
    measure=measure,
    headline=headline,
    draw=draw,
    images=128,
)
