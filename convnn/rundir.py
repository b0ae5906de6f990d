"""The run folder: who may write it, what already stands there, and what is kept about a run."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import yaml
from omegaconf import OmegaConf

from convnn import distributed
from convnn.checks import check, typed, typed_rule
from convnn.config import Config, ConfigError, differences, fingerprint, identity, run_name
from convnn.files import lock, lock_owner, read_json, write_json

_OWN = ("config.yaml", "env.json", "train.log", "metrics.jsonl", "swap.txt", "result.json", "wandb_id")
_OWN_FOLDERS = ("checkpoints", "wandb", "pictures")
_PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "wandb")

log = logging.getLogger("convnn")


def to_config(values: Any) -> Config:
    """Build and check a Config from plain values.

    Raises:
        ConfigError: for unknown keys, wrong types and impossible combinations.
    """
    config = typed(Config, values)
    swap = config.swap
    swap.operator = typed_rule({"operator": swap.operator}, config.operator, "swap").operator
    swap.rules = {name: typed_rule(rule, config.operator, f"swap.rules.{name}") for name, rule in swap.rules.items()}
    return check(config)


def load_config(folder: Path) -> Config:
    """Read the configuration of a run folder.

    Raises:
        ConfigError: if the folder is none, or its file is damaged.
    """
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{folder} is not a run folder: it has no readable config.yaml") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it holds no mapping")
    return to_config(values)


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the content of result.json, or None if there is none or it is damaged."""
    return read_json(folder / "result.json")


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
    _created: int = 0
    """Parent folders that had to be made."""
    _lock: TextIO | None = field(default=None, repr=False)
    _handler: logging.Handler | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file in one step."""
        if self.writes:
            write_json(self.path / name, values)

    def discard(self) -> None:
        """Remove a folder in which nothing was begun."""
        if self.resume or not self.writes:
            return
        for name in (*_OWN, ".lock"):
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
            self._lock.close()


def open_run_folder(config: Config) -> RunFolder:
    """Create or enter the folder of a run, as ``run.if_exists`` says, and lock it against other runs.

    Of several processes the first does it; the others get the same folder, and write nothing.

    Raises:
        ConfigError: if the folder is taken, locked, of another configuration, or cannot be written.
    """
    folder = distributed.joint(lambda: _open(config) if distributed.is_main() else None)
    found = distributed.broadcast((folder.path, folder.resume, folder.done) if folder else None)
    if folder is None and found is not None:
        folder = RunFolder(*found, writes=False)
    assert folder is not None
    return folder


def _open(config: Config) -> RunFolder:
    path = Path(config.run.dir or Path(config.run.root) / f"{run_name(config)}-{fingerprint(config)[:8]}")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir={path} is a file")
    used = path.is_dir() and any(f.name not in (".lock", "train.log") for f in path.iterdir())
    policy = config.run.if_exists
    if used and not (path / "config.yaml").exists():
        raise ConfigError(f"run.dir={path} is not empty and not a run folder; choose another run.dir")
    if used and policy == "fail":
        result = read_result(path)
        state = result["status"] if result else "unfinished"
        raise ConfigError(
            f"run.dir={path} already holds a run ({state}); set run.if_exists=resume, skip or overwrite, or run.dir"
        )
    created = sum(not parent.exists() for parent in path.parents)
    try:
        path.mkdir(parents=True, exist_ok=True)
        own_lock = _lock(path)
    except OSError as error:
        raise ConfigError(f"run.dir={path} cannot be written: {error.strerror}") from error
    folder = RunFolder(path, resume=False, _created=created, _lock=own_lock)
    try:
        if used and policy == "overwrite":
            for name in _OWN:
                (path / name).unlink(missing_ok=True)
            for name in _OWN_FOLDERS:
                shutil.rmtree(path / name, ignore_errors=True)
        elif used:
            changed = differences(identity(load_config(path)), identity(config))
            if changed:
                raise ConfigError(
                    f"run.dir={path} holds a run of another configuration ({'; '.join(changed[:5])}); "
                    "set these back, or choose another run.dir"
                )
            result = read_result(path)
            folder.resume = True
            folder.done = result if result and result.get("status") == "complete" else None
    except BaseException:
        folder.close()
        raise
    if folder.done is None:
        folder._handler = logging.FileHandler(path / "train.log")
        folder._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(folder._handler)
    if not folder.resume:
        (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    return folder


def _lock(path: Path) -> TextIO:
    """Lock the folder until this process ends, however it ends."""
    file = lock(path / ".lock")
    if file is None:
        raise ConfigError(f"run.dir={path} is in use by another process ({lock_owner(path / '.lock')})")
    return file


def environment() -> dict[str, Any]:
    """Return what else decides a run's numbers: versions, hardware, git commit."""
    import torch

    root = Path(__file__).resolve().parent.parent
    cuda = torch.cuda.is_available()
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "git_dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "command": sys.argv[1:],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    import convnn

    found = {"python": platform.python_version(), "convnn": convnn.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
