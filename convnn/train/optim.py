"""Optimizer and learning-rate schedule of a run, both timm's."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import (
    CosineLRScheduler,
    MultiStepLRScheduler,
    PolyLRScheduler,
    StepLRScheduler,
    TanhLRScheduler,
)
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from convnn.config.keys import nearest
from convnn.config.schema import OptimConfig
from convnn.errors import ConfigError

log = logging.getLogger("convnn")


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
        optimizer = create_optimizer_v2(
            model,
            optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            filter_bias_and_bn=not optim.decay_norm_and_bias,
            layer_decay=optim.layer_decay,
        )
        if optim.decay_norm_and_bias:  # timm leaves out what a model names, such as the class token
            for group in optimizer.param_groups:
                group["weight_decay"] = optim.weight_decay
        return optimizer
    except Exception as error:  # optional packages, devices, arguments
        with_decay = "" if optim.layer_decay is None else f" with optim.layer_decay={optim.layer_decay:g}"
        raise ConfigError(
            f"optim.name={optim.name} cannot be used here{with_decay}: {error or type(error).__name__}"
        ) from error


def learning_rate(optimizer: Optimizer) -> float:
    """Return the learning rate of a step, with ``optim.layer_decay`` that of the last layers."""
    group = optimizer.param_groups[0]
    rate: float = group["lr"] / group.get("lr_scale", 1.0)
    return rate


_OWN_KEYS = {
    "cosine": ("min_lr",),
    "tanh": ("min_lr",),
    "poly": ("min_lr", "power"),
    "step": ("decay_epochs", "decay_rate"),
    "multistep": ("milestones", "decay_rate"),
    "constant": (),
}
"""The schedules of ``optim.sched``, and the keys that each alone has."""


def make_scheduler(
    optimizer: Optimizer, optim: OptimConfig, epochs: int, steps_per_epoch: int, total_steps: int | None = None
) -> Scheduler | None:
    """Return the learning-rate schedule of ``optim.sched``, to be updated every step; None if it never moves.

    Args:
        optimizer: whose rate moves.
        optim: names the schedule.
        epochs: as configured.
        steps_per_epoch: of the training data.
        total_steps: where ``train.max_steps`` ends the run before its epochs; None: it does not.

    Raises:
        ConfigError: for an unknown name, a key that the schedule lacks or leaves unused, or a decay after the end.
    """
    _check_schedule(optim, epochs)
    total = steps_per_epoch * epochs if total_steps is None else total_steps
    warmup: float = optim.warmup_epochs * steps_per_epoch
    if warmup >= total:  # the whole run would be warm-up, and the rate of the configuration never reached
        warmup = total * optim.warmup_epochs / epochs
        log.warning(
            "train.max_steps ends the run after %d steps, in optim.warmup_epochs=%d; the warm-up takes %.3g of them",
            total,
            optim.warmup_epochs,
            warmup,
        )
    common: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": optim.warmup_lr, "t_in_epochs": False}
    if optim.sched in ("constant", "step", "multistep"):
        common["warmup_prefix"] = False  # decays are counted from the start of the run
    if optim.sched == "constant":
        return StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, **common) if warmup else None
    if optim.sched == "step":
        every = (optim.decay_epochs or 0) * steps_per_epoch
        return StepLRScheduler(optimizer, decay_t=every, decay_rate=optim.decay_rate, **common)
    if optim.sched == "multistep":
        # timm decays one step before a milestone; here the first step of that epoch is the first at the lower rate.
        decays = [epoch * steps_per_epoch + 1 for epoch in optim.milestones]
        return MultiStepLRScheduler(optimizer, decay_t=decays, decay_rate=optim.decay_rate, **common)
    common |= {"t_initial": total, "lr_min": optim.min_lr}
    if optim.sched == "poly":
        return PolyLRScheduler(optimizer, power=optim.power or 1.0, **common)
    return {"cosine": CosineLRScheduler, "tanh": TanhLRScheduler}[optim.sched](optimizer, **common)


class ExtendedSchedule:
    """The learning rate of a run that was extended: up to the end of each length it is that length's own schedule."""

    def __init__(self, ends: Sequence[int], schedules: Sequence[Scheduler]) -> None:
        self.ends, self.schedules = list(ends), list(schedules)

    def step_update(self, step: int) -> None:
        """Set the rate of a step; it follows from the step's number alone."""
        self.schedules[min(bisect_right(self.ends, step), len(self.ends) - 1)].step_update(step)


def make_schedules(
    optimizer: Optimizer, optim: OptimConfig, lengths: Sequence[tuple[int, int]], steps_per_epoch: int
) -> Scheduler | ExtendedSchedule | None:
    """Return the learning-rate schedule of a run that was perhaps extended; None if it never moves.

    Args:
        optimizer: whose rate moves.
        optim: names the schedule.
        lengths: epochs and steps that the run was planned for, the last one the present plan.
        steps_per_epoch: of the training data.

    Raises:
        ConfigError: as ``make_scheduler``.
    """
    made = []
    for epochs, steps in lengths:
        for group in optimizer.param_groups:  # a schedule starts from the rates that it finds
            group["lr"] = group.get("initial_lr", group["lr"])
        made.append(make_scheduler(optimizer, optim, epochs, steps_per_epoch, steps))
    schedules = [schedule for schedule in made if schedule is not None]
    if not schedules:  # which would have done so
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    if len(schedules) < 2:
        return schedules[0] if schedules else None
    return ExtendedSchedule([steps for _, steps in lengths], schedules)


def _check_schedule(optim: OptimConfig, epochs: int) -> None:
    sched = optim.sched
    if sched not in _OWN_KEYS:
        raise ConfigError(f"optim.sched={sched} is not one of {', '.join(_OWN_KEYS)}")
    plain = OptimConfig()
    for key in sorted({key for keys in _OWN_KEYS.values() for key in keys} - set(_OWN_KEYS[sched])):
        if getattr(optim, key) != getattr(plain, key):
            users = ", ".join(name for name, keys in _OWN_KEYS.items() if key in keys)
            raise ConfigError(
                f"optim.{key}={getattr(optim, key)} does nothing with optim.sched={sched}; it is for {users}"
            )
    examples = {
        "step": ("decay_epochs", "the epochs between two decays", max(1, epochs // 3)),
        "multistep": ("milestones", "the epochs after which it decays", f"[{max(1, epochs // 2)}]"),
        "poly": ("power", "1 for a straight line", 1),
    }
    if sched in examples:
        key, meaning, example = examples[sched]
        if not getattr(optim, key):
            raise ConfigError(f"optim.sched={sched} needs optim.{key}, {meaning}, such as optim.{key}={example}")
    ends = {"decay_epochs": optim.decay_epochs or 0, "warmup_epochs": optim.warmup_epochs}
    for key, value in [*ends.items(), *(("milestones", epoch) for epoch in optim.milestones)]:
        if value and value >= epochs:
            raise ConfigError(f"optim.{key}={getattr(optim, key)} must lie before train.epochs={epochs}")
    if optim.milestones != sorted(set(optim.milestones)) or any(epoch < 1 for epoch in optim.milestones):
        raise ConfigError(f"optim.milestones={optim.milestones} must be ascending epochs from 1 on")
