"""Convolutions whose weight is computed, and those that are no plain convolution: taken over exactly, or refused."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import (
    CondConv2d,
    Conv2dSame,
    MixedConv2d,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import convnn
from convnn import ConvNN1d, swap_layers
from convnn.errors import ConfigError


def drawn(layer):
    """Give a layer weights that are no start, so that a scale or a vector left out would show."""
    layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def old_norm(norm):
    return norm(nn.Conv2d(4, 6, 3, padding=1).double())


LAYERS = {
    "weight standardisation (StdConv2d)": lambda: drawn(StdConv2d(4, 6, 3)),
    "weight standardisation (StdConv2dSame)": lambda: drawn(StdConv2dSame(4, 6, 3, stride=2, bias=True)),
    "weight standardisation (ScaledStdConv2d)": lambda: drawn(ScaledStdConv2d(4, 6, 3, stride=2, groups=2, gamma=1.7)),
    "weight standardisation (ScaledStdConv2dSame)": lambda: drawn(ScaledStdConv2dSame(4, 6, 4, stride=2)),
    "parametrization WeightNorm of weight": lambda: drawn(parametrizations.weight_norm(nn.Conv2d(4, 6, 3))),
    "parametrization SpectralNorm of weight": lambda: drawn(parametrizations.spectral_norm(nn.Conv2d(4, 6, 3))),
    "parametrization Orthogonal of weight": lambda: drawn(parametrizations.orthogonal(nn.Conv2d(4, 6, 1))),
    "torch.nn.utils.WeightNorm of weight": lambda: old_norm(torch.nn.utils.weight_norm),
    "torch.nn.utils.SpectralNorm of weight": lambda: old_norm(torch.nn.utils.spectral_norm),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("what", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_the_weight_that_comes_out_is_taken_over(what, training):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[what]())
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    model.train(training)
    before = model.eval()(x)
    model.train(training)
    report = swap_layers(model, "*", k="kernel", blend=0, init="transfer")
    after = model(x)
    assert (before - after).abs().max() < 1e-10
    assert model[0].training == training and {n for n, _ in model[0].named_parameters()} <= {"weight", "bias"}
    assert report.rows[0].dropped == what
    assert f"not kept: {what}; the weights that it gave were taken over: 0\n" in str(report)


def test_spectral_norm_is_read_without_a_step():
    layer = parametrizations.spectral_norm(nn.Conv2d(4, 6, 3))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    swap_layers(nn.Sequential(layer), "*", k="kernel", init="transfer")
    assert layer.training and all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_old_norms_are_read_from_what_was_loaded():
    first, second = (torch.nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())  # its attribute ``weight`` is still the old one
    x = torch.randn(1, 4, 5, 5)
    before = first(x)
    model = nn.Sequential(second)
    swap_layers(model, "*", k="kernel", blend=0, init="transfer")
    torch.testing.assert_close(model(x), before)


def test_fresh_weights_drop_it_too_and_say_so():
    model = nn.Sequential(StdConv2d(4, 6, 3))
    report = swap_layers(model, "*")
    assert "not kept: weight standardisation (StdConv2d): 0\n" in str(report)
    assert "not kept" not in str(swap_layers(nn.Sequential(nn.Conv2d(4, 6, 3)), "*"))


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x + 1, weight, bias)


def noisy():
    layer = nn.Conv2d(4, 6, 3)
    parametrize.register_parametrization(layer, "weight", Noise())
    return layer


@pytest.mark.parametrize(
    "layer, reason",
    [
        (noisy, "'0' has another parametrization Noise of weight each time"),
        (lambda: Doubled(4, 6, 3), "'0' is a Doubled with a forward pass of its own"),
        (lambda: Shifted(4, 6, 3), "'0' is a Shifted with a forward pass of its own"),
        (lambda: parametrizations.weight_norm(Doubled(4, 6, 3)), "with a forward pass of its own"),
        (lambda: nn.Conv1d(4, 6, 3, padding_mode="circular"), "'0' pads with padding_mode=circular"),
        (lambda: CondConv2d(4, 6, 3), "no conv layer"),
    ],
)
def test_what_is_no_plain_convolution_is_refused(layer, reason):
    for init in ("fresh", "transfer"):
        with pytest.raises(ConfigError, match=reason):
            swap_layers(nn.Sequential(layer()), "*", k="kernel", init=init)


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.other = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return F.conv2d(self.other(x), self.conv.weight[:2], self.conv.bias[:2])


def test_a_layer_that_is_not_called_is_refused():
    with pytest.raises(ConfigError, match=r"'conv' is not called: .* of ByHand .* set rules\[0\].exclude=\[conv\]"):
        swap_layers(ByHand(), "*")
    model = ByHand()
    assert len(swap_layers(model, {"exclude": ["conv"]})) == 1 and model(torch.randn(1, 4, 7, 7)).shape[1] == 2


def test_mixed_convolutions_are_replaced_each():
    torch.manual_seed(0)
    model = nn.Sequential(MixedConv2d(8, 8, [3, 5, 7], stride=2, padding="same")).double()
    x = torch.randn(1, 8, 9, 10, dtype=torch.float64)
    before = model(x)
    assert len(swap_layers(model, "*", k="kernel", blend=0, init="transfer")) == 3
    assert (model(x) - before).abs().max() < 1e-10


def test_a_layer_on_a_line_is_replaced():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 5, padding=2), nn.ReLU(), nn.Conv1d(6, 2, 4, 4)).double()
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    before = model(x)
    report = swap_layers(model, {"min_kernel": 4}, k="kernel", blend=0, init="transfer")
    assert isinstance(model[0], ConvNN1d) and "Conv1d 6->2 4 s4" in str(report)
    assert (model(x) - before).abs().max() < 1e-10
    assert convnn.export_layers(model) == ["0", "2"] and type(model[0]) is nn.Conv1d
    assert (model(x) - before).abs().max() < 1e-10


FAMILIES = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]},
    "tf_efficientnet_b0": {},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 24},
}


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_networks_keep_their_logits_at_the_position_end(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **FAMILIES[name]).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    report = swap_layers(model, "*", k="kernel", blend=0, init="transfer")
    assert {row.init for row in report.rows} == {"transfer"}
    assert (model(x) - before).abs().max() < 1e-10 * before.abs().max().clamp_min(1)


def test_same_padding_follows_the_image():
    model = nn.Sequential(Conv2dSame(3, 4, 3, stride=2)).double()
    images = [torch.randn(1, 3, side, 10, dtype=torch.float64) for side in (8, 9, 5)]
    before = [model(x) for x in images]
    swap_layers(model, "*", k="kernel", blend=0, init="transfer")
    for x, y in zip(images, before, strict=True):
        assert (model(x) - y).abs().max() < 1e-10
