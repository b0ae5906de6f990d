"""From Hydra's settings of a SLURM launcher to a batch script of our own. Imports no torch."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import OmegaConf

from convnn.config.compose import COMPOSE_ERRORS, hydra_context, translate
from convnn.errors import ConfigError
from convnn.sweep.options import SweepRun

_PLAIN = ("cpus_per_task", "gpus_per_node", "nodes", "partition", "qos", "comment", "constraint", "exclude", "gres",
          "cpus_per_gpu", "gpus_per_task", "mem_per_gpu", "mem_per_cpu", "account")  # fmt: skip
_OWN = ("job-name", "output", "chdir", "array", "parsable", "wrap")
"""Options of sbatch that a sweep sets itself."""
_HEAVY = re.compile(
    "(gpus|gres|mem|cpus|cores|threads|sockets|ntasks|nodes|nodelist|exclusive|licenses|tres|mail)(-.*)?"
)
"""Options that the job which sums up does without."""


@dataclass(frozen=True)
class Settings:
    """What ``hydra.launcher`` says of the jobs."""

    options: list[str]
    """For sbatch."""
    setup: list[str] = field(default_factory=list)
    """Commands at the beginning of a job."""
    parallel: int = 256
    """Jobs that may run at once."""
    nodes: int = 1
    gpus: int = 0
    """GPUs of each node, where the settings say it by number."""
    name: str = ""
    """Of the jobs, if the user gave one."""
    light: list[str] = field(default_factory=list)
    """Options for a job that computes nothing, without GPUs and other nodes."""


def read_settings(launcher: Sequence[str]) -> Settings:
    """Return what the command line says of ``hydra.launcher`` for SLURM.

    Raises:
        ConfigError: one line, naming the key and the way out.
    """
    try:
        with hydra_context():
            found = compose("sweep", list(launcher), return_hydra_config=True).hydra.launcher
        values: dict[str, Any] = OmegaConf.to_container(found)  # type: ignore[assignment]  # not resolved: Hydra's own
    except (*COMPOSE_ERRORS, ValueError) as error:
        raise translate(error, launcher, SweepRun) from error
    if values["tasks_per_node"] != 1:
        raise ConfigError(
            "hydra.launcher.tasks_per_node: a point is one job; give it several processes with sweep.processes=N"
        )
    minutes = int(values["timeout_min"])
    if minutes < 1 or values["array_parallelism"] < 1:
        raise ConfigError("hydra.launcher.timeout_min and hydra.launcher.array_parallelism are at least 1")
    delay = max(1, min(int(values["signal_delay_s"]), minutes * 60 // 4))  # lest a short job has no time to train
    always = [f"--time={minutes}", "--requeue", "--open-mode=append"]
    given = {str(k).replace("_", "-"): v for k, v in (values["additional_parameters"] or {}).items()}
    if own := next((key for key in given if key in _OWN), None):
        raise ConfigError(f"hydra.launcher.additional_parameters.{own}: a sweep sets that itself; leave it out")
    plain = {key: values[key] for key in _PLAIN if values.get(key) is not None}
    if values.get("mem_gb") is not None:
        plain["mem"] = f"{values['mem_gb']}G"
    light = {k: v for k, v in (plain | given).items() if not _HEAVY.fullmatch(k.replace("_", "-"))}
    return Settings(
        [*always, f"--signal=USR2@{delay}", "--ntasks-per-node=1", *_options(plain), *_options(given)],
        list(values.get("setup") or []),
        int(values["array_parallelism"]),
        int(values["nodes"] or 1),
        int(values["gpus_per_node"] or 0),
        "" if "${" in str(values["name"]) else str(values["name"]),
        [*always, "--nodes=1", "--ntasks=1", *_options(light)],
    )


def _options(values: Mapping[str, Any]) -> list[str]:
    """Return options for sbatch; what is true stands alone, what is false or null is left out."""
    found = {"--" + key.replace("_", "-"): value for key, value in values.items() if value is not None}
    return [name if value is True else f"{name}={value}" for name, value in found.items() if value is not False]


def batch_script(folder: Path, name: str, setup: Sequence[str], *, cpus: bool) -> str:
    """Return the script of jobs: ``convnn.sweep.cluster_job``, once on each node.

    Args:
        folder: of the sweep.
        name: of the submission.
        setup: commands before.
        cpus: the job asks for a number of CPUs, which SLURM does not hand on to srun by itself.
    """
    begin = ["srun", "--unbuffered", "--wait=45", *(["--cpus-per-task=$SLURM_CPUS_PER_TASK"] if cpus else [])]
    command = shlex.join([sys.executable, "-m", "convnn.sweep.cluster_job", str(folder), name])
    return "\n".join(["#!/bin/bash", *setup, f"exec {' '.join(begin)} {command}", ""])
