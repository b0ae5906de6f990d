"""predictions.npz of a run: what it holds, through stops and extensions, and what happens where it cannot be had."""

import json

import numpy as np
import pytest
from helpers import tiny
from training import rows, stop_after

from convnn.cli.evaluate import evaluate
from convnn.config.continued import resumed_config
from convnn.config.load import load_config
from convnn.runs.contents import PREDICTIONS
from convnn.runs.predictions import read_predictions
from convnn.train import kept
from convnn.train.restore import predict_run
from convnn.train.run import run

OWN = ("train.epochs=4", "train.eval_batch_size=5", "train.ema=0.9", "optim.lr=0.05", "diagnostics.enabled=false")


def finished(where, *overrides):
    return run(tiny(*OWN, f"run.dir={where}", *overrides))


def best_epoch(folder):
    return json.loads((folder / "result.json").read_text())["best_epoch"]


def test_they_are_what_the_run_and_its_checkpoints_say(tmp_path):
    """The accuracies of result.json, the epochs, and what an evaluation of each checkpoint predicts."""
    result = finished(tmp_path, "seed=2", "checkpoint.keep=all")
    accuracy = {"last": result["top1_last"], "best": result["top1_best_on_test"]}
    epochs = {"last": 3, "best": result["best_epoch"]}
    assert epochs["best"] < 3, "the case needs a best epoch that is not the last"
    for which in ("last", "best"):
        found = read_predictions(tmp_path, which)
        assert found.index.tolist() == list(range(16)) and found.epoch == epochs[which]
        assert 100 * found.correct().mean() == pytest.approx(accuracy[which])
        _, again, _ = predict_run(load_config(tmp_path), tmp_path, which)
        assert np.array_equal(found.predicted, again.predicted) and np.array_equal(found.label, again.label)
        assert np.array_equal(found.probabilities, again.probabilities.astype(np.float16))


def test_a_run_without_them_has_those_of_an_evaluation(tmp_path):
    finished(tmp_path, "checkpoint.predictions=off")
    assert not (tmp_path / PREDICTIONS).exists() and read_predictions(tmp_path) is None
    evaluate([f"run={tmp_path}", "checkpoint=best", "device=cpu"])
    assert read_predictions(tmp_path) is None and len(read_predictions(tmp_path, "best").predicted) == 16


def test_classes_alone(tmp_path):
    finished(tmp_path, "checkpoint.predictions=classes")
    found = read_predictions(tmp_path)
    assert found.probabilities is None and len(found.predicted) == 16


@pytest.mark.parametrize("calls", [12, *(pytest.param(n, marks=pytest.mark.long) for n in (9, 17))])
def test_a_run_that_was_stopped_leaves_the_same_file(calls, tmp_path, monkeypatch):
    finished(tmp_path / "whole", "seed=2")
    with monkeypatch.context() as patch:
        stop_after(patch, calls)
        assert finished(tmp_path / "parts", "seed=2")["status"] == "interrupted"
    assert 0 < len(rows(tmp_path / "parts")) < 4
    assert read_predictions(tmp_path / "parts") is None  # the last epoch is yet to come
    finished(tmp_path / "parts", "seed=2", "run.if_exists=resume")
    whole, parts = ((tmp_path / name / PREDICTIONS).read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_an_extended_run_has_those_of_its_new_end(tmp_path):
    finished(tmp_path, "seed=2")
    best = read_predictions(tmp_path, "best")
    run(resumed_config(tmp_path, ["train.epochs=5"], f"resume={tmp_path}"))
    assert read_predictions(tmp_path).epoch == 4
    if best_epoch(tmp_path) == best.epoch:
        assert np.array_equal(read_predictions(tmp_path, "best").probabilities, best.probabilities)


@pytest.mark.parametrize("damage", [None, b"", b"no archive"])
def test_a_lost_file_costs_the_best_epoch_alone(damage, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        stop_after(patch, 17)
        finished(tmp_path, "seed=2")
    (tmp_path / PREDICTIONS).unlink()
    if damage is not None:
        (tmp_path / PREDICTIONS).write_bytes(damage)
    result = finished(tmp_path, "seed=2", "run.if_exists=resume")
    assert result["best_epoch"] < 3, "the case needs a best epoch that is not the last"
    assert read_predictions(tmp_path).epoch == 3 and read_predictions(tmp_path, "best") is None
    assert f"those of the best epoch, {result['best_epoch'] + 1}, are not there" in caplog.text


def test_a_disk_that_refuses_ends_the_run_before_its_checkpoint(tmp_path, monkeypatch):
    """Nothing is complete without what was asked for, and a second call makes it."""
    with monkeypatch.context() as patch:
        patch.setattr(kept, "write_predictions", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
        with pytest.raises(OSError, match="no space left"):
            finished(tmp_path)
    assert not (tmp_path / "result.json").exists()
    assert finished(tmp_path, "run.if_exists=resume")["status"] == "complete" and read_predictions(tmp_path) is not None


def test_overwriting_removes_them(tmp_path):
    finished(tmp_path)
    finished(tmp_path, "run.if_exists=overwrite", "checkpoint.predictions=off")
    assert not (tmp_path / PREDICTIONS).exists()
