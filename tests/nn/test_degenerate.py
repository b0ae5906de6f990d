"""Corners: tokens that are all alike, empty batches, half precision, layers that must refuse or agree."""

import itertools
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import nn

from convnn import ConfigError, ConvNN2d, ConvNNAttention, HybridConvNN2d, OperatorConfig, neighbor_layers, swap_layers
from convnn.config.compose import compose_config
from convnn.nn.acmix import ACmix2d
from convnn.nn.base import Site
from convnn.nn.convit import GatedPositionalAttention
from convnn.ops.geometry import Geometry
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Selection


def small_gradients(layer, x, limit=1e4):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert y.isfinite().all()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is None or (tensor.grad.isfinite().all() and tensor.grad.abs().max() < limit)


MAPS = {
    "constant": lambda: torch.full((2, 3, 5, 5), 0.7),
    "one image constant": lambda: torch.stack([torch.randn(3, 5, 5), torch.full((3, 5, 5), -2.0)]),
    "zero": lambda: torch.zeros(2, 3, 5, 5),
    "half zero": lambda: torch.randn(2, 3, 5, 5) * (torch.arange(5) > 2),
    "nearly constant": lambda: 3 + 1e-7 * torch.randn(2, 3, 5, 5),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("padding", [0, 1])
def test_alike_tokens_give_finite_gradients(name, padding):
    torch.manual_seed(0)
    x = MAPS[name]()
    for similarity, mix in itertools.product(("cosine", "euclidean", "dot"), ("sum", "concat")):
        for options in ({"learn_blend": "layer"}, {"straight_through": True}, {"weighting": "softmax"}):
            layer = ConvNN2d(3, 4, 5, 1, padding, 0.5, similarity=similarity, mix=mix, **options)
            small_gradients(layer, x)


@pytest.mark.parametrize("mix", ["sum", "concat"])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "dot"])
def test_alike_tokens_give_finite_gradients_in_attention(mix, similarity):
    torch.manual_seed(0)
    layer = ConvNNAttention(8, 2, 4, 0.5, learn_blend="head", mix=mix, similarity=similarity, grid_size=(3, 3))
    small_gradients(layer, torch.full((2, 9, 8), 0.3))


def test_a_single_token_and_a_single_candidate():
    small_gradients(ConvNN2d(1, 2, 1, 1, 0, 0.5, mix="concat", learn_blend="layer"), torch.randn(2, 1, 1, 1))
    for similarity in ("cosine", "euclidean", "dot"):
        layer = ConvNN2d(
            3, 4, 2, 1, 0, 0.5, similarity=similarity, candidates="grid", num_candidates=1, learn_blend="layer",
            k_policy="clamp",
        )  # fmt: skip
        small_gradients(layer, torch.randn(2, 3, 4, 4))


def test_where_all_features_are_alike_position_decides():
    geometry = Geometry(5, 5, kernel=(3, 3))
    for value, similarity in itertools.product((1.0, 0.1, 1e-4), ("cosine", "euclidean", "dot")):
        x = torch.full((1, 1, 25, 6), value)
        queries = geometry.query_index()
        args = (x[:, :, queries], x, geometry, Selection(similarity=similarity))
        at_half, at_zero = (select_neighbors(*args, blend=b).index for b in (0.5, 0.0))
        assert torch.equal(at_half, at_zero), (value, similarity)


def test_learned_blend_has_a_gradient_everywhere_and_reports_what_it_uses():
    torch.manual_seed(0)
    layer = ConvNN2d(4, 4, 6, blend=0.5, learn_blend="layer")
    assert layer.blend == pytest.approx(0.5, abs=1e-6)
    x = torch.randn(2, 4, 6, 6)
    for logit in (-8.0, 8.0):
        layer.blend_logit.data.fill_(logit)
        layer.zero_grad()
        (layer(x) * torch.linspace(-1, 1, 36).view(6, 6)).sum().backward()
        assert layer.blend_logit.grad.abs() > 0
        assert layer.blend == pytest.approx(layer.blend_value().item(), abs=1e-7) and 0.001 < layer.blend < 0.999


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_empty_batches(blend):
    for options in ({}, {"weighting": "softmax", "aggregation": "depthwise"}, {"groups": 2}, {"candidates": "window"}):
        layer = ConvNN2d(4, 4, 5, blend=blend, **options)
        assert layer(torch.zeros(0, 4, 6, 6)).shape == (0, 4, 6, 6)
    layer = ConvNNAttention(8, 2, 5, blend, num_prefix_tokens=1, grid_size=(3, 3))
    assert layer(torch.zeros(0, 10, 8)).shape == (0, 10, 8)


