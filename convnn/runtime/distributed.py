"""Several processes that train one model: what torchrun tells each, and the few things that they do together.

Every process runs the same program. What they do together (``gather``, ``broadcast``, ``reduce``, a backward pass)
waits until all have come to the same call. So a process may leave the common path only if all do, at the same place:
one that stopped by itself, for a signal, an error or a loss that is not finite, would let the others wait for
``TIMEOUT``. Hence ``fail_together`` for what may fail on one alone, ``agreed_stop`` for signals, and a minimum over all
processes for what is not finite.

In one process nothing here does anything. torch is imported only where there is a group of processes.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from convnn.errors import ConfigError, PeerError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel

log = logging.getLogger("convnn")
T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""For what one process may take longer than another, such as a download. A process that ends is noticed at once."""

GRACE = 10.0
"""Seconds that a failed process waits before it ends: torchrun ends all processes as soon as one has ended, and so the
one that is to say why might not come to say it."""

LOST_PEER = "another process of the run has ended"
"""What a process says that cannot reach another any more, which may have had no time to say why."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among those of its run: its number and theirs, in all and on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


_world = World()
_store: Any = None
"""A table of keys and values that the first process keeps for all; None without a group."""


def _several_launched() -> bool:
    """Return whether the environment speaks of several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def world_from_environment() -> World:
    """Return the place of this process among those that torchrun started.

    Raises:
        ConfigError: if the environment speaks of several processes and does not say how they meet.
    """
    if not _several_launched():
        return World()
    size = os.environ["WORLD_SIZE"]
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size} is set without {', '.join(missing)}; start several processes with "
            "torchrun --nproc-per-node=N train.py ..., or unset WORLD_SIZE"
        )
    values = [os.environ[name] for name in _VARIABLES[:4]]
    if not all(value.isdecimal() for value in values):
        raise ConfigError(f"{', '.join(_VARIABLES[:4])} must be numbers, not {', '.join(values)}; use torchrun")
    rank, total, local_rank, local_size = map(int, values)
    return World(rank, total, local_rank, local_size)


