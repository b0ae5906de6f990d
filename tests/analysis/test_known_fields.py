"""Receptive fields, distances, frequencies and variances of constructed networks and maps, against float64 loops."""

import math

import numpy as np
import pytest
import timm
import torch
from helpers import tiny
from subjects import images_of, subject_of
from torch import nn

from convnn import ConvNN2d, neighbors_of, swap_layers
from convnn.analysis import erf
from convnn.analysis.base import NotApplicable
from convnn.analysis.distance import mean_distance
from convnn.analysis.erf import centre, field_masses, half_mass, radii
from convnn.analysis.features import as_map, depths, feature_maps
from convnn.analysis.fourier import frequencies, log_amplitudes
from convnn.analysis.noise import BANDS, band_masks, band_noise
from convnn.analysis.variance import token_moments


def conv(channels, out, side, **more):
    return nn.Conv2d(channels, out, side, padding=side // 2, **more).double()


# ------------------------------------------------------------------------------------------- receptive field


def support(model, names, side=15):
    """Rows and columns that have mass at each depth."""
    fields = field_masses(model.eval(), names, torch.rand(2, 3, side, side, dtype=torch.float64))
    for field in fields.values():
        assert torch.allclose(field.sum((1, 2)), torch.ones(2, dtype=torch.float64), atol=1e-12)
    return {
        name: [np.flatnonzero(field[0].sum(axis).numpy()).tolist() for axis in (1, 0)] for name, field in fields.items()
    }


def test_one_3x3_convolution_sees_exactly_3x3_and_two_5x5_see_9x9():
    torch.manual_seed(0)
    assert support(nn.Sequential(conv(3, 4, 3)), ["0"]) == {"0": [[6, 7, 8]] * 2}
    two = nn.Sequential(conv(3, 4, 5), conv(4, 5, 5))
    assert support(two, ["0", "1"]) == {"0": [[5, 6, 7, 8, 9]] * 2, "1": [list(range(3, 12))] * 2}
    fields = field_masses(two, ["0", "1"], torch.rand(1, 3, 15, 15, dtype=torch.float64))
    assert [(field > 0).sum().item() for field in fields.values()] == [25, 81]


def test_the_field_of_two_convolutions_is_that_of_their_composed_kernel():
    """The mass is known without a gradient: the kernels' convolution, summed over outputs, as plain loops have it."""
    torch.manual_seed(1)
    first, second = conv(2, 3, 3, bias=False), conv(3, 4, 3, bias=False)
    found = field_masses(nn.Sequential(first, second), ["1"], torch.rand(1, 2, 9, 9, dtype=torch.float64))["1"][0]
    a, b = (layer.weight.detach().numpy() for layer in (first, second))
    expected = np.zeros((2, 9, 9))
    for c, m, (i, j), (u, v) in (
        (c, m, p, q) for c in range(2) for m in range(3) for p in np.ndindex(3, 3) for q in np.ndindex(3, 3)
    ):
        expected[c, 4 + i - 1 + u - 1, 4 + j - 1 + v - 1] += b[:, m, i, j].sum() * a[m, c, u, v]
    mass = np.abs(expected).sum(0)
    assert np.abs(found.numpy() - mass / mass.sum()).max() < 1e-12


def test_the_convolution_end_has_the_field_of_a_convolution_and_features_reach_further():
    torch.manual_seed(2)
    images = torch.rand(2, 3, 12, 12)
    near, far = (nn.Sequential(ConvNN2d(3, 4, k=9, blend=blend)).eval() for blend in (0.0, 1.0))
    assert ((field_masses(near, ["0"], images)["0"] > 0).sum((1, 2)) == 9).all()
    distance = radii((12, 12), (6, 6))
    spread = [float((field_masses(net, ["0"], images)["0"] * distance).sum()) for net in (near, far)]
    assert spread[1] > 2 * spread[0]


def test_numbers_of_a_known_field():
    mass = torch.zeros(2, 4, 4, dtype=torch.float64)
    mass[0, 1, 1], mass[0, 1, 2], mass[0, 3, 3] = 0.4, 0.35, 0.25
    mass[1] = 1 / 16
    assert half_mass(mass).tolist() == [2, 8]
    assert centre(mass[0]) == pytest.approx((0.75 * 1 + 0.25 * 3, 0.4 * 1 + 0.35 * 2 + 0.25 * 3))
    assert radii((9, 9), (4, 4))[4, 7] == 3 and float(radii((9, 9), (4, 4))[0, 0]) == pytest.approx(math.sqrt(32))


def test_distances_are_from_where_strides_have_moved_a_field():
    layer = nn.Conv2d(3, 1, 3, stride=2, padding=1, bias=False)  # of the third of four rows: pixels 3 to 5
    nn.init.ones_(layer.weight)
    series = erf.measure(subject_of(nn.Sequential(layer), images_of(4, 2), 2, tiny()))["series"]
    assert series["pixels"]["values"] == [9] and series["within"]["values"][0] == pytest.approx(5 / 9)
    assert series["radius"]["values"] == pytest.approx([(4 + 4 * math.sqrt(2)) / 9])


# ------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        (
            "resnet18",
            {},
            ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0", "layer4.1"],
        ),
        ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}, ["patch_embed.proj", "blocks.0", "blocks.1"]),
        ("vgg11", {}, [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)]),
    ],
)
def test_the_depths_of_known_networks(name, given, expected):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=2, **given)
    found = depths(model)
    assert [one for one in found if not one.startswith("pre_logits")] == expected


