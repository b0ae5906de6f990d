"""The swap policy: plan, check, apply, report."""

import pytest
import timm
import torch
from torch import nn

from convnn import ConfigError, ConvNN2d, ConvNNAttention, OperatorConfig, SwapRule, swap_layers
from convnn.config.schema import SwapConfig
from convnn.models.sites import find_sites, network_layers, patches_alone, site_stages
from convnn.models.swap import neighbor_layers

ATTENTION = {
    "name": "a",
    "kind": "attention",
    "target": "convnn.ConvNNAttention",
    "similarity": "dot",
    "self_first": False,
    "weighting": "softmax",
    "aggregation": "depthwise",
}


@pytest.fixture(scope="module")
def names():
    return list(find_sites(timm.create_model("resnet18"), "conv"))


def swapped(rule, model="resnet18", operator=None):
    net = timm.create_model(model, num_classes=10)
    return [row.name for row in swap_layers(net, rule, operator).rows]


def test_rules_choose_layers(names):
    spatial = [n for n in names if "downsample" not in n]
    assert len(names) == 20 and len(spatial) == 17
    assert swapped({}) == names
    assert swapped({"min_kernel": 3}) == spatial
    assert swapped({"min_kernel": 3, "first": 3}) == spatial[:3]
    assert swapped({"min_kernel": 3, "last": 2}) == spatial[-2:]
    assert swapped({"min_kernel": 3, "every": 4}) == spatial[::4]
    assert swapped({"min_kernel": 3, "depths": [0, -1, 5]}) == [spatial[0], spatial[5], spatial[-1]]
    assert swapped({"min_kernel": 3, "fraction": [0.0, 0.5]}) == spatial[:8]
    assert swapped({"min_kernel": 3, "fraction": [0.5, 1.0]}) == spatial[8:]
    assert swapped({"stages": [0]}) == ["conv1"]
    assert swapped({"stages": [2], "min_kernel": 3}) == [n for n in spatial if n.startswith("layer2")]
    assert swapped({"match": "layer3.*", "exclude": ["*.downsample.*"]}) == [
        n for n in spatial if n.startswith("layer3")
    ]


def test_several_rules_with_their_own_operators():
    net = timm.create_model("resnet18")
    swap_layers(
        net, [{"match": "layer1.*", "operator": {"k": 4}}, {"match": "layer2.0.conv2", "operator": {"blend": 0.5}}]
    )
    assert net.layer1[0].conv1.k == 4 and net.layer2[0].conv2.blend == 0.5
    assert isinstance(net.layer3[0].conv1, nn.Conv2d)


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"match": "layer9.*"}, "matches none of the conv layers: conv1, layer1"),
        ({"depths": [20]}, "20 is out of range, 20 layers match"),
        ({"first": 21}, "first=21 is out of range"),
        ({"stages": [7]}, "no conv layer in stage 7; stages: 0, 1, 2, 3, 4"),
        ({"min_kernel": 9}, "nothing is left"),
        ({"kind": "attention"}, "operator=convnn replaces conv layers"),
        ([{"match": "layer1.*"}, {"match": "*.conv1"}], "'layer1.0.conv1' is claimed by both"),
    ],
)
def test_bad_rules_change_nothing(rule, message):
    net = timm.create_model("resnet18")
    before = str(net)
    with pytest.raises(ConfigError, match=message):
        swap_layers(net, rule)
    assert str(net) == before


def test_no_attention_in_a_resnet():
    with pytest.raises(ConfigError, match="ResNet has no attention layer"):
        swapped({}, operator=ATTENTION)


def test_a_swap_of_patches_alone_is_told():
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert [row.name for row in swap_layers(vit, {}).rows] == ["patch_embed.proj"]
    assert patches_alone(vit, ["patch_embed.proj"]).startswith("only the patch embedding is replaced; set operator=")
    assert patches_alone(vit, []) is None and patches_alone(vit, ["patch_embed.proj", "blocks.0.attn"]) is None
    assert patches_alone(nn.Conv2d(3, 4, 3), ["patch_embed.proj"]) is None


def test_classifier_head_is_left_alone():
    rows = swapped({}, "vgg11_bn")
    assert len(rows) == 8 and all(r.startswith("features.") for r in rows)


def test_attention_sites_know_their_grid():
    net = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), patch_size=8, depth=3, num_classes=4)
    report = swap_layers(net, {"depths": [1, 2]}, ATTENTION)
    assert [r.name for r in report.rows] == ["blocks.1.attn", "blocks.2.attn"]
    layer = net.blocks[1].attn
    assert isinstance(layer, ConvNNAttention) and layer.grid_size == (4, 8) and layer.num_prefix_tokens == 1
    for layer in neighbor_layers(net).values():
        layer.set_spectrum(blend=0.5)
    assert net(torch.randn(1, 3, 32, 64)).shape == (1, 4)


def test_stages_follow_feature_info():
    net = timm.create_model("vgg11_bn")
    stages = site_stages(net, find_sites(net, "conv"))
    assert list(stages.values()) == [0, 1, 2, 2, 3, 3, 4, 4]


def test_report_counts_parameters():
    net = timm.create_model("resnet18")
    report = swap_layers(net, {"match": "layer1.0.conv1"}, {"k": 4, "slots": "rank"})
    row = report.rows[0]
    assert (row.params_before, row.params_after) == (64 * 64 * 9, 64 * 64 * 4)
    text = str(report)
    assert "Conv2d 64->64 3x3" in text and "ConvNN2d k=4 blend=1" in text and "36,864" in text and "16,384" in text


