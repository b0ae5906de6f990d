"""Which of several ways computes a step fastest on this device: measured where a case first appears, and remembered.

Nothing is known in advance of a GPU. The ways are timed on the tensors of the first call; the winner is kept for the
process and in a file beside torch's own, one for each device, its versions of torch and triton, and our kernels.

A graph of ``torch.compile`` has cases of its own, since torch's operations are other kernels there. Nothing can be
measured while it is traced: what is known then is looked up, and costs the graph nothing. ``for_graphs`` measures such
cases beforehand, in a pass through the network that is not compiled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnn.errors import first_line

log = logging.getLogger("convnn")

REPEATS = 3
"""Runs of each way that are timed, after one that is not; the least counts."""
GRAPH_SECONDS = 300.0
"""Of a process, for cases of graphs: each compiles plain torch, for tens of seconds. The next process goes on."""


@dataclass(frozen=True)
class Case:
    """A step, and what its speed depends on."""

    step: str
    device: torch.device
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]
    """Named sizes. Those of batches and maps count as the next power of two, see ``sized``."""
    kind: str = ""
    """What else tells cases apart."""

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        return " ".join(filter(None, (self.step, self.kind, sizes, str(self.dtype).removeprefix("torch."))))


def sized(exact: Mapping[str, int], **rough: int) -> tuple[tuple[str, int], ...]:
    """Return sizes of a case: ``exact`` as they are, ``rough`` as the next power of two."""
    return (*exact.items(), *((name, 1 << max(size - 1, 0).bit_length()) for name, size in rough.items()))


Times = dict[str, float | None]
"""Milliseconds of each way; None: it failed."""

_times: dict[tuple[str, str], Times] = {}
"""By device and case: all that was measured, by this process or before it."""
_used: dict[tuple[str, str], str] = {}
"""By device and case: what this process took."""
_answers: dict[tuple[Case, tuple[str, ...]], str] = {}
"""What was taken of these ways: asked in every step, so that it should cost no more than a look."""


_for_graphs: ContextVar[bool] = ContextVar("for_graphs", default=False)
_spent_on_graphs = 0.0
"""Seconds."""


@contextmanager
def for_graphs() -> Iterator[None]:
    """Measure inside what a graph of ``torch.compile`` would choose among, plain torch being compiled for it."""
    from torch._dynamo import config

    token = _for_graphs.set(True)
    try:
        # Each case is a graph of the same code, of which torch makes eight.
        with config.patch(recompile_limit=2**30, accumulated_recompile_limit=2**30):
            yield
    finally:
        _for_graphs.reset(token)


def measures_for_graphs() -> bool:
    """Return whether ``for_graphs`` is at work."""
    return _for_graphs.get()


def as_in_graphs(way: Callable[..., Any]) -> Callable[..., Any]:
    """Return a way of plain torch as ``for_graphs`` times it: compiled by itself, and else as it is."""
    if torch.compiler.is_compiling() or not _for_graphs.get():
        return way
    return torch.compile(way, fullgraph=True, dynamic=False)


def pick(
    step: str,
    like: Tensor,
    kind: str,
    exact: Mapping[str, int],
    rough: Mapping[str, int],
    ways: Mapping[str, Callable[[], object]],
) -> str:
    """Return the name of the fastest way, by measurement where that is not known yet; see ``fastest``.

    Args:
        step: what is computed.
        like: a tensor of the device and precision.
        kind: what else tells cases apart.
        exact: sizes that do.
        rough: sizes that do by their next power of two.
        ways: by name, the one that is taken unmeasured first. In a graph of ``torch.compile`` none is called, and sizes
            that are not fixed leave it at the first.
    """
    if len(ways) == 1:
        return next(iter(ways))
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        sizes = *exact.values(), *rough.values()
        if not all(has_static_value(size) for size in sizes):
            return next(iter(ways))
        numbers = tuple(int(size) for size in sizes)
        return _looked_up(step, like.device, like.dtype, kind, len(exact), (*exact, *rough), numbers, tuple(ways))
    kind = f"{kind} compiled" if _for_graphs.get() else kind
    return fastest(Case(step, like.device, like.dtype, sized(exact, **rough), kind), ways)


@torch.compiler.assume_constant_result  # of numbers and names: the table is no part of a graph
def _looked_up(
    step: str,
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    num_exact: int,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    ways: tuple[str, ...],
) -> str:
    named = list(zip(names, sizes, strict=True))
    case = Case(step, device, dtype, sized(dict(named[:num_exact]), **dict(named[num_exact:])), f"{kind} compiled")
    taken = _used[device_name(device), str(case)] = best_of(known_times(case), dict.fromkeys(ways))
    return taken


def fastest(case: Case, ways: Mapping[str, Callable[[], object]]) -> str:
    """Return the name of the fastest way, and measure where that is not known yet.

    Args:
        case: what is computed.
        ways: by name, the one that is taken unmeasured first: on a CPU, under torch's deterministic algorithms, in
            graphs and while they are captured. They compute the same, up to rounding.
    """
    usual = next(iter(ways))
    if len(ways) == 1 or not measures(case.device):
        return usual
    answer = _answers.get((case, names := tuple(ways)))
    if answer is not None:
        return answer
    key = device_name(case.device), str(case)
    known = known_times(case)
    if not set(ways) <= set(known):
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing or (_for_graphs.get() and _spent_on_graphs > GRAPH_SECONDS):
            return usual
        known = known | _time_all({name: way for name, way in ways.items() if name not in known}, case)
        _times[key] = known
        _store(case.device)
    _used[key] = _answers[case, names] = best_of(known, ways)
    return _used[key]


def best_of(times: Times, ways: Mapping[str, object]) -> str:
    """Return the way of the least time; the first one where all failed."""
    worked = {name: took for name in ways if (took := times.get(name)) is not None}
    return min(worked, key=worked.__getitem__) if worked else next(iter(ways))


def measures(device: torch.device) -> bool:
    """Return whether ways are timed at all on this device, now."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.are_deterministic_algorithms_enabled():
        return False
    return device.type == "cuda"


