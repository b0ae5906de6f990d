"""The compiled choice of the k best follows the rule of ties, whatever the values."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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


def pairs(items, queries, columns, channels, dtype):
    """Small integers, whose products are exact in any order and full of ties."""
    q, keys = torch.randn(items, queries, channels, dtype=dtype), torch.randn(items, channels, columns, dtype=dtype)
    return (2 * q).round(), (2 * keys).round()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, native.FEW_CHANNELS, native.FEW_CHANNELS + 1, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_pairs_are_ranked_as_torch_ranks_their_products(channels, biased, dtype):
    torch.manual_seed(0)
    for items, queries, columns, k in ((1, 7, 50, 9), (3, 5, 33, 32), (2, 2, 2, 1), (2, 3, 300, 9)):
        q, keys = pairs(items, queries, columns, channels, dtype)
        bias = torch.randn(items, 1, columns, dtype=dtype).round() if biased else None
        own = torch.tensor([-1, *range(queries - 1)])
        score = q @ keys if bias is None else q @ keys + bias
        want = score.clone()
        want[:, torch.arange(1, queries), own[1:]] = -torch.inf
        assert native.serves(k, q, keys, bias)
        found, *ranges = native.rank_pairs(q, keys, bias, native.Ranking(k, own))
        assert torch.equal(found, by_sorting(want, k)) and ranges == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("floor", [0.0, 10.0])
@pytest.mark.parametrize("learned", [False, True])
def test_blends_are_those_of_torch(learned, floor, channels, dtype):
    torch.manual_seed(0)
    for items, queries, columns, k in ((1, 7, 50, 9), (3, 5, 33, 32), (2, 2, 2, 1)):
        q, keys = pairs(items, queries, columns, channels, dtype)
        distance, lowest = (
            torch.rand(queries, columns, dtype=dtype),
            torch.full((items, queries, 1), floor, dtype=dtype),
        )
        distance[:, 0] = torch.inf  # as far as a prefix token
        share = torch.rand(items, 1, 1, dtype=dtype) if learned else 0.3
        score = q @ keys
        low, high = score.amin(-1, keepdim=True), score.amax(-1, keepdim=True)
        least, most = span(low, high, lowest)
        want = (score - least) * (share / (most - least)) - (1 - torch.as_tensor(share, dtype=dtype)) * distance
        ranking = native.Ranking(k, torch.full((queries,), -1), share, distance, lowest, ALIKE)
        found, *ranges = native.rank_pairs(q, keys, None, ranking)
        assert torch.equal(found, by_sorting(want, k))
        assert all(map(torch.equal, ranges, (low, high)))


@pytest.mark.parametrize("channels", [3, 64])
def test_distances_along_the_axes_are_those_of_the_grid_behind_its_prefix(channels):
    torch.manual_seed(0)
    for rows, columns, prefix in ((5, 7, 0), (4, 4, 1), (1, 9, 2), (3, 1, 0)):
        count = prefix + rows * columns
        q, keys = pairs(2, 6, count, channels, torch.float64)
        axes = torch.rand(6, rows, dtype=torch.float64), torch.rand(6, columns, dtype=torch.float64)
        grid = torch.maximum(axes[0][:, :, None], axes[1][:, None]).flatten(1)
        whole = torch.cat([torch.full((6, prefix), torch.inf, dtype=torch.float64), grid], dim=1)
        own, floor = torch.arange(6) % count, torch.zeros(2, 6, 1, dtype=torch.float64)
        found = [
            native.rank_pairs(q, keys, None, native.Ranking(min(9, count), own, 0.4, distance, floor, ALIKE), 1)[0]
            for distance in (whole, axes)
        ]
        assert torch.equal(*found) and (found[0][..., 0] == 0).all()


def test_scores_that_could_be_nan_are_not_served():
    q, keys = pairs(2, 3, 40, 4, torch.float32)
    bias = torch.zeros(2, 1, 40)
    assert native.serves(9, q, keys, bias)
    for spoiled in (0, 1, 2):
        for value in (torch.nan, torch.inf, -torch.inf):
            terms = [q.clone(), keys.clone(), bias.clone()]
            terms[spoiled][-1, -1, -1] = value
            assert not native.serves(9, *terms)
    assert not native.serves(9, q * 1e19, keys * 1e19, None)  # finite, but their products are not
    assert not native.serves(native.MAX_K + 1, q, keys, None) and not native.serves(0, q, keys, None)
    assert not native.serves(9, q.half(), keys.half(), None) and not native.serves(9, q[:0], keys[:0], None)


@pytest.mark.parametrize("blend", [0.5, 1.0, "layer"])
@pytest.mark.parametrize("similarity", ["euclidean", "dot"])
@pytest.mark.parametrize(
    "options",
    [{}, {"candidates": "random", "num_candidates": 32}, {"self_first": False}, {"rank_step": 2}, {"k": 34}],
    ids=str,
)
def test_a_layer_chooses_alike_on_both_paths(options, similarity, blend, monkeypatch):
    torch.manual_seed(0)
    fixed = {"blend": 0.5, "learn_blend": blend} if blend == "layer" else {"blend": blend}
    settings = {"similarity": similarity, "k": 5, **fixed, **options}
    # 4 channels and 16 x 16 padded tokens: roots and means are exact, and so are the scores, in whatever order.
    layer = ConvNN2d(4, 4, padding=4, **settings).double().eval()
    x = (4 * torch.rand(2, 4, 8, 8, dtype=torch.float64)).round()
    served, rank_pairs = [], native.rank_pairs

    def counted(*args, **kwargs):
        served.append(True)
        return rank_pairs(*args, **kwargs)

    monkeypatch.setattr(native, "rank_pairs", counted)
    compiled = layer.neighborhood(x).index
    assert bool(served) == (settings["k"] <= native.MAX_K)
    monkeypatch.setattr(native, "installed", lambda: False)
    assert torch.equal(layer.neighborhood(x).index, compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("rows", [torch.int32, torch.int64])
def test_rows_are_added_as_torch_adds_them(rows, dtype, monkeypatch):
    torch.manual_seed(0)
    for count, channels in ((200, 3), (50, 64), (0, 4)):
        index, values = torch.randint(0, 20, (count,), dtype=rows), torch.randn(count, 2 * channels).to(dtype)[:, ::2]
        want = torch.randn(20, channels).to(dtype)
        found = want.clone()
        native.add_rows(found, index, values)
        assert torch.equal(found, want.index_add_(0, index, values))  # to the last bit


def test_what_counts_operations_meets_the_product():
    """Torch's counter sees operations of torch alone."""
    layer, x = ConvNN2d(3, 4), torch.randn(1, 3, 6, 6)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() >= 2 * 36 * 36 * 3


def test_it_is_loaded_only_for_a_choice_on_a_cpu():
    code = """
import sys, torch
from convnn import ConvNN2d
layer, x = ConvNN2d(3, 4, blend=0.0), torch.zeros(1, 3, 8, 8)
layer(x)
ConvNN2d(3, 4).to("meta")(x.to("meta"))  # on which operations are counted
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
