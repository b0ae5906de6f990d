"""The model of a finished run, and its accuracy once more."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convnn.config.identity import differing, identity, lengthened, without_place
from convnn.config.load import read_values
from convnn.config.schema import Config
from convnn.data.datasets import load_dataset
from convnn.data.splits import Dataset
from convnn.data.stream import make_batches
from convnn.errors import ConfigError
from convnn.models.build import build_model
from convnn.models.swap import neighbor_layers
from convnn.runs.checkpoint import load_checkpoint, load_model_state
from convnn.runs.data_record import DataRecord
from convnn.runs.folder import known_record
from convnn.runtime.device import make_autocast, pick_device, set_determinism
from convnn.train.evaluate import evaluate

log = logging.getLogger("convnn")
_UNUSED = ("backbone.pretrained", "backbone.kwargs.checkpoint_path")
"""Keys that count for a run's beginning alone: a checkpoint has all weights."""


@dataclass
class Restored:
    """A run's model with the data that it is to be used on."""

    model: nn.Module
    """On the CPU; the averaged one if there is one."""
    image_size: int
    """Side in pixels of what the model takes."""
    dataset: Dataset
    """With labels that index the run's classes."""
    checkpoint: dict[str, Any]
    same_images: bool | None
    """Whether the compared splits have the images that the run had; None: it is not known."""


def load_run(
    config: Config, folder: Path, checkpoint: str, *, splits: Sequence[str] = ("test",), other_data: bool = False
) -> Restored:
    """Rebuild the model of ``checkpoints/<checkpoint>.pt``, and load the data.

    Args:
        config: of the run, as its folder has it.
        folder: of the run.
        checkpoint: ``last`` or ``best``.
        splits: those whose images must be the run's.
        other_data: they may be others, of the same classes; that is said.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or does not fit.
        ConfigError: if the configuration or the data is not that of the run, naming what differs.
    """
    path = folder / "checkpoints" / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    _check_config(config, folder, state)
    known = DataRecord.read(state) or known_record(folder)
    data = config.data
    if known is not None and known.shape and data.target == "convnn.data.load_imagefolder" and not data.load_size:
        data = replace(data, load_size=known.shape[-1])  # that of the run, whatever the files' sizes are now
    dataset, same = _as_trained(load_dataset(data), known, folder, splits, other_data)
    config.backbone.pretrained = False
    config.backbone.kwargs.pop("checkpoint_path", None)  # timm is not to open other files
    model, _, image_size = build_model(config, dataset)
    load_model_state(model, state["ema"] or state["model"], path)
    for name, layer in neighbor_layers(model).items():
        layer.set_spectrum(**state["spectrum"][name])
        layer.backend = "auto"  # a run that demanded kernels may be evaluated without them
    return Restored(model, image_size, dataset, state, same)


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


def evaluate_run(config: Config, folder: Path, checkpoint: str, *, other_data: bool = False) -> dict[str, Any]:
    """Evaluate ``checkpoints/<checkpoint>.pt`` of a run on its test set, on the device that ``config`` names.

    Precision, determinism and draws are those of the run. Arguments and errors as of ``load_run``.
    """
    device = pick_device(config.device)
    set_determinism(config.train.deterministic)
    run = load_run(config, folder, checkpoint, other_data=other_data)
    model, train = run.model, config.train
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    size = train.eval_batch_size or train.batch_size
    split = run.dataset.test.to(device)
    batches = make_batches(split, size, config.data, run.image_size, channels_last=train.channels_last)
    seeds = config.seed, run.checkpoint["step"]
    loss, top1, top5 = evaluate(model.to(device), batches, make_autocast(train.amp, device), seeds=seeds)
    scores = {"loss": loss, "top1": top1, "top5": top5, "same_images": run.same_images}
    return {"checkpoint": checkpoint, "epochs": run.checkpoint["epoch"], "images": len(split)} | scores
