"""What data a run was made with: the part of its identity that no configuration tells.

A run's marker, checkpoints and result.json each hold a record of it. Wherever a run is taken up again (resumed, skipped
as complete, evaluated), the record is compared with the data that there is now. Imports torch only to read data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.config.schema import DataConfig
from convnn.errors import ConfigError

if TYPE_CHECKING:
    from convnn.data.splits import Dataset

log = logging.getLogger("convnn")
_OWN_SETS = ("convnn.data.load_digits", "convnn.data.load_synthetic", "convnn.data.load_cifar")
"""Data sets that a configuration tells whole: made from it, or verified by checksums."""


@dataclass(frozen=True)
class DataRecord:
    """The classes and the images of a run."""

    classes: list[str]
    """Names, in the order of the labels."""
    images: dict[str, int]
    """Number of images of each split."""
    content: dict[str, str]
    """Hash of each split's labels and images, see ``convnn.data.splits.split_fingerprint``."""
    shape: list[int] | None = None
    """Channels, height and width of the run's images; None: not known. It follows from all files of a folder."""

    @classmethod
    def of(cls, dataset: Dataset) -> DataRecord:
        """Return the record of a data set that was loaded, as a run uses it."""
        from convnn.data.splits import split_fingerprint

        splits = dataset.splits()
        content = {name: split_fingerprint(split) for name, split in splits.items()}
        return cls(list(dataset.classes), {name: len(split) for name, split in splits.items()}, content)

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> DataRecord | None:
        """Return the record in what a marker, a checkpoint or a result holds; None: of before there were records."""
        found = (values or {}).get("data")
        try:
            return cls(
                list(found["classes"]),  # type: ignore[index]
                dict(found["images"]),  # type: ignore[index]
                dict(found["content"]),  # type: ignore[index]
                found.get("shape"),  # type: ignore[union-attr]
            )
        except (TypeError, KeyError, ValueError):
            return None

    def entry(self) -> dict[str, Any]:
        """Return what ``read`` reads, as plain values."""
        return {"data": asdict(self)}

    def differences(self, now: DataRecord, splits: Sequence[str] | None = None) -> list[str]:
        """Say in what other data differs: in classes, and in images of the ``splits`` (None: of all)."""
        found = _class_differences(self.classes, now.classes)
        names = dict.fromkeys([*self.images, *now.images]) if splits is None else splits
        for name in names:
            a, b = self.images.get(name, 0), now.images.get(name, 0)
            if a != b:
                found.append(f"{name}: {a} -> {b} images")
            elif self.content.get(name) != now.content.get(name):
                found.append(f"{name}: other images")
        return found

    def check(self, now: DataRecord, what: str, way: str, splits: Sequence[str] | None = None) -> None:
        """Raise ConfigError unless the data is now the same.

        Args:
            now: of the data at hand.
            what: whose data this is the record of.
            way: what the message tells the user to do.
            splits: those that are compared; None: all.
        """
        found = self.differences(now, splits)
        if found:
            raise ConfigError(f"{what} was made with other data ({'; '.join(found[:5])}); {way}")


def _class_differences(known: list[str], now: list[str]) -> list[str]:
    if known == now:
        return []
    from convnn.data.classes import class_order, listed

    try:
        class_order(known, now, ("the run", "the data"))
    except ConfigError as error:
        return [str(error)]
    return [f"the classes are in another order: {listed(known)} -> {listed(now)}"]


def told_by_configuration(config: DataConfig) -> bool:
    """Return whether equal configurations mean equal data, so that nothing has to be read to know it."""
    return config.target in _OWN_SETS


class RecordReader:
    """Reads what data there is now, each data set once."""

    def __init__(self) -> None:
        self._known: dict[str, DataRecord | ConfigError] = {}
        self._told: set[str] = set()

    def __call__(self, config: DataConfig) -> DataRecord:
        """Return the record of the data that a configuration names; of files only names and sizes are read.

        Raises:
            ConfigError: if the data cannot be had.
        """
        key = _key(config)
        if key not in self._known:
            try:
                self._known[key] = _read(config)
            except ConfigError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, ConfigError):
            raise found
        return found

    def known(self, config: DataConfig) -> DataRecord | None:
        """Return a record that was read before, None if it was not."""
        found = self._known.get(_key(config))
        return found if isinstance(found, DataRecord) else None

    def compare(self, known: DataRecord | None, config: DataConfig, what: str, way: str) -> None:
        """Compare the data of a run that is complete with what there is now; where that cannot be read, warn.

        Raises:
            ConfigError: if it is other data.
        """
        if known is None or told_by_configuration(config):
            return
        try:
            now = self(config)
        except ConfigError as error:
            if str(error) not in self._told:
                log.warning("%s: whether its data is still the same cannot be told (%s)", what, error)
            self._told.add(str(error))
            return
        known.check(now, what, way)

    def differences(self, a: DataConfig, b: DataConfig) -> list[str]:
        """Say in what the data of two runs differs whose configurations differ in the place of the data alone.

        Raises:
            ConfigError: if one of them cannot be had.
        """
        places = {Path(config.root).expanduser().resolve() for config in (a, b)}
        return [] if told_by_configuration(a) or len(places) == 1 else self(a).differences(self(b))


def _key(config: DataConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True)


def _read(config: DataConfig) -> DataRecord:
    from convnn.data.datasets import load_dataset

    if config.target == "convnn.data.load_imagefolder":  # as files, of which few are opened
        config = replace(config, stream="true", load_size=config.load_size or 1)
    return DataRecord.of(load_dataset(replace(config, download=False)))