def known_times(case: Case) -> Times:
    """Return what was measured of a case, by this process or before it."""
    name = device_name(case.device)
    _load(name)
    return _times.get((name, str(case)), {})


def choices() -> dict[str, Any]:
    """Return what this process took: by case the way, and the milliseconds of all that were timed."""
    return {case: {"way": way, "ms": _times.get((device, case), {})} for (device, case), way in _used.items()}


def table() -> dict[tuple[str, str], Times]:
    """Return all that is known, to be given to ``adopt`` by the other processes of a group."""
    return dict(_times)


def adopt(times: dict[tuple[str, str], Times]) -> None:
    """Choose by what another process measured: all of a group then compile the same graph."""
    _times.update(times)
    _answers.clear()


def _time_all(ways: Mapping[str, Callable[[], object]], case: Case) -> Times:
    global _spent_on_graphs
    begin = time.monotonic()
    with torch.random.fork_rng([case.device] if torch.cuda.is_initialized() else []):  # dropout draws as ever
        times = {name: _time(way, case) for name, way in ways.items()}
    if _for_graphs.get():
        _spent_on_graphs += time.monotonic() - begin
        log.info("measured for graphs in %.0f s: %s", time.monotonic() - begin, case)
    return times


def _time(way: Callable[[], object], case: Case) -> float | None:
    try:
        return milliseconds(way)
    except Exception as error:  # a kernel that this device or version cannot build is no way
        log.warning("%s: one way fails here and is left out: %s", case, first_line(error))
        return None


def milliseconds(way: Callable[[], object]) -> float:
    """Return the least time of a way on the current GPU."""
    way()  # compiles
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        way()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


@lru_cache
def device_name(device: torch.device) -> str:
    """Return what a device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cache_file(name: str) -> Path:
    """Return where the times of a device are kept: in ``TORCH_HOME``, by its name and the versions that matter."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    stem = f"{name} torch {torch.__version__} triton {triton} kernels {_kernels()}"
    return Path(torch.hub.get_dir()).parent / "convnn" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', stem)}.json"


@lru_cache
def _kernels() -> str:
    """Return what changes with the kernels of this package, whose times would be those of others."""
    sources = sorted((Path(__file__).parent / "triton").glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]


@lru_cache
def _load(name: str) -> None:
    for case, times in _read(cache_file(name)).items():
        _times.setdefault((name, case), times)


def _read(path: Path) -> dict[str, Times]:
    try:
        found = json.loads(path.read_text())
        return {str(case): {str(k): None if v is None else float(v) for k, v in t.items()} for case, t in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged: measure again
        return {}


def _store(device: torch.device) -> None:
    name = device_name(device)
    path = cache_file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # What failed may have failed for want of memory: the next process tries it again.
        worked = {
            case: {way: took for way, took in times.items() if took is not None}
            for (own, case), times in _times.items()
            if own == name
        }
        merged = _read(path)
        for case, times in worked.items():
            merged.setdefault(case, {}).update(times)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(merged, file, indent=1)
        Path(file.name).replace(path)
    except OSError as error:  # a home that cannot be written costs the next process its measurements
        log.debug("%s cannot be written: %s", path, error)
