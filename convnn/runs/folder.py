"""The run folder: who may write it, what already stands there, and what is kept about a run."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from convnn.config.identity import (
    LENGTH,
    differences,
    differing,
    fingerprint,
    fingerprint_of,
    identity,
    lengthened,
    run_name,
    without_place,
)
from convnn.config.load import load_config, read_values
from convnn.config.schema import Config
from convnn.errors import CheckpointError, ConfigError
from convnn.runs.contents import MARKER, check_removable, is_run_folder, remove_earlier
from convnn.runs.data_record import DataRecord, RecordReader
from convnn.runs.record import read_result
from convnn.runs.status import COMPLETE, UNFINISHED
from convnn.runtime import distributed
from convnn.runtime.files import (
    is_leftover,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from convnn.runtime.locks import Lock, lock, lock_owner, release

log = logging.getLogger("convnn")
_MARKED = {"folder": "run"}
OTHER_DATA = "put it back, or choose another run.dir"
"""What to do about a run folder whose run had other data."""


def known_record(folder: Path) -> DataRecord | None:
    """Return what a run folder says of the run's data; None if it does not."""
    return DataRecord.read(read_json(folder / MARKER)) or DataRecord.read(read_result(folder))


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
    extends: bool = False
    """The run is to become longer than it was planned when it was last trained."""
    moved: bool = False
    """The run's data lies elsewhere than when it began."""
    data: DataRecord | None = None
    """What data there is now, where that had to be read."""
    _created: int = 0
    """Parent folders that had to be made."""
    _lock: Lock | None = field(default=None, repr=False)
    _handler: logging.FileHandler | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file in one step."""
        if self.writes:
            write_json(self.path / name, values)

    def begin(self, config: Config, data: DataRecord) -> None:
        """Write what says whose folder this is, once the run is known to be possible.

        What an earlier run left goes now (``run.if_exists=overwrite``), and no sooner.

        Raises:
            ConfigError: if a run to be resumed had other data, or the folder cannot be written.
        """
        if not self.writes:
            return
        launch = distributed.launch_name()
        marker = _MARKED | data.entry() | ({"launch": launch} if launch else {})
        known = known_record(self.path) if self.resume else None
        if known is not None:
            known.check(data, f"run.dir={self.path}", OTHER_DATA)
        try:
            if self.replaces:
                self._replace_earlier()
            elif read_json(self.path / MARKER) != marker:
                write_json(self.path / MARKER, marker)
            if not self.resume:
                self._write_config(config)
            elif self.moved:
                kept = read_values(self.path)
                kept["data"]["root"] = config.data.root
                write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(kept)))
            if self.replaces:
                write_json(self.path / MARKER, marker)
            for folder in (self.path, self.checkpoints):
                remove_leftovers(folder)
            self._handler = _LogFile(self.path / "train.log")
        except OSError as error:
            self.discard()
            file = f": {error.filename}" if error.filename else ""
            raise ConfigError(f"run.dir={self.path} cannot be written{file}: {error.strerror}") from error
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self._handler)

    def extend(self, config: Config, resumed: bool) -> None:
        """Write that the run is a longer one from now on, once it is known that it can go on.

        Its result goes first: at no moment does a folder say that the longer run is complete.

        Raises:
            CheckpointError: if no checkpoint was ``resumed``.
            OSError: if the folder cannot be written.
        """
        if not resumed:
            raise CheckpointError(f"run.dir={self.path} has no checkpoint from which it could be extended")
        if self.writes:
            (self.path / "result.json").unlink(missing_ok=True)
            kept = read_values(self.path)
            kept["train"] |= {key: getattr(config.train, key) for key in (*LENGTH, "extended_from")}
            kept["checkpoint"] = asdict(config.checkpoint)
            write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(kept)))

    def _write_config(self, config: Config) -> None:
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(config))))

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
    found = distributed.broadcast((folder.path, folder.resume, folder.done, folder.extends) if folder else None)
    if folder is None and found is not None:
        path, resume, done, extends = found
        folder = RunFolder(path, resume, done, writes=False, extends=extends)
    assert folder is not None
    return folder


def _open(config: Config) -> RunFolder:
    read = RecordReader()
    path = _path(config, read)
    policy = policy_of(path, config.run.if_exists)
    used = check_place(path, policy)
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
            begun, known = load_config(path), known_record(path)
            old, new = identity(begun), identity(config)
            if known is not None:
                old, new = without_place(old), without_place(new)
            _check_same(path, lengthened(old, new), new)
            result = read_result(path)
            folder.resume, folder.moved, folder.extends = True, begun.data.root != config.data.root, old != new
            folder.done = result if result and result.get("status") == COMPLETE and not folder.extends else None
            if folder.done:
                read.compare(known, config.data, f"run.dir={path}", OTHER_DATA)
    except BaseException:
        folder.close()
        raise
    folder.data = read.known(config.data)
    return folder


def policy_of(path: Path, if_exists: str) -> str:
    """Return ``run.if_exists``; a run that torchrun has started anew goes on with what its first start began."""
    launch = distributed.launch_name()
    again = distributed.restarts() > 0 and (read_json(path / MARKER) or {}).get("launch") == launch
    return "resume" if again else if_exists


def check_place(path: Path, policy: str) -> bool:
    """Return whether a run folder's place is in use.

    Raises:
        ConfigError: if it is no run's, or may not be used (``run.if_exists=fail``).
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir={path} is a file")
    lasting = (".lock", "train.log", MARKER)
    used = path.is_dir() and any(f.name not in lasting and not is_leftover(f) for f in path.iterdir())
    if used and not is_run_folder(path):
        raise ConfigError(f"run.dir={path} is not empty and not a run folder; choose another run.dir")
    if used and policy == "fail":
        result = read_result(path)
        state = result["status"] if result else UNFINISHED
        raise ConfigError(
            f"run.dir={path} already holds a run ({state}); set run.if_exists=resume, skip or overwrite, or run.dir"
        )
    return used


