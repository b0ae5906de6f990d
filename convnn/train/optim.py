"""Optimizer and learning-rate schedule of a run, both timm's."""

from __future__ import annotations

from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from convnn.config.keys import nearest
from convnn.config.schema import OptimConfig
from convnn.errors import ConfigError


def make_optimizer(model: nn.Module, optim: OptimConfig) -> Optimizer:
    """Return the optimizer of ``optim.name``.

    Raises:
        ConfigError: for an unknown name, or one that cannot be used here.
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


def make_scheduler(optimizer: Optimizer, optim: OptimConfig, epochs: int, steps_per_epoch: int) -> Scheduler | None:
    """Return the learning-rate schedule of ``optim.sched``, to be updated every step; None if it is constant.

    Raises:
        ConfigError: if timm has no such schedule, or refuses its numbers.
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
