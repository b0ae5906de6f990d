"""What each corruption does to an image, against formulas and Pillow; and that a trained network minds the severity."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from convnn.data.corruptions import FAMILIES, LEVELS, corrupted
from convnn.data.distortions import plasma


def grey(value, side=64, channels=1):
    return torch.full((1, channels, side, side), value, dtype=torch.uint8)


def changed(x, name, severity, index=0):
    return corrupted(x, [index], name, severity)[0].numpy() / 255


def test_families_have_every_corruption_once():
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(LEVELS)
    assert all(len(levels) == 5 for pair in LEVELS.values() for levels in pair)


@pytest.mark.parametrize("severity, photons", [(1, 500), (5, 50)])
def test_shot_noise_has_the_variance_of_counted_photons(severity, photons):
    x = changed(grey(102), "shot_noise", severity)
    assert x.mean() == pytest.approx(0.4, abs=0.005) and x.var() == pytest.approx(0.4 / photons, rel=0.1)


def test_impulse_noise_sets_the_stated_share_to_black_or_white():
    x = changed(grey(100, 64, 3), "impulse_noise", 5)
    assert (x == 0).mean() == pytest.approx(0.035, abs=0.005) and (x == 1).mean() == pytest.approx(0.035, abs=0.005)
    assert set(np.unique(x * 255).tolist()) == {0, 100, 255}


def test_defocus_averages_over_a_disk():
    x = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    x[..., 4, 4] = 250
    found = corrupted(x, [0], "defocus_blur", 4)[0, 0]  # a radius of 1: the pixel and those beside it
    expected = torch.zeros(9, 9)
    for row, column in ((4, 4), (3, 4), (5, 4), (4, 3), (4, 5)):
        expected[row, column] = 50
    assert (found - expected).abs().max() <= 1


def test_motion_smears_along_one_line_within_45_degrees():
    x = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    x[..., 16, 16] = 255
    angles = []
    for index in range(8):
        found = changed(x, "motion_blur", 5, index)[0]
        assert found.sum() == pytest.approx(1, abs=0.03)
        rows, columns = np.nonzero(found > 0.02) - np.array([[16], [16]])
        assert (columns <= 0).all()  # one end stays
        far = np.argmax(np.hypot(rows, columns))
        angles.append(math.atan2(-rows[far], -columns[far]))
        line = np.array([math.sin(angles[-1]), math.cos(angles[-1])])
        assert np.abs(rows * line[1] - columns * line[0]).max() < 1
    assert np.abs(angles).max() <= math.pi / 4 + 0.1 and np.ptp(angles) > 0.5


def test_fog_lifts_towards_its_landscape_and_keeps_the_brightest():
    white = changed(grey(255, 32), "fog", 5)
    assert white.min() == pytest.approx(1 / 2.5, abs=0.01) and white.max() == 1
    assert not changed(grey(0), "fog", 5).any()  # as the definition has it: nothing is brighter than the image
    heights = plasma(20, 2.0, np.random.default_rng(0))
    assert heights.shape == (32, 32) and heights.min() == 0 and heights.max() == 1
    rough, smooth = (plasma(32, decay, np.random.default_rng(0)) for decay in (1.75, 3.0))
    assert np.abs(np.diff(rough)).mean() > 1.5 * np.abs(np.diff(smooth)).mean()


def test_brightness_adds_to_the_value_of_hsv():
    x = torch.tensor([[[[10, 0, 255, 200]], [[100, 0, 255, 230]], [[40, 0, 255, 90]]]], dtype=torch.uint8)
    found = corrupted(x, [0], "brightness", 5)[0, :, 0].T.tolist()
    for before, after in zip(x[0, :, 0].T.tolist(), found, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in before))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
        assert np.abs(np.array(after) - 255 * np.array(expected)).max() <= 0.501  # halves may go either way


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
def test_pixelate_is_pillows_box_down_and_up(height, width):
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    box = Image.Resampling.BOX
    small = Image.fromarray(array).resize((int(width * 0.65), int(height * 0.65)), box)
    x = torch.from_numpy(array).permute(2, 0, 1)[None]
    found = corrupted(x, [0], "pixelate", 5)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(small.resize((width, height), box)))


def test_elastic_moves_pixels_by_the_stated_distance():
    """Where an image rises by 3 a column, a change of 3 is a move of one pixel."""
    ramp = (3 * torch.arange(64)).to(torch.uint8).expand(1, 1, 64, 64)
    moved = [(corrupted(ramp, [i], "elastic_transform", 3)[0, 0].float() - ramp[0, 0]) / 3 for i in range(8)]
    inner = torch.stack(moved)[:, 8:-8, 8:-8]
    assert inner.pow(2).mean().sqrt().item() == pytest.approx(0.03 * 64, rel=0.1)


def test_two_corruptions_of_an_image_draw_apart_and_severities_alike():
    x = grey(128, 32)
    shot, impulse = changed(x, "shot_noise", 5), changed(x, "impulse_noise", 5)
    assert abs(np.corrcoef(shot.flatten(), impulse.flatten())[0, 1]) < 0.1
    weak, strong = (changed(x, "impulse_noise", severity) != 128 / 255 for severity in (1, 5))
    assert (strong | ~weak).all()


@pytest.mark.long
def test_a_trained_network_errs_more_at_each_severity():
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * 255 / 16
    x = nn.functional.interpolate(small, (32, 32), mode="bilinear").round().to(torch.uint8)
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 4, 2), nn.ReLU(), nn.Flatten(),
                        nn.Linear(512, 10))  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(250):
        rows = torch.arange(64 * step, 64 * step + 64) % 1400
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows] / 255), y[rows]).backward()
        optimizer.step()

    @torch.no_grad()
    def error(images):
        return (net(images / 255).argmax(1) != y[1400:1600]).double().mean().item()

    test = x[1400:1600]
    clean = error(test)
    by_kind = {name: [error(corrupted(test, range(len(test)), name, s)) for s in (1, 2, 3, 4, 5)] for name in LEVELS}
    mean = np.mean(list(by_kind.values()), axis=0)
    assert clean < 0.15 and (np.diff([clean, *mean]) > 0).all()
    assert all(errors[-1] >= errors[0] - 0.05 for errors in by_kind.values())  # strokes outlast pixels and files
