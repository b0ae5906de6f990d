"""Runs that begin from a file of weights: what they are known by, and what becomes of them when the file is gone."""

import shutil

import pytest
import timm
import torch
import yaml
from helpers import equal_states, tiny, without_times
from training import rows, stop_after

from convnn.config.compose import compose_config
from convnn.config.continued import derived_config, resumed_config
from convnn.config.identity import fingerprint
from convnn.errors import ConfigError, WeightsError
from convnn.runs.checkpoint import load_checkpoint
from convnn.train.restore import evaluate_run
from convnn.train.run import run

SIZES = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1], "num_classes": 10}
OWN = ["swap.last=1", "operator=conv2d", "backbone.stem=default", "optim.lr=0.01"]


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(9)
    torch.save(timm.create_model("resnet18", **SIZES).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def config(file, folder, *more):
    return tiny(*OWN, f"backbone.checkpoint={file}", f"run.dir={folder}", *more)


def resumed(folder, *overrides):
    return resumed_config(folder, overrides, f"resume={folder}")


def test_a_run_is_known_by_the_file_not_by_its_place(file, tmp_path):
    shutil.copy(file, tmp_path / "other_place.pt")
    torch.save({"model": torch.load(file)}, tmp_path / "other.pt")
    own, moved, other = (
        fingerprint(config(f, "r")) for f in (file, tmp_path / "other_place.pt", tmp_path / "other.pt")
    )
    assert own == moved != other
    composed = compose_config([f"backbone.checkpoint={file}"])
    assert len(composed.backbone.checkpoint_sha256) == 64
    file.write_bytes(file.read_bytes() + b"more")
    assert fingerprint(config(file, "r")) != own
    with pytest.raises(ConfigError, match=r"backbone.checkpoint=.*gone.pt cannot be read: .*train.py resume=DIR"):
        config(tmp_path / "gone.pt", "r")
    with pytest.raises(ConfigError, match=r"backbone.pretrained=true and backbone.checkpoint both"):
        config(file, "r", "backbone.pretrained=true")


def test_a_run_begins_from_the_file_and_says_so(file, tmp_path, caplog):
    caplog.set_level("INFO")
    run(config(file, tmp_path / "r", "train.epochs=1", "optim.lr=1e-9", "optim.weight_decay=0"))
    total = f"{sum(p.numel() for p in timm.create_model('resnet18', **SIZES).parameters()):,}"
    assert f"{total} of {total} weights stem from the file" in caplog.text
    state, source = load_checkpoint(tmp_path / "r/checkpoints/last.pt")["model"], torch.load(file)
    assert (state["conv1.weight"] - source["conv1.weight"]).abs().max() < 1e-5
    kept = yaml.safe_load((tmp_path / "r/config.yaml").read_text())["backbone"]
    assert kept["checkpoint"] == str(file) and len(kept["checkpoint_sha256"]) == 64


@pytest.mark.parametrize("lose", ["gone", "another file"])
def test_a_run_is_resumed_and_evaluated_without_the_file(file, tmp_path, monkeypatch, lose):
    whole, stopped = config(file, tmp_path / "a"), config(file, tmp_path / "b")
    run(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run(stopped)["status"] == "interrupted"
    file.unlink() if lose == "gone" else file.write_bytes(b"nothing")
    assert run(resumed(tmp_path / "b"))["status"] == "complete"
    assert [without_times(row) for row in rows(tmp_path / "a")] == [without_times(row) for row in rows(tmp_path / "b")]
    a, b = (load_checkpoint(tmp_path / name / "checkpoints/last.pt")["model"] for name in "ab")
    assert equal_states(a, b)
    assert evaluate_run(resumed(tmp_path / "b"), tmp_path / "b", "last")["images"] == 16


def test_a_run_without_a_checkpoint_needs_the_file(file, tmp_path):
    run(config(file, tmp_path / "r", "train.epochs=1"))
    shutil.rmtree(tmp_path / "r/checkpoints")
    (tmp_path / "r/result.json").unlink()
    file.unlink()
    with pytest.raises(WeightsError, match="no such file"):
        run(resumed(tmp_path / "r"))


def test_another_run_from_a_folder_may_begin_from_another_file(file, tmp_path):
    run(config(file, tmp_path / "r", "train.epochs=1"))
    torch.save({"model": torch.load(file)}, tmp_path / "other.pt")
    same = derived_config(tmp_path / "r", ["seed=1"]).backbone
    other = derived_config(tmp_path / "r", [f"backbone.checkpoint={tmp_path}/other.pt"]).backbone
    assert same.checkpoint_sha256 != other.checkpoint_sha256 and other.checkpoint_sha256
    moved = shutil.move(file, tmp_path / "moved.pt")
    resumed(tmp_path / "r", f"backbone.checkpoint={moved}")
    with pytest.raises(ConfigError, match=r"backbone.checkpoint_sha256"):
        resumed(tmp_path / "r", f"backbone.checkpoint={tmp_path}/other.pt")


def test_a_frozen_run_trains_the_rest_and_counts_it(file, tmp_path, caplog):
    caplog.set_level("INFO")
    frozen = ["backbone.freeze=[conv1,bn1,layer1]", "optim.layer_decay=0.5", "train.ema=0.5"]
    result = run(config(file, tmp_path / "r", "train.epochs=1", "optim.name=sgd", *frozen))
    state, source = load_checkpoint(tmp_path / "r/checkpoints/last.pt")["model"], torch.load(file)
    moved = {name for name, value in source.items() if not torch.equal(state[name], value)}
    assert moved and not any(name.startswith(("conv1.", "bn1.", "layer1.")) for name in moved)
    assert f"{result['params_trained']:,} of {result['params']:,} parameters are trained" in caplog.text
    assert result["params_trained"] < result["params"]
