"""Settings that users of NATTEN and ViG look for, against loops written from their descriptions."""

import math

import pytest
import torch
from comparing import close

from convnn import ConfigError, ConvNN2d, ConvNNAttention, OperatorConfig
from convnn.config.checks import check_operator


def lane_window(place, side, width, step):
    """NATTEN's window along one axis: ``width`` places of those ``step`` apart, around the own one, moved inside."""
    lane = list(range(place % step, side, step))
    own = lane.index(place)
    first = min(max(own - width // 2, 0), len(lane) - width)
    return lane[first : first + width]


def causal_window(place, width, step):
    """Up to ``width`` places, ``step`` apart, that end at the own one."""
    return [p for p in range(place - (width - 1) * step, place + 1, step) if p >= 0]


def attend(module, x, seen):
    """Softmax attention of each token to those that ``seen(row, column)`` lists, one head: (1, N, C) -> (1, N, C)."""
    height, width = module.grid_size
    q, k, v = module.qkv(x)[0].chunk(3, dim=-1)
    out = []
    for i in range(height * width):
        near = [r * width + c for r, c in seen(*divmod(i, width))]
        out.append((q[i] @ k[near].T / math.sqrt(q.shape[-1])).softmax(-1) @ v[near])
    return module.proj(torch.stack(out))[None]


@pytest.mark.parametrize("width, step, grid", [(3, 1, (5, 6)), (3, 2, (7, 6)), (3, 3, (10, 9)), (5, 2, (11, 10))])
def test_dilated_windows_that_move_inside(width, step, grid):
    torch.manual_seed(0)
    settings = {"aggregation": "sum", "border": "shift", "token_dilation": step, "grid_size": grid}
    module = ConvNNAttention(6, 1, width**2, blend=0.0, **settings).double()
    x = torch.randn(1, math.prod(grid), 6, dtype=torch.float64)

    def seen(row, column):
        rows, columns = (lane_window(p, n, width, step) for p, n in zip((row, column), grid, strict=True))
        return [(r, c) for r in rows for c in columns]

    close(module(x), attend(module, x, seen))
    assert module.neighborhood(x).in_window().all()


@pytest.mark.parametrize("width, step, grid", [(3, 1, (5, 6)), (3, 2, (7, 6)), (2, 1, (4, 4))])
@pytest.mark.parametrize("fast", [True, False])
def test_causal_windows(width, step, grid, fast):
    torch.manual_seed(0)
    window = {"candidates": "window", "num_candidates": width - 1, "k_policy": "clamp", "causal": True}
    module = ConvNNAttention(
        6, 1, width**2, aggregation="sum", token_dilation=step, grid_size=grid, fast=fast, **window
    ).double()
    x = torch.randn(1, math.prod(grid), 6, dtype=torch.float64)

    def seen(row, column):
        return [(r, c) for r in causal_window(row, width, step) for c in causal_window(column, width, step)]

    close(module(x), attend(module, x, seen))
    changed = x.clone()
    changed[0, -1] += 1  # the last token is seen by itself alone
    assert torch.equal(module(changed)[0, :-1], module(x)[0, :-1])


@pytest.mark.parametrize("k", [3, 12])
def test_causal_on_a_line(k):
    torch.manual_seed(0)
    line = {"layout": "sequence", "causal": True, "k_policy": "clamp", "aggregation": "sum"}
    module = ConvNNAttention(6, 2, k, **line).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    q, key, v = module.qkv(x).view(2, 9, 3, 2, 3).permute(2, 0, 3, 1, 4)
    score = (q @ key.mT / math.sqrt(3)).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    least = score.sort(-1, descending=True).values[..., min(k, 9) - 1, None]
    y = score.masked_fill(score < least, -torch.inf).softmax(-1) @ v
    close(module(x), module.proj(y.transpose(1, 2).reshape(2, 9, 6)))


@pytest.mark.parametrize("self_first", [True, False])
def test_every_second_of_the_nearest(self_first):
    """ViG's dilated graph: of the k d nearest every d-th."""
    torch.manual_seed(0)
    module = ConvNN2d(4, 5, 3, padding=0, self_first=self_first, similarity="euclidean", rank_step=2).double()
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64)
    tokens = x.flatten(2).mT
    order = torch.cdist(tokens, tokens).argsort(-1)[..., :6:2]
    assert torch.equal(module.neighborhood(x).index[:, 0], order)
    chosen = torch.stack([image[own] for image, own in zip(tokens, order, strict=True)])
    want = torch.einsum("bnkc,ock->bon", chosen, module.weight) + module.bias[:, None]
    close(module(x), want.unflatten(2, (4, 5)))
    few = ConvNN2d(4, 5, 15, padding=0, rank_step=2)
    with pytest.raises(ValueError, match="k=15 with rank_step=2 needs 29 candidates of the 20 of a 4x5 map"):
        few(x.float())
    few = ConvNN2d(4, 5, 15, padding=0, rank_step=2, k_policy="clamp")
    assert few.neighborhood(x.float()).index.shape[-1] == 10  # ranks 0, 2, ..., 18


@pytest.mark.parametrize("kind", ["edge", "sage", "gin"])
def test_other_mixes_of_vision_graphs(kind):
    """EdgeConv, GraphSAGE and GIN as ViG has them, without their norms and activations."""
    torch.manual_seed(0)
    module = ConvNN2d(4, 6, 3, padding=0, aggregation=kind).double()
    if kind == "gin":
        module.eps.data.fill_(0.3)
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    tokens = x.flatten(2).mT
    index = module.neighborhood(x).index[:, 0]
    first, pointwise = (None if m is None else m.weight for m in (module.neighbor_map, module.pointwise))
    images = []
    for image, near in zip(tokens, index, strict=True):
        rows = []
        for own, others in zip(image, image[near], strict=True):
            if kind == "edge":
                both = torch.cat([pointwise, first], 1)
                rows.append(torch.stack([both @ torch.cat([own, other - own]) for other in others]).amax(0))
            elif kind == "sage":
                rows.append(pointwise @ torch.cat([own, (others @ first.T).amax(0)]))
            else:
                rows.append(pointwise @ (1.3 * own + others.sum(0)))
        images.append(torch.stack(rows))
    close(module(x), (torch.stack(images) + module.bias).mT.unflatten(2, (3, 5)))
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("candidates, count", [("random", 12), ("grid", 3)])
def test_samples_without_padding(candidates, count):
    torch.manual_seed(0)
    sample = {"candidates": candidates, "num_candidates": count}
    x = torch.zeros(2, 3, 6, 6)  # where all are alike, a sample with padding takes some
    with_pads, without = (
        ConvNN2d(3, 4, 9, pad_candidates=pads, **sample).neighborhood(x).is_padding for pads in (True, False)
    )
    assert not without.any() and bool(with_pads.any()) == (candidates == "random")


def test_what_does_not_go_together():
    for settings, message in [
        ({"causal": True}, "operator.causal=True does not apply to operators of kind conv"),
        ({"token_dilation": 2}, "operator.token_dilation=2 does not apply to operators of kind conv"),
        ({"rank_step": 2, "slots": "raster"}, "rank_step needs operator.slots=rank"),
        ({"kind": "attention", "aggregation": "gin"}, "aggregation=gin is for operators of kind conv"),
        ({"aggregation": "edge", "weighting": "softmax"}, "aggregation=edge needs operator.weighting=ones"),
        ({"kind": "attention", "causal": True, "border": "shift"}, "causal=true has windows that end at the query"),
        ({"backend": "triton", "rank_step": 2}, "rank_step=2 is not served"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_operator(OperatorConfig(**settings))
    small = ConvNNAttention(4, 1, 9, blend=0.0, aggregation="sum", border="shift", token_dilation=2, grid_size=(5, 6))
    with pytest.raises(ValueError, match="a 3 wide window with token_dilation=2 does not fit into a 5x6 grid"):
        small(torch.zeros(1, 30, 4))


@pytest.mark.parametrize("candidates, count", [("random", 4), ("grid", 2)])
def test_no_token_comes_twice_where_steps_exceed_the_candidates(candidates, count):
    torch.manual_seed(0)
    sample = {"candidates": candidates, "num_candidates": count, "k_policy": "clamp", "rank_step": 2}
    found = ConvNN2d(3, 4, 9, padding=0, **sample).neighborhood(torch.randn(2, 3, 4, 4))
    for tokens, valid in zip(found.index.flatten(0, 2), found.valid.flatten(0, 2), strict=True):
        kept = tokens[valid].tolist()
        assert len(set(kept)) == len(kept)


@pytest.mark.parametrize("border", ["nearest", "zeros"])
def test_a_query_that_sees_no_candidate_gets_nothing(border):
    torch.manual_seed(0)
    sample = {"candidates": "random", "num_candidates": 4, "causal": True, "border": border}
    module = ConvNNAttention(8, 2, 1, proj_bias=False, **sample)
    x = torch.randn(1, 36, 8, requires_grad=True)
    y = module(x)
    blind = ~module.eval().neighborhood(x).valid[0, 0, :, 0]
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())
    assert blind.any() and (module(x)[0, blind] == 0).all()


def test_a_dilated_window_wider_than_the_map_keeps_its_lane():
    torch.manual_seed(0)
    window = {"candidates": "window", "num_candidates": 32, "k_policy": "clamp", "token_dilation": 2}
    wide = {"aggregation": "sum", "grid_size": (6, 6), **window}
    fast, plain = (ConvNNAttention(6, 1, 64, fast=fused, **wide).double() for fused in (True, False))
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(1, 36, 6, dtype=torch.float64)
    close(fast(x), plain(x))
    rows, columns = plain.neighborhood(x).offsets()
    assert (rows % 2 == 0).all() and (columns % 2 == 0).all()
