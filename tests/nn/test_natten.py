"""NATTEN's neighbourhood attention is the position end with ``border=shift``."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from convnn import ConvNNAttention
from convnn.ops import functional, natten
from convnn.ops.geometry import Geometry
from convnn.ops.settings import Mixing, Selection
from convnn.ops.triton import dispatch


def reference(query, key, value, kernel_size, dilation, scale):
    """Return what NATTEN's ``na2d`` is documented to, a query at a time: (B, h, w, H, D) three times -> the same."""
    out = torch.empty_like(value)
    h, w = query.shape[1:3]

    def window(own, side):
        lane, steps = own % dilation, (side - 1 - own % dilation) // dilation + 1
        first = min(max(own // dilation - kernel_size // 2, 0), steps - kernel_size)
        return [lane + dilation * (first + i) for i in range(kernel_size)]

    for row in range(h):
        for column in range(w):
            rows, columns = (torch.tensor(window(own, side)) for own, side in ((row, h), (column, w)))
            keys, values = (x[:, rows][:, :, columns].flatten(1, 2) for x in (key, value))
            score = torch.einsum("bhd,bnhd->bnh", query[:, row, column], keys) * scale
            out[:, row, column] = torch.einsum("bnh,bnhd->bhd", score.softmax(1), values)
    return out


@pytest.fixture
def fastest(monkeypatch):
    """Let NATTEN be measured to be the fastest way, on a CPU; return the calls of ``na2d``."""
    calls = []
    functions = types.ModuleType("natten.functional")
    functions.na2d = lambda *maps, **how: calls.append(how) or reference(*maps, **how)
    monkeypatch.setitem(sys.modules, "natten", types.ModuleType("natten"))
    monkeypatch.setitem(sys.modules, "natten.functional", functions)
    monkeypatch.setattr(natten, "installed", lambda: True)
    monkeypatch.setattr(dispatch, "measured", lambda backend, device: backend == "auto")
    monkeypatch.setattr(functional, "_fastest", lambda _, __, ways, *given: "natten" if "natten" in ways else "torch")
    return calls


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(("k", "dilation"), [(9, 1), (25, 1), (9, 2)])
def test_the_window_that_stays_inside(similarity, k, dilation, fastest):
    torch.manual_seed(0)
    options = {"similarity": similarity, "border": "shift", "token_dilation": dilation, "aggregation": "sum"}
    layer = ConvNNAttention(8, 2, k, blend=0.0, num_prefix_tokens=0, grid_size=(7, 9), temperature=0.7, **options)
    layer = layer.double()
    x = torch.randn(2, 63, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("torch", "auto"):
        layer.backend = backend
        y = layer(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    assert len(fastest) == 1 and fastest[0]["kernel_size"] == int(k**0.5) and fastest[0]["dilation"] == dilation
    for plain, ours in zip(*results, strict=True):
        assert torch.allclose(plain, ours, rtol=0, atol=1e-12)


def test_what_natten_does_not_compute_is_left_to_the_others(monkeypatch):
    monkeypatch.setattr(natten, "installed", lambda: True)
    geometry, selection = Geometry(7, 9, margin=(1, 1)), Selection(k=9, similarity="dot")
    mixing = Mixing(weighting="softmax", aggregation="sum")
    assert natten.serves(geometry, selection, mixing, 0.0, (4, 4))
    others = [
        {"geometry": replace(geometry, margin=(0, 0))},
        {"geometry": replace(geometry, prefix=1)},
        {"geometry": Geometry(2, 9, margin=(1, 1))},
        {"selection": replace(selection, k=8)},
        {"selection": replace(selection, causal=True)},
        {"selection": replace(selection, similarity="euclidean")},
        {"mixing": replace(mixing, weighting="ones")},
        {"mixing": replace(mixing, aggregation="depthwise")},
        {"blend": 0.5},
        {"blend": torch.tensor(0.0)},
        {"channels": (4, 6)},
    ]
    given = {"geometry": geometry, "selection": selection, "mixing": mixing, "blend": 0.0, "channels": (4, 4)}
    for other in others:
        assert not natten.serves(**given | other), other
    monkeypatch.setattr(natten, "installed", lambda: False)
    assert not natten.serves(**given)


def test_the_real_one():
    pytest.importorskip("natten")
    torch.manual_seed(0)
    geometry = Geometry(7, 9, margin=(1, 1))
    q, k, v = (torch.randn(1, 2, 63, 16) for _ in range(3))
    selection, mixing = Selection(k=9, similarity="dot"), Mixing(weighting="softmax", aggregation="sum")
    plain = functional.neighbor_aggregate(q, k, v, geometry, selection, mixing, blend=0.0)
    ours = natten.attend(q, k, v, geometry, "dot", 1.0)
    assert torch.allclose(plain, ours, atol=1e-5)
