"""Queries on one map, keys on another: who is near, what is refused, and what is told of the neighbours."""

import math

import pytest
import torch
from attention_kinds_apart import APART
from comparing import close
from timm.models import mvitv2

from convnn import ConvNNAttention
from convnn.config.presets import operator_of
from convnn.models.mass import neighbor_mass
from convnn.nn.adapters.registry import stand_in
from convnn.nn.base import Site
from convnn.ops.geometry import Geometry, QueryMap

PLACED = {  # rows and columns of the keys, then those of the queries; row of the first query and step, in keys
    "twins global": ((2, 3), (4, 6), -0.25, 0.5),
    "pvt linear": ((7, 7), (9, 7), None, None),
    "multi query": ((2, 3), (4, 6), -0.25, 0.5),
    "multi scale": ((2, 2), (4, 4), -0.25, 0.5),
    "levit down": ((3, 4), (2, 2), 0.0, 2.0),
    "efficientformer v2 down": ((3, 4), (2, 2), 0.0, 2.0),
    "sam 2 pooled": ((4, 6), (2, 3), 0.5, 2.0),
    "halo": ((4, 4), (2, 2), 1.0, 1.0),
    "halo strided": ((6, 6), (2, 2), 1.0, 2.0),
}


def replaced(name, k, **settings):
    layer = APART[name].layer()
    config = operator_of({"kind": "attention", "k": k, "aggregation": "sum"} | settings)
    source, site = stand_in(layer, "transfer", Site("here"), True)
    return ConvNNAttention.from_layer(source, config, "transfer", site).eval()


def places(name):
    """Row and column of each query and of each key, in keys."""
    (height, width), (rows, columns), first, step = PLACED[name]

    def lines(tokens, queries):
        if first is None:  # in the middle of its share of the map
            return [(i + 0.5) * tokens / queries - 0.5 for i in range(queries)]
        return [first + step * i for i in range(queries)]

    keys = [(i, j) for i in range(height) for j in range(width)]
    return [(a, b) for a in lines(height, rows) for b in lines(width, columns)], keys


def distances(name, metric):
    queries, keys = places(name)
    size = (lambda a, b: max(abs(a), abs(b))) if metric == "chebyshev" else math.hypot
    return torch.tensor([[size(a - c, b - d) for c, d in keys] for a, b in queries], dtype=torch.float64)