def _check_same(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a folder's run is the one that is to be continued, naming what differs."""
    found = differing(old, new)
    if not found:
        return
    way = "set these back, or choose another run.dir"
    if found.keys() <= {f"train.{key}" for key in LENGTH}:
        way += f"; train.py resume={path} with these makes the run that is there longer"
    if lengthened(new, old) == old:
        way = "that run is this one, extended: choose another run.dir"
    changed = "; ".join(differences(old, new)[:5])
    raise ConfigError(f"run.dir={path} holds a run of another configuration ({changed}); {way}")


def _path(config: Config, read: RecordReader) -> Path:
    """Return a run's folder; ``run.name`` does not lead out of ``run.root``.

    If the run's data moved, so that the folder would have another name now, it is the one that the run has.
    """
    if config.run.dir:
        return Path(config.run.dir)
    name = f"{run_name(config)}-{fingerprint(config)[:8]}"
    if name.startswith("/") or ".." in Path(name).parts:
        raise ConfigError(f"run.name={config.run.name} leads out of run.root={config.run.root}; set run.dir instead")
    path = Path(config.run.root) / name
    if path.exists() or not path.parent.is_dir() or not place_counts(config):
        return path
    beside = [other for other in path.parent.iterdir() if other.name[:-8] == path.name[:-8]]
    moved = find_moved(config, without_places(beside), read)
    if moved is not None:
        log.info("%s is the folder of this run, whose data lay elsewhere", moved)
    return moved or path


def place_counts(config: Config) -> bool:
    """Return whether the place of a run's data is part of its fingerprint."""
    return "root" in identity(config)["data"]


def without_places(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the folders of runs by fingerprints that take no notice of where the data is."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        if known_record(folder) is not None:
            with suppress(ConfigError):
                found.setdefault(fingerprint_of(without_place(identity(load_config(folder)))), []).append(folder)
    return found


def find_moved(config: Config, folders: Mapping[str, Sequence[Path]], read: RecordReader) -> Path | None:
    """Return the folder, of ``without_places``, whose run had this configuration and this data at another place."""
    for folder in folders.get(fingerprint_of(without_place(identity(config))), []):
        known = known_record(folder)
        with suppress(ConfigError):
            if known is not None and not known.differences(read(config.data)):
                return folder
    return None


def _lock(path: Path) -> Lock:
    """Lock the folder until this process ends, however it ends."""
    owner = lock_owner(path / ".lock")
    file = lock(path / ".lock")
    if file is None:
        raise ConfigError(f"run.dir={path} is in use by another process ({lock_owner(path / '.lock')}); end it first")
    if owner != "unknown":  # it never gave the lock back
        host = owner.partition(" on ")[2].partition(" ")[0]
        doubt = "is gone" if host == platform.node() else f"seems gone; make sure that nothing runs there ({host})"
        log.warning("run.dir=%s was in use by %s, which %s; going on", path, owner, doubt)
    return file