def restarts() -> int:
    """Return how often torchrun has started these processes anew (``--max-restarts``)."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() else 0


def launch_name() -> str | None:
    """Return the name by which a call of torchrun is known through its restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID") or None
    # Without --rdzv-id or --standalone every call has that name; its agent, our parent, lives through restarts.
    return f"none, agent {os.getppid()} on {socket.gethostname()}" if name == "none" else name


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that torchrun started, if there are several; leave together unless something failed.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``: gloo on CPUs, NCCL on GPUs, one GPU for each process of a machine.

    Raises:
        ConfigError: if they cannot meet, or there are too few GPUs.
    """
    global _world, _store
    world = world_from_environment()
    if world.size == 1:
        yield
        return
    import torch.distributed as dist

    _world, _store = world, _meet(world, on_gpu=_takes_gpu(device, world))
    level = log.level
    if world.rank:
        log.setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")
    yield
    # Not after an error: the others may be gone, or wait for something else.
    dist.barrier()
    dist.destroy_process_group()
    log.setLevel(level)
    _world, _store = World(), None


def _takes_gpu(device: str, world: World) -> bool:
    """Return whether this process trains on a GPU, which is then its default one; else share the cores."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "mps":
        raise ConfigError(f"device=mps serves one process, not {world.size}; set device=cpu")
    if device.startswith("cuda:"):
        raise ConfigError(f"device={device}: each of {world.size} processes takes a GPU of its own; set device=cuda")
    on_gpu = device == "cuda" or (device == "auto" and count > 0)
    if on_gpu and world.local_size > count:
        fewer = f"start torchrun with --nproc-per-node={count} or set" if count else "set"
        raise ConfigError(
            f"device={device}: {world.local_size} processes on a machine with {count} usable CUDA devices; "
            f"{fewer} device=cpu"
        )
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # which torchrun sets
        torch.set_num_threads(max(1, usable_cores() // world.local_size))
    return on_gpu


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _meet(world: World, *, on_gpu: bool) -> Any:
    """Wait for the other processes and join them; return the store that they share."""
    import torch.distributed as dist

    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"convnn{restarts()}", store)  # addresses of an attempt outlive it there
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    except (RuntimeError, OSError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(f"the {world.size} processes could not meet at {where}: {first_line(error)}") from error
    return store


def refuse_several(program: str) -> None:
    """Raise ConfigError if torchrun started several of a program that is no single run."""
    if _several_launched():
        raise ConfigError(
            f"{program} is one process, but WORLD_SIZE={os.environ['WORLD_SIZE']}; start it without torchrun, "
            "or unset WORLD_SIZE"
        )


def leave_error_to_others() -> None:
    """Wait while another process says why the run ends."""
    time.sleep(GRACE)


def reports_error() -> bool:
    """Return whether this process is to show its error; to be asked once, by a process that is about to end.

    The first that fails shows its error: it draws number 1 from a counter in the common store, which needs no other
    process to answer. Processes that have not met yet have no such store, but all the same error; the first of each
    machine shows it, and the others do if that has not ended the run a moment later.
    """
    if _store is None:
        if _several_launched() and os.environ.get("LOCAL_RANK", "0") != "0":
            leave_error_to_others()
        return True
    try:
        first = _store.add("failed", 1) == 1
    except RuntimeError:  # its host has gone
        return True
    if not first:
        leave_error_to_others()
    return first


def rank_prefix() -> str:
    """Return how messages name this process: nothing for the first, else such as ``rank 1: ``."""
    return f"rank {_world.rank}: " if _world.rank else ""


def is_lost_connection(error: Exception) -> bool:
    """Return whether an error says that another process cannot be reached any more."""
    plain = isinstance(error, RuntimeError) and not type(error).__module__.startswith("convnn")
    said = r"gloo|NCCL|ProcessGroup|TCPStore|Connection (closed|reset|refused)|Broken pipe"
    return _world.size > 1 and plain and re.search(said, str(error)) is not None


def world() -> World:
    """Return the place of this process in the group that it has joined."""
    return _world


def is_main() -> bool:
    """Return whether this process writes what the run leaves: the first one does."""
    return _world.rank == 0


def gather(value: T) -> list[T]:
    """Return every process' value, by rank."""
    if _world.size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _world.size
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> T:
    """Return the first process' value."""
    if _world.size == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def reduce(tensor: Tensor, op: str = "SUM") -> Tensor:
    """Return the ``SUM``, ``MIN`` or ``MAX`` over processes; the argument stays as it is."""
    if _world.size == 1:
        return tensor
    import torch.distributed as dist

    result = tensor.clone()
    dist.all_reduce(result, getattr(dist.ReduceOp, op))
    return result


def fail_together(call: Callable[[], T]) -> T:
    """Call on every process. If that fails on any, it fails on all: the first with its error, the others quietly.

    Raises:
        PeerError: if it failed elsewhere.
    """
    if _world.size == 1:
        return call()
    error, value = None, None
    try:
        value = call()
    except Exception as caught:
        error = caught
    states = gather(None if error is None else isinstance(error, ConfigError))
    failed = next((rank for rank, state in enumerate(states) if state is not None), None)
    if failed is None:
        return value  # type: ignore[return-value]
    if error is not None and failed == _world.rank:
        raise error
    raise PeerError(failed, bool(states[failed]))


def one_per_machine_first(call: Callable[[], T]) -> T:
    """Call on one process of each machine, then on the others: for what fills a folder that all read."""
    first = _world.local_rank == 0
    value = fail_together(lambda: call() if first else None)
    late = fail_together(lambda: None if first else call())
    return value if first else late  # type: ignore[return-value]


def agreed_stop(stop: Callable[[], int | None]) -> Callable[[], int | None]:
    """Return ``stop`` as all processes see it: a signal that reaches one of them counts for all, at the same step.

    Signals come to each process at its own moment. All ask at the same steps, and stop at the first where any has one.
    """
    if _world.size == 1:
        return stop
    import torch

    return lambda: int(reduce(torch.tensor(stop() or 0), "MAX")) or None


def broadcast_buffers(*models: nn.Module) -> None:
    """Give every process the first one's buffers, as each has running means of its own images, and evaluates a part."""
    if _world.size > 1:
        import torch.distributed as dist

        for buffer in (buffer for model in models for buffer in model.buffers()):
            dist.broadcast(buffer, 0)


def check_batch_size(batch_size: int, *, pairs: bool) -> None:
    """Raise ConfigError if the joint batch, or its ``pairs`` of images for Mixup, cannot be shared equally."""
    parts = _world.size * (2 if pairs else 1)
    if _world.size > 1 and batch_size % parts:
        what = " with train.mixup or train.cutmix" if pairs else ""
        near = -(-batch_size // parts) * parts
        raise ConfigError(
            f"train.batch_size={batch_size} over {_world.size} processes{what} must be a multiple of {parts}; "
            f"set it to {near}, say"
        )


def with_sync_batchnorm(model: nn.Module, device: torch.device, choice: str) -> nn.Module:
    """Return a model whose batch normalisation spans all processes, as ``train.sync_batchnorm`` says.

    Raises:
        ConfigError: for ``true`` on CPUs, where torch has none.
    """
    if _world.size == 1 or choice == "false" or (choice == "auto" and device.type == "cpu"):
        return model
    if device.type == "cpu":
        raise ConfigError("train.sync_batchnorm=true needs GPUs; set it to auto or false")
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def data_parallel(model: nn.Module, device: torch.device, idle: bool) -> DistributedDataParallel:
    """Return a model whose backward pass averages gradients over the processes; ``idle``: some may get none."""
    from torch.nn.parallel import DistributedDataParallel

    # About dimensions of size 1, whose strides say nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=idle)
