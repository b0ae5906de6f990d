"""Timing and memory of operators and training steps, side by side in one run.

Ratios within a run count: repeats of all cases of a group are interleaved, so that a slow moment of the machine
meets all of them alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from benchmark_tensors import Compiled, noise, real
from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.config.schema import OperatorConfig
from convnn.models.swap import swap_layers
from convnn.nn.attention import ConvNNAttention
from convnn.nn.conv import ConvNN2d
from convnn.ops.functional import neighbor_aggregate
from convnn.ops.geometry import Geometry
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Mixing, Selection
from convnn.ops.topk import stable_topk
from convnn.ops.triton.dispatch import missing

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Something to be timed, beside others of its group."""

    group: str
    name: str
    tokens: int
    k: int
    build: Callable[[torch.device], Step] = field(repr=False)
    """Returns what is timed."""
    images: int = 0
    """Per call, for training steps."""


@dataclass(frozen=True)
class Timing:
    """Of one case: milliseconds, and bytes above the start."""

    case: Case
    milliseconds: tuple[float, ...]
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        """Median time in milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile in milliseconds."""
        if len(self.milliseconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.milliseconds, n=4)
        return low, high


class NaiveConvNN2d(nn.Module):
    """ConvNN as its definition reads: the whole similarity matrix, top-k, an expanded copy, gather, Conv1d."""

    def __init__(self, in_channels: int, out_channels: int, k: int) -> None:
        super().__init__()
        self.k, self.conv = k, nn.Conv1d(in_channels, out_channels, k, stride=k)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, O, h, w)."""
        b, c, h, w = x.shape
        tokens = F.pad(x, (1, 1, 1, 1)).flatten(2)
        n = tokens.shape[2]
        unit = F.normalize(tokens, dim=1)
        index = (unit.mT @ unit).topk(self.k, dim=-1).indices  # (B, n, k)
        gathered = tokens[:, :, None].expand(b, c, n, n).gather(3, index[:, None].expand(b, c, n, self.k))
        y = self.conv(gathered.reshape(b, c, n * self.k)).unflatten(2, (h + 2, w + 2))
        return y[:, :, 1:-1, 1:-1]


class NaiveConvNNAttention(nn.Module):
    """ConvNN-attention as its definition reads: scores, top-k, softmax, an expanded copy, gather, depthwise Conv1d."""

    def __init__(self, dim: int, heads: int, k: int) -> None:
        super().__init__()
        self.heads, self.k, d = heads, k, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.conv = nn.Conv1d(d, d, k, stride=k, groups=d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)
        d = q.shape[-1]
        score, index = (q @ k.mT / math.sqrt(d)).topk(self.k, dim=-1)
        weights = score.softmax(-1)
        values = v.mT[:, :, None].expand(-1, d, n, n).gather(3, index[:, None].expand(-1, d, n, self.k))
        y = self.conv((values * weights[:, None]).flatten(2))  # (B H, d, n)
        return self.proj(y.mT.unflatten(0, (b, self.heads)).transpose(1, 2).reshape(b, n, c))


def layer_step(
    make: Callable[[], nn.Module],
    shape: Sequence[int],
    backward: bool = True,
    inputs: Callable[..., Tensor] = noise,
    amp: bool = False,
) -> Callable[..., Step]:
    """Return the builder of a layer's pass on ``inputs(*shape)``, forward or both ways; ``amp``: in bfloat16."""

    def build(device: torch.device) -> Step:
        torch.manual_seed(0)
        layer = make().to(device)
        x = inputs(*shape).to(device).requires_grad_(backward)

        def step() -> None:
            with torch.set_grad_enabled(backward), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                y = layer(x)
            if backward:
                layer.zero_grad(set_to_none=True)
                x.grad = None
                y.sum().backward()

        return step

    return build


def training_step(make: Callable[[], nn.Module], shape: Sequence[int]) -> Callable[..., Step]:
    """Return the builder of a whole training step: forward, backward and AdamW, in bfloat16 on CUDA."""

    def build(device: torch.device) -> Step:
        torch.manual_seed(0)
        model = make().to(device).train()
        images, labels = torch.randn(*shape, device=device), torch.arange(shape[0], device=device) % 10
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        return partial(train_once, model, optimizer, images, labels)

    return build


