"""How long a run is: the epochs and steps that it was planned for, once or several times."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise

from convnn.config.identity import length_of
from convnn.config.schema import TrainConfig
from convnn.errors import ConfigError


def planned_lengths(train: TrainConfig, steps_per_epoch: int) -> list[tuple[int, int]]:
    """Return the epochs and the steps that a run was planned for, one pair for each time; the last is the plan.

    Raises:
        ConfigError: if an extension would not make the run longer, or begins within an epoch.
    """
    found = []
    for plan in (*train.extended_from, length_of(asdict(train))):
        steps = steps_per_epoch * plan["epochs"]
        found.append((plan["epochs"], min(steps, plan.get("max_steps", steps))))
    for (_, before), (_, after) in pairwise(found):
        if before % steps_per_epoch:
            raise ConfigError(
                f"train.max_steps={before} ended the run within an epoch of {steps_per_epoch} steps; "
                "a run can be extended where one ends"
            )
        if after <= before:
            raise ConfigError(
                f"train.epochs={train.epochs} leaves the run at {after} steps, as "
                f"train.max_steps={train.max_steps} ends it there; set train.max_steps=null"
            )
    return found
