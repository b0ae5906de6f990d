"""Data sets, and the batches made of them. Names load on first use, since most need torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convnn.data.batches import Batches as Batches
    from convnn.data.datasets import load_cifar as load_cifar
    from convnn.data.datasets import load_dataset as load_dataset
    from convnn.data.datasets import load_digits as load_digits
    from convnn.data.datasets import load_imagefolder as load_imagefolder
    from convnn.data.datasets import load_synthetic as load_synthetic
    from convnn.data.splits import Dataset as Dataset
    from convnn.data.splits import FileSplit as FileSplit
    from convnn.data.splits import Split as Split

_HOME = {
    "Batches": "batches",
    "Dataset": "splits",
    "FileSplit": "splits",
    "Split": "splits",
    "load_cifar": "datasets",
    "load_dataset": "datasets",
    "load_digits": "datasets",
    "load_imagefolder": "datasets",
    "load_synthetic": "datasets",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"convnn.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'convnn.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
