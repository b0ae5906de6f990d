"""Corrupted copies of images: what each does at each severity, and that it is always the same."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from convnn.config.schema import DataConfig
from convnn.data.batches import Batches
from convnn.data.corruptions import LEVELS, SMALL, corrupted
from convnn.data.splits import Split
from convnn.errors import ConfigError


def images(n=6, channels=3, side=16):
    return torch.randint(
        0, 256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


# Boxes that do not divide a side alias, so that ``pixelate`` has no such order on images as smooth as these.
@pytest.mark.parametrize("name", [name for name in LEVELS if name != "pixelate"])
@pytest.mark.parametrize("side", [16, SMALL + 8])
def test_each_severity_is_further_from_the_image(name, side):
    x = F.interpolate(images(2, 3, 5).float(), (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)
    found = [corrupted(x, [0, 1], name, severity) for severity in (1, 2, 3, 4, 5)]
    away = [(one.float() - x.float()).pow(2).mean().item() for one in found]
    assert all(one.dtype == torch.uint8 and one.shape == x.shape for one in found)
    assert away == sorted(away) and 0 < away[0] < away[-1]


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_the_same_in_every_batch(name, channels):
    x = images(channels=channels)
    whole = corrupted(x, range(6), name, 4)
    apart = torch.cat([corrupted(x[i : i + 1], [i], name, 4) for i in range(6)])
    assert torch.equal(whole, apart) and torch.equal(whole, corrupted(x, range(6), name, 4))


def test_noise_has_the_stated_deviation_and_is_each_images_own():
    x = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    noise = corrupted(x, [0, 1], "gaussian_noise", 5).float() / 255 - 128 / 255
    assert noise.std().item() == pytest.approx(0.10, rel=0.02) and abs(noise.mean().item()) < 0.002
    assert not torch.equal(noise[0], noise[1])
    large = corrupted(torch.full((1, 1, 96, 96), 128, dtype=torch.uint8), [0], "gaussian_noise", 1)
    assert (large.float() / 255).std().item() == pytest.approx(0.08, rel=0.03)


def test_contrast_keeps_the_stated_share():
    x = torch.tensor([[100, 140], [60, 180]], dtype=torch.uint8).view(1, 1, 2, 2)
    assert corrupted(x, [0], "contrast", 2).flatten().tolist() == [110, 130, 90, 150]


def test_blur_is_a_gaussian_of_the_stated_deviation():
    x = torch.zeros(1, 1, 31, 31, dtype=torch.uint8)
    x[..., 15, 15] = 255
    place = torch.arange(31.0) - 15
    weight = torch.exp(-place.pow(2) / 2 / 0.7**2)
    weight /= weight.sum()
    expected = 255 * weight[:, None] * weight
    assert (corrupted(x, [0], "gaussian_blur", 3)[0, 0] - expected).abs().max() <= 0.51


def test_jpeg_is_pillows_file_of_the_stated_quality():
    x = images(1)
    file = io.BytesIO()
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
    assert np.array_equal(corrupted(x, [0], "jpeg_compression", 5)[0].permute(1, 2, 0).numpy(), Image.open(file))
    with pytest.raises(ConfigError, match="corruption=jpeg_compression needs images of 1 or 3 channels, not 4"):
        corrupted(images(1, 4), [0], "jpeg_compression", 1)


@pytest.mark.parametrize(
    "name, severity, said",
    [
        ("gausian_noise", 1, "corruption=gausian_noise is not one of .*; did you mean 'gaussian_noise'"),
        ("contrast", 0, r"severity=0 must lie in \[1, 5\]"),
        ("contrast", 6, r"severity=6 must lie in \[1, 5\]"),
    ],
)
def test_mistakes(name, severity, said):
    with pytest.raises(ConfigError, match=said):
        corrupted(images(), range(6), name, severity)


def test_batches_change_images_by_their_number():
    split = Split(images(), torch.zeros(6, dtype=torch.long))
    batches = Batches(split, 4, DataConfig(mean=[0.0], std=[1.0]), 16)
    batches.change = lambda x, rows: corrupted(x, rows, "gaussian_noise", 5)
    found = torch.cat([x for x, _ in batches.epoch()])
    assert torch.allclose(found * 255, corrupted(split.images, range(6), "gaussian_noise", 5).float(), atol=1e-4)
