"""What a process needs around a model: device, precision, random generators, determinism, signals."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from convnn.config import ConfigError

log = logging.getLogger("convnn")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StoppedError(Exception):
    """A signal asked the run to stop where it cannot return."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def pick_device(name: str) -> torch.device:
    """Return the device of ``device=``.

    Raises:
        ConfigError: if it is CUDA and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device={name}: this machine has {count} usable CUDA devices; set device=cpu or auto")
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all random generators as plain types and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [str(kind), np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Go back to a state from ``rng_state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def make_autocast(amp: str, device: torch.device) -> Callable[[], Any]:
    """Return the precision context of ``train.amp``."""
    if amp == "bf16" or (amp == "auto" and device.type == "cuda"):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


@contextmanager
def explain_memory(batch_size: int) -> Iterator[None]:
    """Turn a full GPU into a ConfigError that names a batch size to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"out of CUDA memory; try train.batch_size={max(batch_size // 2, 1)}") from error


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


def set_determinism(mode: str) -> None:
    """Apply ``train.deterministic``."""
    if mode != "false":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode != "false", warn_only=mode == "warn")
    torch.backends.cudnn.benchmark = mode == "false"
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if mode == "false" else "highest")
