"""What a process needs around a model: device, precision, random generators, determinism, memory."""

from __future__ import annotations

import os
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnn.errors import ConfigError, first_line
from convnn.ops.subsets import seed_subsets
from convnn.runtime import distributed


def pick_device(name: str) -> torch.device:
    """Return the device of ``device=``; among several processes of a machine, each its own GPU.

    ``auto`` is CUDA where there is some, else the CPU. Apple's GPUs (mps) have to be asked for.

    Raises:
        ConfigError: if it names no device, or one that this machine or this torch has not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.world().size > 1:
        name = f"cuda:{distributed.world().local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:  # whose message lists dozens of names
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={name} is not one of auto, cpu, cuda, cuda:N, mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device={name}: this machine has {count} usable CUDA devices; set device=cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        lack = "this machine has no GPU of Apple's that torch can use" if torch.backends.mps.is_built() else _NO_METAL
        raise ConfigError(f"device=mps: {lack}; set device=cpu or auto")
    return device


_NO_METAL = "this torch was built without Apple's Metal (MPS), which is there on macOS alone"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_step(seed: int, step: int, device: torch.device, *, evaluation: bool = False, image: int = 0) -> None:
    """Seed for one training step, or the evaluation before it, so that a run can be entered at any step.

    ``image``: number of the first image of a batch to evaluate, so that its draws depend on no batch before it.

    Python's and NumPy's generators (Mixup) and that of random candidates are alike in all processes of a run; torch's
    (dropout, stochastic depth) is not.
    """
    entropy = [seed, step, evaluation, image] if image else [seed, step, evaluation]
    common, own = (
        int(np.random.SeedSequence(entropy, spawn_key=(stream,)).generate_state(1)[0])
        for stream in (0, 1 + distributed.world().rank)
    )
    random.seed(common)
    np.random.seed(common)
    torch.manual_seed(own)
    seed_subsets(common, device)


def make_autocast(amp: str, device: torch.device) -> Callable[[], Any]:
    """Return the precision context of ``train.amp``."""
    if amp == "bf16" or (amp == "auto" and device.type == "cuda"):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def device_name(device: torch.device) -> str:
    """Return what the device is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process had at once, on the GPU or else in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def explain_out_of_memory(batch_size: int, parts: int = 1) -> Iterator[None]:
    """Turn a full GPU into a ConfigError that names a batch size, and a number of parts of a batch, to try."""
    try:
        yield
    except RuntimeError as error:  # OutOfMemoryError is one; of Apple's GPUs torch raises no kind of its own
        kinds = {"CUDA": isinstance(error, torch.OutOfMemoryError), "MPS": "MPS backend out of memory" in str(error)}
        full = next((kind for kind in reversed(kinds) if kinds[kind]), None)
        if full is None:
            raise
        more = f", or train.grad_accumulation={2 * parts}" if 2 * parts <= batch_size else ""
        raise ConfigError(f"out of {full} memory; try train.batch_size={max(batch_size // 2, 1)}{more}") from error


@contextmanager
def explain_small_batches(batch_size: int, parts: int = 1) -> Iterator[None]:
    """Turn torch's complaint of a batch normalisation over a single value into a ConfigError."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        given = f"train.batch_size={batch_size}" + (f" train.grad_accumulation={parts}" if parts > 1 else "")
        raise ConfigError(f"{given}: batch normalisation needs more than one value") from error


def check_compiler(device: torch.device, mode: bool | str = True) -> None:
    """Raise ConfigError where ``train.compile`` finds no compiler: of C++ on a CPU, of C for Triton on a GPU."""
    key, way = _compile_key(mode), "install it, or set train.compile=false"
    if device.type == "cuda":
        if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
            raise ConfigError(f"{key} needs a C compiler such as gcc; {way}")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(f"{key} needs a C++ compiler such as g++; {way}") from error


GRAPHS = 1024
"""Graphs of one model at most, after which torch runs it uncompiled: each end of the blend and each size of batch has
one, and where shapes are fixed each k of a schedule."""


def compiled(model: Callable[[Tensor], Tensor], mode: bool | str) -> Callable[[Tensor], Tensor]:
    """Return the model as ``train.compile`` says.

    With ``true`` what changes becomes a variable of the second graph: the size of the batch, and the k of a layer.
    With a named mode the shapes of each graph are fixed, as CUDA graphs need them: a smaller last batch has its own,
    and so has each k. What such a graph returns is overwritten by the next step.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, GRAPHS)
    if isinstance(mode, bool):
        config.allow_unspec_int_on_nn_module = True  # else each k is a constant of a graph
        return torch.compile(model) if mode else model
    graph = torch.compile(model, mode=mode, dynamic=False)

    def step(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return graph(images)

    return step


@contextmanager
def explain_compilation(mode: bool | str = True) -> Iterator[None]:
    """Turn a failure of ``torch.compile`` into a ConfigError that names the key."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise ConfigError(
            f"{_compile_key(mode)}: the model cannot be compiled here ({first_line(error)}); set train.compile=false"
        ) from error


def _compile_key(mode: bool | str) -> str:
    return f"train.compile={str(mode).lower()}"


def set_determinism(mode: str) -> None:
    """Apply ``train.deterministic``."""
    if mode != "false":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode != "false", warn_only=mode == "warn")
    torch.backends.cudnn.benchmark = mode == "false"
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high" if mode == "false" else "highest")
