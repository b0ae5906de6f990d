"""Blocks of work shared out among threads of a CPU, each on one core from end to end.

Torch's own threads share each operation of a block out, wait for one another after each, and hand the block from
core to core. Threads that each take whole blocks do not.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, islice
from typing import TypeVar

import torch

from convnn.ops.precision import full_precision
from convnn.ops.topk import runs_at_once

T = TypeVar("T")


def run_blocks(jobs: Iterable[Callable[[], T]], device: torch.device) -> list[T]:
    """Return what the jobs return, in their order; on a CPU several run at a time, without gradients.

    A job is taken from ``jobs`` when a thread is near to free, so that few exist at once.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or not unobserved():
        return [job() for job in jobs]
    coming = iter(jobs)
    first = list(islice(coming, 2))
    if len(first) < 2:  # torch's threads share out what one block needs
        return [job() for job in first]
    results: list[T] = []
    waiting: deque[Future[T]] = deque()
    # The switches of precision are the process's, not the thread's: set here for as long as any job runs.
    with full_precision():
        pool = _pool_or_none(threads)
        for job in chain(first, coming):
            if len(waiting) > 2 * threads:
                results.append(waiting.popleft().result())
            waiting.append(_started(pool, job))
        return results + [future.result() for future in waiting]


def _pool_or_none(threads: int) -> ThreadPoolExecutor | None:
    try:
        return _pool(os.getpid(), threads)
    except RuntimeError:  # no thread starts any more: the main one has ended
        return None


def _started(pool: ThreadPoolExecutor | None, job: Callable[[], T]) -> Future[T]:
    """Give a job to a thread; to this one where threads take none any more, since the main one has ended."""
    if pool is not None:
        try:
            return pool.submit(_without_gradients, job)
        except RuntimeError:
            pass
    done: Future[T] = Future()
    done.set_result(_without_gradients(job))
    return done


def _without_gradients(job: Callable[[], T]) -> T:
    with torch.no_grad():
        return job()


def unobserved() -> bool:
    """Return whether nothing follows this thread's operations: modes that count them, default devices, profilers."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return runs_at_once() and not modes and not torch.autograd._profiler_enabled()


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return threads of this process, since those of a parent do not survive a fork; each computes alone."""
    pool = ThreadPoolExecutor(threads, "convnn")
    together = threading.Barrier(threads)

    def begin() -> None:
        together.wait()  # so that each thread takes one of these
        torch.get_num_threads()  # which reads the number of the process once, and would later
        torch.set_num_threads(1)  # of what this thread calls

    try:
        for started in [pool.submit(begin) for _ in range(threads)]:
            started.result()
    except RuntimeError:
        together.abort()  # those that started wait for the others
        raise
    torch.set_num_threads(threads)  # for this thread as before, and for threads to come
    return pool
