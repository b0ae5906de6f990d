"""``train.compile``: its modes, and how many graphs a moving blend and a smaller last batch take."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from torch import nn
from training import rows

from convnn import ConfigError, ConvNN2d, ConvNNAttention
from convnn.config.identity import fingerprint, identity
from convnn.runtime.device import compiled
from convnn.train import compiling
from convnn.train.run import run

GPU = torch.cuda.is_available()


def test_modes_are_names_and_true_is_what_it_was():
    assert identity(tiny("train.compile=true"))["train"]["compile"] is True
    assert identity(tiny())["train"]["compile"] is False
    prints = {fingerprint(tiny(f"train.compile={mode}")) for mode in ("true", "reduce-overhead", "max-autotune")}
    assert len(prints) == 3
    with pytest.raises(ConfigError, match=r"^train\.compile=fast is not one of false, true, reduce-overhead, max-aut"):
        tiny("train.compile=fast")


def test_modes_fix_the_shapes(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    for mode in (True, "reduce-overhead", "max-autotune"):
        assert compiled(lambda x: x + 1, mode)(torch.ones(())) == 2
    assert calls == [{}, *({"mode": m, "dynamic": False} for m in ("reduce-overhead", "max-autotune"))]


@pytest.mark.parametrize("mode, processes", [(True, 1), ("reduce-overhead", 1), ("reduce-overhead", 2)])
def test_what_a_graph_will_need_is_measured_before_it_is_made(mode, processes, monkeypatch, caplog):
    """At the first step of each end of the blend; with fixed shapes also of each k, and of each size in one process."""
    world = SimpleNamespace(size=processes)
    for name, value in (("world", lambda: world), ("broadcast", lambda table: table)):
        monkeypatch.setattr(compiling.distributed, name, value)
    monkeypatch.setattr(compiling, "compiled", lambda forward, mode: forward)
    events = []
    monkeypatch.setattr(compiling, "measure_choices", lambda model, images: events.append("measured"))
    model = nn.Sequential(ConvNN2d(3, 4, 5))
    step = compiling.compiled_by_choice(model, lambda images: events.append("ran") or images, mode)
    met = []
    moves = (0.0, 5, 4), (0.0, 5, 4), (0.3, 5, 4), (0.6, 5, 4), (1.0, 5, 4), (1.0, 4, 4), (1.0, 3, 4), (1.0, 3, 3)
    for blend, k, size in moves:
        model[0].set_spectrum(blend=blend, k=k)
        step(torch.randn(size, 3, 4, 5))
        met.append(events == ["measured", "ran"])
        events.clear()
    fixed = mode is not True
    assert met == [True, False, True, False, True, fixed, fixed, fixed and processes == 1]
    assert caplog.text.count("compiles anew for each k") == int(fixed)


@pytest.mark.long
def test_a_run_with_a_moving_blend_and_a_smaller_last_batch(tmp_path, monkeypatch):
    graphs, compile_ = [], torch.compile

    def counted(model, *, mode, dynamic):
        return compile_(model, dynamic=dynamic, backend=lambda graph, _: graphs.append(1) or graph)

    monkeypatch.setattr(torch, "compile", counted)
    torch.compiler.reset()
    options = "operator=spectrum", "schedule=linear", "train.batch_size=24", "data.drop_last=false"
    found = []
    for mode in ("false", "reduce-overhead"):
        run(tiny(*options, f"train.compile={mode}", f"run.dir={tmp_path}/{mode}"))
        found.append([row["train_loss"] for row in rows(tmp_path / mode)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    # The first step at blend 0, the last, smaller, at 1, and between them one graph for each of both sizes.
    assert len(graphs) == 4


@pytest.mark.long
@pytest.mark.parametrize("mode, number", [(True, 2), ("reduce-overhead", 4)])
def test_a_moving_k_is_a_variable_where_shapes_may_change(mode, number, monkeypatch, request):
    graphs, compile_ = [], torch.compile

    def counted(model, mode=None, **options):
        return compile_(model, backend=lambda graph, _: graphs.append(1) or graph, fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", counted)
    names = "recompile_limit", "accumulated_recompile_limit", "allow_unspec_int_on_nn_module"
    for name in names:  # set back at the end: monkeypatch would delete them, and torch then hides them
        request.addfinalizer(partial(setattr, torch._dynamo.config, name, getattr(torch._dynamo.config, name)))
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, x = nn.Sequential(ConvNN2d(3, 4, 7, weighting="softmax")), torch.randn(2, 3, 4, 5)
    step = compiled(layer, mode)
    for k in (7, 6, 4, 3):
        layer[0].set_spectrum(k=k)
        results = []
        for function in (layer, step):
            y = function(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == number
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["conv", "attention"])
def test_cuda_graphs_of_a_moving_layer(kind, backend):
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    if kind == "conv":
        layer, x = ConvNN2d(8, 8, 5, blend=0.5, backend=backend), torch.randn(8, 8, 9, 9)
    else:
        layer = ConvNNAttention(16, 2, 5, 0.5, num_prefix_tokens=1, grid_size=(6, 6), backend=backend)
        x = torch.randn(8, 37, 16)
    plain, x = nn.Sequential(nn.Identity(), layer).cuda(), x.cuda()
    graph = copy.deepcopy(plain)
    step = compiled(graph, "reduce-overhead")
    for blend, size in ((0.2, 8), (0.3, 8), (0.4, 8), (0.5, 8), (0.6, 5), (0.7, 5), (0.8, 5), (0.3, 8), (0.9, 8)):
        results = []
        for model, function in ((plain, plain), (graph, step)):
            model[1].set_spectrum(blend=blend, temperature=0.5 + blend)
            model.zero_grad()
            y = function(x[:size])
            y.square().mean().backward()
            results.append([y.detach().clone(), *(p.grad.clone() for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_a_moving_k_on_the_gpu(backend):
    torch.manual_seed(0)
    torch.compiler.reset()
    options = {"num_prefix_tokens": 1, "grid_size": (6, 6), "aggregation": "depthwise", "backend": backend}
    layer, x = nn.Sequential(ConvNNAttention(16, 2, 9, 0.5, **options)).cuda(), torch.randn(8, 37, 16).cuda()
    step = compiling.compiled_by_choice(layer, layer, True)
    for k in (9, 8, 7, 4):
        layer[0].set_spectrum(k=k)
        results = []
        for function in (layer, step):
            y = function(x)
            results.append([y, *torch.autograd.grad(y.square().mean(), list(layer.parameters()))])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
