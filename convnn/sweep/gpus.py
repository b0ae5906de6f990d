"""Which GPU a run may use: parallel jobs on one machine take turns. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from convnn.runtime.locks import lock


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
def reserve_gpu(device: str, jobs: int, stopped: Callable[[], bool], count: int = 1) -> Iterator[dict[str, str] | None]:
    """Wait until GPUs have fewer than ``jobs`` runs; yield the environment that shows a run these GPUs alone.

    Without a GPU, or with ``device=cpu`` or ``mps``, there is nothing to wait for.

    A reservation is a lock on a file of this machine, one file for each run that a GPU may have. Parallel jobs are
    workers of joblib or submitit, or of other sweeps, and have no common parent that could count them; and the system
    gives a lock back when its process ends, however it ends, where a count in a file would stay. In a job of SLURM the
    names of GPUs are often the job's own (each job sees a GPU 0), so the files are its own too.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        jobs: runs that may share a GPU.
        stopped: gives up waiting when true; then None is yielded.
        count: GPUs that the run takes; 0: none is reserved, and it sees all that this process does.
    """
    devices = [] if device in ("cpu", "mps") or not count else visible_devices()
    if device.startswith("cuda:"):
        chosen = int(device.removeprefix("cuda:"))
        devices = devices[chosen : chosen + 1]
    if not devices or count > len(devices):  # of too few GPUs the run itself speaks
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / f"convnn-devices-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    job = f"job{os.environ['SLURM_JOB_ID']}." if "SLURM_JOB_ID" in os.environ else ""
    while not stopped():
        with ExitStack() as stack:
            names: list[str] = []
            for name in devices:
                files = (folder / f"{job}{name.replace('/', '_')}.{slot}" for slot in range(jobs))
                held = next(filter(None, map(lock, files)), None) if len(names) < count else None
                if held is not None:
                    stack.enter_context(held)
                    names.append(name)
            if len(names) == count:
                yield {} if device.startswith("cuda:") else {"CUDA_VISIBLE_DEVICES": ",".join(names)}
                return
        time.sleep(0.2)
    yield None
