"""Properties that no reference shows, over generated sizes and settings; and equalities by composition."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.attention import Attention
from torch import nn

from convnn import ConvNN2d, ConvNNAttention, OperatorConfig
from convnn.nn.base import Site
from convnn.nn.hybrid import HybridConvNN2d
from convnn.ops.candidates import candidate_tokens
from convnn.ops.geometry import Geometry
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Selection

few = settings(max_examples=25, deadline=None)
sides = st.integers(3, 8)
similarities = st.sampled_from(["cosine", "euclidean", "dot"])


def overlap(index, geometry):
    queries = geometry.query_index()
    rows, cols = geometry.coordinates(index)
    own_rows, own_cols = (t[:, None] for t in geometry.coordinates(queries))
    inside = ((rows - own_rows).abs() <= 1) & ((cols - own_cols).abs() <= 1)
    return inside.double().mean().item()


def neighbors(x, geometry, selection, num, blend):
    queries = geometry.query_index()
    return select_neighbors(x[:, :, queries], x, geometry, replace(selection, k=num), blend=blend).index


@few
@given(st.integers(2, 20), st.integers(1, 9), similarities, st.sampled_from(["sum", "depthwise"]), st.integers(0, 99))
def test_feature_end_commutes_with_permutations(n, k, similarity, aggregation, seed):
    torch.manual_seed(seed)
    options = {"similarity": similarity, "aggregation": aggregation}
    module = ConvNNAttention(8, 2, min(k, n), **options).double()
    x, order = torch.randn(2, n, 8, dtype=torch.float64), torch.randperm(n)
    assert (module(x)[:, order] - module(x[:, order])).abs().max() < 1e-10


@few
@given(sides, sides, st.integers(1, 12), st.integers(-2, 2), st.integers(-2, 2), st.integers(0, 99))
def test_position_end_commutes_with_translation(height, width, k, down, right, seed):
    torch.manual_seed(seed)
    module = ConvNN2d(2, 3, k, blend=0.0, fast=False).double()
    x = torch.zeros(1, 2, height + 10, width + 10, dtype=torch.float64)
    x[..., 5:-5, 5:-5] = torch.randn(height, width, dtype=torch.float64)
    moved = torch.roll(x, (down, right), (-2, -1))
    assert (torch.roll(module(x), (down, right), (-2, -1)) - module(moved)).abs().max() < 1e-12


@few
@given(st.integers(6, 10), st.integers(6, 10), similarities, st.sampled_from(["sum", "concat"]), st.integers(0, 99))
def test_overlap_with_the_window_falls_as_blend_rises(height, width, similarity, mix, seed):
    torch.manual_seed(seed)
    geometry = Geometry(height, width, (3, 3), padding=(1, 1))
    x = torch.randn(1, 1, geometry.num_tokens, 6)
    selection = Selection(similarity=similarity, mix=mix)
    blends = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    values = [overlap(neighbors(x, geometry, selection, 9, b), geometry) for b in blends]
    assert values[0] == 1.0
    if mix == "sum":
        # A share of ranks, not of scores, so that a single step may waver a little.
        assert all(a >= b - 0.02 for a, b in itertools.pairwise(values)), values
    assert values[-1] < 0.6


@few
@given(sides, sides, st.integers(0, 1), st.integers(0, 99))
def test_all_tokens_with_softmax_do_not_depend_on_blend_or_order(height, width, prefix, seed):
    torch.manual_seed(seed)
    n = height * width + prefix
    x = torch.randn(1, n, 8, dtype=torch.float64)
    layer = ConvNNAttention(8, 2, n, num_prefix_tokens=prefix, grid_size=(height, width), fast=False).double()
    outputs = []
    for blend, slots in ((0.0, "rank"), (0.3, "rank"), (1.0, "rank"), (1.0, "raster")):
        layer.set_spectrum(blend=blend)
        layer.selection = replace(layer.selection, slots=slots)
        outputs.append(layer(x))
    assert all((y - outputs[0]).abs().max() < 1e-12 for y in outputs)


@few
@given(
    sides,
    sides,
    st.integers(1, 9),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(["all", "random", "grid", "window"]),
    similarities,
    st.integers(0, 99),
)
def test_the_query_itself_is_first_where_promised_and_nobody_comes_twice(
    height, width, k, blend, kind, similarity, seed
):
    torch.manual_seed(seed)
    geometry = Geometry(height, width, (3, 3), padding=(1, 1))
    x = torch.randn(2, 1, geometry.num_tokens, 4)
    selection = Selection(k=k, similarity=similarity, candidates=kind, num_candidates=9 if kind == "random" else 3)
    queries = geometry.query_index()
    found = select_neighbors(x[:, :, queries], x, geometry, selection, blend=blend)
    assert (found.index[..., 0] == queries).all()
    index = found.index.clone()
    if found.valid is not None:  # the others do not count: give each a number of its own
        index[~found.valid] = -1 - torch.arange(int((~found.valid).sum()))
    assert (index.sort(-1).values.diff(dim=-1) > 0).all()


@few
@given(sides, sides, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99))
def test_only_zeros_come_across_the_border(height, width, blend, seed):
    """Without a bias, a layer of ones on a map of ones counts the neighbours that are no padding: an integer."""
    torch.manual_seed(seed)
    layer = ConvNN2d(1, 1, 9, blend=blend, bias=False, fast=False).double()
    nn.init.ones_(layer.weight)
    y = layer(torch.ones(1, 1, height, width, dtype=torch.float64))
    assert torch.equal(y, y.round()) and y.min() >= 1 and y.max() <= 9
    if blend == 0:
        assert torch.equal(
            y, F.conv2d(torch.ones(1, 1, height, width).double(), torch.ones(1, 1, 3, 3).double(), padding=1)
        )


@few
@given(st.integers(5, 9), st.integers(5, 9), st.sampled_from([3, 5]))
def test_shifted_border_is_the_window_moved_inside(height, width, side):
    geometry = Geometry(height, width, margin=(side // 2, side // 2))
    x = torch.zeros(1, 1, height * width, 1)
    index = neighbors(x, geometry, Selection(self_first=False), side * side, 0.0)[0, 0]
    for query, chosen in enumerate(index.tolist()):
        top = min(max(query // width - side // 2, 0), height - side)
        left = min(max(query % width - side // 2, 0), width - side)
        window = {(top + r) * width + left + c for r in range(side) for c in range(side)}
        assert set(chosen) == window


# ------------------------------------------------------------------------------------------------ by composition


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_shuffle_is_unshuffle_layer_shuffle(blend):
    torch.manual_seed(0)
    layer = ConvNN2d(3, 5, 9, blend=blend, shuffle=2).double()
    inner = ConvNN2d(12, 20, 9, blend=blend).double()
    inner.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    assert (layer(x) - F.pixel_shuffle(inner(F.pixel_unshuffle(x, 2)), 2)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="shuffle=2 does not divide a 7x8 map"):
        layer(x[:, :, :7, :8])


@pytest.mark.parametrize("kernel, stride, dilation, multiplier", [(3, 1, 1, 1), (5, 2, 1, 2), (3, 1, 2, 3)])
@pytest.mark.parametrize("fast", [True, False])
def test_depthwise_convolution(kernel, stride, dilation, multiplier, fast):
    torch.manual_seed(0)
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(4, 4 * multiplier, kernel, stride, padding, dilation, groups=4).double()
    config = OperatorConfig(k=kernel**2, blend=0.0, slots="raster", aggregation="depthwise")
    layer = ConvNN2d.from_layer(conv, config, "transfer", Site("c"))
    layer.fast = fast
    x = torch.randn(2, 4, 9, 14, dtype=torch.float64)
    grads = []
    for module in (conv, layer):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        grads.append((y, leaf.grad, module.bias.grad, module.weight.grad.flatten()))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*grads, strict=True))
    assert torch.equal(layer.to_layer().weight, conv.weight) and layer.to_layer().groups == 4


def assert_masked_attention(layer, attention, allowed, x):
    results = []
    for module, mask in ((layer, None), (attention, allowed)):
        leaf = x.clone().requires_grad_()
        y = module(leaf) if mask is None else module(leaf, attn_mask=mask)
        y.square().sum().backward()
        results.append((y, leaf.grad, module.qkv.weight.grad, module.proj.weight.grad))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "candidates, count", [("window", 1), ("window", 2), ("grid", 2), ("grid", 3), ("stride", 2), ("stride", 3)]
)
@pytest.mark.parametrize("fast", [True, False])
def test_candidates_are_masked_attention(candidates, count, fast):
    torch.manual_seed(0)
    attention = Attention(12, 3, qkv_bias=True).double()
    config = OperatorConfig(
        kind="attention",
        k=99,
        k_policy="clamp",
        similarity="dot",
        self_first=False,
        weighting="softmax",
        aggregation="sum",
        candidates=candidates,
        num_candidates=count,
    )
    layer = ConvNNAttention.from_layer(attention, config, "transfer", Site("a", 1, (4, 5)))
    layer.fast = fast
    where = [(r, c) for r in range(4) for c in range(5)]
    allowed = torch.zeros(21, 21, dtype=torch.bool)
    allowed[:, 0] = True  # everyone may attend to CLS
    rows = {2: [0, 3], 3: [0, 2, 3]}[count] if candidates == "grid" else []
    columns = {2: [0, 4], 3: [0, 2, 4]}[count] if candidates == "grid" else []
    for i, (r, c) in enumerate(where):
        for j, (rr, cc) in enumerate(where):
            near = max(abs(r - rr), abs(c - cc)) <= count
            aligned = (r - rr) % count == 0 and (c - cc) % count == 0
            on_grid = rr in rows and cc in columns
            allowed[i + 1, j + 1] = {"window": near, "stride": aligned, "grid": on_grid}[candidates]
    allowed[0] = allowed[1:].any(0) if candidates == "grid" else True
    x = torch.randn(2, 21, 12, dtype=torch.float64)
    assert_masked_attention(layer, attention, allowed, x)


@pytest.mark.parametrize("candidates, count", [("window", 3), ("stride", 5), ("grid", 6), ("all", 1)])
@pytest.mark.parametrize("head_dim", [None, 5])
def test_a_sequence_is_one_line_with_its_prefix(candidates, count, head_dim):
    torch.manual_seed(0)
    attention = Attention(12, 3, attn_head_dim=head_dim).double()
    layer = ConvNNAttention(
        *(12, 3, 99),
        k_policy="clamp",
        aggregation="sum",
        candidates=candidates,
        num_candidates=count,
        layout="sequence",
        head_dim=head_dim,
        num_prefix_tokens=1,
        grid_size=(4, 5),
    ).double()
    layer.load_state_dict(attention.state_dict())
    i, j = torch.arange(21)[:, None], torch.arange(21)
    points = torch.tensor([0, 4, 8, 12, 16, 20])
    allowed = {
        "window": (i - j).abs() <= count,
        "stride": (i - j) % count == 0,
        "grid": torch.isin(j, points).expand(21, 21),
        "all": torch.ones(21, 21, dtype=torch.bool),
    }[candidates]
    assert_masked_attention(layer, attention, allowed, torch.randn(2, 21, 12, dtype=torch.float64))


def test_a_grid_finer_than_the_map_is_the_whole_map():
    geometry = Geometry(4, 3, kernel=(3, 3), padding=(1, 1))
    for count, pads, tokens in ((4, True, 12), (5, True, 30), (5, False, 12)):
        found = candidate_tokens(
            geometry, Selection(candidates="grid", num_candidates=count), pads=pads, training=False
        )
        assert (geometry.num_tokens if found is None else len(found)) == tokens


def test_parts_of_a_hybrid_can_be_left_out():
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False).double()
    settings = {"target": "convnn.HybridConvNN2d", "blend": 0.0, "branch_ratio": 0.5, "branch_fuse": False}
    hybrid = HybridConvNN2d.from_layer(conv, OperatorConfig(**settings), "transfer", Site("a"))
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    assert (hybrid(x) - conv(x)).abs().max() < 1e-12 and (hybrid.to_layer()(x) - conv(x)).abs().max() < 1e-12
    biased = HybridConvNN2d.from_layer(
        conv, OperatorConfig(**settings, bias=True, branch_bias=False), "fresh", Site("a")
    )
    assert biased.neighbors.bias is not None and biased.conv.bias is None and biased.pointwise is None
    alone = OperatorConfig(**settings | {"branch_ratio": 0.0}, branch_kernel=5)
    assert [*HybridConvNN2d.from_layer(conv, alone, "fresh", Site("a")).state_dict()] == ["conv.weight"]
