"""trackio: a database on this machine, which its own dashboard shows. No account, no network."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from convnn.runs.trackers.base import Row, RunTracker, TrackedRun, flat_row

log = logging.getLogger("convnn")


class TrackioTracker(RunTracker):
    """A run of trackio, in trackio's own folder (``TRACKIO_DIR``), where its dashboard finds all runs of a project."""

    title = "trackio"

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        class LocalRun(trackio.Run):
            """A run that does not ask the Hugging Face Hub for the user's name, as one does where a token lies."""

            def _get_username(self) -> None:
                return None

        config, name = run.config, run.folder.name
        identity = run.id_from("trackio_id")
        self._remove(config.project, identity)
        self._trackio, self._step = trackio, 0
        # Not trackio.init, which goes to a Space or a server where an environment variable names one.
        self._run = LocalRun(
            url=None,
            project=config.project,
            client=None,
            name=name,
            run_id=identity,
            group=config.group,
            config=dict(run.values) | {"kind": run.kind, "tags": config.tags},
        )
        for row in run.rows:
            self.log(row)
        where = trackio.utils.TRACKIO_DIR
        log.info(
            "trackio writes to %s, not to the network; look with: trackio show --project %s", where, config.project
        )

    @staticmethod
    def _remove(project: str, identity: str) -> None:
        """Remove what was logged of a run, which may be ahead of the checkpoint that it goes on from."""
        import trackio

        try:
            runs = list(trackio.Api().runs(project))
        except ValueError:  # the project's first run
            return
        for found in runs:
            if found.id == identity and not found.delete():
                raise RuntimeError(f"the earlier rows of run {found.name} cannot be removed")

    def log(self, row: Row) -> None:
        """Add a row."""
        self._step = row["step"]
        self._run.log({key: value for key, value in flat_row(row).items() if key != "step"}, step=self._step)

    def images(self, files: Sequence[Path]) -> None:
        """Add pictures at the last step."""
        pictures: dict[str, Any] = {f"pictures/{file.stem}": self._trackio.Image(str(file)) for file in files}
        self._run.log(pictures, step=self._step)

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Add a table."""
        columns = list(rows[0]) if rows else []
        data = [[row[column] for column in columns] for row in rows]
        self._run.log({name: self._trackio.Table(columns=columns, data=data)}, step=self._step)

    def summary(self, values: Row) -> None:
        """Add values as ``result/NAME`` at the last step; trackio has no summary of a run."""
        self._run.log({f"result/{key}": value for key, value in values.items()}, step=self._step)

    def finish(self, exit_code: int) -> None:
        """Wait, for at most half a minute, until all is in the database."""
        with redirect_stdout(io.StringIO()):  # says that it uploads, which it does not
            self._run.finish()