def test_half_precision_of_zero_tokens():
    torch.manual_seed(0)
    for weighting in ("softmax", "score"):
        layer = ConvNN2d(4, 4, 5, weighting=weighting).half()
        x = torch.randn(1, 4, 5, 5).half()
        x[..., 2:] = 0
        assert layer(x).isfinite().all()


def test_set_spectrum_changes_all_or_nothing():
    layer = ConvNN2d(3, 3, 9, blend=0.5)
    for bad in ({"k": 99}, {"temperature": float("inf")}, {"temperature": 0.0}):
        with pytest.raises(ValueError):
            layer.set_spectrum(blend=0.3, **bad)
        assert layer.spectrum() == {"blend": 0.5, "k": 9, "temperature": 1.0}


def test_fused_attention_is_not_used_where_the_query_adds_itself():
    torch.manual_seed(0)
    options = {"candidates": "grid", "num_candidates": 2, "aggregation": "sum", "grid_size": (4, 4)}
    for self_first in (True, False):
        layer = ConvNNAttention(8, 2, 4, self_first=self_first, **options).double()
        x = torch.randn(2, 16, 8, dtype=torch.float64)
        fast = layer(x)
        layer.fast = False
        assert (fast - layer(x)).abs().max() < 1e-12


def test_raster_slots_put_missing_neighbours_last():
    geometry = Geometry(4, 4)
    x = torch.randn(1, 1, 16, 3)
    selection = Selection(candidates="window", num_candidates=1, slots="raster", self_first=False)
    found = select_neighbors(x, x, geometry, selection)
    counts = found.valid.sum(-1)
    assert counts.min() == 4 and counts.max() == 9
    assert torch.equal(found.valid, torch.arange(9) < counts[..., None])  # all that are valid come first
    for row, count in zip(found.index[0, 0].tolist(), counts[0, 0].tolist(), strict=True):
        assert row[:count] == sorted(row[:count])


# ------------------------------------------------------------------------------------------ to plain layers


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_hybrid_of_depthwise_neighbours_becomes_one_convolution(ratio):
    torch.manual_seed(0)
    config = OperatorConfig(blend=0.0, aggregation="depthwise", branch_ratio=ratio)
    hybrid = HybridConvNN2d.from_layer(nn.Conv2d(4, 8, 3, padding=1), config, "fresh", Site("c")).double()
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    assert (hybrid.to_layer()(x) - hybrid(x)).abs().max() < 1e-12


def test_layers_that_only_look_plain_refuse():
    attention = ConvNNAttention(8, 2, 4, aggregation="sum", k_policy="clamp")
    with pytest.raises(ValueError, match="without grid_size"):
        attention.to_layer()
    conv = ConvNN2d(3, 4, 12, blend=0.0, slots="raster")
    nn.init.zeros_(conv.weight)
    with pytest.raises(ValueError, match="k=12 is not the area"):
        conv.to_layer()


def test_a_shared_layer_stays_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(conv, nn.ReLU(), conv)
    assert len(swap_layers(net, {})) == 1
    assert net[0] is net[2] and isinstance(net[0], ConvNN2d)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "rule, operator, message",
    [
        ({}, {"kk": 9}, r"unknown key 'operator.kk'; did you mean 'operator.k'"),
        ({"matchh": "*"}, {}, r"unknown key 'rules\[0\].matchh'; did you mean 'rules\[0\].match'"),
        ({"operator": {"kk": 4}}, {}, r"unknown key 'rules\[0\].operator.kk'"),
        ({"operator": {"k": "four"}}, {}, r"rules\[0\].operator.k=four must be a number or kernel"),
        ({}, {"k": None}, r"operator.k: "),
        ({}, {"target": "math.pi"}, r"operator.target=math.pi is a float"),
        ({}, {"target": "convnn.nn.base.pair"}, r"operator.target=convnn.nn.base.pair is no operator"),
    ],
)
def test_library_mistakes_name_the_key(rule, operator, message):
    net = timm.create_model("resnet18")
    with pytest.raises(ConfigError, match=message):
        swap_layers(net, rule, operator)
    assert not neighbor_layers(net)


