"""Folders of image files: which splits, classes and files they hold. Shapes: N images."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from convnn.data.classes import check_spelling, listed
from convnn.data.images import image_suffixes
from convnn.errors import ConfigError

log = logging.getLogger("convnn")
VALIDATION = ("val", "valid", "validation")
"""Names of a folder of validation images."""

_LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
"""Folders that systems leave behind, hidden where they come from."""


@dataclass
class Listing:
    """The image files of a split."""

    paths: np.ndarray
    """(N,) as bytes, ImageNet's million names in one array: forked workers share it."""
    labels: np.ndarray
    """(N,) class indices."""
    classes: list[str]
    others: Counter[str] = field(default_factory=Counter)
    """Files that are left out, by suffix or place."""


def split_folders(root: Path, val_folder: bool) -> dict[str, Path]:
    """Return the folders of ``train`` and ``test``, and of ``val`` if it lies beside ``test`` and is wanted.

    A validation folder without ``test`` beside it is the test set. A folder without class folders, as ImageNet's
    unlabelled test images, does not count.

    Raises:
        ConfigError: if there is no folder to train or to test on, or several to validate on.
    """
    there = [root / name for name in ("test", *VALIDATION) if (root / name).is_dir()]
    found = [folder for folder in there if _classes(root, folder)] or there[:1]
    train = root / "train"
    for wanted, exists in ((["train"], train.is_dir()), (["test", "val"], found)):
        if not exists:
            missing = " or ".join(str((root / name).absolute()) for name in wanted)
            raise ConfigError(
                f"data.root={root}: no folder {missing}; expected {'|'.join(wanted)}/CLASS/IMAGE below data.root"
            )
    test = found[0]
    beside = [folder for folder in found[1:] if not folder.samefile(test)]
    if len(beside) > 1 or (beside and test.name != "test"):
        names = " and ".join(folder.name for folder in found if folder.name != "test")
        raise ConfigError(f"data.root={root} has {names}; keep one of them")
    return {"train": train, "test": test} | ({"val": beside[0]} if beside and val_folder else {})


def say_what_is_left_out(root: Path, splits: Mapping[str, Path]) -> None:
    """Log which folders below ``root`` are no split, and warn of one that is two."""
    unused = [name for name in _classes(root, root) if root / name not in splits.values()]
    if unused:
        log.info("data.root=%s: folders left out: %s", root, listed(unused))
    for folder in (*splits.values(),)[1:]:
        if folder.samefile(splits["train"]):
            log.warning("data.root=%s: %s is the folder of train, so that it tells nothing new", root, folder.name)


def list_images(root: Path, folder: Path) -> Listing:
    """Return what lies in ``folder/CLASS/**``: every file with a suffix of an image, through links to folders too.

    Hidden files and folders do not count.

    Args:
        root: folder of the data set, for messages.
        folder: of the split.

    Raises:
        ConfigError: if a class has no images, or there are fewer than two classes.
    """
    classes = _classes(root, folder)
    if not classes:
        raise ConfigError(f"data.root={root}: {folder} has no class folders; expected {folder.name}/CLASS/IMAGE")
    _check_classes(root, folder, classes)
    tree = _Tree(root, folder, classes)
    found = [tree.images(name) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(own) for own in found])
    same = set.intersection(*tree.nested)
    if same:
        log.warning(
            "data.root=%s: all classes of %s hold folders of one name (%s); if those are the classes, move them up",
            *(root, folder.name, listed(sorted(same))),
        )
    with os.scandir(folder) as entries:
        beside = sum(not is_hidden(entry.name) and not entry.is_dir() for entry in entries)
    tree.others.update({"beside the class folders": beside} if beside else {})
    return Listing(np.array([path for own in found for path in own]), labels, classes, tree.others)


def _check_classes(root: Path, folder: Path, classes: list[str]) -> None:
    """Refuse classes that cannot be told apart, and one class alone: its folder often holds those that were meant."""
    check_spelling(classes, f"data.root={root}: {folder.name}")
    nested = _classes(root, folder / classes[0]) if len(classes) == 1 else []
    if nested or (len(classes) == 1 and folder.name == "train"):
        way = f"it holds the folders {listed(nested)}: move them up one level" if nested else "give at least two"
        raise ConfigError(f"data.root={root}: {folder.name} has one class folder, {classes[0]!r}; {way}")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder counts as not there."""
    return name.startswith(".") or name in _LITTER


def _classes(root: Path, folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without hidden ones."""
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not is_hidden(e.name) and e.is_dir())
    except OSError as error:
        raise ConfigError(f"data.root={root} cannot be read: {error}") from error


class _Tree:
    """The class folders of a split, walked one after the other; each real folder is entered once."""

    def __init__(self, root: Path, folder: Path, classes: list[str]) -> None:
        self.root, self.folder = root, folder
        self.others: Counter[str] = Counter()
        self.nested: list[set[str]] = []
        """By class, the names of its folders, none where images lie beside them."""
        self.owner: dict[tuple[int, int], str] = {}
        """Class of the folders that were entered, by device and inode."""
        for name in classes:
            self._enter(folder / name, name)

    def _enter(self, path: Path | str, name: str) -> bool:
        """Return whether a folder of a class was not entered yet.

        Raises:
            ConfigError: if it belongs to another class.
        """
        place = _place(path)
        owner = self.owner.get(place)
        if owner is None:
            self.owner[place] = name
        elif owner != name:
            raise ConfigError(
                f"data.root={self.root}: {path} is a folder of both classes {owner!r} and {name!r}; "
                "remove the link from one of them"
            )
        return owner is None

    def images(self, name: str) -> list[bytes]:
        """Return the sorted paths of a class."""

        def refuse(error: OSError) -> None:
            raise ConfigError(f"data.root={self.root} cannot be read: {error}") from error

        suffixes, found, others = image_suffixes(), [], Counter[str]()
        top = self.folder / name
        above = set(map(_place, (self.root, self.folder, *top.resolve().parents)))  # where links would go in circles
        for place, folders, files in os.walk(top, onerror=refuse, followlinks=True):
            paths = {folder: os.path.join(place, folder) for folder in sorted(folders)}  # noqa: PTH118
            folders[:] = [
                folder
                for folder, path in paths.items()
                if not is_hidden(folder) and _place(path) not in above and self._enter(path, name)
            ]
            for file in files:
                suffix = os.path.splitext(file)[1].lower()  # noqa: PTH122 a Path for each of a million files is slow
                if suffix in suffixes and not is_hidden(file):
                    found.append(os.fsencode(os.path.join(place, file)))  # noqa: PTH118
                elif not is_hidden(file):
                    others[suffix or "without a suffix"] += 1
            if place == str(top):
                self.nested.append(set() if found else set(folders))
        if not found:
            left = f" (left out: {counted(others)})" if others else ""
            raise ConfigError(f"data.root={self.root}: {top} has no images{left}")
        self.others += others
        return sorted(found)


def _place(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


def counted(others: Counter[str]) -> str:
    """Return what was left out, the most first, such as ``3 .txt, 1 .heic``."""
    return ", ".join(f"{count} {what}" for what, count in sorted(others.items(), key=lambda item: (-item[1], item[0])))
