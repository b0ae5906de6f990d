"""A program's files among those of others: written aside, put in place together, known again by a list. No torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from convnn.errors import ConfigError, first_line
from convnn.runtime.files import read_json

Digests = Mapping[str, Sequence[str]]
"""The SHA-256 of what was written, by file name; of several, any is right."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of the disk the name of the file that is being written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or first_line(error), str(path)) from error


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Owner:
    """What writes a set of files into a folder that may hold others."""

    name: str
    """In messages: ``report``."""
    manifest: str
    """File that lists what was written, each with the SHA-256 of its content."""
    last: str | None = None
    """File that is put in place after all others."""
    older: Callable[[Path], Digests] = lambda out: {}
    """Tells what of a folder without a list was written by a version that made none."""

    @contextmanager
    def written_aside(self, out: Path) -> Iterator[Path]:
        """Yield a folder to write to; at the end its files replace those written to ``out`` before.

        Other files in ``out`` stay. Only renames remain at the end, which a full disk allows.

        Raises:
            ConfigError: if a file would replace one that this owner did not write.
            OSError: if the disk refuses; what was written before is then as it was.
        """
        existed = out.exists()
        aside = out / f"{self.manifest}.tmp"
        try:
            out.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            self._put_in_place(aside, out)
        except OSError as error:
            if not str(error.filename).startswith(str(aside)):
                raise
            what, why = out / Path(error.filename).name, f"an earlier {self.name} there is as it was"
            raise OSError(f"{what} cannot be written: {error.strerror}; {why}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    out.rmdir()  # refused where something is in it

    def _put_in_place(self, aside: Path, out: Path) -> None:
        earlier = self._earlier(out)
        new = {path.name: [digest_of(path)] for path in aside.iterdir()}
        foreign = [name for name in sorted(new) if not _is_free(out / name, earlier)]
        if foreign:
            rest = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise ConfigError(
                f"out={out}: {', '.join(foreign[:3])}{rest} would be replaced, which no {self.name} wrote or which was "
                "changed since; move it, or choose another out"
            )
        # Between the first rename and the last the list has the old and the new content, so that a kill loses neither.
        either = {name: [*earlier.get(name, []), *new.get(name, [])] for name in {**earlier, **new}}
        for name, files in (("either", either), ("new", new)):
            with naming(aside / self.manifest):
                (aside / f".{name}").write_text(json.dumps({"files": files}, indent=1) + "\n")
        (aside / ".either").replace(out / self.manifest)
        for name in sorted(earlier.keys() - new.keys()):
            if _is_free(out / name, earlier):
                (out / name).unlink(missing_ok=True)
        for name in sorted(new, key=lambda name: name == self.last):
            (aside / name).replace(out / name)
        (aside / ".new").replace(out / self.manifest)

    def _earlier(self, out: Path) -> Digests:
        """Return the files written before with the SHA-256 of what was written."""
        listed = _listed(out / self.manifest)
        return self.older(out) if listed is None else listed


def _listed(manifest: Path) -> Digests | None:
    """Return what a list says was written into its folder; None without a list."""
    listed = (read_json(manifest) or {}).get("files")
    if not isinstance(listed, dict):
        return None
    return {name: digests for name, digests in listed.items() if Path(name).name == name and isinstance(digests, list)}


def unchanged_files(manifest: Path) -> list[Path]:
    """Return the files of a list that are there as they were written."""
    listed = _listed(manifest) or {}
    return [path for name in listed if (path := manifest.parent / name).is_file() and _is_free(path, listed)]


def _is_free(path: Path, earlier: Digests) -> bool:
    """Return whether a file is not there, or is one that was written before, unchanged."""
    if not path.is_symlink() and path.is_file():
        return digest_of(path) in earlier.get(path.name, [])
    return not (path.is_symlink() or path.exists())