def test_numbers_in_text_are_numbers():
    net = timm.create_model("resnet18")
    swap_layers(net, {"match": "layer1.0.conv1", "operator": {"blend": "0.25"}}, {"k": "4"})
    (layer,) = neighbor_layers(net).values()
    assert (layer.k, layer.blend) == (4, 0.25)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["+swap.operator.k=abc"], "swap.operator.k"),
        (["+swap.operator.k=4.5"], "swap.operator.k"),
        (["+swap.operator.k=null"], "swap.operator.k"),
        (["+swap.operator.blend=half"], "swap.operator.blend"),
        (["+swap.operator.branch_kernel=2.5"], "swap.operator.branch_kernel"),
        (["+swap.operator.options=3"], "swap.operator.options"),
        (["+swap.operator.self_first=maybe"], "swap.operator.self_first"),
        (["+swap.rules.a.match=*", "+swap.rules.a.operator.k=x"], "swap.rules.a.operator.k"),
        (["schedule=shrink_k", "+swap.operator.k=4"], "swap.operator.k=4"),
        (["schedule=shrink_k", "+swap.operator.slots=raster"], "swap.operator.slots"),
        (["schedule=linear", "+swap.operator.learn_blend=layer"], "swap.operator.learn_blend"),
        (["operator=neighborhood", "swap=all_attention", "operator.border=shift", "operator.slots=window"], "slots"),
        (
            [
                "operator=neighborhood", "swap=all_attention", "operator.k=9", "operator.border=shift",
                "operator.candidates=window", "operator.num_candidates=0",
            ],
            "num_candidates",
        ),
    ],
)  # fmt: skip
def test_bad_operators_of_a_rule_name_the_key(overrides, message):
    with pytest.raises(ConfigError) as error:
        compose_config(overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_operators_of_a_rule_have_types():
    assert compose_config(["+swap.operator.blend=0"]).swap.operator == {"blend": 0.0}


@pytest.mark.parametrize(
    "operator, options",
    [
        *(("acmix", {"heads": value}) for value in (0, -1, None, [4], 2.5, True)),
        ("acmix", {"window": -1}),
        ("acmix", {"windows": 7}),
        *(("convit", {"locality_strength": value}) for value in ("abc", None, float("nan"))),
    ],
)
def test_bad_options_of_peers_name_the_key(operator, options):
    preset = compose_config([f"operator={operator}", f"swap=all_{'conv' if operator == 'acmix' else 'attention'}"])
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)) if operator == "acmix" else timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2
    )  # fmt: skip
    operator_config = replace(preset.operator, options=options)
    with pytest.raises(ConfigError, match=rf"operator.options.{next(iter(options))}"):
        swap_layers(net, {}, operator_config)


def test_peers_keep_what_the_layer_has_or_refuse():
    conv = ACmix2d.from_layer(nn.Conv2d(4, 4, 3, padding=1, bias=False), OperatorConfig(), "fresh", Site("c"))
    assert conv(torch.zeros(0, 4, 5, 5)).shape == (0, 4, 5, 5)
    assert conv.bias is None and conv(torch.randn(1, 4, 5, 5)).shape == (1, 4, 5, 5)
    config = OperatorConfig(name="convit", kind="attention", bias=False)
    site = Site("a", 0, (2, 2))
    assert GatedPositionalAttention.from_layer(Attention(8, 2), config, "fresh", site).proj.bias is None
    normed = Attention(8, 2, qk_norm=True, norm_layer=nn.LayerNorm)
    with pytest.raises(ConfigError, match="'a' normalises its queries"):
        GatedPositionalAttention.from_layer(normed, config, "fresh", site)
