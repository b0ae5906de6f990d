"""The program behind ``sweep.warm``: it loads torch once and forks one process for every point; see warm.py.

It computes nothing and touches no GPU itself: threads of a library, and CUDA, do not survive a fork. What a point
loads besides (W&B, Matplotlib, numba) is loaded here once the first point is through, for those that follow.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from convnn.runtime.signals import PARENT, follow_parent
from convnn.sweep.warm import LIMIT, PER_POINT

LEARNED = ("convnn", "matplotlib", "numba", "wandb")
"""Packages that some runs load and others do not, and that take long. A user's own modules are never loaded here."""


def serve(server: socket.socket, module: str, libraries: Sequence[str]) -> list[str] | None:
    """Fork a process per request until the other side closes; return None then, and in a forked one its arguments.

    Args:
        server: takes requests, each with a file descriptor for the output; answers with the number of the process
            and a descriptor of it, and then with its exit code, negative for a signal, as subprocess has it.
        module: that the processes will run.
        libraries: modules to load first.
    """
    for name in libraries:
        importlib.import_module(name)
    sys.modules.pop(module, None)  # it is run anew, as __main__
    _settle()
    while True:
        request, (*outputs,), _, _ = socket.recv_fds(server, LIMIT, 1)
        if not request:
            return None
        reader, writer = os.pipe()
        here, pid = os.getpid(), os.fork()
        if pid == 0:
            server.close()
            os.close(reader)
            return as_new(json.loads(request), outputs[0], writer, here)
        for fd in (writer, *outputs):
            os.close(fd)
        process = os.pidfd_open(pid)
        socket.send_fds(server, [str(pid).encode()], [process])
        os.close(process)
        _, status = os.waitpid(pid, 0)
        server.send(str(os.waitstatus_to_exitcode(status)).encode())
        _learn(reader)


def as_new(request: dict[str, Any], output: int, writer: int, parent: int) -> list[str]:
    """Make a forked process what one that was started would be; return its arguments.

    ``parent`` is the process that forked it; if that has ended in the meantime, so does this one.
    """
    os.environ[PARENT] = str(parent)
    follow_parent()
    os.setsid()
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    for name in PER_POINT:
        os.environ.pop(name, None)
    os.environ.update(request["environment"])
    importlib.invalidate_caches()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own generator is seeded anew by itself
    atexit.register(_tell, writer)
    return request["arguments"]


def _tell(writer: int) -> None:
    """Tell the parent, as the process ends, what it had to load."""
    names = [name for name in sys.modules if name.partition(".")[0] in LEARNED]
    os.set_blocking(writer, False)  # nobody may be there to read
    with suppress(OSError):
        os.write(writer, "\n".join(names).encode()[:60_000])


def _learn(reader: int) -> None:
    """Load what a point had loaded and this process has not."""
    os.set_blocking(reader, False)
    with open(reader, "rb") as told:
        names = (told.read() or b"").decode().split("\n")
    for name in names:
        if name and name not in sys.modules:
            with suppress(Exception):  # a name that is no module, one cut off, an optional part
                importlib.import_module(name)
    if len(names) > 1:
        _settle()


def _settle() -> None:
    """Check that processes forked from here will work, and take what was loaded out of the garbage collector's rounds.

    Raises:
        RuntimeError: if threads run, or if CUDA's driver was asked for something.
    """
    if threading.active_count() > 1:
        raise RuntimeError(f"threads run: {', '.join(thread.name for thread in threading.enumerate())}")
    pid = os.fork()
    if pid == 0:
        os._exit("torch" in sys.modules and sys.modules["torch"].cuda._is_in_bad_fork())
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("a library has opened CUDA as it was loaded")
    if "numba.core.registry" in sys.modules:  # what numba would do at its first call in each point, half a second
        with suppress(AttributeError):
            target = sys.modules["numba.core.registry"].cpu_target
            target.typing_context.refresh()
            target.target_context.refresh()
    gc.collect()
    gc.freeze()


def main() -> None:
    """Serve on the socket of the first argument with what the others name; in a forked process, run the module."""
    descriptor, module, *libraries = sys.argv[1:]
    follow_parent()
    arguments = serve(socket.socket(fileno=int(descriptor)), module, libraries)
    if arguments is not None:
        sys.argv[1:] = arguments
        sys.orig_argv[1:] = ["-m", module, *arguments]
        _leave(_code_of(module))


def _code_of(module: str) -> int:
    """Run a module as ``python -m`` does, and return the exit code that Python would give it."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _leave(code: int) -> None:
    """End a forked process as Python does, except that nothing is taken apart: that would take a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
