"""Signals that ask a process to stop, and a process that ends with its parent. Imports no torch."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("convnn")
PARENT = "CONVNN_PARENT"
"""Environment variable by which sweep.py tells a run its process number."""


def follow_parent() -> None:
    """End with the sweep that started this process, however that ends (Linux): TERM comes, and leaves a checkpoint."""
    parent = os.environ.get(PARENT)
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], int | None]]:
    """Catch TERM, INT and USR2: yield a function that returns the signal seen, or None.

    A second one kills, unless it comes within two seconds: launchers pass on what the whole group has had already.
    """
    seen: list[int] = []
    first = 0.0

    def handle(signum, frame):
        nonlocal first
        if seen and time.monotonic() - first < 2:
            return
        if seen:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        seen.append(signum)
        first = time.monotonic()
        log.warning("%s: stopping after this step with a checkpoint", signal.Signals(signum).name)

    old = {s: signal.signal(s, handle) for s in STOP_SIGNALS}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        if not seen:  # otherwise the process is about to leave, and must do so with its own exit code
            for s, handler in old.items():
                signal.signal(s, handler)


class StopSignals:
    """Notes TERM, INT and USR2. A second one, more than two seconds later, has its usual effect."""

    def __init__(self, on_first: Callable[[int], None] | None = None) -> None:
        self.seen: int | None = None
        self._first, self._on_first = 0.0, on_first
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, old in self._old.items():
            signal.signal(signum, old)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.seen is None:
            self.seen, self._first = signum, time.monotonic()
            if self._on_first is not None:
                self._on_first(signum)
        elif time.monotonic() - self._first > 2:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def pass_on(self) -> None:
        """Hand the signal to the handler that stood before, such as a cluster launcher's, which then requeues the job.

        Call it after leaving the context.
        """
        old = self._old.get(self.seen) if self.seen is not None else None
        if callable(old) and old is not signal.default_int_handler:
            old(self.seen, None)
