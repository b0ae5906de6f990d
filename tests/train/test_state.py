"""What a checkpoint holds of how far a run has come: kept as it is, and shared among any number of processes."""

import pytest
import torch
from helpers import tiny
from training import stop_after

from convnn.runs.checkpoint import load_checkpoint
from convnn.runtime import distributed
from convnn.runtime.distributed import World
from convnn.train.evaluate import Meter
from convnn.train.run import run
from convnn.train.state import RunState

CPU = torch.device("cpu")


def some_state():
    sums = torch.tensor([2.5, 3.0, 4.0, 8.0], dtype=torch.float64)
    rows = [{"epoch": 0, "train_loss": float("nan"), "layers": [{"name": "a", "blend": 0.1}]}]
    counts = {"epoch": 1, "step_in_epoch": 2, "step": 7, "train_seconds": 1.5, "train_images": 224, "skipped_steps": 1}
    best = {"epoch": 0, "test_top1": 12.5}
    return RunState(Meter(sums), best=best, rows=rows, neighbors={"a": torch.arange(4)}, **counts)


def test_a_state_comes_back_as_it_was():
    state = some_state()
    found = RunState.from_checkpoint(state.to_checkpoint(), CPU)
    assert torch.equal(found.meter.sums, state.meter.sums) and torch.equal(found.neighbors["a"], state.neighbors["a"])
    assert str(found.rows) == str(state.rows)  # NaN is not equal to itself
    for name in ("epoch", "step_in_epoch", "step", "best", "train_seconds", "train_images", "skipped_steps"):
        assert getattr(found, name) == getattr(state, name)


@pytest.mark.parametrize("before", [1, 2, 3])
def test_what_was_counted_is_kept_by_any_number_of_processes(before, monkeypatch):
    saved = some_state().to_checkpoint() | {"meter": [[1.0, 2.0, 3.0, float(rank)] for rank in range(before)]}
    total = torch.tensor(saved["meter"], dtype=torch.float64).sum(0)
    for now in (1, 2, 3):
        sums = []
        for rank in range(now):
            monkeypatch.setattr(distributed, "_world", World(rank, now))
            sums.append(RunState.from_checkpoint(saved, CPU).meter.sums)
        assert torch.equal(torch.stack(sums).sum(0), total)
        assert now != before or [s.tolist() for s in sums] == saved["meter"]


def test_checkpoints_keep_their_format(tmp_path, monkeypatch):
    """Runs that were begun with earlier versions go on."""
    stop_after(monkeypatch, 1)
    run(tiny("swap.last=1", f"run.dir={tmp_path}/r"))
    state = load_checkpoint(tmp_path / "r" / "checkpoints" / "last.pt")
    weights = ["model", "ema", "optimizer", "spectrum", "neighbors", "identity", "fingerprint", "format", "data"]
    counts = ["epoch", "step_in_epoch", "step", "skipped_steps", "train_seconds", "train_images", "grad_norms"]
    assert sorted(state) == sorted([*weights, *counts, "best", "layer_norms", "meter", "rows"])
    assert state["rows"] == "[]" and state["best"] == {} and state["step"] == state["step_in_epoch"] == 1
    assert [len(sums) for sums in state["meter"]] == [4] and state["meter"][0][3] == 32.0
    state.pop("neighbors")  # which the first runs did not have
    assert RunState.from_checkpoint(state, CPU).neighbors == {}
