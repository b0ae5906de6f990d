"""metrics.jsonl is the truth; W&B is quiet, offline by default, and cannot stop a run."""

import json
import sys
import time

import pytest
from helpers import tiny

from convnn.config.schema import TrackerConfig
from convnn.report.plots import _history
from convnn.runs.metrics import read_metrics
from convnn.runs.tracking import Tracker
from convnn.train.run import run


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_metrics_begin_with_the_rows_of_the_checkpoint(tmp_path):
    config, path = TrackerConfig(name="jsonl"), tmp_path / "metrics.jsonl"
    kept = [{"epoch": epoch, "step": epoch, "x": 0.1 * epoch} for epoch in range(2)]
    path.write_text('{"epoch": 0}\n{"epoch": 4, "torn')
    assert read_metrics(path) == [{"epoch": 0}]
    Tracker(config, tmp_path, {}, kept).log({"epoch": 2, "step": 2})
    assert read_metrics(path) == [*kept, {"epoch": 2, "step": 2}]
    Tracker(config, tmp_path, {})
    assert read_metrics(path) == []


@pytest.mark.long
def test_wandb_offline_run_is_written_and_kept_across_resumes(tmp_path):
    overrides = ["tracker=wandb", "swap.last=2", f"run.dir={tmp_path}/r"]
    run(tiny(*overrides))
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))
    assert len((tmp_path / "r" / "wandb_id").read_text()) == 8


@pytest.mark.parametrize("mode", ["online", "disabled"])
@pytest.mark.long
def test_wandb_never_prompts_or_blocks(mode, tmp_path, capsys):
    start = time.monotonic()
    result = run(tiny("tracker=wandb", f"tracker.mode={mode}", "swap.last=2", f"run.dir={tmp_path}/r"))
    assert result["status"] == "complete" and time.monotonic() - start < 30
    log = (tmp_path / "r" / "train.log").read_text()
    assert log.count("there is no W&B key") == (mode == "online")
    assert (tmp_path / "r" / "wandb").exists() == (mode == "online")


@pytest.mark.long
def test_online_with_a_key_but_no_network_goes_on_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    overrides = ["tracker=wandb", "tracker.mode=online", "tracker.init_timeout=3", "swap.last=2"]
    start = time.monotonic()
    assert run(tiny(*overrides, f"run.dir={tmp_path}/r"))["status"] == "complete"
    assert time.monotonic() - start < 45
    assert "W&B did not start online" in (tmp_path / "r" / "train.log").read_text()
    assert list((tmp_path / "r" / "wandb").glob("offline-run-*"))


def test_a_missing_wandb_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(tiny("tracker=wandb", "swap.last=2", f"run.dir={tmp_path}/r"))["status"] == "complete"
    assert "tracker=wandb, but wandb is not installed" in (tmp_path / "r" / "train.log").read_text()


def test_metrics_hold_each_layers_place_on_the_spectrum(tmp_path):
    run(tiny("schedule=depth", "operator=spectrum", "swap.first=3", f"run.dir={tmp_path}/r"))
    row = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert [(layer["blend"], layer["k"], layer["temperature"]) for layer in row["layers"]] == [
        (0.0, 9, 1.0),
        (0.5, 9, 1.0),
        (1.0, 9, 1.0),
    ]
    assert {"train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "lr", "step"} <= row.keys()


def test_an_epoch_without_a_loss_is_null_and_ends_no_curve(tmp_path):
    """JSON has no NaN; the curve goes on after an epoch whose steps were all skipped."""
    tracker = Tracker(
        TrackerConfig(name="jsonl"), tmp_path, {}, [{"epoch": 0, "train_loss": float("nan"), "test_top1": 5.0}]
    )
    tracker.log({"epoch": 1, "train_loss": 2.0, "test_top1": 6.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail)["train_loss"] is None
    assert [row["test_top1"] for row in _history(tmp_path)] == [5.0, 6.0]
