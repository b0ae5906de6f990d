"""The model of a finished run, and its accuracy once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from convnn.config.schema import Config
from convnn.data.datasets import load_dataset
from convnn.data.splits import Dataset
from convnn.data.stream import make_batches
from convnn.models.build import build_model
from convnn.models.swap import neighbor_layers
from convnn.runs.checkpoint import load_checkpoint, load_model_state
from convnn.runtime.device import make_autocast, pick_device, set_determinism
from convnn.train.evaluate import evaluate


def load_run(config: Config, folder: Path, checkpoint: str, dataset: Dataset) -> tuple[nn.Module, int, dict[str, Any]]:
    """Rebuild the model of ``checkpoints/<checkpoint>.pt`` (the averaged one if there is one), on the CPU.

    Returns:
        The model, its image side in pixels, and the checkpoint.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or does not fit.
    """
    path = folder / "checkpoints" / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    config.backbone.pretrained = False  # the checkpoint has all weights
    config.backbone.kwargs.pop("checkpoint_path", None)  # and timm is not to open other files
    model, _, image_size = build_model(config, dataset)
    load_model_state(model, state["ema"] or state["model"], path)
    for name, layer in neighbor_layers(model).items():
        layer.set_spectrum(**state["spectrum"][name])
        layer.backend = "auto"  # a run that demanded kernels may be evaluated without them
    return model, image_size, state


def evaluate_run(config: Config, folder: Path, checkpoint: str) -> dict[str, Any]:
    """Evaluate ``checkpoints/<checkpoint>.pt`` of a run on its test set, on the device that ``config`` names.

    Precision and determinism are those of the run.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or does not fit.
    """
    device = pick_device(config.device)
    set_determinism(config.train.deterministic)
    dataset = load_dataset(config.data)
    model, image_size, state = load_run(config, folder, checkpoint, dataset)
    train = config.train
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    size = train.eval_batch_size or train.batch_size
    split = dataset.test.to(device)
    batches = make_batches(split, size, config.data, image_size, channels_last=train.channels_last)
    loss, top1, top5 = evaluate(model.to(device), batches, make_autocast(train.amp, device))
    scores = {"loss": loss, "top1": top1, "top5": top5}
    return {"checkpoint": checkpoint, "epochs": state["epoch"], "images": len(split)} | scores
