"""A trained model at other settings of its layers, on its test images: accuracy, agreement, what neighbours hold, cost.

Nothing is trained. The model is loaded once and the images are decoded once; a point gets new layers with the old
weights (``convnn.models.moving``). Shapes: N images, B batch.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convnn.config.identity import loads_weights
from convnn.config.schema import Config, SwapConfig
from convnn.data.corruptions import check_corruption, corrupted
from convnn.data.datasets import load_dataset
from convnn.data.splits import AnySplit, Split, balanced
from convnn.data.stream import make_batches
from convnn.errors import ConfigError
from convnn.models.build import build_model, kept_weights
from convnn.models.cost import check_output, forward_cost
from convnn.models.mass import Held, held_by_neighbors
from convnn.models.moving import Moving
from convnn.models.swap import neighbor_layers
from convnn.runtime.device import make_autocast, pick_device, set_determinism
from convnn.stats.proportions import paired_share_difference, wilson_interval
from convnn.train.predictions import FEW, Predictions, predict
from convnn.train.restore import Asked, asked_images

log = logging.getLogger("convnn")
HELD_IMAGES, _AT_ONCE = 64, 8
"""Images, evenly spread, on which it is measured what neighbours hold, and how many of them at once."""


@dataclass
class Trained:
    """A trained model with the images that it is evaluated on."""

    model: nn.Module
    config: Config
    """Of the model as it was trained, or as its weights are."""
    images: Split
    """Decoded, and corrupted if that was asked for."""
    index: np.ndarray
    """(N,) numbers of the images in the whole split."""
    classes: list[str]
    image_size: int
    """Side in pixels of what the model takes."""
    channels: int
    step: int = 0
    """Of the checkpoint; random draws follow from it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of model and images, as an evaluation's scores have them."""


@dataclass(frozen=True)
class Point:
    """Settings to evaluate a model at."""

    values: Mapping[str, str]
    """Of the axes, by key."""
    config: Config
    moved: frozenset[str]
    """Names of the operator's settings that are to be those of ``config``."""

    @property
    def label(self) -> str:
        """The settings in one line, such as ``k=9 blend=0.5``."""
        return " ".join(f"{key.removeprefix('operator.')}={value}" for key, value in self.values.items())


@dataclass(frozen=True)
class Row:
    """How a model did at a point; accuracies and their intervals in percent and points, of 95 %."""

    values: Mapping[str, str]
    """Of the axes, by key; empty for the model's own settings."""
    label: str
    moved: str
    """``all`` layers, the name of the one that moved, or ``none``."""
    depth: int | None
    """Of the layer that moved alone, from 0."""
    images: int
    top1: float
    top1_low: float
    top1_high: float
    top5: float
    loss: float
    difference: float | None
    """Top-1 less that at the model's own settings, on the same images; None for those."""
    difference_low: float | None
    difference_high: float | None
    agreement: float
    """Share of the images that get the same class as at the model's own settings, in percent."""
    mass: float | None
    """Mean over the moved layers, see ``convnn.models.mass.Held``; None where no softmax weighs neighbours."""
    window: float | None
    """Mean over the moved layers, likewise."""
    seconds_per_image: float
    """Of the whole evaluation, input included."""
    gflops: float | None
    """Of the forward pass of one image; None: cannot be counted."""
    layers: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Of each moved layer that chooses neighbours: ``k``, ``blend``, ``temperature``, ``mass`` and ``window``."""


def trained_run(config: Config, folder: Path, checkpoint: str, asked: Asked, *, other_data: bool = False) -> Trained:
    """Return the model of a run's checkpoint with its images; arguments and errors as of ``predict_run``."""
    run, split, index, same = asked_images(config, folder, checkpoint, asked, other_data=other_data)
    images = decoded(split, config, run.image_size, index, asked)
    facts = {"checkpoint": checkpoint, "epochs": run.checkpoint["epoch"], "images": len(index), "same_images": same}
    return Trained(
        run.model.eval(),
        config,
        images,
        index,
        run.classes,
        run.image_size,
        run.shape[0],
        run.checkpoint["step"],
        facts,
    )


def trained_backbone(config: Config, asked: Asked) -> Trained:
    """Return a backbone with the weights of a file, before any swap, and the test set of ``config.data``.

    Raises:
        ConfigError: if the configuration names no weights, or weights or data cannot be had.
    """
    if not loads_weights(asdict(config.backbone)):
        raise ConfigError(
            "there is no trained model: give run=DIR, or the weights of the backbone "
            "(backbone.pretrained=true, or backbone.checkpoint=FILE)"
        )
    check_corruption(asked.corruption, asked.severity)
    plain = replace(config, swap=SwapConfig(match=None))
    dataset = load_dataset(config.data)
    model, report, image_size = build_model(plain, dataset)
    text, most = kept_weights(plain, model, report, image_size) or ("", True)
    anew = "anew" in text or not most
    log.log(logging.WARNING if anew else logging.INFO, "%s%s", text, "; that is untrained" if anew else "")
    index = balanced(dataset.test.labels.numpy(), asked.limit, np.random.default_rng(config.data.split_seed))
    split = dataset.test.take(torch.from_numpy(index))
    images, channels = decoded(split, config, image_size, index, asked), dataset.test.shape[0]
    return Trained(model.eval(), plain, images, index, dataset.classes, image_size, channels, 0, {"images": len(index)})


