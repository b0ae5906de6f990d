"""The compiled choice of the k best follows the rule of ties, whatever the values."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from convnn import ConvNN2d
from convnn.ops import native, topk
from convnn.ops.similarity import ALIKE, span

pytest.importorskip("numba")


def by_sorting(score, k):
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def scores(rows, columns, kind, dtype=torch.float32):
    score = torch.randn(rows, columns, dtype=dtype)
    if kind == "few values":
        return (2 * score).round()  # -0.0 among them
    if kind == "one value":
        return torch.zeros_like(score)
    if kind == "infinite":
        return score.masked_fill(score > 1, torch.inf).masked_fill(score < 0.5, -torch.inf)
    if kind == "taken":
        return score.masked_fill(torch.rand_like(score) < 0.9, -torch.inf)
    if kind in ("rising", "falling"):
        return score.sort(dim=-1, descending=kind == "falling").values
    return score


@pytest.mark.parametrize("kind", ["any", "few values", "one value", "infinite", "taken", "rising", "falling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_stable_sort(kind, dtype):
    torch.manual_seed(0)
    for columns in (1, 2, 15, 16, 17, 48, 197, 1156):
        score = scores(7, columns, kind, dtype)
        for k in {1, 2, 9, 25, native.MAX_K, columns} & set(range(1, min(columns, native.MAX_K) + 1)):
            assert torch.equal(native.best_of_rows(score, k), by_sorting(score, k)), (columns, k)


def test_callers_do_not_meet():
    torch.manual_seed(0)
    several = [scores(400, 100 + i, "few values") for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda score: native.best_of_rows(score, 9), several))
    assert all(torch.equal(own, by_sorting(score, 9)) for own, score in zip(found, several, strict=True))


def test_what_it_leaves_to_others(monkeypatch):
    score = torch.randn(3, 50)
    assert native.best_of_rows(torch.randn(3, 200), native.MAX_K + 1) is None
    assert native.best_of_rows(score.half(), 3) is None and native.best_of_rows(score[:0], 3) is None
    for column in range(50):  # a NaN anywhere
        spoiled = score.clone()
        spoiled[1, column] = torch.nan
        assert native.best_of_rows(spoiled, 3) is None
        assert torch.equal(topk.stable_topk(spoiled, 3), by_sorting(spoiled, 3))
    monkeypatch.setattr(native, "installed", lambda: False)
    assert native.best_of_rows(score, 3) is None


@pytest.mark.parametrize("kind", ["any", "few values", "one value", "taken"])
def test_both_paths_choose_alike(kind, monkeypatch):
    torch.manual_seed(0)
    score = scores(60, 300, kind).view(5, 12, 300)
    compiled = topk.stable_topk(score, 9)
    monkeypatch.setattr(native, "installed", lambda: False)
    assert torch.equal(topk.stable_topk(score, 9), compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["any", "few values", "one value"])
@pytest.mark.parametrize("floor", [0.0, 10.0])
def test_blends_are_those_of_torch_to_the_last_bit(kind, dtype, floor, monkeypatch):
    torch.manual_seed(0)
    for items, rows, columns in ((1, 7, 50), (3, 5, 33), (2, 1, 1)):
        score = scores(items * rows, columns, kind, dtype).view(items, rows, columns)
        offset, lowest = torch.rand(rows, columns, dtype=dtype), torch.full((items, rows, 1), floor, dtype=dtype)
        low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
        least, most = span(low, high, lowest)
        want = (score - least) / (most - least) * 0.3 - offset
        found = native.blend_rows(score, offset, 0.3, lowest, ALIKE)
        assert torch.equal(score, want) and all(map(torch.equal, found, (low, high)))
    spoiled = score.fill_(torch.nan)
    assert native.blend_rows(spoiled, offset, 0.3, lowest, ALIKE) is None


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "dot"])
def test_a_blend_chooses_alike_on_both_paths(similarity, monkeypatch):
    torch.manual_seed(0)
    layer, x = ConvNN2d(3, 4, blend=0.5, similarity=similarity), (4 * torch.rand(2, 3, 9, 9)).round()
    compiled = layer.neighborhood(x).index
    monkeypatch.setattr(native, "installed", lambda: False)
    assert torch.equal(layer.neighborhood(x).index, compiled)


def test_it_is_loaded_only_for_a_choice_on_a_cpu():
    code = """
import sys, torch
from convnn import ConvNN2d
layer, x = ConvNN2d(3, 4, blend=0.0), torch.zeros(1, 3, 8, 8)
layer(x)
before = "numba" in sys.modules
layer.set_spectrum(blend=1.0)
layer(x)
sys.exit(before or "numba" not in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_numba_that_does_not_work_is_done_without(monkeypatch, caplog):
    native.installed.cache_clear()
    monkeypatch.setitem(sys.modules, "convnn.ops.native_kernel", None)  # its import fails
    try:
        layer, x = ConvNN2d(3, 4), torch.randn(1, 3, 6, 6)
        assert not native.installed() and layer(x).shape == (1, 4, 6, 6)
        assert "numba cannot be used here" in caplog.text
    finally:
        native.installed.cache_clear()
