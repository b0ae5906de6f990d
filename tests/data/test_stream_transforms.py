"""Transforms of streamed files, and the settings that ask for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as T
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode

import convnn.data
from convnn.config.checks import check_stream
from convnn.config.compose import compose_config
from convnn.config.identity import fingerprint
from convnn.config.schema import DataConfig
from convnn.data.datasets import load_dataset
from convnn.data.readers import seeded
from convnn.data.splits import Split
from convnn.data.stream import ByteErasing, file_transform
from convnn.errors import ConfigError
from convnn.ops.settings import check_fields


def picture(side=(30, 40)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*side, 3), dtype=np.uint8))


def test_training_crop_is_timms_and_seeded_by_the_sample():
    c = DataConfig(scale=[0.3, 0.6], ratio=[0.5, 2.0], interpolation="bilinear", mean=[0.5] * 3, std=[0.5] * 3)
    transform, image = file_transform(c, 16, train=True), picture()
    with seeded(5, 1, 7):
        crop = RandomResizedCropAndInterpolation.get_params(image, (0.3, 0.6), (0.5, 2.0))
    top, left, height, width = crop
    expected = T.resized_crop(image, top, left, height, width, [16, 16], InterpolationMode.BILINEAR)
    with seeded(5, 1, 7):
        assert torch.equal(transform(image), T.pil_to_tensor(expected))
    with seeded(5, 1, 8):
        assert not torch.equal(transform(image), T.pil_to_tensor(expected))


def test_without_a_scale_the_crop_is_the_central_square():
    c = DataConfig(color_jitter=1e-9, mean=[0.5] * 3, std=[0.5] * 3)
    image = picture()
    expected = T.resize(T.center_crop(image, [30, 30]), [16, 16], InterpolationMode.BICUBIC)
    assert (file_transform(c, 16, train=True)(image).int() - T.pil_to_tensor(expected).int()).abs().max() <= 1


def test_evaluation_scales_and_crops_at_the_centre():
    c = DataConfig(crop_pct=0.8, mean=[0.5] * 3, std=[0.5] * 3)
    expected = T.center_crop(T.resize(picture(), 20, InterpolationMode.BICUBIC), [16, 16])
    assert torch.equal(file_transform(c, 16, train=False)(picture()), T.pil_to_tensor(expected))


def test_each_augmentation_acts():
    image = picture((16, 16))
    plain = T.pil_to_tensor(image)
    for more in (
        {"rand_augment": "rand-m9-n4-p1"},
        {"color_jitter": 0.9},
        {"random_erasing": 1.0},
        {"crop_pct": 0.9, "crop_padding": 4},
        {"crop_pct": 0.9, "flip": True},
    ):
        transform = file_transform(DataConfig(mean=[0.5] * 3, std=[0.5] * 3, **more), 16, train=True)
        changed = 0
        for i in range(8):
            with seeded(0, i):
                changed += not torch.equal(transform(image), plain)
        assert 2 <= changed <= 8, more
    assert torch.equal(file_transform(DataConfig(crop_pct=0.9, mean=[0.5] * 3, std=[0.5] * 3), 16, True)(image), plain)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_happens_at_its_rate_and_keeps_the_rest(mode):
    c = DataConfig(random_erasing=0.25, erasing_mode=mode, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])
    image, erase, areas = T.pil_to_tensor(picture((24, 24))), ByteErasing(c), []
    with seeded(0):
        for _ in range(1000):
            differs = (erase(image) != image).any(0)
            areas.append(differs.float().mean().item())
            rows, cols = differs.any(1).nonzero(), differs.any(0).nonzero()
            if areas[-1]:  # outside one rectangle every pixel is the image's
                box = (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)
                assert differs.sum() > 0.8 * box
    hit = [a for a in areas if a]
    assert abs(len(hit) / 1000 - 0.25) < 0.05 and max(hit) < 0.4
    if mode == "const":
        erase.probability = 1.0
        with seeded(0):
            erased = erase(image)
        where = (erased != image).any(0)
        assert torch.equal(erased[:, where].unique(dim=1), torch.tensor([[102], [128], [153]], dtype=torch.uint8))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stream": "maybe"}, "data.stream=maybe is not one of auto, true, false"),
        ({"scale": [0.5, 0.2]}, "data.scale=[0.5, 0.2] must be [from, to] with 0 < from <= to <= 1"),
        ({"ratio": [1.0]}, "data.ratio=[1.0] must be [from, to]"),
        ({"rand_augment": "rnd-m9"}, "such as rand-m9-mstd0.5-inc1"),
        ({"rand_augment": "rand-x9"}, "such as rand-m9-mstd0.5-inc1"),
        ({"rand_augment": "rand-tnone"}, "such as rand-m9-mstd0.5-inc1"),
        ({"interpolation": "bicubc"}, "did you mean 'bicubic'?"),
        ({"erasing_mode": "noise"}, "data.erasing_mode=noise is not one of"),
        ({"random_erasing": 1.5}, "data.random_erasing=1.5 must lie in [0, 1]"),
        ({"crop_pct": 0.0}, "data.crop_pct=0.0 must lie in (0, 1]"),
        ({"workers": -1}, "data.workers=-1"),
        ({"prefetch": 0}, "data.prefetch=0"),
        ({"stream": "false"}, "data.scale needs files that are streamed; set data.stream=auto"),
        ({"crop_padding": 4}, "data.scale and data.crop_padding are both random crops"),
        ({"target": "convnn.data.load_cifar", "name": "cifar10"}, "data.scale is for image folders, not data=cifar10"),
        (
            {"target": "convnn.data.load_cifar", "name": "cifar10", "scale": None, "stream": "true"},
            "data.stream is for image folders, not data=cifar10",
        ),
        (
            {"target": "convnn.data.load_cifar", "name": "cifar10", "scale": None, "val_folder": False},
            "data.val_folder is for image folders, not data=cifar10",
        ),
    ],
)
def test_bad_settings_are_named(change, message):
    good = {"name": "imagenet", "target": "convnn.data.load_imagefolder", "scale": [0.1, 1.0]}
    check_stream(DataConfig(**good))
    with pytest.raises(ConfigError) as error:
        check_fields(DataConfig(**(good | change)), "data")
        check_stream(DataConfig(**(good | change)))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given, nearest", [("data.worker=1", "workers"), ("data.rand_augmnt=rand-m9", "rand_augment")])
def test_misspelt_keys_name_the_nearest(given, nearest):
    with pytest.raises(ConfigError, match=f"did you mean 'data.{nearest}'"):
        compose_config([given])


def test_data_of_other_modules_without_files_are_refused():
    with pytest.raises(ConfigError, match=r"data.crop_pct needs files that are streamed, not data=mine"):
        load_dataset(DataConfig("mine", "test_stream_transforms.load_mine", crop_pct=0.9))


def load_mine(config):
    split = Split(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.arange(2))
    return convnn.data.Dataset(split, split, ["a", "b"])


def test_how_files_are_read_is_no_part_of_the_experiment():
    base = compose_config(["data=imagefolder", "data.root=x", "data.stream=true", "train.deterministic=true"])
    assert (base.data.stream, base.train.deterministic) == ("true", "true")

    def changed(**more):
        return fingerprint(replace(base, data=replace(base.data, **more)))

    assert changed(stream="auto", workers=3, prefetch=5) == fingerprint(base)
    for change in ({"crop_pct": 0.9}, {"rand_augment": "rand-m9"}, {"root": "y"}):
        assert changed(**change) != fingerprint(base)
