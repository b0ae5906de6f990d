"""Configuration of the data set, the ``data`` group. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from convnn.ops.settings import choice, later, number

_FILE_TRANSFORMS = ("scale", "rand_augment", "color_jitter", "random_erasing", "crop_pct")


@dataclass
class DataConfig:
    """The data set, and what is done to a batch on the training device."""

    name: str = "digits"
    """Label in run names, reports and messages."""
    target: str = "convnn.data.load_digits"
    """Function ``(config) -> convnn.data.Dataset``."""
    root: str = "data"
    """Folder of the files; below it the layout that torchvision uses, or CLASS folders in train, test and val."""
    download: bool = True
    """Fetch what is missing (cifar10, cifar100)."""
    limit: int | None = number(None, 1)
    """Use this many training images, spread evenly over the classes, chosen by ``split_seed``."""
    limit_test: int | None = number(None, 1)
    """The same for test images."""
    val_fraction: float = number(0.0, 0, 1, below=True)
    """Share of each class's training images held out to choose the best checkpoint; 0: it is chosen on the validation
    set that the data has, else on the test set, and that is said."""
    split_seed: int = number(0, 0)
    """Seed of the validation split and of ``limit``."""
    val_folder: bool = later(True)
    """Image folders with ``val`` beside ``test``: ``val`` chooses the best checkpoint; false leaves it out."""
    image_size: int | None = number(None, 1)
    """Side in pixels of what the network sees; null takes the backbone's, else the images' own."""
    load_size: int | None = number(None, 1)
    """Side in pixels of the squares that an image folder's files become; null: the median of their shorter sides."""
    crop_padding: int = number(0, 0)
    """Random crops after padding by this many pixels (of the stored image); 0: none."""
    flip: bool = False
    """Random horizontal flips."""
    drop_last: bool = later(True)
    """Leave out the images of an epoch's incomplete last training batch; false: train on them too."""
    mean: list[float] = field(default_factory=lambda: [0.5])
    """Per channel, for pixels in [0, 1]; one value serves all channels."""
    std: list[float] = field(default_factory=lambda: [0.5])
    """What the pixels less ``mean`` are divided by; as many values as ``mean`` has."""
    stream: str = choice("auto", "true", "false")
    """Image folders: ``false`` keeps the images in memory; ``true`` reads the files batch by batch, with the same
    result; ``auto`` streams what exceeds 8 GiB, or has one of the next five settings: timm's transforms, made at the
    size that the network sees, need a stream."""
    scale: list[float] | None = None
    """Range of the area that RandomResizedCrop keeps, such as [0.08, 1]; null: the largest square at the centre."""
    rand_augment: str | None = None
    """timm's name of a RandAugment, such as rand-m9-mstd0.5-inc1; null: none."""
    color_jitter: float = number(0.0, 0)
    """Largest change of brightness, contrast and saturation; timm leaves it out beside ``rand_augment``."""
    random_erasing: float = number(0.0, 0, 1)
    """Probability that a rectangle of an image is erased."""
    crop_pct: float | None = number(None, 0, 1, above=True)
    """Share of the shorter side that the central crop keeps at evaluation; null: all of it."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Range of the aspect ratio of RandomResizedCrop."""
    erasing_mode: str = choice("pixel", "rand", "const")
    """What replaces an erased rectangle: ``pixel`` (noise), ``rand`` (one random colour) or ``const`` (the mean)."""
    interpolation: str = choice("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")
    """Of timm's transforms; ``random``: bilinear or bicubic in training, bicubic at evaluation."""
    workers: int | None = number(None, 0)
    """Processes that read a stream, 0: the training process itself; null: one a CPU core, at most 16."""
    prefetch: int = number(2, 1)
    """Batches that each worker reads ahead."""
    size: int = number(2048, 1)
    """Number of images of the synthetic set."""
    num_classes: int = number(10, 2)
    """Number of classes of the synthetic set."""
    options: dict[str, Any] = field(default_factory=dict)
    """Free settings for data sets from other modules."""

    def file_transforms(self) -> list[str]:
        """Return the settings in use that only streamed files can have."""
        return [name for name in _FILE_TRANSFORMS if getattr(self, name)]
