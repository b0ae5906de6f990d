"""The Triton kernels as operators of torch's library: in compiled graphs, and with gradients in one order.

``test_kernels.py`` runs this file as it does kernel_checks.py.
"""

import copy
import os

import pytest
import timm
import torch
from torch import library, nn

from convnn import ConfigError, ConvNN2d, ConvNNAttention, measure_choices, swap_layers
from convnn.ops import choice
from convnn.ops.geometry import Geometry
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Selection
from convnn.ops.triton import attention, dispatch, select

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
GPU = DEVICE == "cuda"


def edges(queries=7, tokens=11, heads=2, channels=5, num=4):
    """Return q, k, v, the index and weights."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, channels, device=DEVICE) for n in (queries, tokens, tokens))
    index = torch.rand(2, heads, queries, tokens, device=DEVICE).argsort(-1)[..., :num]
    return q, k, v, index, torch.randn(channels, num, device=DEVICE)


# ------------------------------------------------------------------------------------------------ torch's library


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_attention_is_what_torch_takes_for_an_operator(full, ordered):
    q, k, v, index, weight = edges()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    more = [torch.rand(index.shape, device=DEVICE) > 0.3, weight.requires_grad_(), torch.tensor(0.7, device=DEVICE)]
    arguments = *leaves, index, *(more if full else [None] * 3), 0.5, ordered
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if GPU and not ordered:  # which sums atomically, and so never gives the same digits twice
        tests = tests[:3]
    library.opcheck(attention.attend, arguments, test_utils=tests)


@pytest.mark.parametrize("blend", [0.5, 1.0])
def test_selection_is_what_torch_takes_for_an_operator(blend, monkeypatch):
    calls, best_keys = [], select.best_keys
    monkeypatch.setattr(select, "best_keys", lambda *a: calls.append(a) or best_keys(*a))
    x = torch.randn(1, 2, 12, 4, device=DEVICE)
    select_neighbors(x, x, Geometry(3, 4), Selection(k=4), blend=blend, backend="triton")
    library.opcheck(best_keys, calls[0])


def test_a_second_derivative_is_refused():
    q, k, v, index, _ = edges()
    y = attention.attend_to_neighbors(q.requires_grad_(), k, v, index, None, None, similarity="dot", temperature=1.0)
    (grad,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attend_backward"):
        grad.sum().backward()


def test_a_forward_derivative_is_refused_and_not_zero():
    layer, x = ConvNNAttention(8, 2, 5, backend="triton").to(DEVICE), torch.randn(1, 9, 8, device=DEVICE)
    with pytest.raises(ConfigError, match="forward derivatives"):
        torch.func.jvp(layer, (x,), (x,))
    layer.backend = "auto"
    torch.func.jvp(layer, (x,), (x,))


# ----------------------------------------------------------------------------------------------------- compilation


def swapped(kind):
    """Return a swapped network whose layers demand kernels, and images."""
    torch.manual_seed(0)
    if kind == "vit":
        size = {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
        model = timm.create_model("vit_tiny_patch16_224", **size)
        options = {"kind": "attention", "target": "convnn.ConvNNAttention", "k": 5, "aggregation": "depthwise"}
        options |= {"similarity": "dot", "weighting": "softmax"}
        swap_layers(model, {}, options)
        return model.to(DEVICE), torch.randn(2, 3, 16, 16, device=DEVICE)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    swap_layers(model, {}, {"name": "hybrid", "target": "convnn.HybridConvNN2d", "branch_ratio": 0.5, "blend": 0.6})
    return model.to(DEVICE), torch.randn(2, 3, 6, 5, device=DEVICE)


@pytest.mark.parametrize("kind, backend", [("vit", "inductor"), ("cnn", "inductor" if GPU else "aot_eager")])
def test_a_swapped_network_compiles_in_one_graph_with_kernels(kind, backend, monkeypatch):
    model, x = swapped(kind)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"
    seen = []

    def noted(graph, inputs):
        seen.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=noted)
    results = []
    for function in (model, compiled):
        model.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-3 if GPU else 1e-5, rtol=1e-4)
    names = {"convnn.attend.default", "convnn.best_keys.default"} if kind == "vit" else {"convnn.best_keys.default"}
    assert len(seen) == 1 and names <= seen[0]


@pytest.mark.parametrize("winner", ["torch", "triton", "triton in order"])
def test_a_graph_has_what_was_measured_to_be_fastest_in_one(winner, monkeypatch, tmp_path):
    model, x = swapped("vit")
    expected = model(x)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, value in (("_times", {}), ("_used", {}), ("_answers", {})):
        monkeypatch.setattr(choice, name, value)
    choice._load.cache_clear()
    monkeypatch.setattr(choice, "measures", lambda device: not torch.compiler.is_compiling())
    monkeypatch.setattr(dispatch, "engaged", lambda *given: True)
    if not GPU or winner != "torch":  # minutes of compilation else
        monkeypatch.setattr(choice, "as_in_graphs", lambda way: way)
    timed = []

    def time(way, case):
        way()
        timed.append(case.step)
        mine = timed.count(case.step) - 1
        if case.step == "attention":
            return float(["torch", "triton", "triton in order"][mine] != winner)
        return float((mine == 0) != (winner == "torch"))  # of selection plain torch comes first

    monkeypatch.setattr(choice, "_time", time)
    found = measure_choices(model, x)
    targets = []

    def noted(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=noted)
    assert torch.allclose(compiled(x), expected, atol=1e-4)
    assert {case.split()[0]: entry["way"] for case, entry in found.items() if "kernel" not in case} == {
        "attention": winner,
        "selection": "torch" if winner == "torch" else "triton",
    }
    assert ("convnn.attend.default" in targets) == ("convnn.best_keys.default" in targets) == (winner != "torch")


def test_an_exported_graph_is_of_torchs_own_operations():
    layer, x = ConvNNAttention(8, 2, 5, backend="triton").to(DEVICE).eval(), torch.randn(2, 9, 8, device=DEVICE)
    program = torch.export.export(layer, (x,))
    assert not any("convnn" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(program.module()(x), layer(x), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- one order


def gradients(parts, index, weight, **options):
    leaves = [t.detach().requires_grad_() for t in (*parts, *([] if weight is None else [weight]))]
    own = None if weight is None else leaves[3]
    y = attention.attend_to_neighbors(*leaves[:3], index, None, own, similarity="dot", temperature=1.0, **options)
    cotangent = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
    return torch.autograd.grad(y, leaves, cotangent.to(y.dtype))


def test_torchs_flag_orders_the_sums(monkeypatch):
    calls, incoming = [], attention.incoming
    monkeypatch.setattr(attention, "incoming", lambda *a: calls.append(a) or incoming(*a))
    *parts, index, weight = edges()
    gradients(parts, index, weight)
    assert not calls
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        gradients(parts, index, weight)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_gradients_are_equal_bit_for_bit(dtype):
    size = (512, 400, 2, 64, 9) if GPU else (4, 3, 1, 2, 2)
    *parts, index, weight = edges(*size)
    index[..., 0] = 1  # a hub, on which atomic sums would differ most
    parts = [t.to(dtype) for t in parts]
    first = gradients(parts, index, weight, ordered=True)
    for _ in range(1000 if GPU else 20):
        again = gradients(parts, index, weight, ordered=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    plain = gradients(parts, index, weight)
    for a, b in zip(first, plain, strict=True):
        assert (a - b).abs().max() <= (2e-2 if dtype == torch.bfloat16 else 1e-4) * b.abs().max()


def test_a_hub_and_tokens_that_nobody_chose():
    q, k, v, _, weight = edges(queries=40, tokens=9, num=3)  # more edges than are summed at once
    index = torch.tensor([2, 5, 7], device=DEVICE).expand(1, 1, 40, 3)  # and shared by all
    wide = [t.double() for t in (q, k, v)]
    found = gradients([q, k, v], index, weight, ordered=True)
    leaves = [t.detach().double().requires_grad_() for t in (*wide, weight)]
    keys, values = (t[:, :, index[0, 0, 0]] for t in leaves[1:3])
    p = (leaves[0] @ keys.mT / 5**0.5).softmax(-1)
    y = torch.einsum("bhqr,bhrc,cr->bhqc", p, values, leaves[3])
    expected = torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y).double())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())
    others = [token for token in range(9) if token not in (2, 5, 7)]
    assert not found[1][:, :, others].any() and not found[2][:, :, others].any()


def test_incoming_edges_in_rising_order():
    index = torch.tensor([[[2, 0], [2, 1], [0, 2]]], device=DEVICE)[None]
    sorted_edges, start = attention.incoming(index, 4)
    assert sorted_edges.tolist() == [1, 4, 3, 0, 2, 5] and start.tolist() == [0, 2, 3, 6, 6]


def test_a_training_step_with_kernels_repeats_under_the_flag():
    model, x = swapped("vit")
    for layer in model.modules():
        if isinstance(layer, ConvNN2d | ConvNNAttention):
            layer.backend = "triton"
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            own = copy.deepcopy(model)
            own(x).square().sum().backward()
            results.append([p.grad for p in own.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
