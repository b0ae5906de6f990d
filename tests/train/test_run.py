"""A run in its folder: what it leaves, what it does with what is there, and what it refuses."""

import json
import logging
import os
import re
import shutil

import pytest
from helpers import tiny
from training import rows, stop_after

from convnn.errors import CheckpointError, ConfigError
from convnn.runs.checkpoint import load_checkpoint, previous_of
from convnn.runs.folder import open_run_folder
from convnn.train import trainer
from convnn.train.disk import checkpoint_bytes
from convnn.train.run import _best_of, run


def test_run_folder_contents(tmp_path):
    result = run(tiny("data.val_fraction=0.2", "train.batch_size=16", f"run.dir={tmp_path}/r"))
    names = {p.name for p in (tmp_path / "r").iterdir()}
    expected = {"config.yaml", "env.json", "train.log", "metrics.jsonl", "swap.txt", "checkpoints", "result.json"}
    assert expected <= names
    keys = "status fingerprint top1_last top1_best_on_test top5_last epochs seconds params gflops images_per_second"
    assert set(keys.split()) <= result.keys() and result["peak_memory_bytes"] > 0 and "torch" in result["versions"]
    assert result["top1_best_on_test"] is None and result["top1_at_best_val"] is not None
    env = json.loads((tmp_path / "r" / "env.json").read_text())
    assert env["versions"]["timm"] and "git_commit" in env and env["cores"]
    swap = (tmp_path / "r" / "swap.txt").read_text()
    assert "layer1.0.conv1" in swap and "ConvNN2d k=9" in swap


@pytest.mark.long
def test_if_exists(tmp_path):
    where = f"run.dir={tmp_path}/r"
    first = run(tiny(where))
    with pytest.raises(ConfigError, match=r"already holds a run \(complete\); set run.if_exists=resume"):
        run(tiny(where))
    stamp = (tmp_path / "r" / "metrics.jsonl").stat().st_mtime_ns
    for policy in ("skip", "resume"):
        assert run(tiny(where, f"run.if_exists={policy}")) == first
    assert (tmp_path / "r" / "metrics.jsonl").stat().st_mtime_ns == stamp
    for policy in ("skip", "resume"):
        with pytest.raises(ConfigError, match=r"another configuration \(train.epochs: 2 -> 3\)"):
            run(tiny(where, f"run.if_exists={policy}", "train.epochs=3"))
    again = run(tiny(where, "run.if_exists=overwrite", "train.epochs=1"))
    assert again["epochs"] == 1 and len(rows(tmp_path / "r")) == 1


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_text("x")
    for policy in ("fail", "overwrite", "resume"):
        with pytest.raises(ConfigError, match="not a run folder"):
            run(tiny(f"run.dir={tmp_path}", f"run.if_exists={policy}"))
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_run_folder_is_locked(tmp_path):
    folder = open_run_folder(tiny(f"run.dir={tmp_path}/r"))
    with pytest.raises(ConfigError, match=rf"in use by another process \(pid {os.getpid()}"):
        run(tiny(f"run.dir={tmp_path}/r", "run.if_exists=resume"))
    folder.close()


def test_nothing_is_left_when_the_parts_do_not_fit(tmp_path):
    for overrides in (
        ["data=imagefolder", f"data.root={tmp_path}/none"],
        ["train.batch_size=1000"],
        ["operator.k=200"],
        ["backbone.name=resnet81"],
        ["swap.match=layer9.*"],
        ["optim.name=adamx"],
    ):
        with pytest.raises(ConfigError):
            run(tiny(*overrides, f"run.dir={tmp_path}/a/b/run"))
        assert not (tmp_path / "a").exists()


def test_too_few_candidates_name_the_layer(tmp_path):
    with pytest.raises(ConfigError, match=r"layer 'layer\d.*k=40 exceeds the 36 candidates"):
        run(tiny("operator.k=40", f"run.dir={tmp_path}/r"))


@pytest.mark.long
def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, monkeypatch):
    where = f"run.dir={tmp_path}/r"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run(tiny(where, "train.epochs=4"))
    last = tmp_path / "r" / "checkpoints" / "last.pt"
    data = bytearray(last.read_bytes())
    weight = load_checkpoint(last)["model"]["layer1.0.conv1.weight"]
    data[data.index(weight.numpy().tobytes()) + 40] ^= 1
    last.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(last)
    resumed = run(tiny(where, "train.epochs=4", "run.if_exists=resume"))
    whole = run(tiny(f"run.dir={tmp_path}/w", "train.epochs=4"))
    assert resumed["top1_last"] == whole["top1_last"]
    assert rows(tmp_path / "r") == rows(tmp_path / "w")
    assert last.exists() and not previous_of(last).exists()


@pytest.mark.parametrize(
    "on_test, on_val, says",
    [(81.0, None, "best on test 81.00%"), (0.0, None, "best on test 0.00%"), (None, 0.0, "best on validation 0.00%")],
)
def test_the_best_accuracy_may_be_zero(on_test, on_val, says):
    result = {"top1_last": 0.0, "top1_best_on_test": on_test, "val_top1_best": on_val}
    assert _best_of(result) == f"top-1 0.00% (last epoch), {says}"


OTHER = [
    "[1, 2]",
    "3",
    "null",
    "{}",
    '{"status": 3}',
    '{"status": "complete"}',
    '{"status": "complete", "top1_last": "x"}',
]


