"""The Triton kernels against references in float64. ``test_kernels.py`` runs this file in a process of its own.

On the CPU they run in Triton's interpreter, which the environment must choose before triton is imported; on CUDA they
are compiled.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.utils.checkpoint
from oracles import _pick

from convnn.errors import ConfigError
from convnn.nn.conv import ConvNN2d
from convnn.ops import choice
from convnn.ops.candidates import candidate_tokens
from convnn.ops.functional import neighbor_aggregate
from convnn.ops.geometry import Geometry
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Mixing, Selection
from convnn.ops.triton import attention, select
from convnn.ops.triton import dispatch as backend

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def whole_numbers(*shape, dtype=F32, high=2):
    """Return small integers: products and sums are exact in any precision, so that ties are ties."""
    return torch.randint(-high, high + 1, shape).to(DEVICE, dtype)


def picked(q, k, geometry, selection, num, blend):
    """Return what the loop reference chooses: (B, H, Q, K)."""
    pads = selection.pad_candidates or blend != 1
    candidates = candidate_tokens(geometry, selection, pads=pads, training=False, device=DEVICE)  # which draws its own
    rows, cols = geometry.padded_shape
    where = [None] * geometry.prefix + [(r, c) for r in range(rows) for c in range(cols)]
    queries = geometry.query_index().tolist()
    shares = blend if isinstance(blend, list) else [blend] * q.shape[1]
    chosen = [
        [
            _pick(
                token,
                dict(zip(queries, q[b, h], strict=True)),
                k[b, h],
                where,
                range(len(where)) if candidates is None else candidates.tolist(),
                k=num,
                blend=shares[h],
                similarity=selection.similarity,
                metric=selection.distance,
                self_first=selection.self_first,
                slots=selection.slots,
                window=(geometry.kernel, geometry.dilation),
                mix=selection.mix,
                places=geometry.positions(),
            )
            for token in queries
        ]
        for b in range(q.shape[0])
        for h in range(q.shape[1])
    ]
    return torch.tensor(chosen).unflatten(0, q.shape[:2])


MAP = Geometry(7, 10, stride=(3, 3), prefix=2)  # 72 tokens are a block and a part of one
PADDED = Geometry(6, 7, (3, 3), (2, 3), (1, 1))
DILATED = Geometry(7, 8, (3, 5), (2, 3), (2, 2), (2, 1))
SMALL = Geometry(3, 4, stride=(2, 1))
MANY = Geometry(5, 8, prefix=1)  # 41 queries: a block and a part of one
PLAIN = {"self_first": False}
CASES = {
    "ties": (MAP, {"similarity": "dot"} | PLAIN, 9, 1.0, 1, 3, F32),
    "ties of distances": (MAP, {"similarity": "euclidean"} | PLAIN, 9, 1.0, 1, 3, F32),
    "many queries": (MANY, {"similarity": "dot", "slots": "raster"} | PLAIN, 3, 1.0, 1, 4, F32),
    "self first": (MAP, {"similarity": "dot"}, 5, 1.0, 1, 3, F16),
    "three heads, 16 bits": (PADDED, {"similarity": "euclidean"}, 4, 1.0, 3, 5, BF16),
    "every token": (SMALL, {"similarity": "dot"}, 12, 1.0, 1, 2, F32),
    "one neighbour": (SMALL, {"similarity": "dot"} | PLAIN, 1, 1.0, 1, 2, F32),
    "itself alone": (SMALL, {}, 1, 1.0, 1, 2, F32),
    "many channels": (SMALL, {"similarity": "dot"} | PLAIN, 4, 1.0, 1, 70, F32),
    "a grid of candidates": (MAP, {"similarity": "dot", "candidates": "grid", "num_candidates": 4}, 6, 1.0, 1, 3, F32),
    "random candidates": (PADDED, {"similarity": "dot", "candidates": "random"}, 6, 1.0, 1, 3, BF16),
    "no padding": (PADDED, {"similarity": "euclidean", "pad_candidates": False}, 6, 1.0, 1, 3, F32),
    "cosine": (MAP, {}, 7, 1.0, 1, 6, F32),
    "cosine, 16 bits": (PADDED, PLAIN, 7, 1.0, 3, 6, BF16),
    "blend": (MAP, {"similarity": "dot"}, 6, 0.5, 1, 6, F32),
    "blend, cosine": (DILATED, PLAIN, 6, 0.3, 1, 6, BF16),
    "blend of random candidates": (PADDED, {"similarity": "euclidean", "candidates": "random"}, 6, 0.6, 1, 6, F32),
    "blend, euclidean": (DILATED, {"distance": "euclidean", "similarity": "euclidean"}, 6, 0.3, 1, 6, F32),
    "blend per head": (SMALL, {}, 4, [0.2, 0.8], 2, 6, F32),
    "concatenated": (PADDED, {"mix": "concat", "similarity": "euclidean"}, 6, 0.5, 1, 6, F32),
}


WAYS = [0, 1, 2] if DEVICE == "cpu" else [*range(len(select.WAYS))]  # in the interpreter tiles are of no account
ways = pytest.mark.parametrize("way", WAYS, ids=[select.WAYS[way][0].replace(" ", "-") for way in WAYS])


@ways
@pytest.mark.parametrize("case", CASES)
def test_selection(case, way, monkeypatch):
    geometry, options, num, blend, heads, channels, dtype = CASES[case]
    torch.manual_seed(0)
    exact = blend == 1 and options.get("similarity", "cosine") != "cosine"
    draw = whole_numbers if exact else lambda *shape, dtype: torch.randn(*shape).to(DEVICE, dtype)
    k = draw(1, heads, geometry.num_tokens, channels, dtype=dtype)
    if exact:  # so that the mean, around which distances are measured, is a whole number too
        k = torch.cat([k[:, :, : k.shape[2] // 2], -k[:, :, : k.shape[2] // 2], 0 * k[:, :, : k.shape[2] % 2]], dim=2)
    q = draw(1, heads, len(geometry.query_index()), channels, dtype=dtype)
    if options.get("self_first", True):
        q = k[:, :, geometry.query_index()]
    share = torch.tensor(blend, device=DEVICE) if isinstance(blend, list) else blend
    selection = Selection(k=num, **({"num_candidates": 20} | options))
    monkeypatch.setattr(select, "_fastest", lambda *operands: way)
    found = select_neighbors(q, k, geometry, selection, blend=share, backend="triton")
    assert torch.equal(found.index.cpu(), picked(q.cpu().double(), k.cpu().double(), geometry, selection, num, blend))
    if blend != 1 and selection.mix == "sum":
        plain = select_neighbors(q, k, geometry, selection, blend=share, backend="torch")
        for ours, theirs in ((found.low, plain.low), (found.high, plain.high)):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


RISING = torch.arange(600.0)
CROWDS = {
    "rising": RISING,  # of each block many reach the bound of those before
    "falling": -RISING,
    "all equal": torch.ones(600),
    "equal above": (RISING % 50 == 3).float(),
    "steps": RISING // 100,
    # Ties that fit, and then more that are better than there is room for.
    "better after equal": torch.where(RISING < 25, 0.0, torch.where((RISING % 64 < 8) & (RISING > 63), 1.0, -1.0)),
    "zeros of both signs": torch.tensor([0.0, -0.0]).repeat(300),
}

FEW = Geometry(20, 30, stride=(7, 5))


@ways
@pytest.mark.parametrize("name", CROWDS)
def test_selection_among_many_that_are_as_good(name, way, monkeypatch):
    monkeypatch.setattr(select, "_fastest", lambda *operands: way)
    x = torch.stack([CROWDS[name], torch.ones(600)], dim=-1)[None, None].to(DEVICE)
    for k, self_first in ((1, False), (4, False), (9, True), (64, False)):
        selection = Selection(k=k, similarity="dot", self_first=self_first)
        arguments = torch.ones(1, 1, len(FEW.query_index()), 2, device=DEVICE), x, FEW, selection
        ours, plain = (select_neighbors(*arguments, backend=name).index for name in ("triton", "torch"))
        assert torch.equal(ours, plain), k


@ways
def test_what_is_no_number_chooses_some_token(way, monkeypatch):
    monkeypatch.setattr(select, "_fastest", lambda *operands: way)
    x = torch.randn(1, 1, 30, 3, device=DEVICE)
    x[0, 0, 4], x[0, 0, 7, 1] = torch.nan, torch.inf
    selection = Selection(k=5, similarity="dot", self_first=False)
    index = select_neighbors(x, x, Geometry(5, 6), selection, backend="triton").index
    assert (index >= 0).all() and (index < 30).all()


@pytest.mark.parametrize("blend", [0.5, 1.0])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_who_is_in_doubt_among_buckets(similarity, blend, monkeypatch):
    torch.manual_seed(0)
    geometry, selection = Geometry(20, 32, stride=(4, 1)), Selection(k=9, similarity=similarity)
    x = torch.randn(1, 1, 640, 8)
    x[0, 0, 128:136] = x[0, 0, 128]  # the nearest of one another, and all of the same score
    x = x.to(DEVICE)
    doubts = []
    monkeypatch.setattr(select, "_fastest", lambda *operands: 2)
    monkeypatch.setattr(select, "_merge", lambda *arguments: doubts.append(arguments[-1].clone()))
    ours, plain = (
        select_neighbors(x[:, :, geometry.query_index()], x, geometry, selection, blend=blend, backend=name).index[0, 0]
        for name in ("triton", "torch")
    )
    sure = doubts[0][0] == 0
    assert torch.equal(ours[sure], plain[sure])
    assert sure.sum() >= 145  # of 160: five buckets' best are nearly always enough
    if blend == 1:
        assert not sure[32:40].any()  # the queries that are alike


def test_alike_candidates_are_chosen_by_position():
    x = torch.ones(1, 1, MAP.num_tokens, 3, device=DEVICE)
    arguments = (x[:, :, MAP.query_index()], x, MAP, Selection(k=5))
    blended, placed = (
        select_neighbors(*arguments, blend=blend, backend="triton").index[..., 2:, :] for blend in (0.5, 0.0)
    )
    assert torch.equal(blended, placed.expand_as(blended))


def test_zeros_are_no_neighbours_of_anyone_in_particular():
    q, k = torch.zeros(1, 1, 12, 3, device=DEVICE), torch.randn(1, 1, 12, 3, device=DEVICE)
    geometry = Geometry(3, 4)
    index = select_neighbors(q, k, geometry, Selection(k=4, self_first=False), backend="triton")
    assert (index.index == torch.arange(4, device=DEVICE)).all()


TOLERANCE = {F32: 2e-6, F16: 4e-3, BF16: 3e-2}
ATTENTION = {  # dtype, heads, Q, N, D, C, K, weights, mask, similarity, shared index
    "depthwise": (F32, 1, 7, 11, 5, 5, 4, True, False, "dot", False),
    "sum": (F32, 3, 33, 9, 8, 3, 3, False, False, "dot", False),
    "masked": (F32, 2, 5, 13, 4, 6, 5, True, True, "dot", True),
    "cosine": (F32, 1, 4, 6, 3, 7, 3, True, True, "cosine", False),
    "one neighbour": (F32, 1, 3, 4, 1, 1, 1, True, False, "dot", False),
    "half": (F16, 3, 6, 8, 5, 6, 4, True, True, "dot", False),
    "bfloat16": (BF16, 1, 6, 8, 5, 6, 4, True, False, "dot", True),
    "wide": (F32, 1, 4, 6, 130, 300, 3, True, False, "dot", False),
}


def reference(q, k, v, index, valid, weight, similarity, temperature):
    """Return the sum over neighbours from its definition, in float64, a query at a time."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                own = index[b, h, i] if valid is None else index[b, h, i][valid[b, h, i]]
                keys = k[b, h, own]
                if similarity == "cosine":
                    score = torch.stack([x @ q[b, h, i] / (x.norm() * q[b, h, i].norm()) for x in keys])
                else:
                    score = keys @ q[b, h, i] / q.shape[-1] ** 0.5
                p = torch.softmax(score / temperature, 0)
                slots = torch.arange(index.shape[-1]) if valid is None else valid[b, h, i].nonzero()[:, 0]
                part = v[b, h, own] if weight is None else v[b, h, own] * weight[:, slots].T
                rows.append((p[:, None] * part).sum(0))
    return torch.stack(rows).view(*q.shape[:3], -1)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_and_its_gradients(case, ordered):
    dtype, heads, queries, n, d, c, num, weighed, masked, similarity, shared = ATTENTION[case]
    torch.manual_seed(0)
    batch = 2 if heads < 3 else 1
    # As the layers pass them: the channels of a token hold all heads, which are then moved in front.
    q, k, v = (torch.randn(batch, m, heads, size).to(DEVICE, dtype) for m, size in ((queries, d), (n, d), (n, c)))
    weight = torch.randn(c, num + 2, device=DEVICE) if weighed else None
    lead = (1, 1) if shared else (batch, heads)
    index = torch.rand(*lead, queries, n, device=DEVICE).argsort(-1)[..., :num]
    valid = torch.rand(*lead, queries, num, device=DEVICE) > 0.4 if masked else None
    if valid is not None:
        valid[..., 0, 1:], valid[..., 0, 0] = True, False  # the first neighbour need not count
        valid[..., 1:, 0] = True
    leaves = [t.requires_grad_() for t in (q, k, v, weight) if t is not None]
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    options = {"similarity": similarity, "temperature": torch.tensor(0.7) if ordered else 0.7, "ordered": ordered}
    y = attention.attend_to_neighbors(*heads_first, index, valid, weight, **options)
    assert y.dtype == (F32 if weighed else dtype) and y.shape == (batch, heads, queries, c)
    dy = torch.randn(y.shape, device=DEVICE, dtype=y.dtype)
    ours = [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
    own = [t.transpose(1, 2) for t in wide[:3]]
    whole = (batch, heads, -1, -1)
    mask = None if valid is None else valid.cpu().expand(whole)
    y = reference(*own, index.cpu().expand(whole), mask, wide[3] if weighed else None, similarity, 0.7)
    theirs = [y.detach(), *torch.autograd.grad(y, wide, dy.cpu().double())]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.cpu() - b).abs().max() <= TOLERANCE[dtype] * max(1, b.abs().max())


