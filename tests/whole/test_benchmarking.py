"""The benchmark's references compute what ours compute, and its clock and memory counters count."""

import csv
import time

import benchmark_cases as benchmarking
import pytest
import torch
from benchmark import draw
from benchmark_cases import Case, NaiveConvNN2d, NaiveConvNNAttention, layer_step, measure, peak_memory
from benchmark_input import input_cases, input_share_cases
from figure_checks import texts_outside
from matplotlib.colors import to_hex
from torch import nn

from convnn import ConfigError, ConvNN2d, ConvNNAttention
from convnn.figures.style import COLOURS, NEUTRAL
from convnn.ops.triton import dispatch as backend

CPU = torch.device("cpu")


def test_the_naive_layers_are_ours():
    torch.manual_seed(0)
    naive, ours = NaiveConvNN2d(4, 6, 5).double(), ConvNN2d(4, 6, 5).double()
    ours.weight.data, ours.bias.data = naive.conv.weight.data, naive.conv.bias.data
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    assert (naive(x) - ours(x)).abs().max() < 1e-10
    naive, ours = NaiveConvNNAttention(12, 3, 4).double(), ConvNNAttention(12, 3, 4, qkv_bias=True).double()
    ours.qkv, ours.proj = naive.qkv, naive.proj
    ours.slot_weight.data = naive.conv.weight.data.squeeze(1)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    assert (naive(x) - ours(x)).abs().max() < 1e-10


def test_times_and_memory_are_of_what_is_measured():
    cases = [Case("g", str(ms), 0, 0, lambda _, ms=ms: lambda: time.sleep(ms / 1000)) for ms in (2, 20)]
    fast, slow = measure(cases, CPU, 4, 10)
    assert 2 <= fast.median < slow.median and slow.median >= 20 and len(fast.milliseconds) == 4
    assert fast.quartiles[0] <= fast.median <= fast.quartiles[1]
    freed = [torch.ones(50_000) for _ in range(1_000)]  # what a process has freed is needed again
    kept = freed.pop()
    del freed
    big = Case("g", "big", 0, 0, layer_step(lambda: nn.Conv2d(8, 64, 3), (4, 8, 256, 256), backward=False))
    assert 60e6 < peak_memory(big, CPU) < 400e6, kept.shape  # its output alone is 66 MB


def test_backends_are_compared_on_cuda_only(monkeypatch):
    assert benchmarking.backend_cases(True, CPU) == []
    monkeypatch.setattr(benchmarking, "missing", lambda device: None)
    cases = benchmarking.backend_cases(True, torch.device("cuda"))
    groups = {case.group: [c.name for c in cases if c.group == case.group] for case in cases}
    assert all(names == ["torch", "torch compiled", "triton"] for names in groups.values()) and len(groups) == 10
    for group in ("backend selection N=196 k=9 float32", "backend attention N=196 k=9 bfloat16"):
        plain, _, ours = (case.build(CPU) for case in cases if case.group == group)
        plain()
        with pytest.raises(ConfigError, match="needs a CUDA device" if backend._installed() else "not installed"):
            ours()


@pytest.mark.long
def test_the_script_writes_its_table_and_picture(tmp_path, call):
    code, err = call("scripts/benchmark.py", ["quick=true", "groups=neighbours", f"out={tmp_path}"])
    assert code == 0, err
    with (tmp_path / "benchmark.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["k"] for row in rows] == ["1", "9"] and all(float(row["ms_median"]) > 0 for row in rows)
    assert (tmp_path / "benchmark.png").stat().st_size > 5000
    code, err = call("scripts/benchmark.py", ["quick=true", "groups=x"])
    assert code == 2 and "groups=x matches no group" in err


@pytest.mark.parametrize(
    "bars, groups", [(0, ["tokens"]), (1, ["tokens", "neighbours"]), (9, ["tokens", "neighbours"])]
)
def test_the_picture_is_of_the_house(bars, groups):
    """Nothing is cut, a name has one colour, and the reference is grey."""
    rows = [{"group": f"g{i}", "case": f"a case with a long name {j}", "ms_median": 1 + j, "ms_q1": 1, "ms_q3": 9 + j,
             "ratio": 1 + j} for i in range(min(bars, 3)) for j in range(bars)]  # fmt: skip
    rows += [{"group": group, "case": case, "tokens": n, "k": n, "ms_median": n} for group in groups
             for case in ("ours", "theirs") for n in (4, 9)]  # fmt: skip
    figure = draw(rows, "A processor with a long name, 128 cores at 3.5 GHz, and 512 GiB of memory, torch 2.15.0+cpu")
    assert texts_outside(figure) == []
    curves = [line for axes in figure.axes for line in axes.lines if line.get_label() in ("ours", "theirs")]
    assert len({(line.get_label(), line.get_color()) for line in curves}) == 2 and len(curves) == 2 * len(groups)
    assert {line.get_color() for line in curves} == set(COLOURS[:2])
    assert bars == 0 or to_hex(figure.axes[0].patches[0].get_facecolor()) == NEUTRAL


def test_all_input_cases_do_the_same_work():
    """Each call is one epoch of all images; the stream's temporary files are JPEGs of the same noise."""
    cases = input_cases(quick=True)
    timings = measure(cases[:2], CPU, 1, 1)
    assert [t.case.name for t in timings] == ["Batches", "torchvision, 2 workers"]
    assert 3 * timings[0].median < timings[1].median  # 5 times and more; the margin is for a busy machine
    still, fresh = input_share_cases(quick=True)
    assert still.images == fresh.images == 16 and cases[0].images == 1280
    fresh.build(CPU)()
