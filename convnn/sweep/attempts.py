"""Whether the jobs of a point get anywhere: each says how far the run was when it began. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def mark_of(run: Path) -> str:
    """Return what changes whenever a run has saved more: of its last checkpoint, time and size. No clock is read."""
    try:
        found = (run / "checkpoints" / "last.pt").stat()
    except OSError:
        return ""
    return f"{found.st_mtime_ns}-{found.st_size}"


def next_record(record: Mapping[str, Any], run: Path, call: str) -> dict[str, Any]:
    """Return what the record of a point's next job says of progress.

    Args:
        record: of the job before, empty for the first.
        run: its run folder.
        call: of sweep.py; in another call the jobs without progress are counted anew.

    Returns:
        ``call``, ``mark`` and ``stalled``, the number of jobs in a row before this one that saved nothing.
    """
    mark = mark_of(run)
    same = record.get("call") == call and record.get("mark") == mark
    return {"call": call, "mark": mark, "stalled": int(record.get("stalled") or 0) + 1 if same else 0}
