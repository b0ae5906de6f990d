"""The model of a finished run, and its accuracy once more."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convnn.config.identity import differing, identity, lengthened, without_place
from convnn.config.load import read_values
from convnn.config.schema import Config, DataConfig
from convnn.data.corruptions import check_corruption
from convnn.data.datasets import load_dataset
from convnn.data.files import class_folder
from convnn.data.splits import AnySplit, Dataset, balanced, split_fingerprint
from convnn.errors import ConfigError
from convnn.models.build import build_network, without_weights
from convnn.models.swap import neighbor_layers
from convnn.runs.checkpoint import load_checkpoint, load_model_state
from convnn.runs.data_record import DataRecord
from convnn.runs.folder import known_record
from convnn.runs.record import read_result
from convnn.runs.status import COMPLETE, DIVERGED, UNFINISHED
from convnn.train.predictions import Predictions, predict

log = logging.getLogger("convnn")
_UNUSED = (
    "backbone.pretrained",
    "backbone.checkpoint",
    "backbone.checkpoint_sha256",
    "backbone.kwargs.checkpoint_path",
    "swap.init",
)
"""Keys that count for a run's beginning alone: a checkpoint has all weights."""


@dataclass
class Restored:
    """A run's model with the data that it is to be used on."""

    model: nn.Module
    """On the CPU; the averaged one if there is one."""
    image_size: int
    """Side in pixels of what the model takes."""
    classes: list[str]
    """Names, in the order of the model's logits."""
    shape: list[int]
    """Channels, rows and columns of the images that the run was trained on."""
    checkpoint: dict[str, Any]
    dataset: Dataset | None = None
    """With labels that index the run's classes; None: nothing of the data was needed."""
    same_images: bool | None = None
    """Whether the compared splits have the images that the run had; None: it is not known."""


def load_run(
    config: Config,
    folder: Path,
    checkpoint: str,
    *,
    splits: Sequence[str] = ("test",),
    other_data: bool = False,
    load: Callable[[DataConfig], Dataset] = load_dataset,
) -> Restored:
    """Rebuild the model of ``checkpoints/<checkpoint>.pt``, and load the data where that is needed.

    A run that is not complete is a warning.

    Args:
        config: of the run, as its folder has it.
        folder: of the run.
        checkpoint: ``last`` or ``best``.
        splits: those whose images are used and must be the run's; none: the run folder suffices, unless it is an old
            one that does not tell the classes and the size of the images.
        other_data: data that the user named: its images may be others, of the same classes; that is said.
        load: loads the data, where several runs share it.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or does not fit.
        ConfigError: if the configuration or the data is not that of the run, naming what differs.
    """
    path = folder / "checkpoints" / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    _check_config(config, folder, state)
    known = DataRecord.read(state) or known_record(folder)
    dataset, same = None, None
    if splits or other_data or known is None or known.shape is None:
        dataset, same = _as_trained(
            _load_data(config, known, folder, load, other_data), known, folder, splits, other_data
        )
        classes, shape = dataset.classes, list(dataset.train.shape)
    else:
        classes, shape = known.classes, known.shape
    config.backbone = without_weights(config.backbone)  # timm is not to open other files
    model, _, image_size = build_network(config, len(classes), shape)
    load_model_state(model, state["ema"] or state["model"], path)
    for name, layer in neighbor_layers(model).items():
        layer.set_spectrum(**state["spectrum"][name])
        layer.backend = "auto"  # a run that demanded kernels may be evaluated without them
    _warn_unless_complete(config, folder, checkpoint, state)
    return Restored(model, image_size, classes, shape, state, dataset, same)


def _warn_unless_complete(config: Config, folder: Path, checkpoint: str, state: dict[str, Any]) -> None:
    """Warn that a run is interrupted, has diverged or is still to end, with what its checkpoint is worth."""
    result, train = read_result(folder) or {}, config.train
    status = result.get("status", UNFINISHED)
    if status == COMPLETE and len(result.get("extended_from") or ()) < len(train.extended_from):
        status = UNFINISHED  # it was complete before it was extended
    if status == COMPLETE:
        return
    most = "" if train.max_steps is None else f", of at most {train.max_steps}"
    log.warning(
        "%s %s; the weights of its %s checkpoint are those after %d of %d epochs (step %d%s)",
        folder,
        "has diverged" if status == DIVERGED else f"is {status}",
        checkpoint,
        state["epoch"],
        train.epochs,
        state["step"],
        most,
    )


def _load_data(
    config: Config, known: DataRecord | None, folder: Path, load: Callable[[DataConfig], Dataset], other_data: bool
) -> Dataset:
    """Load the data of a run, as it was for the run.

    Raises:
        ConfigError: if it cannot be had; where the run folder should have told what is asked, it says so.
    """
    data = config.data
    if known is not None and known.shape and data.target == "convnn.data.load_imagefolder" and not data.load_size:
        data = replace(data, load_size=known.shape[-1])  # that of the run, whatever the files' sizes are now
    try:
        return load(data)
    except ConfigError as error:
        if known is not None and known.shape is not None:
            if other_data:  # which the user named
                raise
            raise ConfigError(f"{error}; if the data moved, name its place by data_root=DIR") from error
        lacks = "the size of its images" if known else "the names of its classes and the size of its images"
        raise ConfigError(
            f"run={folder} is of before runs recorded {lacks}, and its data cannot be read ({error}); "
            "give the folder of that data with data_root=DIR"
        ) from error


