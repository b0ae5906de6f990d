"""Measuring what computes the steps of a network fastest, before ``torch.compile`` makes a graph of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convnn.ops import choice
from convnn.ops.neighborhood import same_draws


def measure_choices(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Measure what a graph of the model would choose among with ``operator.backend=auto``; before the first step.

    The images go through the model once, uncompiled. Each case of a replaced layer that is not known yet is measured
    on the way: plain torch, compiled by itself for tens of seconds, and the kernels. ``torch.compile`` looks up what
    was found whenever it traces a layer; cases that it does not find there take the kernels. The model is left as it
    was. On a CPU, under torch's deterministic algorithms and for layers of another backend nothing is measured.

    Args:
        model: in the mode, and in the autocast, that it will run in; for training with gradients enabled.
        images: as many as a step has, or what else the model takes.

    Returns:
        By case the way that was taken and the milliseconds of each, as in ``env.json``.
    """
    model = getattr(model, "_orig_mod", model)  # of what torch.compile returned
    if choice.measures(images.device):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            with choice.for_graphs(), same_draws(images.device):
                model(images)
        finally:
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    buffer.copy_(before[name])
    return choice.choices()
