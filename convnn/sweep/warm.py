"""Points that start warm: forked from a process that has loaded torch once (``sweep.warm``). Imports no torch.

A point is as much a process of its own as one that is started: its session, signals, output, environment and exit code
are its own. The process that forks, ``convnn.sweep.warm_parent``, belongs to one worker of a launcher; it ends with it,
and takes what it has forked along.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from convnn.runtime.signals import PARENT

PER_POINT = ("CUDA_VISIBLE_DEVICES",)
"""Variables that may differ from point to point; all others are read as libraries are loaded."""
LIBRARIES = ("convnn.cli.train", "convnn.train.run")
"""What is loaded once; tests put something quicker here."""
LIMIT = 100_000
"""Bytes of a request at most."""
_PACKAGE = Path(__file__).resolve().parents[1]


def possible() -> bool:
    """Return whether this system can: a fork is safe on Linux alone, and the kernel must know ``pidfd_open`` (5.3)."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class WarmPoint:
    """A process that is forked elsewhere, with what is used of ``subprocess.Popen``."""

    def __init__(self, parent: _Parent) -> None:
        self._parent = parent
        self._process: int | None = None  # its descriptor: a number of a process could be another's by now
        self.pid = parent.process.pid
        """Its number, and that of its session; until it has begun, those of the process that will fork it."""
        self.returncode: int = None  # type: ignore[assignment]  # as subprocess has it
        self.lost = False
        """Whether the process that forks has ended, so that the exit code is unknown."""

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        while self.returncode is None and _readable(self._parent.socket if self._process is None else self._process):
            news, fds = self._parent.receive()
            if not news:
                self.lost = True
                self.returncode = self._parent.process.wait() if self._process is None else -signal.SIGTERM
            elif self._process is None:
                self.pid, self._process = int(news), fds[0]
            else:
                self.returncode = int(news)
        if self.returncode is not None and self._process is not None:
            os.close(self._process)
            self._process = None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal to it; before it has begun, to the process that would fork it."""
        if self._process is None:
            self._parent.process.send_signal(signum)
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._process, signum)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The process that forks, and the socket to it."""

    def __init__(self, module: str, environment: Mapping[str, str], key: Any) -> None:
        self.key = key
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # it is read if the process fails
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "convnn.sweep.warm_parent", str(other.fileno()), module, *LIBRARIES],
                stdin=subprocess.DEVNULL,
                stdout=self.errors,
                stderr=self.errors,
                env={**environment, PARENT: str(os.getpid())},
                pass_fds=[other.fileno()],
                start_new_session=True,
            )

    def receive(self) -> tuple[bytes, list[int]]:
        """Return what it says, nothing if it has ended, and the descriptors that come with that."""
        try:
            news, fds, _, _ = socket.recv_fds(self.socket, 100, 1)
        except ConnectionError:
            return b"", []
        return news, fds

    def close(self) -> None:
        """End it."""
        self.socket.close()
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def reason(self) -> str:
        """Return what it said last, or else how it ended."""
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"exit code {code}")


class _Here:
    """What this process has: the one that forks for it, and whether one has failed."""

    parent: _Parent | None = None
    point: WarmPoint | None = None
    failed = False


def start(command: Sequence[str], output: int, environment: Mapping[str, str]) -> WarmPoint | None:
    """Begin ``python -m module argument ...`` in a forked process, or return None where it has to be started.

    Args:
        command: of the process.
        output: descriptor of the file that takes what it prints.
        environment: of the process.
    """
    if command[1] != "-m" or _Here.failed or not possible():
        return None
    if _Here.point is not None and _Here.point.returncode is None:  # of another thread
        return None
    module, *arguments = command[2:]
    own = {name: environment[name] for name in PER_POINT if name in environment}
    request = json.dumps({"arguments": arguments, "environment": own}).encode()
    if len(request) > LIMIT:
        return None
    shared = {name: value for name, value in environment.items() if name not in (PARENT, *PER_POINT)}
    key = (module, Path.cwd(), shared, _code())
    if _Here.parent is not None and _Here.parent.key != key:
        close()
    try:
        _Here.parent = _Here.parent or _Parent(module, shared, key)
        socket.send_fds(_Here.parent.socket, [request], [output])
    except OSError:  # it has ended since the last point
        give_up()
        return None
    _Here.point = WarmPoint(_Here.parent)
    return _Here.point


def give_up() -> None:
    """Say once why points are started from here on, and end the process that forked them."""
    parent, _Here.failed = _Here.parent, True
    if parent is not None:
        parent.process.kill()
        print(f"sweep.warm: points start one by one from here on ({parent.reason()})", file=sys.stderr, flush=True)
        close()


def close() -> None:
    """End the process that forks, if there is one; no point may be running."""
    parent, _Here.parent = _Here.parent, None
    if parent is not None:
        parent.close()


def _code() -> tuple[int, int]:
    """Return what changes when convnn's files or the installed packages do: such points need a new start."""
    files = [entry.stat().st_mtime_ns for entry in _PACKAGE.rglob("*.py")]
    return hash(tuple(files)), Path(sysconfig.get_paths()["purelib"]).stat().st_mtime_ns


def _readable(channel: socket.socket | int) -> bool:
    poll = select.poll()  # select refuses large descriptors
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(0))
