"""Checkpoints: whole or refused, and never executed."""

import errno
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from convnn.config.schema import BackboneConfig
from convnn.errors import CheckpointError, ConfigError
from convnn.models.backbones import create_backbone
from convnn.runs.checkpoint import FORMAT, load_checkpoint, load_model_state, previous_of, save_checkpoint
from convnn.runtime.files import write_atomically


class Hostile:
    def __reduce__(self):
        return (open, ("hostile-was-here", "w"))


def save(path, **state):
    save_checkpoint(path, {"weights": torch.arange(1000.0), **state})
    return path


def test_round_trip_and_previous(tmp_path):
    path = save(tmp_path / "c" / "last.pt", epoch=1)
    save(path, epoch=2)
    assert load_checkpoint(path)["epoch"] == 2 and load_checkpoint(previous_of(path))["epoch"] == 1
    assert torch.equal(load_checkpoint(path)["weights"], torch.arange(1000.0))
    assert torch.load(path, weights_only=True)["epoch"] == 2  # an ordinary torch file
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.previous.pt", "last.pt"]


def test_every_flipped_byte_of_the_content_is_noticed_or_harmless(tmp_path):
    path = save(tmp_path / "last.pt", epoch=1)
    good, data = load_checkpoint(path), path.read_bytes()
    noticed = 0
    for position in range(0, len(data), 37):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert state["epoch"] == good["epoch"] and torch.equal(state["weights"], good["weights"])
    assert noticed > 0.5 * len(data) / 37


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>404</html>", b"\x00" * 5000])
def test_files_that_are_none(content, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        load_checkpoint(path)


def test_missing_truncated_hostile_and_foreign_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    path = save(tmp_path / "last.pt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(path)
    torch.save({"format": 1, "x": Hostile()}, path)
    with pytest.raises(CheckpointError, match="not a safe or whole checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "hostile-was-here").exists()
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not written by convnn"):
        load_checkpoint(path)
    torch.save({"format": FORMAT + 1}, path)
    with pytest.raises(CheckpointError, match="of a newer convnn; this one reads format 2: update convnn"):
        load_checkpoint(path)
    torch.save({"format": FORMAT - 1}, path)
    with pytest.raises(CheckpointError, match=r"of an older convnn; .*: use the version in env.json"):
        load_checkpoint(path)


def test_a_failing_write_keeps_what_was_there(tmp_path, monkeypatch):
    path = save(tmp_path / "last.pt", epoch=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, full)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("write failed\nstack")))
    with pytest.raises(OSError, match="could not be written: write failed"):
        save(path, epoch=2)
    assert load_checkpoint(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_another_architecture_names_the_differences(tmp_path):
    state = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)).state_dict()
    with pytest.raises(CheckpointError, match=r"has unknown 1.weight, 1.bias; has another shape of 0.weight"):
        load_model_state(nn.Sequential(nn.Linear(5, 3)), state, tmp_path)


@pytest.mark.parametrize("content", [Hostile(), torch.nn.Linear(1, 1), np.zeros(2)])
def test_a_refusal_does_not_advise_to_load_it_all_the_same(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 2, "x": content}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt is not a safe .*tensors and plain values \(") as one:
        load_checkpoint(tmp_path / "c.pt")
    with pytest.raises(ConfigError, match=r"it holds objects other than") as two:
        create_backbone(BackboneConfig(kwargs={"checkpoint_path": str(tmp_path / "c.pt")}), 10)
    for error in (one, two):
        text = str(error.value)
        assert "\n" not in text and not re.search(r"weights_only|trust|likely succeed|two options", text)
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
