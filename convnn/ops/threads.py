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
    if device.type != "cpu" or threads < 2 or not _unobserved():
        return [job() for job in jobs]
    results: list[T] = []
    waiting: deque[Future[T]] = deque()
    pool = None
    # The switches of precision are the process's, not the thread's: set here for as long as any job runs.
    with full_precision():
        first: Callable[[], T] | None = None
        for count, job in enumerate(jobs):
            if count == 0:  # of one job the whole is better shared out
                first = job
                continue
            if pool is None:
                pool = _pool(os.getpid(), threads)
                assert first is not None
                waiting.append(pool.submit(_without_gradients, first))
            if len(waiting) > 2 * threads:
                results.append(waiting.popleft().result())
            waiting.append(pool.submit(_without_gradients, job))
        if pool is None and first is not None:
            return [first()]
        results += [future.result() for future in waiting]
    return results


def _without_gradients(job: Callable[[], T]) -> T:
    with torch.no_grad():
        return job()


def _unobserved() -> bool:
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

    for started in [pool.submit(begin) for _ in range(threads)]:
        started.result()
    torch.set_num_threads(threads)  # for this thread as before, and for threads to come
    return pool
