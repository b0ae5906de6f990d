"""Loading image folders, and sets of a few alike images, for the tests of data."""

import numpy as np
import pytest
import torch

from convnn.config.schema import DataConfig
from convnn.data import Dataset
from convnn.data.datasets import load_dataset
from convnn.data.splits import Split
from convnn.errors import ConfigError


def load(root, **kwargs):
    return load_dataset(DataConfig("imagefolder", "convnn.data.load_imagefolder", str(root), **kwargs))


def refused(root, message, **kwargs):
    with pytest.raises(ConfigError, match=message) as error:
        load(root, **kwargs)
    assert "\n" not in str(error.value) and str(error.value).startswith("data.")


def lopsided(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


def load_lopsided(config):
    sizes = config.options["sizes"]
    labels = torch.from_numpy(lopsided(sizes))
    images = torch.arange(len(labels)).remainder(256).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    split = Split(images, labels)
    return Dataset(split, split, [f"c{i}" for i in range(len(sizes))])


def from_sizes(*sizes, **kwargs):
    return load_dataset(DataConfig("mine", "image_sets.load_lopsided", options={"sizes": sizes}, **kwargs))
