"""Runs that are made longer: the rule for the rate, exactness, and what the folder says of it."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import equal_states, tiny
from programs import snapshot
from training import rates_of, rows, stop_after

from convnn.config.continued import resumed_config
from convnn.config.identity import fingerprint
from convnn.config.load import load_config
from convnn.config.schema import OptimConfig
from convnn.errors import CheckpointError, ConfigError
from convnn.report.results import find_results
from convnn.runs.checkpoint import load_checkpoint
from convnn.train.optim import make_optimizer, make_schedules
from convnn.train.restore import evaluate_run
from convnn.train.run import run

SMALL = ("swap.last=1", "diagnostics.enabled=false", "train.ema=0.9", "data.flip=true", "schedule=linear")


def config(where, *overrides):
    return tiny(*SMALL, *overrides, f"run.dir={where}")


def longer(where, *overrides):
    return run(resumed_config(where, overrides, f"resume={where}"))


def rates(lengths, **optim):
    optimizer = make_optimizer(torch.nn.Linear(2, 2), OptimConfig(lr=0.8, **optim))
    schedule = make_schedules(optimizer, OptimConfig(lr=0.8, **optim), lengths, 10)
    return rates_of(optimizer, schedule, lengths[-1][1])


@pytest.mark.parametrize(
    "optim",
    [
        {},
        {"warmup_epochs": 1, "warmup_lr": 0.1, "min_lr": 0.05},
        {"sched": "constant"},
        {"sched": "constant", "warmup_epochs": 1},
        {"sched": "step", "decay_epochs": 1},
        {"sched": "multistep", "milestones": [1]},
        {"sched": "poly", "power": 2.0},
        {"sched": "tanh"},
    ],
)
def test_from_the_end_of_each_length_the_rate_is_that_of_the_next(optim):
    """The stated rule, for every schedule; those that do not follow the length are as if never extended."""
    plain = {epochs: rates([(epochs, 10 * epochs)], **optim) for epochs in (2, 4, 7)}
    assert rates([(2, 20), (4, 40), (7, 70)], **optim) == plain[2] + plain[4][20:] + plain[7][40:]
    if optim.get("sched") in ("constant", "step", "multistep"):
        assert rates([(2, 20), (4, 40), (7, 70)], **optim) == plain[7]
    elif not optim:
        assert plain[2][-1] < 0.01 and plain[4][20] == pytest.approx(0.4)  # cosine goes back to half of its peak


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    where = tmp_path_factory.mktemp("finished") / "r"
    return where, run(config(where))


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "r")


def test_an_extended_run_is_the_one_that_its_configuration_describes(finished, folder, tmp_path, monkeypatch, caplog):
    first = finished[1]
    with caplog.at_level("INFO", "convnn"):
        monkeypatch.setattr(logging.getLogger("convnn"), "propagate", True)
        result = longer(folder, "train.epochs=4")
    assert result["status"] == "complete" and result["epochs"] == 4 and result["steps"] == 8
    assert result["extended_from"] == [{"epochs": 2, "steps": 4}] and first["extended_from"] == []
    assert rows(folder)[:2] == rows(finished[0]) and len(rows(folder)) == 4
    assert (
        "extended from 2 to 4 epochs: from step 4 on the learning rate is what a run of 8 steps has at that step; "
        "blend, k and temperature stay as they are at step 4"
    ) in caplog.text
    blends = [row["layers"][0]["blend"] for row in rows(folder)]
    assert blends[0] < 1 and blends[1:] == [1, 1, 1]
    assert rows(folder)[1]["lr"] < rows(folder)[2]["lr"]  # it rises again

    at_once = run(config(tmp_path / "once", "train.epochs=4", "train.extended_from=[{epochs:2}]"))
    assert rows(tmp_path / "once") == rows(folder) and at_once["fingerprint"] == result["fingerprint"]
    ours, theirs = (load_checkpoint(where / "checkpoints" / "last.pt") for where in (folder, tmp_path / "once"))
    assert equal_states(ours["model"], theirs["model"]) and equal_states(ours["ema"], theirs["ema"])

    assert longer(folder) == result and longer(folder, "train.epochs=4") == result  # nothing to do


@pytest.mark.long
@pytest.mark.parametrize("calls", [1, 4])
def test_an_extension_that_is_stopped_goes_on_exactly(calls, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, calls)
        assert longer(folder, "train.epochs=4")["status"] == "interrupted"
    assert json.loads((folder / "result.json").read_text())["fingerprint"] == fingerprint(load_config(folder))
    stopped = longer(folder)
    run(config(tmp_path / "once", "train.epochs=4", "train.extended_from=[{epochs:2}]"))
    assert stopped["status"] == "complete" and rows(tmp_path / "once") == rows(folder)


@pytest.mark.long
def test_a_run_that_was_interrupted_first_ends_as_planned(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(config(tmp_path / "r"))["status"] == "interrupted"
    longer(tmp_path / "r", "train.epochs=3")
    run(config(tmp_path / "once", "train.epochs=3", "train.extended_from=[{epochs:2}]"))
    assert rows(tmp_path / "once") == rows(tmp_path / "r")


@pytest.mark.long
def test_checkpoints_of_before_an_extension_are_the_runs(folder, finished):
    (folder / "checkpoints" / "best.pt").unlink()
    shutil.copy(folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt")
    result = longer(folder, "train.epochs=3")
    shutil.copy(finished[0] / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt")
    scores = evaluate_run(replace(load_config(folder), device="cpu"), folder, "best")
    assert scores["epochs"] == 2 and scores["top1"] == finished[1]["top1_last"]
    (folder / "checkpoints" / "last.pt").write_bytes(b"torn")
    (folder / "checkpoints" / "last.previous.pt").unlink(missing_ok=True)
    (folder / "result.json").unlink()
    again = longer(folder)  # from best.pt, of before the extension
    assert again["fingerprint"] == result["fingerprint"]
    assert len(rows(folder)) == 3


def test_nobody_takes_it_for_the_shorter_run(finished, folder):
    longer(folder, "train.epochs=3")
    for epochs, way in ((2, "that run is this one, extended: choose another run.dir"), (3, "set these back")):
        with pytest.raises(ConfigError, match=f"holds a run of another configuration .*train.extended_from.*{way}"):
            run(config(folder, f"train.epochs={epochs}", "run.if_exists=skip"))
    found = {one.folder: one for one in find_results([finished[0], folder]).runs}
    assert len(found) == 2 and {one.status for one in found.values()} == {"complete"}
    assert found[folder].keys["train.extended_from"] == '[{"epochs": 2}]'
    assert "train.extended_from" not in found[finished[0]].keys


def test_a_longer_length_alone_is_refused_with_the_way(folder):
    with pytest.raises(
        ConfigError, match=rf"train.epochs: 2 -> 3\).*train.py resume={folder} with these makes the run"
    ):
        run(config(folder, "train.epochs=3", "run.if_exists=resume"))


@pytest.mark.parametrize(
    "begun, more, said",
    [
        (["train.max_steps=3"], ["train.max_steps=4"], "train.max_steps=3 ended the run within an epoch of 2 steps"),
        (["train.max_steps=2"], ["train.epochs=9"], "train.epochs=9 leaves the run at 2 steps, as train.max_steps=2"),
    ],
)
def test_what_cannot_be_extended_stays_as_it_is(begun, more, said, tmp_path):
    run(config(tmp_path / "r", *begun))
    before = snapshot(tmp_path / "r")
    with pytest.raises(ConfigError, match=said):
        longer(tmp_path / "r", *more)
    assert snapshot(tmp_path / "r") == before
    if more == ["train.epochs=9"]:
        assert longer(tmp_path / "r", "train.epochs=3", "train.max_steps=null")["epochs"] == 3


def test_without_a_checkpoint_nothing_is_extended(folder):
    shutil.rmtree(folder / "checkpoints")
    kept = {name: (folder / name).read_bytes() for name in ("config.yaml", "result.json", "metrics.jsonl")}
    with pytest.raises(CheckpointError, match="has no checkpoint from which it could be extended"):
        longer(folder, "train.epochs=3")
    assert {name: (folder / name).read_bytes() for name in kept} == kept


def test_a_kill_between_the_two_writes_leaves_the_shorter_run(folder, finished, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("convnn.runs.folder.write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            longer(folder, "train.epochs=3")
    assert not (folder / "result.json").exists() and load_config(folder).train.epochs == 2
    again = longer(folder)
    assert again["fingerprint"] == finished[1]["fingerprint"] and again["top1_last"] == finished[1]["top1_last"]