@pytest.mark.parametrize("text", OTHER)
@pytest.mark.long
def test_a_result_with_other_content_is_made_anew(text, finished, tmp_path):
    folder, first = finished
    shutil.copytree(folder, tmp_path / "r")
    (tmp_path / "r" / "result.json").write_text(text)
    where = f"run.dir={tmp_path}/r"
    with pytest.raises(ConfigError, match=r"already holds a run \(unfinished\); set run.if_exists"):
        run(tiny(where))
    again = run(tiny(where, "run.if_exists=skip"))
    times = ("seconds", "images_per_second", "peak_memory_bytes")
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in first.items() if k not in times}
    assert json.loads((tmp_path / "r" / "result.json").read_text()) == again


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return folder and result of a short run."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    return folder, run(tiny(f"run.dir={folder}"))


@pytest.mark.parametrize(
    "overrides, kept",
    [
        ([], {"last.pt": True, "best.pt": False}),
        (["checkpoint.keep=last"], {"last.pt": True}),
        (["checkpoint.keep=best"], {"best.pt": False}),
        (["checkpoint.optimizer=false"], {"last.pt": False, "best.pt": False}),
        (["checkpoint.optimizer=false", "checkpoint.keep=best", "optim=sgd"], {"best.pt": False}),
        (["train.ema=0.9", "optim=sgd"], {"last.pt": True, "best.pt": False}),
    ],
    ids=str,
)
def test_what_stays_of_a_complete_run(overrides, kept, tmp_path, monkeypatch):
    """Which files, which of them have the optimizer's state, and that their size was foretold."""
    place, sizes = tmp_path / "r", []
    save = trainer.save_checkpoint
    # Weights that make the rest of a file small.
    wide = ["~backbone.kwargs.channels", "data.size=32", "train.epochs=2", "swap=none"]
    config = tiny(*wide, *overrides, f"run.dir={place}")

    def saved(path, *args, **kwargs):
        save(path, *args, **kwargs)
        sizes.append(sum(f.stat().st_size for f in path.parent.glob("*.pt")) + path.stat().st_size)

    monkeypatch.setattr(trainer, "save_checkpoint", saved)
    built = []
    told = checkpoint_bytes
    monkeypatch.setattr("convnn.train.run.checkpoint_bytes", lambda *args: built.append(told(*args)) or built[-1])
    result = run(config)
    found = {p.name: load_checkpoint(p)["optimizer"] is not None for p in (place / "checkpoints").glob("*.pt")}
    assert found == kept
    need, there = built[0], sum(p.stat().st_size for p in (place / "checkpoints").glob("*.pt"))
    assert there == pytest.approx(need.complete, rel=0.02) and max(sizes) <= need.training * 1.02
    assert run(tiny(*wide, *overrides, f"run.dir={place}", "run.if_exists=resume")) == result


def test_a_complete_run_whose_result_is_lost_needs_no_optimizer_to_say_it_again(tmp_path):
    own = ["checkpoint.optimizer=false", f"run.dir={tmp_path}/r"]
    first = run(tiny(*own))
    (tmp_path / "r" / "result.json").unlink()
    again = run(tiny(*own, "run.if_exists=resume"))
    assert again["top1_last"] == first["top1_last"] and again["epochs"] == first["epochs"]


def test_weights_alone_are_nothing_to_go_on_from(tmp_path, monkeypatch, caplog):
    place = f"run.dir={tmp_path}/r"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run(tiny(place, "train.epochs=4"))
    last = tmp_path / "r" / "checkpoints" / "last.pt"
    last.unlink()
    previous_of(last).unlink(missing_ok=True)
    assert (tmp_path / "r" / "checkpoints" / "best.pt").exists()
    run(tiny(place, "train.epochs=4", "run.if_exists=resume"))
    assert "best.pt, which holds weights alone, nothing to go on from" in (tmp_path / "r" / "train.log").read_text()
    assert len(rows(tmp_path / "r")) == 4


def test_a_disk_that_is_too_small_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("convnn.train.run.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    run(tiny(f"run.dir={tmp_path}/r", "train.max_steps=1"))
    log = (tmp_path / "r" / "train.log").read_text()
    assert "WARNING checkpoints: " in log and "but 1 B are free" in log


def test_progress_is_logged_where_no_terminal_shows_it(tmp_path, caplog):
    caplog.set_level(logging.INFO, "convnn")
    run(tiny(f"run.dir={tmp_path}/r", "data.size=160", "train.batch_size=16", "train.log_every=4", "swap=none"))
    lines = [line for line in (tmp_path / "r" / "train.log").read_text().splitlines() if "  step " in line]
    found = [
        re.search(r"epoch (\d)/2  step (\d+) of 10  train loss (\d\.\d{4})  [\de+.]+ images/s", line) for line in lines
    ]
    assert [m.groups()[:2] for m in found] == [("1", "4"), ("1", "8"), ("2", "4"), ("2", "8")]
    assert all(line.endswith(" of training left") for line in lines)


def test_a_complete_run_that_was_killed_before_it_tidied_up_does_so_when_asked_again(tmp_path):
    own = [f"run.dir={tmp_path}/r", "checkpoint.keep=last"]
    run(tiny(*own))
    folder = tmp_path / "r" / "checkpoints"
    for name in ("last.previous.pt", "best.pt"):
        shutil.copy(folder / "last.pt", folder / name)
    run(tiny(*own, "run.if_exists=skip"))
    assert [p.name for p in folder.iterdir()] == ["last.pt"]


def test_a_complete_run_that_cannot_tidy_up_is_complete(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(trainer, "settle", refuse)
    assert run(tiny(f"run.dir={tmp_path}/r"))["status"] == "complete"
    assert "more checkpoints are kept than checkpoint.keep says: read-only" in caplog.text
