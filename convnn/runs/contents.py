"""What a run leaves in its folder: how a folder is known to be a run's, and what of it may be removed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

from convnn.errors import CheckpointError, ConfigError
from convnn.runs.trackers import tensorboard
from convnn.runtime.files import is_leftover, read_json
from convnn.runtime.owned import digest_of, unchanged_files

MARKER = ".convnn-run"
"""Says that a folder is one of a run. Version 0.1 wrote none."""
PICTURES_LIST = ".convnn-pictures"
"""Lists the pictures that were written into a folder."""
EVALUATIONS, EVALUATION_LIST = "evaluation", ".convnn-evaluation"
"""Folder of a run's evaluations, each in a folder of its own, and the list of the files in that."""
ANALYSES = "analyses"
"""Folder of what scripts/analyze.py measured of a run, ``NAME.json`` and ``NAME.npz``, or drew of several."""
PREDICTIONS = "predictions.npz"
"""What the model says of each test image, see ``convnn.runs.predictions``."""
_FILES = ("result.json", "env.json", "train.log", "metrics.jsonl", "swap.txt", "wandb_id", "trackio_id", PREDICTIONS)
_IN_FOLDERS = {
    "checkpoints": [
        "".join(parts) for parts in product(("last", "best"), ("", ".previous"), ("", ".damaged"), (".pt",))
    ],
    "pictures": [
        PICTURES_LIST,
        *(
            f"{name}.{kind}"
            for name, kind in product(("neighbors", "blends", "weights", "diagnostics", "training"), ("png", "svg"))
        ),
    ],
    tensorboard.FOLDER: [],
    "wandb": ["latest-run", "debug.log", "debug-internal.log", "settings"],
}
_KEPT = {MARKER, ".lock", "config.yaml"}


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder bears our marker, or config.yaml and a further file as only our runs write it."""
    if (folder / MARKER).is_file():
        return True
    if not (folder / "config.yaml").is_file():
        return False
    versions = (read_json(folder / "env.json") or {}).get("versions")
    result = read_json(folder / "result.json") or {}
    return (
        (isinstance(versions, dict) and "convnn" in versions)
        or {"status", "fingerprint", "top1_last"} <= result.keys()
        or any(_is_checkpoint(folder / "checkpoints" / f"{name}.pt") for name in ("last", "best"))
    )


def _is_checkpoint(path: Path) -> bool:
    if not path.is_file():
        return False
    from convnn.runs.checkpoint import load_checkpoint  # loads torch, which most readers of a folder do without

    try:
        return "fingerprint" in load_checkpoint(path)
    except CheckpointError:
        return False


def pictures_of_run(folder: Path) -> Mapping[str, Sequence[str]]:
    """Return the pictures in a run's own folder of them, which are the run's by their names, with their SHA-256."""
    found = [path for name in _IN_FOLDERS["pictures"] if (path := folder / name).is_file()]
    return {path.name: [digest_of(path)] for path in found}


def check_removable(folder: Path) -> None:
    """Raise ConfigError if a part of a run's folder is a link, whose files may be others' too, or no folder."""
    for path in (folder / name for name in _IN_FOLDERS):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            what = f"a link to {path.readlink()}" if path.is_symlink() else "a file"
            raise ConfigError(f"{path} is {what}, which overwriting leaves alone; remove it, or choose another run.dir")


def remove_earlier(folder: Path) -> list[str]:
    """Remove what an earlier run wrote into its folder, and nothing else; return the names of what is left.

    Raises:
        OSError: if something cannot be removed.
    """
    for path in list(_written(folder)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for place in (*(folder / EVALUATIONS).glob("*/"), folder / EVALUATIONS, folder / ANALYSES):
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    left = [path for path in folder.iterdir() if path.name not in (*_KEPT, *_IN_FOLDERS) and not is_leftover(path)]
    for name in _IN_FOLDERS:
        if (folder / name).is_dir():
            inside = list((folder / name).iterdir())
            left += inside
            if not inside:
                (folder / name).rmdir()
    return sorted(str(path.relative_to(folder)) for path in left)


def _written(folder: Path) -> Iterator[Path]:
    """Yield what a run wrote, as far as it is there; W&B's folders bear the run's id in their names."""
    try:
        wandb_id = (folder / "wandb_id").read_text().strip()
    except (OSError, UnicodeDecodeError):
        wandb_id = ""
    if wandb_id.isalnum():
        for kind in ("run", "offline-run"):
            yield from (folder / "wandb").glob(f"{kind}-*-{wandb_id}")
    yield from (folder / tensorboard.FOLDER).glob(f"*{tensorboard.SUFFIX}")
    for listing in (folder / EVALUATIONS).glob(f"*/{EVALUATION_LIST}"):
        yield from (path for path in unchanged_files(listing) if path.is_file())
        yield listing
    for file in (folder / ANALYSES).glob("*.json"):
        if "analysis" in (read_json(file) or {}):
            yield from (one for one in (file, file.with_suffix(".npz")) if one.is_file())
    for place, names in (("", _FILES), *_IN_FOLDERS.items()):
        found = (folder / place / name for name in names)
        yield from (path for path in found if path.is_symlink() or path.is_file())
        if (folder / place).is_dir():
            yield from filter(is_leftover, (folder / place).iterdir())
