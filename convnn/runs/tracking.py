"""Metrics: ``metrics.jsonl`` always, other tools on top. None of them can block or end a run."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convnn.config.schema import TrackerConfig
from convnn.errors import first_line
from convnn.runs.metrics import json_line
from convnn.runs.trackers.base import RunTracker, TrackedRun, is_scalar
from convnn.runtime import distributed
from convnn.runtime.files import write_text

log = logging.getLogger("convnn")

_TOOLS = {"wandb": "WandbTracker", "tensorboard": "TensorBoardTracker", "trackio": "TrackioTracker"}
"""By the name in ``tracker=``, which is also that of its module and of its package: the class."""


class Tracker:
    """Writes one row per epoch to ``metrics.jsonl`` and the tools asked for; of several processes, the first does."""

    def __init__(
        self, config: TrackerConfig, folder: Path, run_config: dict[str, Any], rows: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Begin the folder's metrics with the rows of the checkpoint, whatever has become of the file since."""
        self.path = folder / "metrics.jsonl"
        self._tools = Tools()
        if not distributed.is_main():
            return
        write_text(self.path, "".join(json_line(row) for row in rows))
        self._tools = Tools.start(TrackedRun(config, folder, run_config, rows))

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is on disk when this returns."""
        if not distributed.is_main():
            return
        with self.path.open("a") as file:
            file.write(json_line(row))
            file.flush()
            os.fsync(file.fileno())
        self._tools.each(lambda tool: tool.log(row))

    @property
    def takes_images(self) -> bool:
        """Whether pictures have somewhere to go."""
        return bool(self._tools.running)

    def log_images(self, files: Sequence[Path]) -> None:
        """Add pictures, named after their files."""
        if files:
            self._tools.each(lambda tool: tool.images(files))

    def finish(self, result: Mapping[str, Any], exit_code: int) -> None:
        """Hand over the final numbers and close."""
        values = {key: value for key, value in result.items() if is_scalar(value)}
        self._tools.each(lambda tool: tool.summary(values))
        self._tools.each(lambda tool: tool.finish(exit_code))


class Tools:
    """The tools that a run is watched in, less those that failed."""

    def __init__(self, running: Sequence[RunTracker] = ()) -> None:
        self.running = list(running)

    @classmethod
    def start(cls, run: TrackedRun) -> Tools:
        """Start the run in each tool of its configuration; one that cannot be had is a warning."""
        running = []
        for name in run.config.running:
            module = importlib.import_module(f"convnn.runs.trackers.{name}")
            kind: type[RunTracker] = getattr(module, _TOOLS[name])
            try:
                running.append(kind(run))
            except ImportError as error:
                lost = "is not installed" if (error.name or name) == name else f"cannot be loaded ({first_line(error)})"
                way = "" if name == "wandb" else f"; uv sync --extra {name} installs it"
                log.warning("tracker=%s, but %s %s; metrics.jsonl goes on without it%s", name, name, lost, way)
            except Exception as error:
                log.warning("%s did not start (%s); metrics.jsonl goes on without it", kind.title, first_line(error))
        return cls(running)

    def each(self, call: Callable[[RunTracker], None]) -> None:
        """Call for each tool; one that fails is left out from then on."""
        for tool in list(self.running):
            try:
                call(tool)
            except Exception as error:
                log.warning("%s failed (%s); metrics.jsonl goes on without it", tool.title, first_line(error))
                self.running.remove(tool)


def publish_report(
    config: TrackerConfig,
    folder: Path,
    group: str,
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    images: Sequence[Path],
) -> None:
    """Give a sweep's runs, in each of their tools, a run of its own with the summary, the table of runs, and the plots.

    Args:
        config: of the sweep's runs.
        folder: of the sweep.
        group: of the sweep's runs.
        rows: of the summary, with the same keys.
        runs: of the table of runs, with the same keys.
        images: files of the plots.
    """
    tools = Tools.start(TrackedRun(replace(config, group=group), folder, kind="report"))
    tools.each(lambda tool: tool.table("summary", rows))
    tools.each(lambda tool: tool.table("runs", runs))
    tools.each(lambda tool: tool.images(images))
    tools.each(lambda tool: tool.finish(0))
