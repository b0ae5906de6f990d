"""Files that are there whole or not at all. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], Any], keep: Path | None = None) -> None:
    """Call ``write(file)`` on a temporary file and put it in place in one step, so that readers see old or new.

    At every moment, and after a power cut too, ``path`` is there if it was before. Four steps, in this order:

    1. write the new content beside ``path`` and flush it to the disk, lest the name outlive its content;
    2. give what stands at ``path`` its second name ``keep``, as a link, so that ``path`` itself is never missing;
    3. rename the new file to ``path``, which the system does in one step;
    4. flush the folder, where the names are.

    Args:
        path: the file.
        write: writes the content.
        keep: where what stands at ``path`` is kept, if given.

    Raises:
        OSError: if the disk refuses; what stood at ``path`` still does.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _keep(path: Path, keep: Path) -> None:
    """Give a file a second name, in one step, in place of what had that name."""
    link = path.with_name(f".{keep.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        link.hardlink_to(path)
    except OSError:  # a file system without links
        path.replace(keep)
    else:
        link.replace(keep)
        link.unlink(missing_ok=True)  # still there where both names were of one file already


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_leftover(path: Path) -> bool:
    """Return whether a file is a temporary one of ``write_atomically``, whose process may have been killed."""
    return re.fullmatch(r"\..+\.\d+\.tmp", path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a folder; call it under a lock."""
    for path in filter(is_leftover, folder.glob(".*.tmp")):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file in one step."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the mapping in a JSON file, or None if there is none or it is damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, read anew only if its size or time has changed.

    Raises:
        OSError: if it cannot be read.
    """
    found = path.stat()
    return _sha256(path.resolve(), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=64)
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
