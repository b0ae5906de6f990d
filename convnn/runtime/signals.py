"""Signals that ask a process to stop, and a process that ends with its parent. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PARENT = "CONVNN_PARENT"
"""Environment variable by which sweep.py tells a run its process number."""
AGENT = "TORCHELASTIC_RUN_ID"
"""Environment variable of the processes that torchrun's agent starts."""


def follow_parent() -> None:
    """End with the sweep or the torchrun that started this process, however that ends (Linux).

    TERM comes, and leaves a checkpoint.
    """
    parent = os.environ.get(PARENT)
    if (parent or AGENT in os.environ) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if parent and os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
"""What a user, a system that shuts down, and SLURM before a time limit send."""


@contextmanager
def hangup_as_term() -> Iterator[None]:
    """Take a logout (HUP) for TERM within a ``with`` block, unless the caller has said that it is none (nohup)."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        yield
        return
    old = signal.signal(signal.SIGHUP, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, old)


class StopSignals:
    """Notes the first of ``STOP_SIGNALS`` that comes within a ``with`` block, so that work ends at a good place.

    A second one has its usual effect, which is to kill, unless it comes within two seconds: launchers pass on what the
    whole group of processes has had already. In other threads than the main one, Python lets no signal be caught.
    """

    def __init__(self, on_first: Callable[[int], None] | None = None, *, leaving: bool = False) -> None:
        """Prepare to catch.

        Args:
            on_first: called with the first signal.
            leaving: the process is to end after a signal. Then the handlers stay in place, as a signal that comes
                late would else give it another exit code than its own.
        """
        self.seen: int | None = None
        self._first, self._on_first, self._leaving = 0.0, on_first, leaving
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._old = {signum: signal.signal(signum, self._handle) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if not (self._leaving and self.seen):
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
