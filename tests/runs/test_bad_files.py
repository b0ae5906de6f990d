"""Bad inputs of the users' list that lie on a disk: checkpoints, run folders, full disks; see test_bad_inputs.py."""

import errno
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY, tiny
from programs import assert_refused
from training import stop_after

from convnn.errors import EXIT_FAILED
from convnn.runs import checkpoint
from convnn.runs import folder as rundir
from convnn.runs.folder import open_run_folder
from convnn.train.run import run

SMALL = [*TINY, "swap.last=1", "train.epochs=1"]


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch hostile-was-here",))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run that a signal ended after its first epoch."""
    folder = tmp_path_factory.mktemp("begun") / "r"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6)
        assert run(tiny("swap.last=1", "train.epochs=4", f"run.dir={folder}"))["epochs"] >= 1
    return folder


def spoil_all(folder, content):
    for path in (folder / "checkpoints").glob("*.pt"):
        content(path)


def save_hostile(path):
    torch.save({"format": checkpoint.FORMAT, "model": Hostile()}, path)


def other_model(path):
    state = checkpoint.load_checkpoint(path)
    state["model"]["conv1.weight"] = torch.zeros(9)
    torch.save(state, path)


def flip(path):
    data = bytearray(path.read_bytes())
    weight = checkpoint.load_checkpoint(path)["model"]["layer1.0.conv1.weight"]
    data[data.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(data)


CHECKPOINTS = {
    "empty": (lambda p: p.write_bytes(b""), r"last\.pt is not a whole checkpoint"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), r"last\.pt is not a whole checkpoint"),
    "html": (lambda p: p.write_bytes(b"<html>404</html>"), r"last\.pt is not a whole checkpoint"),
    "flipped": (flip, r"last\.pt is damaged: checksum"),
    "architecture": (other_model, r"does not fit the model: it has another shape of conv1\.weight"),
    "hostile": (save_hostile, r"not a safe or whole checkpoint: it holds objects other than .* nothing of it was run"),
    "hostile-pickle": (lambda p: p.write_bytes(pickle.dumps(Hostile())), "not a whole checkpoint"),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
@pytest.mark.long
def test_group08_checkpoints(fault, call, begun):
    spoil, hint = CHECKPOINTS[fault]
    shutil.copytree(begun, "r")
    spoil_all(Path("r"), spoil)
    kept = {p: p.read_bytes() for p in Path("r/checkpoints").iterdir()}
    args = [*TINY, "swap.last=1", "train.epochs=4", "run.dir=r", "run.if_exists=resume"]
    code, err = call("train.py", args)
    lines = err.strip().splitlines()
    assert code == EXIT_FAILED and len(lines) == 1 and lines[0].startswith("error: ") and re.search(hint, lines[0]), err
    assert {p: p.read_bytes() for p in Path("r/checkpoints").iterdir()} == kept
    assert_refused(call, "scripts/evaluate.py", ["run=r"], hint, EXIT_FAILED)
    assert not Path("hostile-was-here").exists()


def test_group08_missing(call, begun):
    shutil.copytree(begun, "r")
    (Path("r") / "checkpoints" / "best.pt").unlink()
    assert_refused(
        call, "scripts/evaluate.py", ["run=r", "checkpoint=best"], r"best\.pt: no such checkpoint", EXIT_FAILED
    )


def test_group09_resume_with_a_changed_configuration(call, begun):
    shutil.copytree(begun, "r")
    args = [*TINY, "swap.last=1", "train.epochs=5", "optim.lr=0.1", "run.dir=r", "run.if_exists=resume"]
    assert_refused(call, "train.py", args, r"optim\.lr: 0\.001 -> 0\.1\); leave that out, or begin")


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.long
def test_group10_a_disk_that_is_full_or_read_only_at_the_start(call, monkeypatch):
    assert_refused(call, "train.py", [*SMALL, "run.dir=/proc/none/r"], r"run\.dir=/proc/none/r cannot be written")
    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_text", full)
        assert_refused(call, "train.py", [*SMALL, "run.dir=a/b"], r"run\.dir=a/b cannot be written: No space left")
        patch.setattr(rundir, "lock", full)
        assert_refused(call, "train.py", [*SMALL, "run.dir=a/b"], r"run\.dir=a/b cannot be written: No space left")


@pytest.mark.long
def test_group10_a_disk_that_fills_up_in_mid_checkpoint(call, monkeypatch):
    save, calls = torch.save, iter(range(100))

    def save_thrice(state, file):
        if next(calls) < 3:
            return save(state, file)
        file.write(b"half")
        return full()

    monkeypatch.setattr(torch, "save", save_thrice)
    args = [*TINY, "swap.last=1", "train.epochs=4", "run.dir=r", "run.if_exists=resume"]
    code, err = call("train.py", args)
    assert code == EXIT_FAILED and err.count("\n") == 1 and "No space left on device" in err
    good = checkpoint.load_checkpoint(Path("r/checkpoints/last.pt"))
    assert good["epoch"] >= 1 and not list(Path("r").rglob("*.tmp"))
    monkeypatch.setattr(torch, "save", save)
    assert call("train.py", args)[0] == 0


def test_group17_a_folder_in_use_or_of_another_run(call, begun):
    shutil.copytree(begun, "r")
    args = [*TINY, "swap.last=1", "train.epochs=4", "run.dir=r"]
    assert_refused(call, "train.py", args, r"already holds a run \(interrupted\); set run\.if_exists=resume")
    folder = open_run_folder(tiny("swap.last=1", "train.epochs=4", "run.dir=r", "run.if_exists=resume"))
    hint = rf"in use by another process \(pid {os.getpid()} on .*\)"
    assert_refused(call, "train.py", [*args, "run.if_exists=resume"], hint)
    folder.close()


@pytest.mark.long
def test_overwrite_removes_the_old_run_only_once_the_new_one_is_possible(call, begun):
    shutil.copytree(begun, "r")
    args = [*TINY, "run.dir=r", "run.if_exists=overwrite"]
    assert_refused(call, "train.py", [*args, "operator.k=200"], "exceeds")
    assert call("train.py", [*args, "swap.last=1", "train.epochs=1", "seed=5"])[0] == 0
    assert not (Path("r") / "checkpoints" / "last.previous.pt").exists()
