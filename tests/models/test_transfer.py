"""Weights across the spectrum and back: layers, whole timm models, and export to plain timm weights."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from helpers import tiny
from timm.layers.attention import Attention
from torch import nn

from convnn import ConfigError, HybridConvNN2d, OperatorConfig, export_layers, neighbor_layers, swap_layers
from convnn.config.compose import compose_config
from convnn.data.splits import Dataset, Split
from convnn.models.build import build_model, kept_weights
from convnn.nn.base import Site

CONV = {"k": 9, "blend": 0.0}
RESNET = [{"match": "conv1", "operator": {"k": 49}}, {"min_kernel": 3, "exclude": ["conv1"]}]
ATTENTION = compose_config(["operator=mhsa"]).operator


def models(name, **kwargs):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=7, **kwargs).eval()
    for module in plain.modules():  # statistics and scales that are not those of a fresh model
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return plain, copy.deepcopy(plain)


def error(a, b, x):
    with torch.no_grad():
        return ((a(x) - b(x)).abs().max() / b(x).abs().max().clamp_min(1)).item()


CASES = [
    ("resnet50", {}, RESNET, CONV, (2, 3, 40, 48)),
    ("vgg11_bn", {}, {}, {"k": 9, "blend": 0.0, "slots": "raster"}, (2, 3, 32, 32)),
    ("vit_small_patch16_224", {"img_size": (48, 64), "patch_size": 8}, {}, ATTENTION, (2, 3, 48, 64)),
]


@pytest.mark.parametrize("name, kwargs, rule, operator, size", CASES, ids=[c[0] for c in CASES])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.long
def test_whole_models_keep_their_logits_and_come_back(name, kwargs, rule, operator, size, fast):
    plain, model = models(name, **kwargs)
    report = swap_layers(model, rule, operator, init="transfer")
    assert len(report) >= 8
    for layer in neighbor_layers(model).values():
        layer.fast = fast
    x = torch.randn(*size)
    assert error(model, plain, x) < 1e-4
    if fast:
        assert sorted(export_layers(model)) == sorted(row.name for row in report.rows)
        assert not neighbor_layers(model)
        fresh = timm.create_model(name, num_classes=7, **kwargs).eval()
        fresh.load_state_dict(model.state_dict())  # strict: these are plain timm weights
        assert error(fresh, plain, x) < 1e-6
    else:
        assert error(model.double(), plain.double(), x.double()) < 1e-10


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_hybrid_folds_into_one_convolution(ratio):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False).double()
    hybrid = HybridConvNN2d.from_layer(conv, OperatorConfig(blend=0.0, branch_ratio=ratio), "fresh", Site("c"))
    nn.init.normal_(hybrid.pointwise.weight)
    merged = hybrid.to_layer()
    x = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    assert type(merged) is nn.Conv2d and (merged(x) - hybrid(x)).abs().max() < 1e-10


def test_temperature_folds_into_the_queries():
    torch.manual_seed(0)
    attention = Attention(12, 3, qkv_bias=True).double()
    config = replace(ATTENTION, temperature=2.5)
    from convnn import ConvNNAttention

    layer = ConvNNAttention.from_layer(attention, config, "transfer", Site("a", 1, (3, 3)))
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    assert (layer.to_layer()(x) - layer(x)).abs().max() < 1e-12
    assert (attention(x) - layer(x)).abs().max() > 1e-4


@pytest.mark.parametrize(
    "model, rule, operator, message",
    [
        ("resnet18", {"last": 1, "min_kernel": 3}, {"blend": 0.5}, "'layer4.1.conv2' cannot be exported.*blend=0.5"),
        ("resnet18", {"last": 1, "min_kernel": 3}, {"blend": 0.0, "k": 12}, "k=12 is not the area"),
        ("resnet18", {"last": 1, "min_kernel": 3}, {"blend": 0.0, "weighting": "softmax"}, "no convolution"),
        ("vit_tiny_patch16_224", {"last": 1}, "kvt", "k=9 is less than the 17 tokens"),
        ("vit_tiny_patch16_224", {"last": 1}, "convit", "no plain equivalent"),
    ],
)
def test_export_says_why_not_and_changes_nothing(model, rule, operator, message):
    kwargs = {"img_size": 32, "patch_size": 8} if model.startswith("vit") else {}
    net = timm.create_model(model, **kwargs)
    swap_layers(net, rule, compose_config([f"operator={operator}"]).operator if isinstance(operator, str) else operator)
    before = str(net)
    with pytest.raises(ConfigError, match=message):
        export_layers(net)
    assert str(net) == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"aggregation": "separable"}, "no place with operator.aggregation=separable"),
        ({"projection": "linear"}, "no place with operator.projection=linear"),
        ({"weighting": "softmax"}, "no place with operator.weighting=softmax"),
        ({"shuffle": 2}, "no place with operator.shuffle=2"),
        ({"distance": "euclidean"}, "no place with operator.distance=euclidean"),
        ({"aggregation": "depthwise"}, "has groups=1 and operator.aggregation=depthwise 4"),
    ],
)
def test_transfers_without_meaning_are_refused(change, message):
    from convnn import ConvNN2d

    with pytest.raises(ConfigError, match=message):
        ConvNN2d.from_layer(nn.Conv2d(4, 8, 3, padding=1), OperatorConfig(**change), "transfer", Site("here"))


@pytest.mark.parametrize("operator", [CONV, CONV | {"branch_ratio": 0.5, "target": "convnn.HybridConvNN2d"}])
def test_a_convolution_in_float64_is_transferred_whole(operator):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = model(x)
    swap_layers(model, {}, operator, init="transfer")
    assert (model(x) - before).abs().max() < 1e-14


@pytest.mark.parametrize("hybrid", [{}, {"branch_ratio": 0.5, "target": "convnn.HybridConvNNAttention"}])
def test_attention_in_float64_is_transferred_whole(hybrid):
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(12, 3, qkv_bias=True)).double(), torch.randn(2, 9, 12, dtype=torch.float64)
    before = model(x)
    swap_layers(model, {}, replace(ATTENTION, **hybrid), init="transfer")
    assert (model(x) - before).abs().max() < 1e-14


def pretrained(tmp_path, *overrides, classes=10):
    """A run whose ResNet starts from a file that timm takes for its pretrained weights, of 10 classes and 32 pixels."""
    sizes = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}
    torch.manual_seed(5)
    source = timm.create_model("resnet18", num_classes=10, **sizes)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    overlay = "+backbone.kwargs.pretrained_cfg_overlay"
    given = ["backbone.pretrained=true", f"{overlay}.file={tmp_path}/weights.pt", f"{overlay}.num_classes=10"]
    config = tiny("data.load_size=64", f"data.num_classes={classes}", *given, *overrides)
    data = Split(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    dataset = Dataset(data, data, [str(i) for i in range(classes)])
    model, report, side = build_model(config, dataset)
    return source, model, report, kept_weights(config, model, report, side)


def test_loaded_weights_are_transferred_by_default(tmp_path):
    source, model, report, (text, most) = pretrained(tmp_path, "swap.stages=[1,2,3,4]")
    assert {row.init for row in report.rows} == {"transfer"} and most
    taps = [net.layer1[0].conv1.weight.flatten(2).sort().values for net in (model, source)]
    assert torch.equal(*taps)  # in the order of slots
    total = sum(p.numel() for p in source.parameters())
    assert text == f"{total:,} of {total:,} weights stem from the file"


def test_what_begins_anew_is_told(tmp_path):
    source, model, report, (text, most) = pretrained(tmp_path, "swap.init=fresh", classes=3)
    lost = sum(row.params_before for row in report.rows) + 8 * 3 + 3
    total = sum(p.numel() for p in source.parameters()) - 8 * 7 - 7
    names = "conv1, layer1.0.conv1, layer1.0.conv2 and 7 more"
    assert text == f"{total - lost:,} of {total:,} weights stem from the file; begin anew: {names}" and not most
    assert torch.equal(model.bn1.weight, source.bn1.weight)


def test_a_small_stem_has_none_of_the_files_weights(tmp_path):
    _, model, _, (text, _) = pretrained(tmp_path, "backbone.stem=small", "swap=none")
    total = sum(p.numel() for p in model.parameters())
    assert text == f"{total - model.conv1.weight.numel():,} of {total:,} weights stem from the file; begin anew: conv1"


def test_where_no_transfer_is_defined_layers_begin_anew(tmp_path):
    _, _, report, (text, _) = pretrained(tmp_path, "operator.k=4", "+swap.rules.a.match=layer1.*.conv*", *OTHERS)
    assert [row.init for row in report.rows] == ["fresh", "fresh", "transfer", "transfer"]
    assert text.endswith("begin anew: layer1.0.conv1, layer1.0.conv2")


OTHERS = ["+swap.rules.b.match=layer2.*.conv*", "+swap.rules.b.operator.k=9"]


def test_without_loaded_weights_all_is_fresh():
    config = tiny()
    data = Split(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    model, report, side = build_model(config, Dataset(data, data, list("0123456789")))
    assert {row.init for row in report.rows} == {"fresh"} and kept_weights(config, model, report, side) is None


class Careless(nn.Conv2d):
    """An operator that takes no notice of how its weights are to begin."""

    @classmethod
    def from_layer(cls, layer, config, init, site):
        return cls(layer.in_channels, layer.out_channels, 3, layer.stride, 1, bias=False)


def test_operators_of_others_begin_anew_unless_asked():
    model = timm.create_model("resnet18", num_classes=4)
    own = OperatorConfig(name="careless", target=f"{__name__}.Careless")
    assert {row.init for row in swap_layers(model, "layer4.1.conv*", own, "auto").rows} == {"fresh"}