def test_published_parameter_counts():
    """VGG-11 with hybrid branching and ViT-Tiny with ConvNN attention, 10 classes (authors' results)."""
    hybrid = {"name": "hybrid", "target": "convnn.HybridConvNN2d"}
    for ratio in (0.25, 0.5):
        with torch.device("meta"):
            net = timm.create_model("vgg11_bn", num_classes=10)
        swap_layers(net, {}, hybrid | {"branch_ratio": ratio})
        assert sum(p.numel() for p in net.parameters()) == 130_015_690
    with torch.device("meta"):
        net = timm.create_model("vit_tiny_patch16_224", num_classes=10, num_heads=1)
    before = sum(p.numel() for p in net.parameters())
    swap_layers(net, {}, ATTENTION)
    assert sum(p.numel() for p in net.parameters()) - before == 5_500_042 - 5_479_306


def test_none_swaps_nothing_and_says_so():
    net = timm.create_model("resnet18")
    report = swap_layers(net, SwapConfig(match=None))
    assert len(report) == 0 and "no layer replaced" in str(report)


def test_every_neighbor_layer_gets_a_gradient_in_real_backbones():
    for name, rule, operator in (
        ("resnet18", SwapRule(min_kernel=3, last=3), OperatorConfig()),
        ("vit_tiny_patch16_224", SwapRule(last=2), ATTENTION),
    ):
        kwargs = {"img_size": 32, "patch_size": 4, "depth": 2} if name.startswith("vit") else {}
        net = timm.create_model(name, num_classes=4, **kwargs)
        swap_layers(net, rule, operator)
        net(torch.randn(2, 3, 64, 64) if not kwargs else torch.randn(2, 3, 32, 32)).square().sum().backward()
        for key, p in net.named_parameters():
            assert p.grad is not None, key
        assert any(isinstance(m, (ConvNN2d, ConvNNAttention)) for m in net.modules())


def test_frozen_layers_stay_frozen():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    net[0].requires_grad_(False)
    net[1].weight.requires_grad_(False)  # its bias learns
    swap_layers(net, {}, {"k": 5})
    assert not any(p.requires_grad for p in net[0].parameters())
    assert {n: p.requires_grad for n, p in net[1].named_parameters()} == {"weight": False, "bias": True}


def test_a_partly_frozen_layer_with_other_parameters_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    net[0].bias.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'0' has frozen parameters \(bias\) beside others"):
        swap_layers(net, {}, {"k": 5, "aggregation": "separable"})
    assert isinstance(net[0], nn.Conv2d)


ATTACHED = {
    "forward hooks": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward pre hooks": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hooks": lambda layer: layer.register_full_backward_hook(lambda *_: None),
}


@pytest.mark.parametrize("message", ATTACHED)
@pytest.mark.parametrize("init", ["fresh", "transfer"])
def test_what_a_swap_would_lose_is_refused_before_anything_changes(message, init):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    ATTACHED[message](net[1])
    with pytest.raises(ConfigError, match=rf"'1' .*{message}"):
        swap_layers(net, {}, {"k": 9}, init)
    assert all(isinstance(layer, nn.Conv2d) for layer in net)


COMPUTED = {
    r"parametrized weight; call .*remove_parametrizations": nn.utils.parametrizations.weight_norm,
    r"parametrized weight; call .*remove_parametrizations first": nn.utils.parametrizations.spectral_norm,
    r"hook of torch.nn.utils; call torch.nn.utils.remove_weight_norm": nn.utils.weight_norm,
    r"hook of torch.nn.utils; call torch.nn.utils.remove_spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("message", COMPUTED)
def test_computed_weights_of_attention_are_refused(message):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1, embed_dim=24, num_heads=3)
    COMPUTED[message](vit.blocks[0].attn.qkv)
    with pytest.raises(ConfigError, match=rf"'blocks.0.attn' .*{message}"):
        swap_layers(vit, {"kind": "attention"}, ATTENTION | {"k": 3})


def test_hooks_inside_attention_are_found_too():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1, embed_dim=24, num_heads=3)
    vit.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"'blocks.0.attn' has forward hooks"):
        swap_layers(vit, {"kind": "attention"}, ATTENTION | {"k": 3})


@pytest.mark.parametrize("operator", ["convnn", "hybrid"])
def test_the_networks_layers_are_the_same_before_and_after_a_swap(operator):
    small = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
    net = timm.create_model("resnet18", num_classes=3, **small)
    before = network_layers(net)
    assert before == list(find_sites(net, "conv")) and before[0] == "conv1" and "fc" not in before
    swap_layers(net, "layer[13].*conv*", operator, k=4)
    assert network_layers(net) == before


def test_the_networks_layers_of_a_vit_are_its_patches_and_attention():
    net = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3)
    assert network_layers(net) == ["patch_embed.proj", "blocks.0.attn", "blocks.1.attn"]
    swap_layers(net, {"last": 1}, "convnn_attention")
    assert network_layers(net) == ["patch_embed.proj", "blocks.0.attn", "blocks.1.attn"]


def test_a_layer_inside_another_is_replaced_by_neither_or_with_it():
    def attention():
        return timm.create_model("visformer_tiny", img_size=64, embed_dim=48, num_heads=2, depth=(1, 1, 1))

    model, name = attention(), "stage2.0.attn"
    pointwise = {"kind": "conv", "target": "convnn.ConvNN2d", "k": 1, "weighting": "ones", "aggregation": "conv"}
    rules = [{"match": f"{name}.*", "operator": pointwise}, {"match": name}]
    with pytest.raises(ConfigError, match=rf"'{name}.qkv' of rules\[0\] lies in '{name}' of rules\[1\]"):
        swap_layers(model, rules, "convnn_attention", k=4, aggregation="sum")
    swap_layers(model, f"{name}.*", pointwise)
    with pytest.raises(ConfigError, match=f"'{name}' holds layers that were replaced before"):
        swap_layers(model, name, "convnn_attention", k=4, aggregation="sum")
