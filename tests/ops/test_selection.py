"""Total order, candidates, slots and the policies around them."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnn import ConvNN2d, ConvNNAttention
from convnn.ops import native, scores
from convnn.ops.aggregation import with_own_scores
from convnn.ops.candidates import candidate_tokens
from convnn.ops.geometry import Geometry, window_order
from convnn.ops.neighborhood import find_neighborhood
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Mixing, Selection
from convnn.ops.topk import stable_topk


@given(
    st.lists(st.sampled_from([-1.5, -0.0, 0.0, 1e-30, 2.0, -torch.inf, torch.inf]), min_size=1, max_size=40), st.data()
)
@settings(max_examples=150, deadline=None)
def test_stable_topk_orders_by_score_then_index(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
    for dtype in (torch.float32, torch.float64):
        for installed in (native.installed(), False):
            with mock.patch.object(native, "installed", lambda installed=installed: installed):
                assert stable_topk(torch.tensor(scores, dtype=dtype), k).tolist() == expected


@pytest.mark.parametrize("m", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(8, 20), (10, 14), (7, 7)])
def test_nearest_tokens_are_the_window_in_one_order_everywhere(m, size):
    p = m // 2
    geometry = Geometry(*size, kernel=(m, m), padding=(p, p))
    x = torch.zeros(1, 1, geometry.num_tokens, 1)
    queries = geometry.query_index()
    index = select_neighbors(x[:, :, queries], x, geometry, Selection(k=m * m), blend=0.0).index[0, 0]
    rows, cols = geometry.coordinates(index)
    qr, qc = geometry.coordinates(queries)
    offsets = torch.stack([rows - qr[:, None], cols - qc[:, None]], -1)
    taps = window_order((m, m))
    expected = torch.stack([taps // m - p, taps % m - p], -1)
    assert (offsets == expected).all()


def test_random_candidates():
    geometry = Geometry(6, 7, kernel=(3, 3), padding=(1, 1))
    random = Selection(candidates="random", num_candidates=10)

    def draw(sel=random, **kwargs):
        return candidate_tokens(geometry, sel, **({"pads": sel.pad_candidates, "training": False} | kwargs))

    assert torch.equal(draw(), draw()) and len(draw()) == 10
    assert draw().tolist() == sorted(set(draw().tolist()))
    other = Selection(candidates="random", num_candidates=10, candidate_seed=1)
    assert not torch.equal(draw(), draw(other))
    torch.manual_seed(0)
    a, b = draw(training=True), draw(training=True)
    torch.manual_seed(0)
    assert torch.equal(draw(training=True), a) and not torch.equal(a, b)
    resample = Selection(candidates="random", num_candidates=10, eval_candidates="resample")
    assert not torch.equal(draw(resample), draw(resample))
    everything = Selection(candidates="random", num_candidates=10, eval_candidates="all")
    assert draw(everything) is None
    assert draw(Selection(candidates="random", num_candidates=72), training=True) is None
    inner = Selection(candidates="random", num_candidates=10, pad_candidates=False)
    assert set(draw(inner).tolist()) <= set(geometry.inner_tokens().tolist())
    assert len(draw(Selection(pad_candidates=False))) == 42
    assert draw(Selection(pad_candidates=False), pads=True) is None  # below 1 a convolution's zeros take part


def test_random_candidates_as_large_as_the_map_equal_all():
    torch.manual_seed(0)
    every = ConvNN2d(3, 4, 5)
    sampled = ConvNN2d(3, 4, 5, candidates="random", num_candidates=64)
    sampled.load_state_dict(every.state_dict())
    x = torch.randn(2, 3, 6, 6)  # 8 x 8 with its ring
    assert torch.equal(every(x), sampled(x))


@pytest.mark.parametrize("layer", ["conv", "attention"])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_batch_size_changes_no_result(layer, blend):
    torch.manual_seed(0)
    if layer == "conv":
        module = ConvNN2d(3, 4, 5, blend=blend, candidates="random", num_candidates=20, self_first=True).eval()
        x = torch.randn(5, 3, 6, 7)
    else:
        module = ConvNNAttention(8, 2, 5, blend, num_prefix_tokens=1, candidates="random", num_candidates=9).eval()
        x = torch.randn(5, 17, 8)
    whole = module.double()(x.double())
    parts = torch.cat([module(part.double()) for part in x.split(2)])
    assert (whole - parts).abs().max() < 1e-12


@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_chunks_change_nothing(blend, monkeypatch):
    torch.manual_seed(0)
    modules = [ConvNN2d(3, 4, 5, blend=blend, fast=False).double(), ConvNNAttention(8, 2, 5, blend).double()]
    inputs = [torch.randn(3, 3, 6, 7).double(), torch.randn(3, 16, 8).double()]
    whole = [m(x) for m, x in zip(modules, inputs, strict=True)]
    for limit in (1, 100, 700):
        monkeypatch.setitem(scores.CHUNK_SCORES, "cpu", limit)
        for m, x, y in zip(modules, inputs, whole, strict=True):
            assert (m(x) - y).abs().max() < 1e-12


def test_missing_neighbours_leave_no_slot_without_a_token():
    torch.manual_seed(0)
    options = {"blend": 0.5, "slots": "window", "candidates": "window"}
    layer = ConvNN2d(2, 2, 25, padding=1, num_candidates=2, **options)
    geometry = layer.geometry(4, 4)
    x = torch.randn(1, 1, geometry.num_tokens, 2)
    queries = geometry.query_index()
    for _ in range(5):
        found = select_neighbors(x[:, :, queries], x, geometry, layer.selection, blend=0.5)
        assert found.index.min() >= 0 and found.index.max() < geometry.num_tokens
        assert (~found.valid).any() and (found.valid.sum(-1) >= 9).all()


def test_self_is_first_where_promised():
    geometry = Geometry(5, 6, kernel=(3, 3), padding=(1, 1))
    x = torch.randn(2, 1, geometry.num_tokens, 4)
    queries = geometry.query_index()
    for kind in ("all", "random", "grid"):
        sel = Selection(k=4, similarity="dot", candidates=kind, num_candidates=6)
        for blend in (0.0, 0.5, 1.0):
            index = select_neighbors(x[:, :, queries], x, geometry, sel, blend=blend).index
            assert (index[..., 0] == queries).all()
            assert (index.sort(-1).values.diff(dim=-1) > 0).all(), "a neighbour was taken twice"


@pytest.mark.parametrize("layer", ["conv", "attention"])
def test_k_beyond_the_candidates(layer):
    build = {
        "conv": lambda **kw: (ConvNN2d(3, 4, 40, **kw), torch.randn(1, 3, 4, 4)),
        "attention": lambda **kw: (ConvNNAttention(8, 2, 40, **kw), torch.randn(1, 16, 8)),
    }[layer]
    module, x = build()
    with pytest.raises(ValueError, match=r"k=40 exceeds the \d+ candidates of a .* map"):
        module(x)
    module, x = build(k_policy="clamp")
    weights = module.weight if layer == "conv" else module.slot_weight
    module(x).sum().backward()
    used = 36 if layer == "conv" else 16
    assert weights.grad[..., :used].abs().sum() > 0 and weights.grad[..., used:].abs().sum() == 0


def test_overlap_with_the_window_falls_as_blend_rises():
    torch.manual_seed(0)
    geometry = Geometry(9, 9, kernel=(3, 3), padding=(1, 1))
    x = torch.randn(1, 1, geometry.num_tokens, 8)
    queries = geometry.query_index()

    def overlap(blend):
        index = select_neighbors(x[:, :, queries], x, geometry, Selection(), blend=blend).index
        rows, cols = geometry.coordinates(index[0, 0])
        qr, qc = geometry.coordinates(queries)
        return ((rows - qr[:, None]).abs().maximum((cols - qc[:, None]).abs()) <= 1).float().mean().item()

    values = [overlap(b) for b in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert values[0] == 1.0 and values == sorted(values, reverse=True) and values[-1] < 0.4


def test_window_slots_change_one_slot_per_newcomer():
    """A neighbour outside the window takes the slot of the tap that left."""
    geometry = Geometry(5, 5, kernel=(3, 3), padding=(1, 1))
    queries = torch.tensor([24])  # centre of the padded 7 x 7 map
    window = [24, 16, 17, 18, 23, 25, 30, 31, 32]
    from convnn.ops.slots import window_slots

    for leaver in window[1:]:
        neighbours = torch.tensor([[[[j for j in window if j != leaver] + [0]]]])
        ranked = neighbours.flip(-1)
        slots = torch.empty_like(ranked).scatter_(-1, window_slots(ranked, queries, geometry), ranked)[0, 0, 0].tolist()
        assert slots == [0 if j == leaver else j for j in window]


def test_float32_keeps_the_order_and_lower_precision_does_not():
    """The rule: scores are float32, whatever the precision of the features and autocast say."""
    torch.manual_seed(0)
    geometry, selection = Geometry(12, 12), Selection(self_first=False)
    tokens = torch.randn(2, 1, 144, 64, dtype=torch.float64)

    def chosen(x, autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return select_neighbors(x, x, geometry, selection).index

    unit = torch.nn.functional.normalize(tokens, dim=-1)
    exact = (unit @ unit.mT).sort(dim=-1, descending=True, stable=True)
    clear = (exact.values[..., :9] - exact.values[..., 1:10]).amin(-1) > 1e-6  # float32 can tell them apart
    want, keeps = exact.indices[..., :9][clear], clear.float().mean()
    assert keeps > 0.9
    assert torch.equal(chosen(tokens)[clear], want)
    assert torch.equal(chosen(tokens.float())[clear], want)
    assert torch.equal(chosen(tokens.float(), autocast=True)[clear], want)
    rounded = unit.bfloat16()
    low = (rounded @ rounded.mT).float().sort(dim=-1, descending=True, stable=True).indices[..., :9][clear]
    assert (low != want).any(-1).float().mean() > 0.1  # of the queries have other neighbours, or another order


@pytest.mark.parametrize("kind, count", [("grid", 2), ("random", 4)])
@pytest.mark.parametrize("blend", [0.5, 1.0])
def test_clamp_keeps_the_query_besides_all_candidates(kind, count, blend):
    torch.manual_seed(0)
    geometry, x = Geometry(4, 4), torch.randn(2, 1, 16, 3)
    selection = Selection(k=30, k_policy="clamp", candidates=kind, num_candidates=count)
    found = select_neighbors(x, x, geometry, selection, blend=blend)
    candidates = set(found.candidates.tolist())
    for image in range(2):
        for query in range(16):
            index, valid = found.index[image, 0, query], found.valid[image, 0, query]
            chosen = index[valid].tolist()
            assert chosen[0] == query and len(set(chosen)) == len(chosen)
            assert set(chosen) == candidates | {query}


def test_clamp_with_queries_on_a_wide_ring():
    torch.manual_seed(0)
    geometry = Geometry(3, 3, kernel=(1, 1), padding=(1, 1))
    x = torch.randn(1, 1, 25, 3)
    selection = Selection(k=30, k_policy="clamp", pad_candidates=False)
    found = select_neighbors(x[:, :, geometry.query_index()], x, geometry, selection)
    inner = set(geometry.inner_tokens().tolist())
    for query in range(25):
        chosen = found.index[0, 0, query][found.valid[0, 0, query]].tolist()
        assert chosen[0] == query and set(chosen) == inner | {query} and len(set(chosen)) == len(chosen)


def test_clamp_of_layers_is_the_softmax_over_candidates_and_query():
    torch.manual_seed(0)
    layer = ConvNNAttention(
        6, 2, 30, candidates="grid", num_candidates=2, self_first=True, k_policy="clamp", aggregation="sum"
    ).double()
    x = torch.randn(2, 16, 6, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 16, 3, 2, 3).permute(2, 0, 3, 1, 4)
    allowed = torch.eye(16, dtype=torch.bool)
    allowed[:, [0, 3, 12, 15]] = True
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed)
    torch.testing.assert_close(layer(x), layer.proj(y.transpose(1, 2).reshape(2, 16, 6)), rtol=1e-10, atol=1e-10)


def test_scores_rounded_to_a_step_give_one_order_whatever_computes_the_products():
    """Tokens of few colours have scores that are equal on paper; two ways to sum the products differ in the last bits.

    Without the step the lists differ in some rows, with it in none.
    """
    torch.manual_seed(0)
    colours = torch.randn(6, 24)
    x = (colours[torch.randint(6, (2, 1, 100))] * torch.rand(2, 1, 100, 1).mul(4).ceil()).contiguous()
    turned = x.flip(-1)  # the same products, summed backwards

    def differing(step):
        selection = Selection(k=9, score_step=step)
        lists = [select_neighbors(t, t, Geometry(10, 10), selection).index for t in (x, turned)]
        return int((lists[0] != lists[1]).any(-1).sum())

    assert differing(None) > 10 and differing(1e-5) == 0


def test_the_own_token_once_more_among_the_candidates():
    torch.manual_seed(0)
    x, own = torch.randn(1, 1, 9, 4), torch.arange(9)
    first, last = (
        select_neighbors(x, x, Geometry(3, 3), Selection(k=9, self_again=score)).index[0, 0] for score in (2.0, -2.0)
    )  # above and below every cosine
    assert torch.equal(first[:, 0], own) and torch.equal(first[:, 1], own)
    assert torch.equal(last[:, 0], own) and torch.equal(last[:, 1:8], first[:, 2:])
    assert all(sorted(row) == own.tolist() for row in last.tolist())
    with pytest.raises(ValueError, match="exceeds"):
        select_neighbors(x, x, Geometry(3, 3), Selection(k=10, self_again=2.0))


def test_grid_points_at_the_nearest_tokens_or_those_before():
    for rounding, expected in (("nearest", [0, 3, 5, 8]), ("floor", [0, 2, 5, 8])):
        selection = Selection(k=1, candidates="grid", num_candidates=4, grid_rounding=rounding)
        assert candidate_tokens(Geometry(1, 9), selection, pads=True, training=False).tolist() == expected


def test_the_own_token_is_weighed_by_the_scores_that_are_given():
    score, index = torch.arange(8.0).view(1, 1, 2, 4), torch.tensor([[[[5, 1, 5, 2], [6, 0, 1, 2]]]])
    assert with_own_scores(score, index, None, None) is score
    assert with_own_scores(score, index, -0.1, 1.0)[0, 0].tolist() == [[1, 1, pytest.approx(-0.1), 3], [1, 5, 6, 7]]
    assert with_own_scores(score, index, -0.1, None)[0, 0, :, 0].tolist() == [0, 4]


@pytest.mark.parametrize("metric", ["chebyshev", "euclidean"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": (3, 3), "padding": (1, 1), "stride": (2, 1)},
        {"kernel": (3, 5), "padding": (2, 4), "dilation": (2, 2)},
        {"kernel": (1, 3), "padding": (0, 1)},
        {"prefix": 2, "margin": (1, 1)},
    ],
)
def test_distances_axis_by_axis_are_those_of_all_pairs(metric, options):
    geometry = Geometry(5, 7, **options)
    queries, tokens = geometry.query_index()[geometry.prefix :], torch.arange(geometry.num_tokens)
    found, want = (geometry.distance_to_all(queries, metric), geometry.distance(queries[:, None], tokens, metric))
    assert torch.equal(found[:, geometry.prefix :], want[:, geometry.prefix :])


def test_a_sheared_grid_is_numbered_without_the_ring():
    geometry = Geometry(6, 6, kernel=(3, 3), padding=(1, 1))
    selection = Selection(candidates="grid", num_candidates=3, grid_rounding="sheared")
    found = candidate_tokens(geometry, selection, pads=True, training=False)
    assert found.tolist() == [6 * column + row for column in (0, 2, 5) for row in (0, 2, 5)]
    selection = Selection(candidates="grid", num_candidates=7, grid_rounding="sheared")
    assert candidate_tokens(geometry, selection, pads=True, training=False) is None  # finer than the map: all of it


def test_the_least_alike_may_weigh_most():
    torch.manual_seed(0)
    far, near = (
        ConvNN2d(2, 2, 3, weighting=kind, aggregation="sum", similarity="euclidean")
        for kind in ("softmax_far", "softmax")
    )
    x = torch.randn(1, 2, 4, 4)
    a, b = far.neighborhood(x), near.neighborhood(x)
    assert torch.equal(a.index, b.index)
    assert (a.weights[..., 0] < a.weights[..., -1]).all() and (b.weights[..., 0] > b.weights[..., -1]).all()
    tokens = torch.nn.functional.pad(x, (1, 1, 1, 1)).flatten(2)[0].T
    want = (tokens[a.index[0, 0]] * a.weights[0, 0, :, :, None]).sum(1) + far.bias
    torch.testing.assert_close(far(x)[0].flatten(1).T, want)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_a_prefix_token_that_may_be_seen_comes_before_one_that_may_not(blend):
    q, k, blocked = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 4), torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    blocked[..., 2:, 0] = True
    geometry, wanted = Geometry(2, 2, prefix=2), Selection(k=5, self_first=False)
    found = find_neighborhood(q, k, geometry, wanted, Mixing(weighting="softmax"), blend=blend, blocked=blocked)
    assert found.valid.all() and all(sorted(row) == [1, 2, 3, 4, 5] for row in found.index[0, 0, 2:].tolist())
