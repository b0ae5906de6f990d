"""Asking layers for their neighbours: the answer is what the output was made from, and asking leaves no trace."""

import timm
import torch
import torch.nn.functional as F
from helpers import equal_states
from torch import nn

from convnn import ConvNN2d, ConvNNAttention, neighbors_of, swap_layers
from convnn.models.flops import count_operations
from convnn.models.mass import held_by_neighbors
from convnn.nn.neighbor_attention import add_ring

TINY_RESNET = {"num_classes": 3, "channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}


def gathered(tokens, found):
    """(N, C) tokens of image 0, head 0 at the neighbours: (Q, K, C)."""
    return tokens[found.index[0, 0]]


def conv_by_hand(layer, x, found):
    tokens = F.pad(x, (1, 1, 1, 1)).flatten(2)[0].T
    y = torch.einsum("qkc,ock->qo", gathered(tokens, found), layer.weight[..., : found.index.shape[-1]]) + layer.bias
    return y.T.unflatten(1, found.geometry.out_shape)[None]


def test_a_convolution_layers_answer_rebuilds_its_output_on_a_map_that_is_not_square():
    x = torch.randn(1, 3, 6, 9)
    for blend, stride in ((0.0, 1), (0.0, 2), (0.4, 1), (1.0, 2)):  # blend 0 runs through F.conv2d
        layer = ConvNN2d(3, 5, 9, stride, blend=blend)
        y, found = layer(x, return_neighbors=True)
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(conv_by_hand(layer, x, found), y, atol=1e-5, rtol=1e-5)
        assert found.weights is None and found.valid.all() and found.geometry.padded_shape == (8, 11)
        assert bool(found.in_window().all()) == (blend == 0)


def test_windows_padding_and_distances_at_blend_0():
    layer = ConvNN2d(2, 2, 9, blend=0.0, dilation=2, padding=2, kernel_size=3)
    found = layer.neighborhood(torch.randn(1, 2, 5, 4))
    assert found.in_window().all()
    corner = found.is_padding[0, 0, 0]
    assert int(corner.sum()) == 5 and int(found.is_padding[0, 0, 2 * 4 + 2].sum()) == 3
    expected = torch.tensor([0.0, *[2.0] * 4, *[8**0.5] * 4])
    torch.testing.assert_close(found.distance()[0, 0, 0].sort().values, expected)


def heads_by_hand(v, found):
    """(H, N, D) -> a list of (Q, D)."""
    each = zip(found.weights[0], v, found.index[0], strict=True)
    return [torch.einsum("qk,qkd->qd", weights, own[index]) for weights, own, index in each]


def attention_by_hand(layer, x, found):
    b, n, c = x.shape
    v = layer.qkv(x)[..., 2 * c :].view(b, n, layer.num_heads, -1)[0].transpose(0, 1)  # (H, N, D)
    heads = heads_by_hand(v, found)
    return layer.proj(torch.cat(heads, dim=-1))[None]


def test_an_attention_layers_weights_and_neighbours_rebuild_its_output_with_cls():
    torch.manual_seed(0)
    x = torch.randn(1, 13, 8)
    cases = [
        {"k": 5, "blend": 1.0},
        {"k": 4, "blend": 0.3},
        {"k": 13, "k_policy": "clamp"},  # fused attention
        {"k": 65536, "k_policy": "clamp"},
        {"k": 9, "candidates": "window", "num_candidates": 1, "k_policy": "clamp"},
    ]
    for case in cases:
        layer = ConvNNAttention(8, 2, num_prefix_tokens=1, grid_size=(3, 4), aggregation="sum", **case)
        y, found = layer(x, return_neighbors=True)
        torch.testing.assert_close(attention_by_hand(layer, x, found), y, atol=1e-5, rtol=1e-5)
        assert found.geometry.prefix == 1 and (found.geometry.height, found.geometry.width) == (3, 4)
        torch.testing.assert_close(found.weights.sum(-1), torch.ones(1, 2, 13))
        assert not found.weights[~found.valid].any()
    assert layer(x, return_neighbors=True)[1].is_prefix.any()


def test_ranks_are_given_whatever_the_slots():
    x = torch.randn(1, 3, 5, 5)
    answers = [
        ConvNN2d(3, 3, 9, blend=0.7, slots=slots).neighborhood(x).index for slots in ("rank", "window", "raster")
    ]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_random_candidates_are_those_of_the_output():
    layer = ConvNN2d(3, 4, 4, candidates="random", num_candidates=8).train()
    x = torch.randn(1, 3, 6, 6)
    for _ in range(3):
        y, found = layer(x, return_neighbors=True)
        torch.testing.assert_close(conv_by_hand(layer, x, found), y, atol=1e-5, rtol=1e-5)
    assert not torch.equal(found.index, layer(x, return_neighbors=True)[1].index)


def test_asking_a_model_leaves_no_trace_and_needs_one_pass():
    model = timm.create_model("resnet18", **TINY_RESNET)
    swap_layers(model, {"match": "layer[34].*", "min_kernel": 3}, {"k": 9, "blend": 0.5})
    model.train()
    model.bn1.eval()
    images = torch.randn(2, 3, 40, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    found = neighbors_of(model, images)
    handle.remove()
    assert len(passes) == 1 and list(found) == [f"layer{i}.0.conv{j}" for i in (3, 4) for j in (1, 2)]
    assert equal_states(before, model.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert found["layer3.0.conv2"].index.shape == (2, 1, 3 * 4, 9)
    at_ends = [neighbors_of(model, torch.randn(1, 3, 64, 64), blend=b)["layer3.0.conv2"] for b in (0, 1)]
    assert at_ends[0].in_window().all() and not at_ends[1].in_window().all()


def test_hybrids_and_peers_answer_too():
    for operator, name in (("hybrid", "layer4.0.conv2.neighbors"), ("acmix", "layer4.0.conv2")):
        model = timm.create_model("resnet18", **TINY_RESNET)
        config = {"hybrid": {"branch_ratio": 0.5, "target": "convnn.HybridConvNN2d"}}.get(
            operator, {"name": "acmix", "target": "convnn.ACmix2d"}
        )
        swap_layers(model, {"match": "layer4.0.conv2"}, config)
        found = neighbors_of(model, torch.randn(1, 3, 64, 64))
        assert list(found) == [name]
    # ACmix on a 2x2 map: a 7x7 window holds all four tokens, and of the padding none.
    assert found[name].valid.sum(-1).eq(4).all() and not found[name].is_padding.any()
    torch.testing.assert_close(found[name].weights.sum(-1), torch.ones(1, 4, 4))
    layer = model.layer4[0].conv2
    x = torch.randn(1, 8, 4, 5)
    answer, (_, _, _, v, geometry) = layer.neighborhood(x), layer._project(x)
    heads = heads_by_hand(add_ring(v, geometry)[0], answer)
    attended = torch.cat([h.T for h in heads])[None].unflatten(2, geometry.out_shape)
    with torch.no_grad():
        layer.alpha.fill_(1)
        layer.beta.fill_(0)
    torch.testing.assert_close(attended, layer(x), atol=1e-5, rtol=1e-5)


def test_convit_answers_with_every_token():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=12, num_heads=4)
    swap_layers(model, {"kind": "attention"}, {"kind": "attention", "target": "convnn.GatedPositionalAttention"})
    found = neighbors_of(model, torch.randn(1, 3, 32, 32))["blocks.0.attn"]
    assert found.index.shape == (1, 4, 17, 17) and found.window == (2, 2)
    assert (found.weights.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(1, 4, 17))


def test_the_window_of_a_layer_with_fewer_candidates_than_k():
    """Without a limit to k, full attention's window is that of its tokens; a k lowered later keeps the layer's."""
    x = torch.randn(1, 17, 8)
    full = ConvNNAttention(8, 2, 65536, k_policy="clamp", aggregation="sum", num_prefix_tokens=1)
    assert full.neighborhood(x).window == (5, 5)
    local = ConvNNAttention(
        8, 2, 65536, k_policy="clamp", candidates="window", num_candidates=1, aggregation="sum", num_prefix_tokens=1
    )
    assert local.neighborhood(x).window == (3, 3)
    layer = ConvNNAttention(8, 2, 9, num_prefix_tokens=1)
    layer.set_spectrum(k=2)
    assert layer.neighborhood(x).window == (3, 3)


def test_layers_that_are_called_by_names_alone():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, image):
            x = image.flatten(2).mT
            return self.attn(query=x, key=x, value=x, need_weights=False)[0].mean(1)

    model, image = Named(), torch.randn(2, 8, 3, 3)
    swap_layers(model, "*", {"kind": "attention", "aggregation": "sum", "k": 4})
    assert neighbors_of(model, image)["attn"].index.shape == (2, 2, 9, 4)
    assert held_by_neighbors(model, [image])["attn"].mass < 1
    assert count_operations(model, image).total > 0
