"""Configuration of the data set: the group ``data`` of ``conf/``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_FILE_TRANSFORMS = ("scale", "rand_augment", "color_jitter", "random_erasing", "crop_pct")


@dataclass
class DataConfig:
    """The data set, and what is done to a batch on the training device."""

    name: str = "digits"
    target: str = "convnn.data.load_digits"
    """Function ``(config) -> convnn.data.Dataset``."""
    root: str = "data"
    """Folder of the files; below it the layout that torchvision uses, or train/CLASS and test/CLASS (or val/CLASS)."""
    download: bool = True
    """Fetch what is missing (cifar10, cifar100)."""
    limit: int | None = None
    """Use this many training images, spread evenly over the classes, chosen by ``split_seed``."""
    limit_test: int | None = None
    """The same for test images."""
    val_fraction: float = 0.0
    """Share of the training images held out to choose the best checkpoint; 0 chooses it on the test set and says so."""
    split_seed: int = 0
    """Seed of the validation split and of ``limit``."""
    image_size: int | None = None
    """Side in pixels of what the network sees; null takes the backbone's, else the images' own."""
    load_size: int | None = None
    """Side in pixels of the squares that an image folder's files become; null keeps the first image's shorter side."""
    crop_padding: int = 0
    """Random crops after padding by this many pixels (of the stored image); 0: none."""
    flip: bool = False
    """Random horizontal flips."""
    mean: list[float] = field(default_factory=lambda: [0.5])
    """Per channel, for pixels in [0, 1]; one value serves all channels."""
    std: list[float] = field(default_factory=lambda: [0.5])
    stream: str = "auto"
    """Image folders: ``false`` keeps the images in memory; ``true`` reads the files batch by batch, with the same
    result; ``auto`` streams what exceeds 8 GiB, or has one of the next five settings: timm's transforms, made at the
    size that the network sees, need a stream."""
    scale: list[float] | None = None
    """Range of the area that RandomResizedCrop keeps, such as [0.08, 1]; null: the largest square at the centre."""
    rand_augment: str | None = None
    """timm's name of a RandAugment, such as rand-m9-mstd0.5-inc1; null: none."""
    color_jitter: float = 0.0
    """Largest change of brightness, contrast and saturation; timm leaves it out beside ``rand_augment``."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image is erased."""
    crop_pct: float | None = None
    """Share of the shorter side that the central crop keeps at evaluation; null: all of it."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Range of the aspect ratio of RandomResizedCrop."""
    erasing_mode: str = "pixel"
    """What replaces an erased rectangle: ``pixel`` (noise), ``rand`` (one random colour) or ``const`` (the mean)."""
    interpolation: str = "bicubic"
    """Of timm's transforms: bilinear, bicubic, nearest, lanczos, box, hamming; or ``random``: bilinear or bicubic
    in training, bicubic at evaluation."""
    workers: int | None = None
    """Processes that read a stream, 0: the training process itself; null: one a CPU core, at most 16."""
    prefetch: int = 2
    """Batches that each worker reads ahead."""
    size: int = 2048
    """Number of images of the synthetic set."""
    num_classes: int = 10
    """Number of classes of the synthetic set."""
    options: dict[str, Any] = field(default_factory=dict)
    """Free settings for data sets from other modules."""

    def __post_init__(self) -> None:
        self.stream = self.stream.lower()  # YAML's true arrives as "True"

    def file_transforms(self) -> list[str]:
        """Return the settings in use that only streamed files can have."""
        return [name for name in _FILE_TRANSFORMS if getattr(self, name)]