def _check_config(config: Config, folder: Path, state: dict[str, Any]) -> None:
    """Raise ConfigError, naming key and values, unless the checkpoint was trained with this configuration."""
    now, trained = without_place(identity(config)), without_place(state["identity"])
    found = differing(now, lengthened(trained, now))
    there = read_values(folder)
    lines = [
        f"{key}: {here}{'' if _has(there, key) else ' by default, as it is missing'}, in the run {then}"
        for key, (here, then) in found.items()
        if key not in _UNUSED
    ]
    if lines:
        path = folder / "config.yaml"
        raise ConfigError(f"{path} is not what the run was trained with ({'; '.join(lines[:5])}); mend it")


def _has(values: Any, key: str) -> bool:
    """Return whether nested mappings have a dotted key."""
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True


def _as_trained(
    dataset: Dataset, known: DataRecord | None, folder: Path, splits: Sequence[str], other_data: bool
) -> tuple[Dataset, bool | None]:
    """Return a data set with its classes in the order of the run, and whether its ``splits`` are the run's."""
    if known is None:
        return dataset, None
    if dataset.classes != known.classes:
        ordered = dataset.ordered_as(known.classes)
        log.warning("the data has the classes of %s in another order; they are taken by name", folder)
        dataset = ordered
    now = DataRecord.of(dataset)
    if not other_data:
        known.check(now, f"run={folder}", "put it back, or name the data to use with data_root=DIR", splits)
    elif other := known.differences(now, splits):
        log.warning("the data is not that of %s (%s)", folder, "; ".join(other))
    return dataset, not known.differences(now, splits)


@dataclass(frozen=True)
class Asked:
    """The images that a run is evaluated on."""

    folder: Path | None = None
    """Of class folders; None: the run's own test set."""
    corruption: str | None = None
    """Of ``convnn.data.corruptions``; None: the images as they are."""
    severity: int = 3
    """1 to 5."""
    limit: int | None = None
    """Only so many, spread evenly over the classes; the same ones each time."""

    @property
    def name(self) -> str:
        """What the images are called, where a folder is named after them; empty: the whole test set as it is."""
        place = self.folder.resolve() if self.folder else None
        # Folders of one name at several places, such as "test", are told apart.
        parts = [f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:6]}"] if place else []
        parts += [f"{self.corruption}-{self.severity}"] if self.corruption else []
        return "-".join([*parts, *([f"limit{self.limit}"] if self.limit else [])])


def evaluate_run(config: Config, folder: Path, checkpoint: str, *, other_data: bool = False) -> dict[str, Any]:
    """Return the scores of ``predict_run`` on the run's own test set."""
    return predict_run(config, folder, checkpoint, other_data=other_data)[0]


def asked_images(
    config: Config, folder: Path, checkpoint: str, asked: Asked, *, other_data: bool = False
) -> tuple[Restored, AnySplit, np.ndarray, bool | None]:
    """Return a run's model, the images that it is to be evaluated on, and what is known of them.

    Arguments and errors as of ``predict_run``.

    Returns:
        The model, the images, their numbers in the whole split (N,), and whether that split is the run's own test set;
        None: it is not known.
    """
    check_corruption(asked.corruption, asked.severity)
    run = load_run(config, folder, checkpoint, splits=() if asked.folder else ("test",), other_data=other_data)
    if asked.folder:
        split: AnySplit = class_folder(asked.folder, run.classes, run.shape, run.image_size)
        known = DataRecord.read(run.checkpoint)
        same = None if known is None else split_fingerprint(split) == known.content.get("test")
    else:
        assert run.dataset is not None
        split, same = run.dataset.test, run.same_images
    index = balanced(split.labels.numpy(), asked.limit, np.random.default_rng(config.data.split_seed))
    return run, split.take(torch.from_numpy(index)), index, same


def predict_run(
    config: Config, folder: Path, checkpoint: str, asked: Asked | None = None, *, other_data: bool = False
) -> tuple[dict[str, Any], Predictions, list[str]]:
    """Evaluate ``checkpoints/<checkpoint>.pt`` of a run on the device that ``config`` names.

    Precision, determinism and draws are those of the run. Arguments and errors as of ``load_run``; ``asked`` says on
    what, by default on the run's test set.

    Returns:
        The scores, what the model says of each image, and the names of the classes.
    """
    asked = asked or Asked()
    run, split, index, same = asked_images(config, folder, checkpoint, asked, other_data=other_data)
    (loss, top1, top5), found = predict(
        run.model,
        config,
        split,
        run.image_size,
        step=run.checkpoint["step"],
        index=index,
        corruption=asked.corruption,
        severity=asked.severity,
        base=asked.folder or Path(config.data.root),
    )
    scores: dict[str, Any] = {"checkpoint": checkpoint, "epochs": run.checkpoint["epoch"], "images": len(index)}
    scores |= {"loss": loss, "top1": top1, "top5": top5, "same_images": same}
    if asked.folder:
        scores["data"] = str(asked.folder)
    if asked.corruption:
        scores |= {"corruption": asked.corruption, "severity": asked.severity}
    return scores, found, run.classes
