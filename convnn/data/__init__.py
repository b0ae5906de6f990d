"""Data sets, and the batches made of them. Names load on first use, since most need torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convnn.data.batches import Batches
    from convnn.data.datasets import load_cifar, load_dataset, load_digits, load_imagefolder, load_synthetic
    from convnn.data.splits import Dataset, FileSplit, Split

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
__all__ = [
    "Batches",
    "Dataset",
    "FileSplit",
    "Split",
    "load_cifar",
    "load_dataset",
    "load_digits",
    "load_imagefolder",
    "load_synthetic",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"convnn.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'convnn.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
