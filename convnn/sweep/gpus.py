"""Which GPU a run may use: parallel jobs on one machine take turns. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from convnn.runtime.files import lock


def visible_devices() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() and name.strip() != "-1"]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i, _ in enumerate(line for line in done.stdout.splitlines() if line.startswith("GPU "))]


@contextmanager
def reserve_gpu(device: str, jobs: int, stopped: Callable[[], bool]) -> Iterator[dict[str, str] | None]:
    """Wait until one of the GPUs has fewer than ``jobs`` runs; yield the environment that shows a run this GPU alone.

    Without a GPU, or with ``device=cpu`` or ``mps``, there is nothing to wait for.

    A reservation is a lock on a file of this machine, one file for each run that a GPU may have. Parallel jobs are
    workers of joblib or submitit, or of other sweeps, and have no common parent that could count them; and the system
    gives a lock back when its process ends, however it ends, where a count in a file would stay.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        jobs: runs that may share a GPU.
        stopped: gives up waiting when true; then None is yielded.
    """
    devices = [] if device in ("cpu", "mps") else visible_devices()
    if device.startswith("cuda:"):
        chosen = int(device.removeprefix("cuda:"))
        devices = devices[chosen : chosen + 1]
    if not devices:
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / f"convnn-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while not stopped():
        for slot in range(jobs):
            for name in devices:
                held = lock(folder / f"{name.replace('/', '_')}.{slot}")
                if held is not None:
                    with held:
                        yield {} if device.startswith("cuda:") else {"CUDA_VISIBLE_DEVICES": name}
                    return
        time.sleep(0.2)
    yield None