def decoded(split: AnySplit, config: Config, image_size: int, index: np.ndarray, asked: Asked) -> Split:
    """Return images as an evaluation has them before it normalises them, in memory: read and corrupted once.

    Args:
        split: the images.
        config: of the run.
        image_size: side in pixels of what the model takes.
        index: (N,) their numbers in the whole split, which seed a corruption.
        asked: names the corruption.
    """
    if isinstance(split, Split) and asked.corruption is None:
        return split
    kept: list[Tensor] = []

    def keep(images: Tensor, rows: list[int]) -> Tensor:
        if asked.corruption is not None:
            images = corrupted(images, index[rows].tolist(), asked.corruption, asked.severity)
        kept.append(images.clone())
        return images

    size = config.train.eval_batch_size or config.train.batch_size
    data = replace(config.data, workers=0) if len(split) <= FEW else config.data
    batches = make_batches(split, size, data, image_size)
    batches.change = keep
    with closing(batches.epoch()) as epoch:
        for _ in epoch:
            pass
    return Split(torch.cat(kept), split.labels, split.paths)


def evaluate_points(
    trained: Trained, points: Sequence[Point], *, each: bool = False, tell: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Evaluate a model at its own settings and at the points, all of which are checked before the first is evaluated.

    Args:
        trained: model and images.
        points: where its layers are to move.
        each: also move one layer alone at a time, the others staying where they are.
        tell: called with every row as it is there.

    Returns:
        The row of the model's own settings, then of each point one of all layers moved and, with ``each``, one a layer.

    Raises:
        ConfigError: if a point is not possible, naming the setting or the layer.
    """
    moving = Moving(
        trained.model, trained.config.backbone, (len(trained.classes), trained.channels, trained.image_size)
    )
    device = pick_device(trained.config.device)
    trained.model.to(device)
    own_k = trained.config.operator.k
    for point in points:
        with moving.placed(moving.layers(point.config, point.moved, own_k)) as model:
            check_output(model.to(device), trained.channels, trained.image_size, len(trained.classes))
    bench = _Bench(trained, device, tell)
    rows = [bench.row(trained.model, None, moving.swapped, "none")]
    for point in points:
        layers = moving.layers(point.config, point.moved, own_k)
        with moving.placed(layers) as model:
            rows.append(bench.row(model, point, list(layers), "all"))
        for depth, name in enumerate(layers if each else ()):
            with moving.placed({name: layers[name]}) as model:
                rows.append(bench.row(model, point, [name], name, depth))
    return rows


class _Bench:
    """Evaluates a model where it stands, and compares with the first evaluation."""

    def __init__(self, trained: Trained, device: torch.device, tell: Callable[[Row], None]) -> None:
        self.trained, self.device, self.tell = trained, device, tell
        total = len(trained.images)
        places = torch.linspace(0, total - 1, min(HELD_IMAGES, total), dtype=torch.float64).round().long()
        self._few = trained.images.take(places)
        self._own: Predictions | None = None

    def row(
        self, model: nn.Module, point: Point | None, layers: Collection[str], moved: str, depth: int | None = None
    ) -> Row:
        """Return how the model does; ``layers`` are the names of those that moved."""
        trained, config = self.trained, self.trained.config
        set_determinism(config.train.deterministic)
        held = self._held(model.to(self.device), layers)  # first, so that the time is that of a warm model
        start = time.perf_counter()
        (loss, top1, top5), found = predict(
            model, config, trained.images, trained.image_size, step=trained.step, index=trained.index
        )
        seconds = time.perf_counter() - start
        right = found.predicted == found.label
        n, own = len(right), self._own or found
        self._own = own
        low, high = wilson_interval(int(right.sum()), n)
        apart: tuple[float | None, float | None, float | None] = (None, None, None)
        if point is not None:
            gain, least, most = paired_share_difference(right, own.predicted == own.label)
            apart = 100 * gain, 100 * least, 100 * most
        row = Row(
            values=point.values if point else {},
            label=point.label if point else "own",
            moved=moved,
            depth=depth,
            images=n,
            top1=top1,
            top1_low=100 * low,
            top1_high=100 * high,
            top5=top5,
            loss=loss,
            difference=apart[0],
            difference_low=apart[1],
            difference_high=apart[2],
            agreement=100 * float((found.predicted == own.predicted).mean()),
            mass=_mean([one["mass"] for one in held.values()]),
            window=_mean([one["window"] for one in held.values()]),
            seconds_per_image=seconds / n,
            gflops=self._gflops(model),
            layers=held,
        )
        self.tell(row)
        return row

    def _held(self, model: nn.Module, layers: Collection[str]) -> dict[str, dict[str, Any]]:
        """Return what the neighbours of the layers in question hold, by the name of the replaced layer."""
        train, few = self.trained.config.train, self._few.to(self.device)
        data = replace(self.trained.config.data, workers=0)
        batches = make_batches(few, _AT_ONCE, data, self.trained.image_size, channels_last=train.channels_last)
        model.eval()
        with make_autocast(train.amp, self.device)():
            found = held_by_neighbors(model, (images for images, _ in batches.epoch())) if layers else {}
        spectra = neighbor_layers(model)
        named: dict[str, dict[str, Any]] = {}
        for name in layers:
            inner = next((one for one in found if one == name or one.startswith(f"{name}.")), None)
            if inner is None:
                continue
            held: Held = found[inner]
            stands = spectra[inner].spectrum() if inner in spectra else {}
            named[name] = {**stands, "mass": held.mass, "window": held.window}
        return named

    def _gflops(self, model: nn.Module) -> float | None:
        try:
            return forward_cost(model, self.trained.channels, self.trained.image_size).total / 1e9
        except ConfigError:
            return None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
