"""A report's files: written aside, put in place together, and known again by a list of what was written."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from convnn.errors import ConfigError, first_line
from convnn.runtime.files import read_json

MANIFEST = ".convnn-report"
"""Lists the files that a report wrote, each with the SHA-256 of its content."""
_ASIDE = ".convnn-report.tmp"
_PAGE = "Mean ± sample standard deviation over n seeds; only complete runs count."
"""Stands in every page, also of version 0.1, which wrote no list."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the disk the name of the file that is being written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or first_line(error), str(path)) from error


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Yield a folder to write a report to; at the end its files replace those of the earlier report in ``out``.

    Other files in ``out`` stay. The page comes last; only renames remain then, which a full disk allows.

    Raises:
        ConfigError: if a file of the report would replace one that no report wrote.
        OSError: if the disk refuses; the earlier report is then as it was.
    """
    existed = out.exists()
    aside = out / _ASIDE
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        _put_in_place(aside, out)
    except OSError as error:
        if not str(error.filename).startswith(str(aside)):
            raise
        what = out / Path(error.filename).name
        raise OSError(f"{what} cannot be written: {error.strerror}; an earlier report there is as it was") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                out.rmdir()  # refused where something is in it


def _put_in_place(aside: Path, out: Path) -> None:
    earlier = _earlier(out)
    new = {path.name: [_digest(path)] for path in aside.iterdir()}
    foreign = [name for name in sorted(new) if not _is_free(out / name, earlier)]
    if foreign:
        rest = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(
            f"out={out}: {', '.join(foreign[:3])}{rest} would be replaced, which no report wrote or which was changed "
            "since; move it, or choose another out"
        )
    # Between the first rename and the last the list has the old and the new content, so that a kill loses neither.
    either = {name: earlier.get(name, []) + new.get(name, []) for name in earlier | new}
    for name, files in (("either", either), ("new", new)):
        with naming(aside / MANIFEST):
            (aside / f".{name}").write_text(json.dumps({"files": files}, indent=1) + "\n")
    (aside / ".either").replace(out / MANIFEST)
    for name in sorted(earlier.keys() - new.keys()):
        if _is_free(out / name, earlier):
            (out / name).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == "index.html"):
        (aside / name).replace(out / name)
    (aside / ".new").replace(out / MANIFEST)


def _is_free(path: Path, earlier: dict[str, list[str]]) -> bool:
    """Return whether a file is not there, or is one that an earlier report wrote, unchanged."""
    if not path.is_symlink() and path.is_file():
        return _digest(path) in earlier.get(path.name, [])
    return not (path.is_symlink() or path.exists())


def _earlier(out: Path) -> dict[str, list[str]]:
    """Return the files of an earlier report with the SHA-256 of what it wrote."""
    listed = (read_json(out / MANIFEST) or {}).get("files")
    if isinstance(listed, dict):
        return {
            name: digests for name, digests in listed.items() if Path(name).name == name and isinstance(digests, list)
        }
    page = out / "index.html"
    text = page.read_text(errors="replace") if page.is_file() else ""
    if _PAGE not in text:
        return {}
    # A page of version 0.1 holds its pictures.
    pictures = [path for path in out.glob("*.svg") if base64.b64encode(path.read_bytes()).decode() in text]
    files = [out / name for name in ("index.html", "table.md", "summary.csv", "results.csv")]
    files += [path.with_suffix(kind) for path in pictures for kind in (".svg", ".png")]
    return {path.name: [_digest(path)] for path in files if path.is_file()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
