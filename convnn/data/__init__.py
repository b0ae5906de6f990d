"""Data sets, and the batches made of them."""

from convnn.data.batches import Batches
from convnn.data.datasets import load_cifar, load_dataset, load_digits, load_imagefolder, load_synthetic
from convnn.data.splits import Dataset, FileSplit, Split

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
