"""Whether the batches of a run can be made of its data."""

from __future__ import annotations

from convnn.config.schema import Config
from convnn.data.splits import Dataset
from convnn.errors import ConfigError
from convnn.runtime import distributed


def check_sizes(config: Config, dataset: Dataset) -> None:
    """Raise ConfigError where the batches of a run cannot be made of its data, or the pixels not be normalised."""
    train, data, processes = config.train, config.data, distributed.world().size
    if train.batch_size > len(dataset.train):
        raise ConfigError(
            f"train.batch_size={train.batch_size} exceeds the {len(dataset.train)} training images of {data.name}"
        )
    pairs = bool(train.mixup or train.cutmix)
    distributed.check_batch_size(train.batch_size, pairs=pairs)
    left = 0 if data.drop_last else len(dataset.train) % train.batch_size
    if left % (processes * (2 if pairs else 1)):
        purpose = f"shared by {processes} processes{' in pairs for Mixup' if pairs else ''}"
        raise ConfigError(f"data.drop_last=false: the last batch of {left} images cannot be {purpose}; set it to true")
    if left == 1:
        raise ConfigError(
            "data.drop_last=false: the last batch has one image, too few for batch normalisation; "
            "set it to true or change train.batch_size"
        )
    channels = dataset.train.shape[0]
    if len(data.mean) not in (1, channels):
        raise ConfigError(f"data.mean has {len(data.mean)} values for images of {channels} channels")
