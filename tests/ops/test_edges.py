"""Aggregation along edges against the gathered block, and what it may not hold in memory."""

import itertools
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from convnn import ConvNN2d, ConvNNAttention
from convnn.ops import aggregation, choice, edge_functions, edges, functional, native
from convnn.ops.topk import stable_topk

OPTIONS = [
    {"aggregation": "conv"},
    {"aggregation": "conv", "weighting": "softmax"},
    {"aggregation": "conv", "weighting": "score", "similarity": "dot"},
    {"aggregation": "conv", "groups": 2},
    {"aggregation": "conv", "candidates": "window", "num_candidates": 1, "k_policy": "clamp"},
    {"aggregation": "conv", "candidates": "random", "num_candidates": 6},
    {"aggregation": "conv", "candidates": "random", "num_candidates": 9, "self_first": False, "slots": "raster"},
    {"aggregation": "conv", "candidates": "grid", "num_candidates": 3, "weighting": "softmax"},
    {"aggregation": "conv", "candidates": "grid", "num_candidates": 3, "blend": 0.5, "learn_blend": "layer"},
    {"aggregation": "depthwise"},
    {"aggregation": "depthwise", "weighting": "softmax", "blend": 0.5},
    {"aggregation": "sum", "weighting": "softmax", "blend": 0.3, "straight_through": True},
    {"aggregation": "sum", "weighting": "score", "similarity": "euclidean"},
    {"aggregation": "separable"},
    {"aggregation": "conv", "weighting": "softmax", "groups": 2},
    {"aggregation": "max_relative", "straight_through": True, "blend": 0.5},
    {"aggregation": "edge", "candidates": "window", "num_candidates": 1, "k_policy": "clamp"},
]
PATHS = {"cache": {}, "chunks": {"CHUNK_BYTES": 512}, "at once": {"CHUNK_BYTES": 1 << 20}, "unordered": {}}
"""A CPU's, that of other devices with a few queries at a time and with all of them, and theirs without an order."""


@contextmanager
def walking(path, monkeypatch):
    """Aggregate as one of ``PATHS``."""
    with monkeypatch.context() as patch:
        patch.setattr(edges, "BLOCK", 64)  # several parts
        for name, value in PATHS[path].items():
            patch.setattr(edges, name, value)
        if path != "cache":
            patch.setattr(edges, "in_cache", lambda _: False)
            patch.setattr(edge_functions, "in_cache", lambda _: False)
        with edges.summed_in_order(path != "unordered"):
            yield