@pytest.mark.parametrize("aggregation", ["sum", "depthwise", "conv"])
def test_the_operator_gives_the_same_with_kernels(aggregation, monkeypatch):
    torch.manual_seed(0)
    geometry, queries = PADDED, PADDED.query_index()
    x = torch.randn(1, 2, geometry.num_tokens, 4).to(DEVICE)
    weight = {"depthwise": torch.randn(4, 5), "conv": torch.randn(4, 1, 5)}.get(aggregation)
    kind = "window" if aggregation == "sum" else "all"
    selection = Selection(k=5, similarity="dot", candidates=kind, num_candidates=1)
    blend, calls, results = 0.0 if aggregation == "sum" else 1.0, [], []
    attend = attention.attend_to_neighbors
    monkeypatch.setattr(attention, "attend_to_neighbors", lambda *a, **kw: calls.append(1) or attend(*a, **kw))
    for name, dtype in (("torch", torch.float64), ("triton", F32)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        own = None if weight is None else weight.to(DEVICE, dtype)
        y = neighbor_aggregate(
            leaf[:, :, queries], leaf, leaf * 2, geometry, selection,
            Mixing(weighting="softmax", temperature=0.5, aggregation=aggregation, backend=name),
            blend=blend, weight=own, groups=4,
        )  # fmt: skip
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for plain, ours in zip(*results, strict=True):
        assert (plain - ours).abs().max() < 3e-6 * max(1, plain.abs().max())
    assert calls  # on a GPU several times, to be measured


def test_a_layer_gives_the_same_with_kernels():
    options = {"projection": "linear", "weighting": "softmax", "aggregation": "separable", "similarity": "dot"}
    layers = [ConvNN2d(4, 6, 5, **options, backend=name).to(DEVICE) for name in ("torch", "triton")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(1, 4, 4, 5, device=DEVICE)
    plain, ours = (layer(x) for layer in layers)
    assert torch.allclose(plain, ours, atol=1e-5)
    for y in (plain, ours):
        y.square().sum().backward()
    for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4)


@pytest.mark.parametrize("winner", ["torch", "triton", "triton in order"])
def test_auto_takes_what_was_measured_to_be_fastest(winner, monkeypatch, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 30, 4).to(DEVICE)
    weight, timed = torch.randn(4, 5).to(DEVICE), []
    mixing = Mixing(weighting="softmax", temperature=0.5, aggregation="depthwise", backend="auto")

    def aggregate(**options):
        leaf = x.clone().requires_grad_()
        arguments = leaf, leaf, 2 * leaf, Geometry(5, 6), Selection(k=5, similarity="dot"), replace(mixing, **options)
        y = neighbor_aggregate(*arguments, weight=weight)
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaf)

    expected = aggregate(backend="torch")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, value in (("_times", {}), ("_used", {}), ("_answers", {}), ("measures", lambda device: True)):
        monkeypatch.setattr(choice, name, value)
    choice._load.cache_clear()
    monkeypatch.setattr(backend, "engaged", lambda *given: True)

    def time(way, case):
        way()  # which must work, gradients included
        timed.append(case.step)
        mine = timed.count(case.step) - 1
        if case.step == "attention":
            return float(["torch", "triton", "triton in order"][mine] != winner)
        return abs(mine - (winner != "torch")) if case.step == "selection" else float(mine)

    monkeypatch.setattr(choice, "_time", time)
    for _ in range(2):  # the second time nothing is measured
        for ours, theirs in zip(aggregate(), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=2e-6 * float(theirs.abs().max()))  # of sums in other orders
    assert (
        sorted(timed) == ["attention"] * 3 + ["selection"] * 2 + ["selection kernel"] * 2
    )  # too few tokens for buckets
    taken = {case.split()[0]: found["way"] for case, found in choice.choices().items() if "kernel" not in case}
    assert taken == {"selection": "torch" if winner == "torch" else "triton", "attention": winner}
    assert len(list(tmp_path.glob("convnn/*.json"))) == 1


