"""A run in its folder: what it leaves, what it does with what is there, and what it refuses."""

import json
import os
import shutil

import pytest
from helpers import tiny
from training import rows, stop_after

from convnn.errors import CheckpointError, ConfigError
from convnn.runs.checkpoint import load_checkpoint, previous_of
from convnn.runs.folder import open_run_folder
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
    assert previous_of(last).exists()


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
