"""The environment of a run, and how it changed between its sessions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from convnn.config import differences
from convnn.files import read_json, write_json
from convnn.rundir import environment

log = logging.getLogger("convnn")

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
