"""Weights & Biases: offline unless ``tracker.mode=online``, and then too without a key or a network."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from convnn.errors import first_line
from convnn.runs.trackers.base import Row, RunTracker, TrackedRun, flat_row

log = logging.getLogger("convnn")


class WandbTracker(RunTracker):
    """A run of W&B. Offline, each resume is a run folder of its own with one id, which ``wandb sync`` joins."""

    title = "W&B"

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        config, mode = run.config, run.config.mode
        if mode == "online" and not _has_key():
            log.warning(
                "tracker.mode=online, but there is no W&B key (WANDB_API_KEY or `wandb login`); going on offline"
            )
            mode = "offline"
        self._wandb: Any = wandb
        self._run: Any = None
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                self._run = wandb.init(
                    project=config.project,
                    entity=config.entity,
                    group=config.group,
                    job_type=run.kind,
                    tags=config.tags,
                    name=run.folder.name,
                    id=run.id_from("wandb_id"),
                    resume="allow" if attempt == "online" else None,
                    dir=str(run.folder),
                    config=dict(run.values),
                    mode=attempt,  # type: ignore[arg-type]
                    settings=wandb.Settings(silent=True, console="off", init_timeout=config.init_timeout),
                )
            except Exception as error:
                if attempt == "offline":
                    raise
                log.warning("W&B did not start %s (%s)", attempt, first_line(error))
                continue
            if attempt == "offline":
                log.info("W&B runs offline; upload with: wandb sync %s", Path(self._run.dir).parent)
            return

    def log(self, row: Row) -> None:
        """Add a row."""
        self._run.log(flat_row(row), step=row["step"])

    def images(self, files: Sequence[Path]) -> None:
        """Add pictures as media."""
        self._run.log({f"pictures/{file.stem}": self._wandb.Image(str(file)) for file in files})

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Add a table."""
        columns: list[Any] = list(rows[0]) if rows else []
        self._run.log({name: self._wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])})

    def summary(self, values: Row) -> None:
        """Put values into the run's summary."""
        self._run.summary.update(dict(values))

    def finish(self, exit_code: int) -> None:
        """Close the run with the exit code."""
        self._run.finish(exit_code=exit_code)


def _has_key() -> bool:
    """Return whether a W&B key is at hand: in the environment, or in the netrc file that ``wandb login`` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