def train_once(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Take one step, in bfloat16 on CUDA."""
    kind = images.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def operator_cases(
    quick: bool, compiled: bool, images: int | None = None, backends: Sequence[str] = ("auto",), amp: bool = False
) -> list[Case]:
    """Return the operators beside a naive reference and the limits, ``F.conv2d`` and fused attention.

    ``images``: per call; None: 4 if quick, else 16. ``backends``: of our layers; of several, each case names its own.
    """
    side, dim = (16, 192) if quick else (32, 192)
    batch = images or (4 if quick else 16)
    shape, n = (batch, 64, side, side), (side + 2) ** 2
    conv: dict[str, Callable[[], nn.Module]] = {
        "F.conv2d": lambda: nn.Conv2d(64, 128, 3, padding=1),
        "naive": lambda: NaiveConvNN2d(64, 128, 9),
        "ConvNN2d blend 0": lambda: ConvNN2d(64, 128, 9, blend=0.0),
    }
    first: dict[str, Callable[[], nn.Module]] = {"F.conv2d": lambda: nn.Conv2d(3, 64, 3, padding=1)}
    attention: dict[str, Callable[[int], nn.Module]] = {
        "fused attention": lambda h: Attention(dim, h),
        "naive": lambda h: NaiveConvNNAttention(dim, h, 9),
    }
    for backend in backends:
        named = f", {backend}" if len(backends) > 1 else ""
        ours: dict[str, Any] = {"backend": backend}
        few = ours | {"candidates": "random", "num_candidates": 32}
        conv[f"ConvNN2d blend 0.5{named}"] = partial(ConvNN2d, 64, 128, 9, blend=0.5, **ours)
        conv[f"ConvNN2d blend 1{named}"] = partial(ConvNN2d, 64, 128, 9, **ours)
        conv[f"ConvNN2d random 32{named}"] = partial(ConvNN2d, 64, 128, 9, **few)
        first[f"ConvNN2d blend 0.5{named}"] = partial(ConvNN2d, 3, 64, 9, blend=0.5, **ours)
        first[f"ConvNN2d blend 1{named}"] = partial(ConvNN2d, 3, 64, 9, **ours)
        attend = partial(ConvNNAttention, dim, k=9, **ours)
        attention[f"ConvNNAttention sum{named}"] = partial(attend, aggregation="sum")
        attention[f"ConvNNAttention depthwise{named}"] = attend
    if compiled:
        conv["ConvNN2d blend 1 compiled"] = lambda: Compiled(ConvNN2d(64, 128, 9))
        attention["ConvNNAttention depthwise compiled"] = lambda h: Compiled(ConvNNAttention(dim, h, 9))
    cases = []
    for backward in (False, True):
        what = "forward+backward" if backward else "forward"
        convs: list[tuple] = [(name, make, shape, noise, "") for name, make in conv.items()]
        convs += [(name, make, shape, real, ", activations") for name, make in conv.items() if name != "naive"]
        convs += [(name, make, (batch, 3, side, side), real, ", images") for name, make in first.items()]
        cases += [
            Case(f"conv {what}{on}", name, n, 9, layer_step(make, size, backward, inputs, amp))
            for name, make, size, inputs, on in convs
        ]
        for heads in (1, 3):
            group, sequence = f"attention {heads} heads {what}", (batch, 197, dim)
            cases += [
                Case(group, name, 197, 9, layer_step(partial(make, heads), sequence, backward, amp=amp))
                for name, make in attention.items()
            ]
    return cases


_CANDIDATES: dict[str, dict[str, Any]] = {"all": {}, "random 32": {"candidates": "random", "num_candidates": 32}}


def scaling_cases(quick: bool) -> list[Case]:
    """Return forward and backward passes over growing maps, and over k."""
    cases = []
    for side in (8, 16, 32) if quick else (8, 16, 32, 56, 80, 112):
        for name, options in _CANDIDATES.items():
            build = layer_step(partial(ConvNN2d, 64, 64, 9, 1, 0, **options), (1, 64, side, side))
            cases.append(Case("tokens", f"{name} candidates", side * side, 9, build))
    for k in (1, 9) if quick else (1, 4, 9, 16, 25, 49):
        build = layer_step(partial(ConvNN2d, 64, 64, k), (2, 64, 16, 16))
        cases.append(Case("neighbours", "ConvNN2d blend 1", 18 * 18, k, build))
    return cases


def training_cases(quick: bool) -> list[Case]:
    """Return whole training steps of swapped models beside the plain ones."""
    batch = 8 if quick else 32
    small = {"channels": (16, 16, 32, 32)} if quick else {}
    vit = {"img_size": 32, "patch_size": 4, "depth": 4 if quick else 12}
    attention = OperatorConfig("convnn_attention", "attention", "convnn.ConvNNAttention", similarity="dot",
                               self_first=False, weighting="softmax", aggregation="depthwise")  # fmt: skip
    makers: dict[str, tuple[str, dict, OperatorConfig | None]] = {
        "ResNet-18": ("resnet18", small, None),
        "ResNet-18 ConvNN": ("resnet18", small, OperatorConfig(k_policy="clamp")),
        "ViT-Tiny": ("vit_tiny_patch16_224", vit, None),
        "ViT-Tiny ConvNN": ("vit_tiny_patch16_224", vit, attention),
    }

    def make(name: str, kwargs: dict, operator: OperatorConfig | None) -> nn.Module:
        model = timm.create_model(name, num_classes=10, **kwargs)
        if operator is not None:
            swap_layers(model, {"min_kernel": 3}, operator)
        return model

    return [
        Case("training step", name, 0, 9, training_step(partial(make, *args), (batch, 3, 32, 32)), batch)
        for name, args in makers.items()
    ]


_BACKENDS = {"torch": "torch", "torch compiled": "torch", "triton": "triton"}


def backend_cases(quick: bool, device: torch.device) -> list[Case]:
    """Return both steps that have Triton kernels, and whole layers, with each backend; none off CUDA.

    The attention step selects by position, once for
    the whole batch, with every backend.
    """
    if device.type != "cuda" or missing(device) is not None:
        return []
    cases = []
    batch, sides = (4, (14,)) if quick else (32, (14, 32, 56))
    for side, k, dtype in itertools.product(sides, (9, 25), (torch.float32, torch.bfloat16)):
        n, precision = side * side, str(dtype).removeprefix("torch.")
        for step in ("selection", "attention"):
            group, size = f"backend {step} N={n} k={k} {precision}", (batch, side, k, dtype)
            cases += [Case(group, name, n, k, _step_of(step, name, *size)) for name in _BACKENDS]
    for heads in (1, 3):
        group, shape = f"backend ConvNNAttention {heads} heads", (batch, 197, 192)
        cases += [Case(group, name, 197, 9, layer_step(partial(_layer_of, name, heads), shape)) for name in _BACKENDS]
    return cases


def _layer_of(name: str, heads: int) -> nn.Module:
    layer = ConvNNAttention(192, heads, 9, backend=_BACKENDS[name])
    return Compiled(layer) if name.endswith("compiled") else layer


def _step_of(step: str, name: str, batch: int, side: int, k: int, dtype: torch.dtype) -> Callable[[torch.device], Step]:
    """Return the builder of a selection by features, or of attention to neighbours forward and backward."""
    geometry, backend = Geometry(side, side), _BACKENDS[name]
    by_features = Selection(k=k, similarity="dot", self_first=False)
    mixing = Mixing(weighting="softmax", aggregation="depthwise", backend=backend)

    def build(device: torch.device) -> Step:
        torch.manual_seed(0)
        q, key, v = (torch.randn(batch, 3, side * side, 64, device=device, dtype=dtype) for _ in range(3))
        weight = torch.ones(64, k, device=device, requires_grad=True)

        def select() -> Tensor:
            return select_neighbors(q, key, geometry, by_features, training=True, backend=backend).index

        def attend() -> Tensor:
            return neighbor_aggregate(q, key, v, geometry, by_features, mixing, blend=0.0, weight=weight, training=True)

        run = select if step == "selection" else attend
        run = torch.compile(run) if name.endswith("compiled") else run
        if step == "selection":
            return run
        leaves = [t.requires_grad_() for t in (q, key, v)]

        def both() -> None:
            for leaf in (*leaves, weight):
                leaf.grad = None
            run().sum().backward()

        return both

    return build


def measure(cases: Sequence[Case], device: torch.device, repeats: int, seconds: float) -> list[Timing]:
    """Time all cases of one group, interleaved: up to ``repeats`` rounds, or until ``seconds`` have passed."""
    steps = [case.build(device) for case in cases]
    for step in steps:
        step()
        step()
    times: list[list[float]] = [[] for _ in cases]
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for i, step in enumerate(steps):
            _wait(device)
            begin = time.perf_counter()
            step()
            _wait(device)
            times[i].append(1000 * (time.perf_counter() - begin))
    return [Timing(case, tuple(t)) for case, t in zip(cases, times, strict=True)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache(maxsize=1)
def _load_kernels() -> None:
    """Have everything compiled loaded, forward and backward, for few channels and for many."""
    stable_topk(torch.zeros(1, 64), 1)
    for channels in (3, 64):
        for blend in (0.5, 1.0):
            ConvNN2d(channels, 4, blend=blend)(torch.randn(1, channels, 4, 4, requires_grad=True)).sum().backward()


def peak_memory(case: Case, device: torch.device) -> int:
    """Return the bytes that one call needs above what is there before it; on a CPU in a process of its own."""
    if device.type == "cuda":
        step = case.build(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    # What the first call loads and compiles, and the inputs, belong to no case.
    _load_kernels()
    case.build(device)
    # A forked child starts with this process's memory, and what is free there would not be counted again.
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_peak_in_child, args=(case, sender))
    child.start()
    value = receiver.recv() if receiver.poll(600) else -1
    child.join()
    if value < 0:
        raise RuntimeError(f"{case.name}: its memory could not be measured")
    return value


def _peak_in_child(case: Case, sender: object) -> None:
    torch.set_num_threads(1)  # the thread pool does not survive a fork
    step = case.build(torch.device("cpu"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    sender.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))  # type: ignore[attr-defined]
