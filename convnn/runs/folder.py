"""The run folder: who may write it, what already stands there, and what is kept about a run."""

from __future__ import annotations

import logging
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from omegaconf import OmegaConf

from convnn.config.identity import differences, fingerprint, identity, run_name
from convnn.config.load import load_config
from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.runs.contents import MARKER, check_removable, is_run_folder, remove_earlier
from convnn.runs.record import read_result
from convnn.runs.status import COMPLETE, UNFINISHED
from convnn.runtime import distributed
from convnn.runtime.files import (
    is_leftover,
    lock,
    lock_owner,
    read_json,
    release,
    remove_leftovers,
    write_json,
    write_text,
)

log = logging.getLogger("convnn")
_MARKED = {"folder": "run"}


@dataclass
class RunFolder:
    """An open, locked run folder."""

    path: Path
    resume: bool
    """A run of the same configuration was begun here and is to be continued."""
    done: dict[str, Any] | None = None
    """The result, if that run is complete and nothing is left to do."""
    writes: bool = True
    """False in all but the first of several processes: what they are asked to write, they do not."""
    replaces: bool = False
    """What an earlier run left goes when this one begins."""
    _created: int = 0
    """Parent folders that had to be made."""
    _lock: TextIO | None = field(default=None, repr=False)
    _handler: logging.FileHandler | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file in one step."""
        if self.writes:
            write_json(self.path / name, values)

    def begin(self, config: Config) -> None:
        """Write what says whose folder this is, once the run is known to be possible.

        What an earlier run left goes now (``run.if_exists=overwrite``), and no sooner.

        Raises:
            ConfigError: if the folder cannot be written.
        """
        if not self.writes:
            return
        try:
            if self.replaces:
                self._replace_earlier()
            elif not (self.path / MARKER).exists():
                write_json(self.path / MARKER, _MARKED)
            if not self.resume:
                write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
            if self.replaces:
                write_json(self.path / MARKER, _MARKED)
            for folder in (self.path, self.checkpoints):
                remove_leftovers(folder)
            self._handler = _LogFile(self.path / "train.log")
        except OSError as error:
            self.discard()
            file = f": {error.filename}" if error.filename else ""
            raise ConfigError(f"run.dir={self.path} cannot be written{file}: {error.strerror}") from error
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._handler)

    def _replace_earlier(self) -> None:
        """Remove the earlier run; after a kill or an error meanwhile, what is left of it is not resumed."""
        check_removable(self.path)
        write_json(self.path / MARKER, _MARKED | {"overwriting": True})
        left = remove_earlier(self.path)
        if left:
            names = ", ".join(left[:10]) + (f" and {len(left) - 10} more" if len(left) > 10 else "")
            log.warning("run.dir=%s: left what no run wrote: %s", self.path, names)

    def discard(self) -> None:
        """Remove a folder in which nothing was begun."""
        if self.resume or not self.writes or (self.path / "config.yaml").exists():
            return
        for name in (".lock", MARKER):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.path, *self.path.parents[: self._created]):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def close(self) -> None:
        """Release the folder."""
        if self._handler is not None:
            log.removeHandler(self._handler)
            self._handler.close()
        if self._lock is not None:
            release(self._lock)


class _LogFile(logging.FileHandler):
    """Drops messages that a full disk does not take."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Stay quiet: what stops the run says so itself."""

    def close(self) -> None:
        """Close, even if the last message cannot be written."""
        with suppress(OSError):
            super().close()


def open_run_folder(config: Config) -> RunFolder:
    """Create or enter the folder of a run, as ``run.if_exists`` says, and lock it against other runs.

    Of several processes the first does it; the others get the same folder, and write nothing.

    Nothing is written but the lock until ``begin``.

    Raises:
        ConfigError: if the folder is taken, locked, of another configuration, or cannot be written.
    """
    folder = distributed.fail_together(lambda: _open(config) if distributed.is_main() else None)
    found = distributed.broadcast((folder.path, folder.resume, folder.done) if folder else None)
    if folder is None and found is not None:
        folder = RunFolder(*found, writes=False)
    assert folder is not None
    return folder


def _open(config: Config) -> RunFolder:
    path = _path(config)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir={path} is a file")
    begun = (".lock", "train.log", MARKER)
    used = path.is_dir() and any(f.name not in begun and not is_leftover(f) for f in path.iterdir())
    policy = config.run.if_exists
    if used and not is_run_folder(path):
        raise ConfigError(f"run.dir={path} is not empty and not a run folder; choose another run.dir")
    if used and policy == "fail":
        result = read_result(path)
        state = result["status"] if result else UNFINISHED
        raise ConfigError(
            f"run.dir={path} already holds a run ({state}); set run.if_exists=resume, skip or overwrite, or run.dir"
        )
    folder = RunFolder(path, resume=False, _created=sum(not parent.exists() for parent in path.parents))
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder._lock = _lock(path)
    except OSError as error:
        folder.discard()
        raise ConfigError(f"run.dir={path} cannot be written: {error.strerror}") from error
    try:
        marker = read_json(path / MARKER) or {}
        folder.replaces = used and (policy == "overwrite" or "overwriting" in marker)
        if used and not folder.replaces:
            changed = differences(identity(load_config(path)), identity(config))
            if changed:
                raise ConfigError(
                    f"run.dir={path} holds a run of another configuration ({'; '.join(changed[:5])}); "
                    "set these back, or choose another run.dir"
                )
            result = read_result(path)
            folder.resume = True
            folder.done = result if result and result.get("status") == COMPLETE else None
    except BaseException:
        folder.close()
        raise
    return folder


def _path(config: Config) -> Path:
    """Return a run's folder; ``run.name`` does not lead out of ``run.root``."""
    if config.run.dir:
        return Path(config.run.dir)
    name = f"{run_name(config)}-{fingerprint(config)[:8]}"
    if name.startswith("/") or ".." in Path(name).parts:
        raise ConfigError(f"run.name={config.run.name} leads out of run.root={config.run.root}; set run.dir instead")
    return Path(config.run.root) / name


def _lock(path: Path) -> TextIO:
    """Lock the folder until this process ends, however it ends."""
    owner = lock_owner(path / ".lock")
    file = lock(path / ".lock")
    if file is None:
        raise ConfigError(f"run.dir={path} is in use by another process ({lock_owner(path / '.lock')}); end it first")
    if owner != "unknown":  # it never gave the lock back
        host = owner.partition(" on ")[2]
        doubt = "is gone" if host == platform.node() else f"seems gone; make sure that nothing runs there ({host})"
        log.warning("run.dir=%s was in use by %s, which %s; going on", path, owner, doubt)
    return file
