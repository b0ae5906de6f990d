"""TensorBoard: event files in ``<run folder>/tensorboard``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from convnn.runs.trackers.base import Row, RunTracker, TrackedRun, flat_row
from convnn.text import markdown_table

log = logging.getLogger("convnn")
FOLDER = "tensorboard"
SUFFIX = ".convnn"
"""Ends the names of our event files, by which they are known among others in the folder."""


class TensorBoardTracker(RunTracker):
    """A run of TensorBoard: scalars by step, pictures, tables as text, the configuration as hyperparameters."""

    title = "TensorBoard"

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / FOLDER
        # Event files can only be added to, and those of a run that was killed may be torn, or ahead of its checkpoint:
        # the rows of the checkpoint are written anew, as metrics.jsonl is.
        for path in folder.glob(f"events.*{SUFFIX}"):
            path.unlink()
        # A TensorBoard that is open forgets what it has seen of the steps from purge_step on.
        self._writer: Any = SummaryWriter(str(folder), purge_step=0, filename_suffix=SUFFIX)
        self._values, self._step = run.values, 0
        if run.values:
            text = yaml.safe_dump(dict(run.values), sort_keys=False)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))
        for row in run.rows:
            self._add(row)
        self._writer.flush()
        shown = run.folder if run.kind == "report" else run.folder.parent
        log.info("TensorBoard: tensorboard --logdir %s", shown)

    def _add(self, row: Row) -> None:
        self._step = row["step"]
        for name, value in flat_row(row).items():
            if not isinstance(value, str) and name != "step":
                self._writer.add_scalar(name, value, self._step)

    def log(self, row: Row) -> None:
        """Add the numbers of a row as scalars."""
        self._add(row)
        self._writer.flush()

    def images(self, files: Sequence[Path]) -> None:
        """Add pictures at the last step."""
        import numpy as np
        from PIL import Image

        for file in files:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(f"pictures/{file.stem}", pixels, self._step, dataformats="HWC")

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Add a table as text."""
        columns = list(rows[0]) if rows else []
        cells = [["" if row[column] is None else str(row[column]) for column in columns] for row in rows]
        self._writer.add_text(name, markdown_table(columns, cells), self._step)

    def summary(self, values: Row) -> None:
        """Add numbers as ``result/NAME``, beside the configuration for the page of hyperparameters, and all as text."""
        from torch.utils.tensorboard.summary import hparams

        numbers = {f"result/{key}": value for key, value in values.items() if not isinstance(value, str)}
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, self._step)
        for part in hparams(dict(_plain(self._values)), numbers):
            self._writer.file_writer.add_summary(part)
        self.table("result", [{"name": key, "value": value} for key, value in values.items()])

    def finish(self, exit_code: int) -> None:
        """Close the event file."""
        self._writer.close()


def _plain(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Yield dotted keys and values of the types that hyperparameters may have."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _plain(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)
