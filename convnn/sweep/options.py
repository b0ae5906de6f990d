"""The ``sweep`` part of a configuration. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hydra import compose
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from convnn.config.compose import COMPOSE_ERRORS, hydra_context, translate
from convnn.config.keys import meant, nearest, schema_node
from convnn.config.load import expanded
from convnn.config.overrides import key_of
from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.ops.settings import check_fields, choice, number
from convnn.sweep.times import budget_seconds


@dataclass
class SweepConfig:
    """Which runs a sweep makes, and how."""

    name: str = "custom"
    """Name of the sweep; its group in W&B and trackio."""
    dir: str = "sweeps/${sweep.name}"
    """Where plan, runs, logs and report go."""
    base: list[str] = field(default_factory=list)
    """Overrides of every point."""
    points: dict[str, list[str]] = field(default_factory=dict)
    """Named alternatives, each a list of overrides; the axes are applied to each of them."""
    axes: dict[str, Any] = field(default_factory=dict)
    """Values of each key or group: a list, or Hydra's sweep syntax in a string."""
    on_invalid: str = choice("fail", "skip")
    """``fail``: run nothing if a point cannot work; ``skip``: leave such points out."""
    retry_failed: bool = True
    """Run failed points again."""
    dry_run: str = choice("false", "true", "timed")
    """``true``: say what would run and how many operations that takes, and stop; ``timed``: estimate the time too, from
    a few training steps of each distinct model."""
    report: bool = True
    """Write tables and plots at the end."""
    budget: str | None = None
    """Time that this call may take, such as 90s, 30m or 1h30m: no point begins that would not end in time by the points
    done so far, and those that run then stop with a checkpoint; null: no limit."""
    jobs_per_device: int = number(1, 1)
    """Runs that may share one GPU."""
    warm: str = choice("auto", "false")
    """``auto``: points are forked from a process that has loaded torch once, where the system can (Linux); ``false``:
    each loads it anew. Numbers are the same."""
    processes: int | None = number(None, 1)
    """Processes of each run on each machine, which torchrun starts, each with a GPU of its own; null: as many as
    ``hydra.launcher.gpus_per_node`` of a cluster's jobs, else one."""
    detach: bool = False
    """On a cluster: submit the jobs, and one that makes the report after them, and leave."""
    status: bool = False
    """Say where each point is, and stop."""
    requeues: int = number(3, 0)
    """On a cluster: how often in a row a point's job may begin again without progress before the point has failed."""
    point: str | None = None
    """Set by sweep.py for each job: ``p`` and the fingerprint of the point."""
    token: str | None = None
    """Set by sweep.py for each job: the sweep that it belongs to."""
    deadline: float | None = None
    """Set by sweep.py for each job: when the budget is spent, in seconds since 1970."""


@dataclass
class SweepRun(Config):
    """A run's configuration with the sweep's besides."""

    sweep: SweepConfig = field(default_factory=SweepConfig)


ConfigStore.instance().store(name="sweep_schema", node=schema_node(SweepRun))


def _unknown_to_hydra(error: Exception, launcher: Sequence[str]) -> ConfigError | None:
    """Return the error for a key that a launcher or sweeper lacks, if that is what Hydra means."""
    found = re.search(r"'(hydra\.[\w.]+)'", str(error))
    if found is None:
        return None
    parent, _, leaf = found[1].rpartition(".")
    with hydra_context(), suppress(*COMPOSE_ERRORS):
        chosen = compose("sweep", [o for o in launcher if "/" in key_of(o)], return_hydra_config=True)
        known = [str(key) for key in OmegaConf.select(chosen, parent) or () if not str(key).startswith("_")]
        if known and leaf not in known:
            return ConfigError(f"unknown key '{found[1]}'{nearest(leaf, known, f'{parent}.')}")
    return None


def sweep_options(overrides: Sequence[str], launcher: Sequence[str] = ()) -> SweepConfig:
    """Compose the ``sweep`` part of conf/sweep.yaml, and check Hydra's own overrides with it.

    Raises:
        ConfigError: one line, naming the key and the way out.
    """
    try:
        with hydra_context():
            values = compose("sweep", [*overrides, *launcher])
        options: SweepConfig = OmegaConf.to_object(values.sweep)  # type: ignore[assignment]
    except (*COMPOSE_ERRORS, ValueError) as error:
        raise _unknown_to_hydra(error, launcher) or translate(error, [*overrides, *launcher], SweepRun) from error
    if not options.dir.strip():
        raise ConfigError("sweep.dir is empty; name a folder")
    options.dir = expanded(options.dir, "sweep.dir")
    options.dry_run = meant(options.dry_run, ("false", "true", "timed"))
    options.warm = meant(options.warm, ("auto", "false"))
    check_fields(options, "sweep")
    budget_seconds(options.budget)
    for name, values in options.axes.items():
        if isinstance(values, list) and not values:
            raise ConfigError(f"sweep.axes.{name} is empty; give it values, or leave it out")
    return options
