"""timm's optimizer and learning-rate schedule of a configuration."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from convnn.checks import nearest
from convnn.config import ConfigError, OptimConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of ``optim.name``.

    Raises:
        ConfigError: if timm has none of this name, or it cannot be used here.
    """
    known = [str(name) for name in list_optimizers()]
    if optim.name not in known:
        raise ConfigError(f"optim.name={optim.name} is not a timm optimizer{nearest(optim.name, known)}")
    if get_optimizer_info(optim.name).second_order:
        raise ConfigError(f"optim.name={optim.name} needs second derivatives, which train.py does not compute")
    try:
        return create_optimizer_v2(
            model,
            optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            filter_bias_and_bn=not optim.decay_norm_and_bias,
        )
    except Exception as error:  # optional packages, devices, arguments
        raise ConfigError(f"optim.name={optim.name} cannot be used here: {error or type(error).__name__}") from error


def build_scheduler(optimizer: torch.optim.Optimizer, optim: OptimConfig, epochs: int, steps_per_epoch: int) -> Any:
    """Return the schedule of ``optim.sched``, to be stepped at every update, or None for a constant rate.

    Raises:
        ConfigError: if timm has none of this name.
    """
    if optim.sched == "constant":
        return None
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            optim.sched,
            num_epochs=epochs,
            warmup_epochs=optim.warmup_epochs,
            warmup_lr=optim.warmup_lr,
            min_lr=optim.min_lr,
            warmup_prefix=False,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"optim.sched={optim.sched} is not usable: {error}") from error
    if scheduler is None:
        raise ConfigError(f"optim.sched={optim.sched} is not a timm schedule; use constant, cosine, step, poly, ...")
    return scheduler
