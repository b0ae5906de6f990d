"""Checkpoints: atomic writes, verified reads, plain types and tensors only."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from convnn.config.identity import differences, lengthened, without_place
from convnn.errors import CheckpointError, first_line, load_failure
from convnn.runs.data_record import DataRecord
from convnn.runtime.files import write_atomically

log = logging.getLogger("convnn")
FORMAT = 2
"""Version of what a checkpoint holds; it changes whenever a reader of another version could misread it."""


def save_checkpoint(path: Path, state: dict[str, Any], previous: bool = True) -> None:
    """Write ``state`` to ``path`` and keep the file that stood there as ``previous_of(path)``, if it is to be kept.

    Raises:
        OSError: if the disk refuses; what stood there still does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(
            path,
            lambda file: torch.save({"format": FORMAT, **state}, file),
            keep=previous_of(path) if previous else None,
        )
    except RuntimeError as error:  # torch reports a full disk as RuntimeError
        raise OSError(f"{path} could not be written: {first_line(error)}") from error


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
        raise CheckpointError(f"{path} is not a whole checkpoint: {first_line(error)}") from error
    except (RuntimeError, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a safe or whole checkpoint: {load_failure(error)}") from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointError(f"{path} was not written by convnn")
    found = state["format"]
    if found != FORMAT:
        age, way = ("a newer", "update convnn") if found > FORMAT else ("an older", "use the version in env.json")
        raise CheckpointError(f"{path} has format {found} of {age} convnn; this one reads format {FORMAT}: {way}")
    return state


def load_latest(folder: Path, map_location: Any = "cpu") -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the newest whole checkpoint in a folder, None if there is none at all.

    That is ``last.pt``; if it is damaged or missing, the one of most steps among the one before it and the best ones,
    with a warning. Damaged ones are then renamed (``last.damaged.pt``), so that they take no good one's place. Weights
    alone, as those of the best epoch, are nothing to go on from.

    Raises:
        CheckpointError: if there are checkpoints, and none of them is whole.
    """
    last, best = folder / "last.pt", folder / "best.pt"
    others = [path for path in (previous_of(last), best, previous_of(best)) if path.exists()]
    if not last.exists() and not others:
        return None
    try:
        return last, load_checkpoint(last, map_location)
    except CheckpointError as error:
        first = error
    good, damaged = [], [last] if last.exists() else []
    for path in others:
        try:
            good.append((path, load_checkpoint(path, map_location)))
        except CheckpointError:
            damaged.append(path)
    whole = [item for item in good if item[1].get("optimizer") is not None]
    if good and not whole and not damaged:
        log.warning("%s: there is %s, which holds weights alone, nothing to go on from", first, good[0][0].name)
        return None
    if not whole:
        raise CheckpointError(f"{first}; no other checkpoint there is whole either; begin anew elsewhere") from first
    found = max(whole, key=lambda item: item[1]["step"])
    log.warning("%s; going on from %s, step %d", first, found[0].name, found[1]["step"])
    for path in damaged:
        path.replace(path.with_name(f"{path.stem}.damaged{path.suffix}"))
    return found


def settle(folder: Path, keep: str) -> None:
    """Remove the checkpoints that a complete run does not keep.

    Args:
        folder: of the checkpoints.
        keep: as ``checkpoint.keep``; without best weights the last ones stay.
    """
    last, best = folder / "last.pt", folder / "best.pt"
    gone = [previous_of(last), previous_of(best)]
    if keep == "last":
        gone.append(best)
    elif keep == "best" and best.exists():
        gone.append(last)
    for path in gone:
        path.unlink(missing_ok=True)


def check_identity(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any], data: DataRecord) -> None:
    """Refuse a checkpoint of another configuration or of other data; one of before an extension of the run is taken.

    Raises:
        CheckpointError: naming what differs in the configuration.
        ConfigError: naming what differs in the data.
    """
    known, old = DataRecord.read(state), state["identity"]
    if known is not None:
        old, identity = without_place(old), without_place(identity)
    changed = differences(lengthened(old, identity), identity)
    if changed:
        raise CheckpointError(f"{path} belongs to another configuration ({'; '.join(changed[:5])}); set these back")
    if known is not None:
        known.check(data, str(path), "put it back, or begin another run")


def load_model_state(model: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load weights into a model of exactly the same architecture.

    Raises:
        CheckpointError: naming the first differences.
    """
    own = model.state_dict()
    # Blend, k and temperature of a layer, which checkpoints of version 0.1 hold elsewhere.
    missing = [k for k in own if k not in state and not k.endswith("_extra_state")]
    extra = [k for k in state if k not in own]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or shapes:
        parts = []
        for label, keys in (("lacks", missing), ("has unknown", extra), ("has another shape of", shapes)):
            if keys:
                parts.append(f"{label} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}")
        raise CheckpointError(f"{path} does not fit the model: it {'; '.join(parts)}")
    model.load_state_dict(state)
