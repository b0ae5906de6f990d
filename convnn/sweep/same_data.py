"""Whether the points of a sweep have the data that they had. Imports torch only where data has to be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from convnn.config.schema import DataConfig
from convnn.runs.data_record import RecordReader
from convnn.runs.folder import find_moved, known_record, place_counts, without_places
from convnn.runs.record import read_result
from convnn.runs.status import COMPLETE
from convnn.sweep.plan import Plan, Point, read_plan
from convnn.sweep.state import point_state


def check_points(plan: Plan, folder: Path) -> None:
    """Compare the data of the points that are complete with what there is now, each data set once.

    Points that are to be continued compare it themselves. Points whose image folder moved keep their run folders.

    Raises:
        ConfigError: if a point was made with other data.
    """
    read = RecordReader()
    _follow_moved(plan, folder, read)
    for point in plan.points:
        check_point(folder, point, plan.configs[point.fingerprint].data, read)


def _follow_moved(plan: Plan, folder: Path, read: RecordReader) -> None:
    """Give points the run folders that they had while their data lay elsewhere."""
    known = {p["fingerprint"]: folder / p["folder"] for p in read_plan(folder).get("points", [])}
    new = {
        p.fingerprint for p in plan.points if p.fingerprint not in known and place_counts(plan.configs[p.fingerprint])
    }
    if not (known and new):
        return
    taken = {p.fingerprint for p in plan.points}
    folders = without_places(path for fingerprint, path in known.items() if fingerprint not in taken)
    for i, point in enumerate(plan.points):
        found = find_moved(plan.configs[point.fingerprint], folders, read) if point.fingerprint in new else None
        if found is not None:
            before = str((read_result(found) or {}).get("fingerprint", ""))
            plan.points[i] = replace(point, name=found.name, before=before)


def check_point(folder: Path, point: Point, data: DataConfig, read: RecordReader) -> None:
    """Do so for one point.

    Raises:
        ConfigError: if it was made with other data.
    """
    if point_state(folder, point).status == COMPLETE:
        path = folder / point.folder
        read.compare(known_record(path), data, str(path), "put it back, or choose another sweep.dir")
