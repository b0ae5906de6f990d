"""Metrics: ``metrics.jsonl`` always, Weights & Biases on top. W&B can neither block nor end a run."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convnn.config.schema import TrackerConfig
from convnn.errors import first_line
from convnn.runs.metrics import json_line
from convnn.runtime import distributed
from convnn.runtime.files import write_text

log = logging.getLogger("convnn")


class Tracker:
    """Writes one row per epoch to ``metrics.jsonl`` and, if asked, to W&B; of several processes, the first does."""

    def __init__(
        self, config: TrackerConfig, folder: Path, run_config: dict[str, Any], rows: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Begin the folder's metrics with the rows of the checkpoint, whatever has become of the file since."""
        self.path = folder / "metrics.jsonl"
        self._wandb = None
        if not distributed.is_main():
            return
        write_text(self.path, "".join(json_line(row) for row in rows))
        self._wandb = _start_wandb(config, folder, run_config) if config.name == "wandb" else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Add a row; it is on disk when this returns."""
        if not distributed.is_main():
            return
        with self.path.open("a") as file:
            file.write(json_line(row))
            file.flush()
            os.fsync(file.fileno())
        if self._wandb is not None:
            self._try(lambda: self._wandb.log(_flat(row), step=row["step"]))

    @property
    def takes_images(self) -> bool:
        """Whether pictures have somewhere to go."""
        return self._wandb is not None

    def log_images(self, files: Sequence[Path]) -> None:
        """Add pictures to W&B as media, named after their files."""
        if self._wandb is not None:
            self._try(lambda: self._wandb.log(_media(files)))

    def finish(self, result: Mapping[str, Any], exit_code: int) -> None:
        """Hand W&B the final numbers and close it."""
        if self._wandb is not None:
            self._try(lambda: self._wandb.summary.update({k: v for k, v in result.items() if _is_scalar(v)}))
            self._try(lambda: self._wandb.finish(exit_code=exit_code))

    def _try(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            log.warning("W&B failed (%s); metrics.jsonl goes on without it", first_line(error))
            self._wandb = None


def _media(files: Sequence[Path]) -> dict[str, Any]:
    import wandb

    return {f"pictures/{file.stem}": wandb.Image(str(file)) for file in files}


def publish_report(
    config: TrackerConfig,
    folder: Path,
    group: str,
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    images: Sequence[Path],
) -> None:
    """Give a sweep's W&B group a run of its own that holds the summary, the table of runs, and the plots.

    Args:
        config: of the sweep's runs.
        folder: of the sweep.
        group: of the sweep's runs.
        rows: of the summary, with the same keys.
        runs: of the table of runs, with the same keys.
        images: files of the plots.
    """
    run = _start_wandb(config, folder, {}, group=group, job_type="report")
    if run is None:
        return
    try:
        import wandb

        for name, table in (("summary", rows), ("runs", runs)):
            columns: list[Any] = list(table[0]) if table else []
            run.log({name: wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in table])})
        run.log(_media(images))
        run.finish()
    except Exception as error:
        log.warning("W&B failed (%s); the report in %s is complete without it", first_line(error), folder)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {k: v for k, v in row.items() if _is_scalar(v)}
    for layer in row.get("layers", []):
        flat |= {f"layers/{layer['name']}/{k}": v for k, v in layer.items() if k != "name"}
    return flat


def _has_key() -> bool:
    """Return whether a W&B key is at hand: in the environment, or in the netrc file that ``wandb login`` writes."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        from urllib.parse import urlparse

        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_wandb(
    config: TrackerConfig, folder: Path, run_config: dict[str, Any], group: str | None = None, job_type: str = "train"
) -> Any:
    """Return a W&B run or None. ``online`` without a key or network goes on offline with one warning."""
    if config.mode == "disabled":
        return None
    mode = config.mode
    if mode == "online" and not _has_key():
        log.warning("tracker.mode=online, but there is no W&B key (WANDB_API_KEY or `wandb login`); going on offline")
        mode = "offline"
    try:
        import wandb
    except ImportError:
        log.warning("tracker=wandb, but wandb is not installed; metrics.jsonl goes on without it")
        return None
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=group or config.group,
                job_type=job_type,
                tags=config.tags,
                name=folder.name,
                id=id_file.read_text().strip(),
                resume="allow" if attempt == "online" else None,
                dir=str(folder),
                config=run_config,
                mode=attempt,  # type: ignore[arg-type]
                settings=wandb.Settings(silent=True, console="off", init_timeout=config.init_timeout),
            )
        except Exception as error:
            log.warning("W&B did not start %s (%s)", attempt, first_line(error))
            continue
        if attempt == "offline":
            log.info("W&B runs offline; upload with: wandb sync %s", Path(run.dir).parent)
        return run
    return None
