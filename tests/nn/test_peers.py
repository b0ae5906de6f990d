"""Layers of other papers against plain references."""

import oracles
import pytest
import timm
import torch
from comparing import close, compare
from timm.layers.attention import Attention
from timm.models.convit import GPSA
from torch import nn

from convnn import ConfigError, ConvNN2d, OperatorConfig, swap_layers
from convnn.config.compose import compose_config
from convnn.nn.acmix import ACmix2d
from convnn.nn.base import Site, layer_settings
from convnn.nn.convit import GatedPositionalAttention


@pytest.mark.parametrize("heads", [1, 4, 9])
def test_gated_positional_attention_is_timms(heads):
    torch.manual_seed(0)
    theirs = GPSA(36, num_heads=heads, qkv_bias=False, locality_strength=1.5).double()
    theirs.local_init()
    nn.init.normal_(theirs.gating_param)
    ours = GatedPositionalAttention(36, heads, locality_strength=1.5, grid_size=(5, 5)).double()
    close(ours.qkv.weight[72:], theirs.v.weight)
    starts = [sorted(m.pos_proj.weight.tolist()) for m in (ours, theirs)]
    assert starts[0] == starts[1]  # the same set of offsets, one per head
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([theirs.qk.weight, theirs.v.weight]))
        ours.pos_proj.load_state_dict(theirs.pos_proj.state_dict())
        ours.gating.copy_(theirs.gating_param)
        ours.proj.load_state_dict(theirs.proj.state_dict())
    x = torch.randn(2, 25, 36, dtype=torch.float64)
    close(ours(x), theirs(x))


def test_gated_positional_attention_with_prefix_on_a_wide_grid():
    torch.manual_seed(0)
    module = GatedPositionalAttention(8, 2, num_prefix_tokens=1, grid_size=(2, 3)).double()
    nn.init.normal_(module.gating)
    nn.init.normal_(module.pos_proj.weight)
    x = torch.randn(1, 7, 8, dtype=torch.float64)

    def reference(x):
        qkv = x[0] @ module.qkv.weight.T
        where = [None, *[(r, c) for r in range(2) for c in range(3)]]
        rows = []
        for i in range(7):
            heads = []
            for h in range(2):
                q, k, v = (qkv[:, s * 8 + h * 4 : s * 8 + h * 4 + 4] for s in range(3))
                content = torch.softmax(torch.stack([q[i] @ k[j] / 2 for j in range(7)]), 0)
                if i == 0:
                    heads.append(content @ v)
                    continue
                offsets = [(where[j][1] - where[i][1], where[j][0] - where[i][0]) for j in range(1, 7)]
                features = torch.tensor([[dx, dy, dx * dx + dy * dy] for dx, dy in offsets], dtype=x.dtype)
                position = torch.softmax(features @ module.pos_proj.weight[h] + module.pos_proj.bias[h], 0)
                gate = torch.sigmoid(module.gating[h])
                heads.append((1 - gate) * content @ v + gate * position @ v[1:])
            rows.append(module.proj.weight @ torch.cat(heads) + module.proj.bias)
        return torch.stack(rows)[None]

    # The bias shifts all positional logits of a head alike: its gradient is zero in both.
    compare(module, reference, x)


@pytest.mark.parametrize(
    "stride, padding, kernel, window, size",
    [
        (1, 1, 3, 3, (6, 5)),
        (2, 1, 3, 5, (6, 5)),
        (1, 0, 3, 3, (6, 5)),
        (1, 2, 5, 7, (6, 5)),
        (2, 1, 3, 7, (2, 3)),  # a window beyond what the border can mirror once
        (1, 1, 3, 7, (1, 4)),
    ],
)
def test_acmix_equals_loop_reference(stride, padding, kernel, window, size):
    torch.manual_seed(0)
    module = ACmix2d(3, 8, kernel, stride, padding, heads=2, window=window).double()
    nn.init.normal_(module.bias)
    module.alpha.data.fill_(0.3)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    geometry = {"kernel": kernel, "stride": stride, "padding": padding, "window": window}

    def reference(x):
        position = module.position.weight[:, :, 0, 0], module.position.bias
        args = (module.qkv.weight[:, :, 0, 0], module.qkv.bias, position, module.mix.weight, module.bias)
        return oracles.acmix(x, *args, module.alpha, module.beta, heads=2, **geometry)

    close(module(x), reference(x))
    module.shift.requires_grad_(False)  # fixed to shifts in the formula, learnable in the layer
    grads = []
    for function in (module, reference):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        (function(leaf) ** 2).sum().backward()
        grads.append([leaf.grad] + [p.grad for p in module.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_acmix_has_the_published_parameters():
    net = timm.create_model("resnet50", num_classes=1000)
    swap_layers(net, {"match": "layer*.conv2"}, OperatorConfig(name="acmix", target="convnn.ACmix2d"))
    # That of the authors' ResNet-50 (Panxuran/ACmix) with seven-wide windows and four heads.
    assert sum(p.numel() for p in net.parameters()) == 18_333_976


def test_acmix_names_each_token_of_its_window_once():
    torch.manual_seed(0)
    module = ACmix2d(3, 4, heads=2, window=5)
    found = module.neighborhood(torch.randn(1, 3, 4, 4))
    assert found.index.shape == (1, 2, 16, 16) and not found.is_padding.any()
    tokens = found.index.masked_fill(~found.valid, -1).sort(-1).values
    assert ((tokens.diff(dim=-1) > 0) | (tokens[..., 1:] < 0)).all()  # each once
    # At a corner the window reaches three rows and columns, and mirrors two of them.
    assert found.valid[0, 0, 0].sum() == 9 and found.valid[0, 0, 5].sum() == 16
    assert (found.weights.sum(-1) - 1).abs().max() < 1e-6


def test_vision_graph_layer_is_max_relative_over_feature_neighbours():
    torch.manual_seed(0)
    preset = layer_settings(compose_config(["operator=vision_graph"]).operator)
    module = ConvNN2d(4, 6, 5, padding=1, **preset).double()
    x = torch.randn(1, 4, 4, 5, dtype=torch.float64)
    tokens = x.flatten(2)[0].T
    unit = tokens / tokens.norm(dim=1, keepdim=True)  # ViG normalises before it measures
    distance = torch.cdist(unit, unit)
    near = tokens[distance.topk(5, largest=False).indices]
    expected = torch.cat([tokens, (near - tokens[:, None]).amax(1)], 1) @ module.pointwise.weight.T + module.bias
    close(module(x), expected.T.view(1, 6, 4, 5))


def test_peers_refuse_what_they_cannot_do():
    conv = nn.Conv2d(3, 6, 3, padding=1)
    config = OperatorConfig(name="acmix", target="convnn.ACmix2d")
    for change, init, message in [
        ({}, "transfer", "no counterpart in operator=acmix"),
        ({}, "fresh", "heads=4 must divide out_channels=6"),
        ({"options": {"head": 2}}, "fresh", "operator.options.head: acmix has the options heads, window"),
        ({"options": {"heads": 2, "window": 4}}, "fresh", "window=4 must be odd"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ACmix2d.from_layer(conv, OperatorConfig(**(vars(config) | change)), init, Site("here"))
    with pytest.raises(ConfigError, match="no counterpart"):
        GatedPositionalAttention.from_layer(Attention(8, 2), OperatorConfig(name="convit"), "transfer", Site("a"))
    with pytest.raises(ValueError, match="not supported"):
        GatedPositionalAttention(8, 2)(torch.zeros(1, 4, 8), is_causal=True)
