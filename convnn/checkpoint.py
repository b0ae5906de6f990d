"""Checkpoints: atomic writes, verified reads, plain types and tensors only."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from convnn.files import write_atomically

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message is one line that names the file and the reason."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` and keep the file that stood there as ``previous_of(path)``.

    Raises:
        OSError: if the disk refuses; what stood there still does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=previous_of(path))
    except RuntimeError as error:  # torch reports a full disk as RuntimeError
        raise OSError(f"{path} could not be written: {_line(error)}") from error


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before the last one is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read and verify a checkpoint. Nothing in it is executed (``weights_only``).

    Raises:
        CheckpointError: if it is missing, damaged, hostile or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares the CRC-32 of every record, which torch.load does not
        if damaged:
            raise CheckpointError(f"{path} is damaged: checksum of {damaged} does not match")
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {_line(error)}") from error
    except (RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a safe or whole checkpoint: {_line(error)}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path} was not written by convnn")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {state['format']}; this version reads format {FORMAT}")
    return state


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_model_state(model: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load weights into a model of exactly the same architecture.

    Raises:
        CheckpointError: naming the first differences.
    """
    own = model.state_dict()
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or shapes:
        parts = []
        for label, keys in (("lacks", missing), ("has unknown", extra), ("has another shape of", shapes)):
            if keys:
                parts.append(f"{label} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}")
        raise CheckpointError(f"{path} does not fit the model: it {'; '.join(parts)}")
    model.load_state_dict(state)