def test_what_is_measured_within_a_checkpoint_is_computed_again_alike(monkeypatch, tmp_path):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    mixing = Mixing(weighting="softmax", aggregation="sum", backend="auto")

    def aggregate(q, k, v):
        return neighbor_aggregate(q, k, v, Geometry(3, 4), Selection(k=4, similarity="dot"), mixing)

    expected = torch.autograd.grad(aggregate(q, k, v).square().sum(), (q, k, v))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, value in (("_times", {}), ("_used", {}), ("_answers", {}), ("measures", lambda device: True)):
        monkeypatch.setattr(choice, name, value)
    monkeypatch.setattr(choice, "milliseconds", lambda way: (way(), 1.0)[1])
    choice._load.cache_clear()
    monkeypatch.setattr(backend, "engaged", lambda *given: True)
    y = torch.utils.checkpoint.checkpoint(aggregate, q, k, v, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert all(None not in entry["ms"].values() for entry in choice.choices().values()) and choice.choices()


def test_nothing_has_no_gradient():
    q, weight = torch.randn(0, 1, 6, 3, device=DEVICE, requires_grad=True), torch.ones(3, 4, device=DEVICE)
    index = torch.zeros(0, 1, 6, 4, dtype=torch.int64, device=DEVICE)
    for ordered in (False, True):
        leaf = weight.clone().requires_grad_()
        how = {"similarity": "dot", "temperature": 1.0, "ordered": ordered}
        y = attention.attend_to_neighbors(q, q, q, index, None, leaf, **how)
        assert y.shape == (0, 1, 6, 3) and torch.autograd.grad(y.sum(), leaf)[0].abs().sum() == 0


def test_what_is_not_served_is_refused():
    x, geometry = torch.randn(1, 1, 12, 4, device=DEVICE), Geometry(3, 4)
    softmax = Mixing(weighting="softmax", aggregation="sum", backend="triton")
    dot = Selection(k=3, similarity="dot")

    def aggregate(x, selection=dot, mixing=softmax, **options):
        return neighbor_aggregate(x, x, x, geometry, selection, mixing, **options)

    refused = {
        "float64 is not served": lambda: aggregate(x.double()),
        "candidates=window is not served": lambda: aggregate(x, replace(dot, candidates="window")),
        "euclidean with": lambda: aggregate(x, replace(dot, similarity="euclidean")),
        "dropout": lambda: aggregate(x, dropout=0.1, training=True),
        "straight_through": lambda: aggregate(x, mixing=replace(softmax, straight_through=True)),
        "k=65 exceeds 64": lambda: backend.selects("triton", x, x, Selection(k=65)),
        "more than 1024 channels": lambda: backend.attends(x, x, x.repeat(1, 1, 1, 257), None, dot, softmax, num=3),
    }
    for message, call in refused.items():
        with pytest.raises(ConfigError, match=rf"operator\.backend=triton: .*{message}.*; or set operator\.backend"):
            call()
    aggregate(x, dropout=0.1)  # not while evaluating