def results(layer, x):
    """Return output and gradients of the input and all parameters."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def compare(layer, x, monkeypatch):
    """Compare a layer on all paths to the same with the gathered block; return how often edges were walked."""
    walked = []
    with monkeypatch.context() as patch:
        patch.setattr(functional, "walks_edges", lambda _: False)
        plain = results(layer, x)
    monkeypatch.setattr(edges.Edges, "__init__", _counting(walked))
    for path in PATHS:
        layer.zero_grad()
        with walking(path, monkeypatch):
            own = results(layer, x)
        for a, b in zip(own, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, path=path: f"{path}: {m}")
    return len(walked)


def _counting(walked, init=edges.Edges.__init__):
    def counted(self, *args):
        walked.append(self)
        init(self, *args)

    return counted


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_convolutional_layers(options, monkeypatch):
    """Values and all gradients are those of the gathered block."""
    torch.manual_seed(0)
    layer = ConvNN2d(4, 4, 5, 1, 1, **options).double()
    assert compare(layer, torch.randn(2, 4, 5, 6, dtype=torch.float64), monkeypatch)


@pytest.mark.parametrize("aggregation", ["sum", "depthwise", "conv", "separable"])
@pytest.mark.parametrize("weighting", ["softmax", "ones", "score"])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_layers(aggregation, weighting, heads, monkeypatch):
    """Values and all gradients are those of the gathered block, also with a token before the grid."""
    torch.manual_seed(0)
    options = {"weighting": weighting, "attn_drop": 0.3, "dropout_on": "weights"}
    layer = ConvNNAttention(12, heads, 4, aggregation=aggregation, num_prefix_tokens=1, **options).double()
    assert compare(layer, torch.randn(2, 10, 12, dtype=torch.float64), monkeypatch)


def test_few_candidates_are_multiplied_before_they_are_gathered(monkeypatch):
    """The products are those of the candidates, not of all queries."""
    seen = []
    monkeypatch.setattr(
        functional, "mix_candidates", lambda *a: seen.append(len(a[4])) or aggregation.mix_candidates(*a)
    )
    layer = ConvNN2d(4, 8, 3, candidates="random", num_candidates=6, pad_candidates=False)
    layer(torch.randn(2, 4, 6, 6))
    assert seen == [6]
    ConvNN2d(4, 8, 3, candidates="random", num_candidates=30, pad_candidates=False)(torch.randn(2, 4, 6, 6))
    assert seen == [6]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(options, autocast):
    """Layers in bfloat16, and under autocast, are as near to float64 as those of gathered blocks."""
    torch.manual_seed(0)
    layer, x = ConvNN2d(4, 4, 5, 1, 1, **options), torch.randn(2, 4, 5, 6).bfloat16()
    layer.bfloat16().double()
    want, found = results(layer, x.double()), {}
    layer.float() if autocast else layer.bfloat16()
    for name, context in (("edges", nullcontext), ("blocks", aggregation.in_blocks)):
        layer.zero_grad()
        with context(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found[name] = results(layer, x.float() if autocast else x)
    for own, plain, exact in zip(found["edges"], found["blocks"], want, strict=True):
        assert own.dtype == plain.dtype or autocast
        far = (plain.double() - exact).norm()
        assert (own.double() - exact).norm() <= 1.5 * far + 0.01 * exact.norm()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_second_derivatives(options):
    """They are those of gathered neighbours, through the layers around too, and none is left out in silence."""
    torch.manual_seed(0)
    layer = ConvNN2d(4, 4, 5, 1, 1, **options).double()
    first = torch.nn.Conv2d(2, 4, 3).double()
    x, found = torch.randn(2, 2, 6, 6, dtype=torch.float64), []
    for context in (nullcontext, aggregation.in_blocks):
        torch.manual_seed(1)
        with context():
            y = layer(first(x).tanh()).square().sum()
        parts = [first.weight, *layer.parameters()]
        gradients = torch.autograd.grad(y, parts, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), parts))
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-10)


def test_transforms_of_torch_func():
    """``torch.func.grad`` gives what ``backward`` gives."""
    layer = ConvNN2d(2, 2, 3, weighting="softmax")
    x = torch.randn(1, 2, 4, 4)
    own = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(dict(layer.named_parameters()))
    layer(x).sum().backward()
    torch.testing.assert_close(own["weight"], layer.weight.grad)


@pytest.mark.parametrize("aggregation", ["conv", "depthwise", "edge"])
def test_many_derivatives_at_once(aggregation):
    """Jacobians by batches of gradients and in forward mode are those of one gradient at a time."""
    torch.manual_seed(0)
    layer = ConvNN2d(2, 2, 3, aggregation=aggregation).double()
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    want = torch.autograd.functional.jacobian(layer, x)
    for options in ({"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        torch.testing.assert_close(torch.autograd.functional.jacobian(layer, x, **options), want)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x))))
    torch.testing.assert_close(y.tangent.flatten(), want.flatten(0, 3).flatten(1).sum(1))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_traced_layer_computes_the_same():
    layer = ConvNN2d(2, 2, 3, blend=0.5, weighting="softmax").eval()
    x, other = torch.randn(2, 1, 2, 4, 4)
    torch.testing.assert_close(torch.jit.trace(layer, x)(other), layer(other))


@pytest.mark.parametrize("compiled", [True, False])
def test_topk_with_and_without_ties(compiled, monkeypatch):
    """Ties in few rows, in many and in all of them, within the k and at their border: against a stable sort."""
    torch.manual_seed(0)
    if not compiled:
        monkeypatch.setattr(native, "installed", lambda: False)
    for levels, tied in itertools.product((1, 3, 30, 1000), (1, 10, 50)):
        score = torch.randn(2, 25, 40).flatten(0, 1)
        score[:tied] = torch.randint(levels, (tied, 40)).float()
        score[0, 5] = -0.0
        score[:3, 20:] = -torch.inf
        score = score.view(2, 25, 40)
        want = score.sort(dim=-1, descending=True, stable=True).indices
        for k in (1, 7, 39, 40):
            assert torch.equal(stable_topk(score, k), want[..., :k])


@pytest.mark.parametrize("path", ["cache", "chunks", "unordered"])
def test_no_block_of_neighbours_is_held(path, monkeypatch):
    """Forward and backward pass allocate nothing of the size of the gathered neighbours."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and t.layout == torch.strided:
                    Largest.elements = max(Largest.elements, t.untyped_storage().nbytes() // t.element_size())
            return out

    monkeypatch.setattr("convnn.ops.scores.CHUNK_SCORES", {"cpu": 1 << 12})
    monkeypatch.setitem(PATHS, "cache", {"BLOCK": 1 << 12})
    for name in ("chunks", "unordered"):
        monkeypatch.setitem(PATHS, name, {"CHUNK_BYTES": 1 << 14})
    tokens, width, k = 400, 32, 16
    for layer, x in (
        (ConvNN2d(width, width, k, padding=0), torch.randn(1, width, 20, 20)),
        (ConvNN2d(width, width, k, padding=0, aggregation="edge"), torch.randn(1, width, 20, 20)),
        (ConvNN2d(width, width, k, padding=0, weighting="score", similarity="euclidean"), torch.randn(1, 32, 20, 20)),
        (ConvNN2d(width, width, k, padding=0, candidates="random", num_candidates=20), torch.randn(1, 32, 20, 20)),
        (ConvNN2d(width, width, k, padding=0, aggregation="max_relative"), torch.randn(1, width, 20, 20)),
        (ConvNNAttention(width, 1, k, straight_through=True), torch.randn(1, tokens, width)),
        (ConvNNAttention(width, 1, k), torch.randn(1, tokens, width)),
        (ConvNNAttention(width, 1, k, aggregation="sum"), torch.randn(1, tokens, width)),
    ):
        Largest.elements = 0
        with walking(path, monkeypatch), Largest():
            layer(x.requires_grad_()).sum().backward()
        assert tokens * width <= Largest.elements <= 3 * tokens * width < tokens * width * k


class Seen(TorchDispatchMode):
    """Notes the names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


ADDS_BY_CHANCE = {
    "index_add",
    "index_add_",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "embedding_dense_backward",
}
"""Operations that a GPU sums in by atomic additions, whose order is that of chance; it sorts for ``index_put_``."""


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_gradients_are_summed_in_order(options, monkeypatch):
    """No sum of a backward pass is one of atomic additions on a GPU, and repeated gradients are bitwise equal."""
    torch.manual_seed(0)
    layer, x = ConvNN2d(4, 4, 5, 1, 1, **options), torch.randn(2, 4, 5, 6)
    with aggregation.in_blocks(), Seen() as seen:
        results(layer, x)
    assert seen.names & ADDS_BY_CHANCE
    with walking("chunks", monkeypatch), Seen() as seen:
        results(layer, x)
    assert not seen.names & ADDS_BY_CHANCE
    with walking("chunks", monkeypatch):
        bitwise_equal(layer, x, 5)


@pytest.mark.parametrize("options", [{}, {"aggregation": "sum", "weighting": "softmax"}])
@pytest.mark.parametrize("winner", ["torch", "torch atomic"])
def test_the_order_of_sums_is_measured(winner, options, monkeypatch, tmp_path):
    """In training, with ``auto``, where sums are not in a core's cache; the way that won is the one that runs."""
    torch.manual_seed(0)
    layer, x = ConvNN2d(4, 4, 5, **options), torch.randn(2, 4, 5, 6)
    expected = results(layer, x)
    layer.zero_grad()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, value in (("_times", {}), ("_used", {}), ("_answers", {}), ("measures", lambda device: True)):
        monkeypatch.setattr(choice, name, value)
    choice._load.cache_clear()
    timed = []

    def time(way, case):
        way()
        timed.append(case)
        return float((timed.count(case) == 1) != (winner == "torch"))

    monkeypatch.setattr(choice, "_time", time)
    monkeypatch.setattr(functional.dispatch, "measured", lambda backend, device: backend == "auto")
    monkeypatch.setattr(functional, "in_cache", lambda _: False)
    added, add_rows = [], native.add_rows
    monkeypatch.setattr(native, "add_rows", lambda *given: added.append(1) or add_rows(*given))
    with walking("chunks", monkeypatch):
        results(layer, x)
        layer.zero_grad()
        added.clear()
        found = results(layer, x)
        assert bool(added) == (winner == "torch atomic") and len(timed) == 2
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            layer(x)
        layer.backend = "torch"
        added.clear()
        results(layer, x)
    assert not added and len(timed) == 2
    ((case, entry),) = choice.choices().items()
    assert entry["way"] == winner and case.split()[:2] == ["attention" if options else "aggregation", "training"]


def bitwise_equal(layer, x, times):
    """Compare the gradients of a layer, computed again and again, to the last bit."""
    torch.use_deterministic_algorithms(True)
    try:
        x = x.requires_grad_()
        y, parts = layer(x), [x, *layer.parameters()]
        weights = torch.linspace(0, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
        first = None
        for _ in range(times):
            own = torch.autograd.grad(y, parts, weights, retain_graph=True)
            first = own if first is None else first
            assert all(map(torch.equal, own, first))
    finally:
        torch.use_deterministic_algorithms(False)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_layers_on_the_gpu(options, monkeypatch):
    """Values and all gradients are those of the gathered block, in chunks, at once and unordered; in float64."""
    torch.manual_seed(0)
    layer, x = ConvNN2d(4, 4, 5, 1, 1, **options).to("cuda").double(), torch.randn(2, 4, 5, 6).double().cuda()
    with aggregation.in_blocks():
        plain = results(layer, x)
    for path in ("chunks", "at once", "unordered"):
        layer.zero_grad()
        with walking(path, monkeypatch):
            own = results(layer, x)
        for a, b in zip(own, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"aggregation": "conv"},
        {"aggregation": "conv", "weighting": "softmax", "similarity": "euclidean", "groups": 2},
        {"aggregation": "conv", "candidates": "random", "num_candidates": 12, "weighting": "softmax"},
        {"aggregation": "depthwise", "weighting": "softmax", "straight_through": True},
        {"aggregation": "sum", "weighting": "score"},
        {"aggregation": "edge"},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values()),
)
def test_a_thousand_gradients_on_the_gpu(options, dtype, monkeypatch):
    """They are equal to the last bit, with torch's deterministic algorithms demanded: nothing refuses."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(0)
    layer = ConvNN2d(16, 16, 9, **options).to("cuda", dtype)
    bitwise_equal(layer, torch.randn(8, 16, 16, 16, device="cuda", dtype=dtype), 1000)
