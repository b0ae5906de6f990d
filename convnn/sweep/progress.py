"""How far a sweep is: its points' states, watched from outside, so that any launcher will do. Imports no torch."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from convnn.runs.status import CANCELLED, COMPLETE, FAILURES, INTERRUPTED, QUEUED, RUNNING
from convnn.sweep.plan import Point
from convnn.sweep.state import PointState, log_of, point_state
from convnn.text import duration


class Display:
    """Shows how the points' states change: a bar on a terminal, elsewhere a line per event."""

    def __init__(self, folder: Path, name: str, todo: Sequence[Point], seen: Mapping[str, PointState]) -> None:
        self.folder, self.todo = folder, list(todo)
        self.bar = tqdm(total=len(self.todo), desc=name, unit="run", disable=None)
        self._seen = dict(seen)
        self._done: set[str] = set()
        self._start = time.monotonic()

    def show(self, now: Mapping[str, PointState]) -> None:
        """Show what has changed: the present state of every point, by fingerprint."""
        for point in self.todo:
            key = point.fingerprint
            state, old = now[key], self._seen[key]
            if state == old:
                continue
            self._seen[key] = state
            ended = state.status in (COMPLETE, INTERRUPTED, CANCELLED, *FAILURES)
            if ended and key not in self._done:
                self._done.add(key)
                self.bar.update()
            if ended or self.bar.disable:
                self.bar.write(self._line(point, state))
        counts = Counter(s.status for s in now.values())
        failed = sum(counts[s] for s in FAILURES)
        queued = f"queued {counts[QUEUED]}, " if counts[QUEUED] else ""
        self.bar.set_postfix_str(f"{queued}running {counts[RUNNING]}, failed {failed}")
        sys.stdout.flush()

    def _line(self, point: Point, state: PointState) -> str:
        text = f"[{len(self._done)}/{len(self.todo)}] {state.status:<11} {point.name}"
        if state.top1 is not None:
            text += f"  top-1 {state.top1:.2f} %"
        if state.reason:
            text += f"  {state.reason}"
        if state.status in FAILURES:
            text += log_of(self.folder, point)
        left = len(self.todo) - len(self._done)
        if self._done and left and state.status not in (RUNNING, QUEUED):
            text += f"  (about {duration((time.monotonic() - self._start) / len(self._done) * left)} left)"
        return text


class Progress(Display):
    """Watches the files of points that run on this machine, whatever launcher has started them."""

    def __init__(self, folder: Path, name: str, todo: Sequence[Point]) -> None:
        super().__init__(folder, name, todo, {p.fingerprint: point_state(folder, p) for p in todo})
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._refresh()
        self.bar.close()

    def _watch(self) -> None:
        while not self._end.wait(1.0):
            self._refresh()

    def _refresh(self) -> None:
        self.show({p.fingerprint: point_state(self.folder, p) for p in self.todo})
