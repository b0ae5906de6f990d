"""Blocks shared out among threads: results in order, switches and threads as before, nothing hidden from a mode."""

import multiprocessing
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convnn import ConvNN2d
from convnn.ops import precision, scores, threads
from convnn.ops.threads import run_blocks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def several():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def names_of(count):
    return run_blocks((lambda i=i: (i, threading.current_thread().name) for i in range(count)), CPU)


def test_results_come_in_order_from_several_threads():
    found = names_of(40)
    assert [i for i, _ in found] == list(range(40))
    assert all(name.startswith("convnn") for _, name in found) and torch.get_num_threads() == 3
    assert {torch.get_num_threads() for _ in range(2)} == {3}
    assert set(run_blocks((torch.get_num_threads for _ in range(20)), CPU)) == {1}
    assert names_of(0) == [] and names_of(1) == [(0, threading.current_thread().name)]


def test_few_jobs_exist_at_once():
    made, done = [0], [0]

    def jobs():
        for i in range(60):
            made[0] += 1
            assert i - done[0] < 12  # 2 per thread, and what the threads hold
            yield lambda: done.__setitem__(0, done[0] + 1)

    run_blocks(jobs(), CPU)
    assert made == done == [60] or made[0] == 60


def test_an_error_in_a_thread_is_the_callers():
    def fail():
        raise ValueError("in a block")

    with pytest.raises(ValueError, match="in a block"):
        run_blocks([lambda: 1, fail, lambda: 2], CPU)
    assert names_of(3)[2][0] == 2


def test_threads_compute_in_full_precision_without_gradients():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        state = [s.fp32_precision for s in precision._SWITCHES]
        assert "ieee" not in state

        def job():
            with precision.full_precision():  # as each product does: threads that leave it do not lower it for others
                inside = [s.fp32_precision for s in precision._SWITCHES]
            return torch.is_grad_enabled(), inside, [s.fp32_precision for s in precision._SWITCHES]

        for grad, inside, after in run_blocks((job for _ in range(20)), CPU):
            assert not grad and set(inside) == set(after) == {"ieee"}
        assert [s.fp32_precision for s in precision._SWITCHES] == state
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_follows_operations_sees_them_all():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    seen = []
    layer, x = ConvNN2d(4, 4), torch.randn(16, 4, 32, 32)
    with Names(), torch.no_grad():
        layer(x)
    assert sum(name.startswith("bmm") for name in seen) > 16
    with torch.autograd.profiler.profile() as profile, torch.no_grad():
        layer(x)
    assert sum(event.name == "aten::bmm" for event in profile.function_events) > 16


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_layer_chooses_what_one_thread_chooses(blend, context, monkeypatch):
    torch.manual_seed(0)
    layer, x = ConvNN2d(4, 4, blend=blend), torch.randn(3, 4, 12, 12)
    monkeypatch.setitem(scores.CHUNK_SCORES, "cpu", 1 << 12)  # many blocks
    with context():
        shared = layer.neighborhood(x).index
        torch.set_num_threads(1)
        assert torch.equal(layer.neighborhood(x).index, shared)


def _answer(sender):
    sender.send([i for i, _ in names_of(9)])


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_process_has_threads_of_its_own():
    names_of(9)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_answer, args=(sender,))
    child.start()
    assert receiver.poll(60) and receiver.recv() == list(range(9))
    child.join(10)
    assert child.exitcode == 0


def test_another_number_of_threads_is_another_pool():
    first = names_of(9)
    torch.set_num_threads(2)
    assert [i for i, _ in names_of(9)] == [i for i, _ in first]
    assert threads._pool.cache_info().currsize == 1


@pytest.mark.parametrize("blend", [0.5, 1.0])
def test_a_graph_is_whole_and_has_no_threads(blend):
    torch.manual_seed(0)
    layer, x = ConvNN2d(4, 4, 5, blend=blend), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_thread_that_outlives_the_main_one_still_computes():
    code = """
import threading, time, torch
from convnn import ConvNN2d
torch.set_num_threads(2)
layer, x = ConvNN2d(4, 4), torch.randn(2, 4, 40, 40)
def late():
    time.sleep(0.5)
    print(layer(x).shape, flush=True)
threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.Size([2, 4, 40, 40])" in done.stdout and "Traceback" not in done.stderr


def test_threads_that_cannot_start_leave_none_waiting(monkeypatch):
    start, began = threading.Thread.start, []

    def second_fails(thread):
        began.append(thread)
        if len(began) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    threads._pool.cache_clear()
    monkeypatch.setattr(threading.Thread, "start", second_fails)
    assert [i for i, _ in names_of(9)] == list(range(9))
    began[0].join(10)
    assert not began[0].is_alive() or threads._pool.cache_info().currsize == 0
    monkeypatch.undo()
    assert [i for i, _ in names_of(9)] == list(range(9))