def test_tokens_become_maps_without_their_prefix():
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=(32, 64), num_classes=2
    ).eval()
    tokens = torch.arange(9.0).view(1, 9, 1).expand(1, 9, 24)  # CLS and 2 x 4 patches
    assert as_map(model, tokens)[0, 0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    maps = feature_maps(model, depths(model), torch.rand(2, 3, 32, 64))
    assert {name: tuple(one.shape) for name, one in maps.items()} == dict.fromkeys(depths(model), (2, 24, 2, 4))
    with pytest.raises(NotApplicable, match="no map of tokens"):
        as_map(nn.Identity(), torch.zeros(1, 7, 3))
    with pytest.raises(NotApplicable, match="no depth"):
        depths(nn.Sequential(nn.Linear(3, 3)))


# ------------------------------------------------------------------------------------------- distance


def test_the_distance_of_a_convolutions_window_is_known():
    model = nn.Sequential(ConvNN2d(3, 4, k=9, blend=0.0))
    total, count = mean_distance(neighbors_of(model, torch.rand(2, 3, 6, 6))["0"])
    assert count.tolist() == [72]  # queries of two images
    assert float(total / count) == pytest.approx((4 + 4 * math.sqrt(2)) / 9, abs=1e-7)


def test_the_distance_of_attention_is_weighted_and_by_head():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=3, img_size=48, num_classes=2)
    swap_layers(model, {"match": "*"}, "convnn_attention", k=4, blend=0.5)
    found = next(iter(neighbors_of(model, torch.rand(2, 3, 48, 48)).values()))
    total, count = mean_distance(found)
    expected = torch.zeros(3, dtype=torch.float64)
    for image, head, query in np.ndindex(2, 3, found.index.shape[2]):
        if query == 0:
            continue  # CLS has no place
        parts = []
        for token, weight in zip(
            found.index[image, head, query].tolist(), found.weights[image, head, query].tolist(), strict=True
        ):
            if token > 0:
                there, own = divmod(token - 1, 3), divmod(query - 1, 3)
                parts.append((weight, math.dist(there, own)))
        expected[head] += sum(w * d for w, d in parts) / sum(w for w, _ in parts)
    assert count.tolist() == [18, 18, 18]
    assert torch.allclose(total, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------- frequencies


@pytest.mark.parametrize("f", [1, 2, 3, 4])
def test_a_pure_sine_has_one_frequency(f):
    n = 8
    rows, columns = np.mgrid[:n, :n]
    wave = 2 + 0.5 * np.cos(2 * np.pi * f * (rows + columns) / n)
    found = log_amplitudes(torch.from_numpy(wave)[None, None])[0].tolist()
    height = n * n * (0.5 if f == n // 2 else 0.25)  # two halves of the amplitude, which meet at the highest frequency
    expected = [math.log(2 * n * n + 1e-6)] + [
        math.log(height + 1e-6) if g == f else math.log(1e-6) for g in range(1, 5)
    ]
    assert found == pytest.approx(expected, abs=1e-6)
    assert frequencies(len(found)) == [0, 0.25, 0.5, 0.75, 1]


def test_log_amplitudes_are_those_of_the_sum_itself():
    maps = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = log_amplitudes(maps)
    for image in range(2):
        for f in range(4):
            logs = []
            for channel in range(3):
                terms = [
                    complex(maps[image, channel, y, x]) * np.exp(-2j * np.pi * f * (y + x) / 6)
                    for y, x in np.ndindex(6, 6)
                ]
                logs.append(math.log(abs(sum(terms)) + 1e-6))
            assert float(found[image, f]) == pytest.approx(sum(logs) / 3, abs=1e-10)


def test_bands_divide_the_frequencies_and_noise_stays_in_its_own():
    masks = band_masks(16, 16)
    radius = np.hypot(*np.meshgrid(2 * np.fft.fftfreq(16), 2 * np.fft.fftfreq(16), indexing="ij"))
    for y, x in np.ndindex(16, 16):
        band = max(math.ceil(radius[y, x] * BANDS - 1e-9) - 1, 0)
        assert masks[:, y, x].nonzero().flatten().tolist() == ([band] if band < BANDS else [])
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mask in masks:
        cut = band_noise(torch.fft.fft2(noise), mask)
        assert torch.allclose(cut.square().mean((1, 2, 3)), torch.ones(2, dtype=torch.float64))
        assert torch.fft.fft2(cut).abs()[..., ~mask].max() < 1e-9


# ------------------------------------------------------------------------------------------- variance


def test_the_variance_of_constructed_maps():
    flat = torch.full((2, 3, 4, 4), 5.0)
    assert token_moments(flat).tolist() == [0, 0, 50]
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2).expand(1, 3, 4, 4)
    assert token_moments(board).tolist() == pytest.approx([16 / 15, 1, 1])
    one = token_moments(torch.ones(1, 3, 1, 1))
    assert math.isnan(one[0]) and one[1:].tolist() == [0, 1]
    maps = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flatten = maps.numpy().reshape(3, 2, 20)
    expected = [flatten.var(2, ddof=1).mean(1).sum(), flatten.var(2).mean(1).sum(), (flatten**2).mean((1, 2)).sum()]
    assert token_moments(maps).tolist() == pytest.approx(expected, rel=1e-12)