@pytest.mark.parametrize("metric", ["chebyshev", "euclidean"])
@pytest.mark.parametrize("blend", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("name", PLACED)
def test_neighbours_are_those_of_a_loop_over_places(name, blend, metric):
    k = 3
    new = replaced(name, k, blend=blend, distance=metric)
    x, given = APART[name].call()
    heads = new.adapter.read(new.plain, x, **given)
    score = heads.q @ heads.k.mT / math.sqrt(heads.q.shape[-1])
    away = distances(name, metric)
    low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
    extent = max(*PLACED[name][0], 2) - 1
    wanted = blend * (score - low) / (high - low) - (1 - blend) * away / extent
    best = wanted.float().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    found = new.neighborhood(x, **given)
    assert torch.equal(found.index, best)
    assert new(x, **given) is not None and new.last_call(x)[1].queries == heads.queries


def test_a_class_token_has_no_place():
    new = replaced("multi scale pooled", 2, blend=0.0)
    x, given = APART["multi scale pooled"].call()
    found = new.neighborhood(x, **given)
    assert found.index.shape == (2, 2, 5, 2) and not found.is_prefix[:, :, 1:].any()
    nearest = found.index[0, 0, 1:, 0].tolist()
    assert nearest == [1, 2, 3, 4]  # two maps of 2 x 2
    by_features = replaced("multi scale pooled", 2).neighborhood(x, **given)
    assert torch.equal(found.index[:, :, 0], by_features.index[:, :, 0])


@pytest.mark.parametrize("radius, counts", [(1, {1, 2, 4}), (0.5, {1})])
def test_a_window_is_of_keys_around_the_query(radius, counts):
    geometry = Geometry(3, 3, queries=QueryMap.over((3, 3), (6, 6)))
    near = geometry.distance_to_all(geometry.query_places()) <= radius
    assert set(near.sum(-1).tolist()) == counts
    new = replaced("twins global", 6, candidates="window", num_candidates=1, k_policy="clamp")
    x, given = APART["twins global"].call()
    found = new.neighborhood(x, **given)
    inside = distances("twins global", "chebyshev") <= 1
    assert torch.equal(found.valid.sum(-1)[0, 0], inside.sum(-1))
    close(found.weights.sum(-1), torch.ones(2, 2, 24, dtype=torch.float64))
    new.fast = False
    slow = new(x, **given)
    new.fast = True
    close(new(x, **given), slow)


def test_the_middle_of_a_finer_map_is_that_of_its_keys():
    for tokens, queries in (((2, 3), (8, 6)), ((5, 5), (5, 5)), ((6, 4), (3, 1))):
        geometry = Geometry(*tokens, queries=QueryMap.over(tokens, queries))
        rows, cols = geometry.query_coordinates(geometry.query_places())
        close(rows.mean(), torch.tensor((tokens[0] - 1) / 2))
        close(cols.mean(), torch.tensor((tokens[1] - 1) / 2))
        own = geometry.query_index()
        assert len(own) == queries[0] * queries[1] and (own < geometry.num_tokens).all()
        if tokens == queries:
            assert torch.equal(own, torch.arange(25))


OWN = {
    "self_first": {"self_first": True},
    "causal": {"causal": True, "blend": 0.5},
    "candidates=stride": {"candidates": "stride", "num_candidates": 2},
    "mix=concat": {"mix": "concat", "blend": 0.5},
    "border=shift": {"border": "shift", "k": 9, "blend": 0.0},
    "layout=sequence": {"layout": "sequence"},
    "token_dilation=2": {"token_dilation": 2, "blend": 0.5},
}


@pytest.mark.parametrize("name", OWN)
def test_what_needs_a_query_that_is_a_token_is_refused(name):
    new = replaced("twins global", **({"k": 4, "k_policy": "clamp"} | OWN[name]))
    x, given = APART["twins global"].call()
    with pytest.raises(ValueError, match=f"^{name}.* needs queries that are tokens"):
        new(x, **given)


@pytest.mark.parametrize("name", ["nextvit", "hiera pooled"])
def test_positions_that_are_not_known_are_refused(name):
    new = replaced(name, 2, blend=0.5)
    x, given = APART[name].call()
    with pytest.raises(ValueError, match=r"where the \d+ queries of this layer lie .* is not known; use settings"):
        new(x, **given)
    assert replaced(name, 2)(x, **given).isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"blend": 0.5}, {"blend": 0.5, "learn_blend": "head"}], ids=str)
@pytest.mark.parametrize("name", ["multi query", "cascaded", "halo"])
def test_what_is_told_of_neighbours_fits_the_keys(name, settings):
    new = replaced(name, 3, **settings)
    x, given = APART[name].call()
    found = new.neighborhood(x, **given)
    tokens = found.geometry.num_tokens
    assert tokens == new.adapter.read(new.plain, x, **given).k.shape[2] and int(found.index.max()) < tokens
    assert len(found.queries) == found.index.shape[2] and found.index.shape[1] == new.num_heads
    rows, _ = found.offsets()
    assert not rows.is_floating_point() and found.distance().isfinite().all()
    mass = neighbor_mass(new, lambda: new.neighborhood(x, **given), found)
    assert mass is None if name == "cascaded" else bool(((mass > 0) & (mass <= 1 + 1e-9)).all())
    if "learn_blend" in settings:
        new(x, **given).square().sum().backward()
        assert new.blend_logit.grad.shape == (new.num_heads,) and (new.blend_logit.grad != 0).all()


def test_a_layer_that_timm_cannot_compute_is_refused():
    pools_first = mvitv2.MultiScaleAttentionPoolFirst(8, 8, (4, 4), 2, has_cls_token=False)
    with pytest.raises(RuntimeError):
        pools_first(torch.randn(1, 16, 8), [4, 4])
    with pytest.raises(ValueError, match="pools before it projects"):
        stand_in(pools_first, "fresh", Site("here"), True)
