"""The environment of a run, and how it changed between its sessions."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convnn.config.folders import config_folders
from convnn.config.identity import differences
from convnn.runtime.files import read_json, write_json
from convnn.version import __version__

log = logging.getLogger("convnn")
_PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "omegaconf", "numpy", "wandb")


def environment() -> dict[str, Any]:
    """Return what else decides a run's numbers: versions, hardware, git commit."""
    import torch

    cuda = torch.cuda.is_available()
    commit, dirty = own_commit(Path(__file__).resolve().parents[1])
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "git_commit": commit,
        "git_dirty": dirty,
        "command": [*(f"--config-dir={folder}" for folder in config_folders()[1:]), *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version(), "convnn": __version__}
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


def own_commit(package: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that a package lies in, and whether tracked files were changed since.

    Both are None unless the package lies at the top of the repository and is tracked there: a copy that was installed
    or put below another project would bear that project's commit.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    own = top is not None and Path(top).resolve() == package.resolve().parent
    if not own or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return _git(package, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(folder: Path, *args: str) -> str | None:
    """Return what git says of the repository around a folder, None if it fails."""
    # In a hook of another repository, git's variables name that one.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *args]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


_COMPARED = ("versions", "platform", "processor", "threads", "device", "gpu", "cuda", "cudnn", "git_commit")


def record_environment(folder: Path, device: str, step: int) -> list[str]:
    """Write env.json and return what changed since the run began, such as ``step 40: versions.torch: 2.11 -> 2.12``.

    Args:
        folder: of the run.
        device: that it runs on, by name.
        step: at which it goes on; 0 if it begins.
    """
    now: dict[str, Any] = environment() | {"device": device}
    before = read_json(folder / "env.json") or {}
    changes: list[str] = []
    if step and before:
        changes = list(before.get("changes", []))
        old, new = ({key: env[key] for key in _COMPARED if key in env} for env in (before, now))
        new_changes = [f"step {step}: {change}" for change in differences(old, new)]
        if new_changes:
            log.warning(
                "the environment is another one than before, so that results may differ in the last digits (%s)",
                "; ".join(new_changes),
            )
        changes += new_changes
    write_json(folder / "env.json", now | {"changes": changes})
    return changes


def record_choices(folder: Path, choices: dict[str, Any]) -> None:
    """Add to env.json which way of computing each case was measured to be fastest, see ``convnn.ops.choice``."""
    found = read_json(folder / "env.json")
    if choices and found is not None:
        write_json(folder / "env.json", found | {"choices": choices})
