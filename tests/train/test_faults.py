"""What must not be lost: signals anywhere, several interruptions, damaged files, spikes, other environments, locks."""

import json
import os
import platform
import shutil
import signal
from importlib.metadata import version

import pytest
import torch
from helpers import equal_states, tiny
from training import HARD, rows, stop_after

from convnn.errors import CheckpointError, ConfigError
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.folder import open_run_folder
from convnn.train import trainer as training
from convnn.train.run import run, run_trainer
from convnn.train.trainer import Trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "r"
    run(tiny(*HARD, f"run.dir={folder}"))
    return folder


def assert_same(folder, whole):
    assert rows(folder) == rows(whole) and len(rows(whole)) == 3
    states = [load_checkpoint(f / "checkpoints" / "last.pt") for f in (folder, whole)]
    for part in ("model", "ema"):
        assert equal_states(states[0][part], states[1][part])
    results = [json.loads((f / "result.json").read_text()) for f in (folder, whole)]
    for key in ("status", "top1_last", "top1_at_best_val", "best_epoch", "steps", "skipped_steps"):
        assert results[0][key] == results[1][key], key


def at_call(monkeypatch, owner, name, number, signum):
    """Send this process a signal in the given call of a function."""
    original, calls = getattr(owner, name), iter(range(10**9))

    def wrapped(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    "signum, owner, name, number",
    [
        pytest.param(signal.SIGTERM, Trainer, "_train_step", 1, id="TERM-first-epoch"),
        pytest.param(signal.SIGINT, training, "save_checkpoint", 1, id="INT-checkpoint-write"),
        pytest.param(signal.SIGUSR2, training, "evaluate", 5, id="USR2-last-evaluation"),
        pytest.param(signal.SIGTERM, training, "check_sizes", 0, id="TERM-while-building"),
    ],
)
@pytest.mark.long
def test_signals_leave_a_checkpoint_wherever_they_come(signum, owner, name, number, whole, tmp_path, monkeypatch):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    config = tiny(*HARD, f"run.dir={tmp_path}/r", "run.if_exists=resume")
    try:
        with monkeypatch.context() as patch:
            at_call(patch, owner, name, number, signum)
            partial = run(config)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    assert (partial["status"], partial["signal"]) == ("interrupted", signal.Signals(signum).name)
    assert partial["exit_code"] == 128 + signum
    assert len(rows(tmp_path / "r")) < 3
    torch.manual_seed(99)
    assert run(config)["status"] == "complete"
    assert_same(tmp_path / "r", whole)


@pytest.mark.long
def test_many_interruptions(whole, tmp_path, monkeypatch):
    config, sessions = tiny(*HARD, f"run.dir={tmp_path}/r", "run.if_exists=resume"), 1
    stop_after(monkeypatch, 3)  # steps, batches of evaluations and ends of epochs
    while run(config)["status"] == "interrupted":
        sessions += 1
        assert sessions < 20
    assert sessions >= 4
    assert_same(tmp_path / "r", whole)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The folder of a run that was interrupted in its third epoch."""
    folder = tmp_path_factory.mktemp("interrupted") / "r"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 16)
        assert run(tiny(*HARD, f"run.dir={folder}"))["epochs"] == 2
    return folder


@pytest.fixture
def begun(interrupted, tmp_path):
    """Configuration and folder of a copy of the interrupted run."""
    shutil.copytree(interrupted, tmp_path / "r")
    return tiny(*HARD, f"run.dir={tmp_path}/r", "run.if_exists=resume"), tmp_path / "r"


@pytest.mark.long
def test_a_whole_best_checkpoint_stands_in_when_the_last_two_are_damaged(begun, whole):
    """Version 0.1 wrote such; today's has weights alone."""
    config, folder = begun
    last, previous = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "last.previous.pt"
    shutil.copy(previous, folder / "checkpoints" / "best.pt")
    last.write_bytes(b"<html>")
    previous.write_bytes(previous.read_bytes()[:1000])
    run(config)
    assert_same(folder, whole)
    assert "going on from best.pt" in (folder / "train.log").read_text()
    assert (folder / "checkpoints" / "last.damaged.pt").read_bytes() == b"<html>"


def test_the_best_weights_are_nothing_to_go_on_from_when_the_last_two_are_damaged(begun):
    config, folder = begun
    before = load_checkpoint(folder / "checkpoints" / "best.pt")
    for name in ("last.pt", "last.previous.pt"):
        (folder / "checkpoints" / name).write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="no other checkpoint there is whole either"):
        run(config)
    assert before["optimizer"] is None and load_checkpoint(folder / "checkpoints" / "best.pt")["step"] == before["step"]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b'{"epoch": 0, "st'])
def test_metrics_are_restored_from_the_checkpoint(content, begun, whole):
    config, folder = begun
    path = folder / "metrics.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    run(config)
    assert_same(folder, whole)


def test_another_environment_is_told_and_recorded(begun):
    config, folder = begun
    before = json.loads((folder / "env.json").read_text())
    before["versions"]["torch"], before["processor"] = "1.0", "abacus"
    (folder / "env.json").write_text(json.dumps(before))
    step = load_checkpoint(folder / "checkpoints" / "last.pt")["step"]
    changes = run(config)["environment_changes"]
    assert len(changes) == 2
    assert changes[1] == f"step {step}: versions.torch: 1.0 -> {version('torch')}"
    assert changes[0].startswith(f"step {step}: processor: abacus -> ")
    env = json.loads((folder / "env.json").read_text())
    assert env["changes"] == changes and env["versions"]["torch"] == version("torch")
    assert "versions.torch: 1.0 -> " in (folder / "train.log").read_text()


def test_the_same_environment_is_no_change(begun):
    config, folder = begun
    assert run(config)["environment_changes"] == []
    assert "another one than before" not in (folder / "train.log").read_text()


@pytest.mark.parametrize("host, told", [(platform.node(), "which is gone"), ("elsewhere", "nothing runs there (else")])
def test_a_lock_left_behind_is_recognised(host, told, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("convnn.runs.folder.log.propagate", True)
    config = tiny(f"run.dir={tmp_path}")
    (tmp_path / ".lock").write_text(f"pid 4194305 on {host}\n")
    open_run_folder(config).close()
    assert len(caplog.records) == 1 and f"was in use by pid 4194305 on {host}" in caplog.text
    assert told in caplog.text
    caplog.clear()
    open_run_folder(config).close()  # this one was given back
    assert not caplog.records


def test_leftovers_of_a_kill_are_no_run_and_go(tmp_path):
    (tmp_path / ".config.yaml.123.tmp").write_text("half")
    run(tiny("swap.last=1", "train.epochs=1", f"run.dir={tmp_path}"))
    assert not list(tmp_path.glob(".*.tmp"))


# ------------------------------------------------------------------------------------------------ divergence


def spikes(monkeypatch, *steps):
    """Make the images of some steps infinite."""
    original = Trainer._train_step

    def step(self, images, labels):
        return original(self, images * torch.inf if self.state.step in steps else images, labels)

    monkeypatch.setattr(Trainer, "_train_step", step)


def test_spikes_are_skipped_up_to_the_threshold(tmp_path, monkeypatch):
    spikes(monkeypatch, 1, 2)
    common = ["train.epochs=3", "train.ema=0.9", "swap.last=2"]
    result = run(tiny(*common, "train.skip_nonfinite=2", f"run.dir={tmp_path}/two"))
    assert (result["status"], result["steps"], result["skipped_steps"]) == ("complete", 6, 2)
    state = load_checkpoint(tmp_path / "two" / "checkpoints" / "last.pt")
    assert all(value.isfinite().all() for value in (*state["model"].values(), *state["ema"].values()))
    taken = {int(s["step"]) for s in state["optimizer"]["state"].values()}
    assert taken == {4} and state["skipped_steps"] == 2
    assert "step 1 skipped: loss is not finite (1 of 2)" in (tmp_path / "two" / "train.log").read_text()
    result = run(tiny(*common, "train.skip_nonfinite=1", f"run.dir={tmp_path}/one"))
    assert (result["status"], result["exit_code"], result["steps"]) == ("diverged", 3, 3)
    last = tmp_path / "one" / "checkpoints" / "last.pt"
    assert result["reason"].startswith("loss is not finite at step 2 (epoch 2, lr ")
    assert result["reason"].endswith(f"the last good checkpoint is {last}")
    assert load_checkpoint(last)["step"] == 2


def test_the_number_of_skipped_steps_survives_a_resume(tmp_path, monkeypatch):
    spikes(monkeypatch, 0, 3)
    config = tiny("train.skip_nonfinite=1", "swap.last=1", f"run.dir={tmp_path}/r", "run.if_exists=resume")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(config)["skipped_steps"] == 1
    assert run(config)["status"] == "diverged"


class SteepLoss(torch.nn.CrossEntropyLoss):
    """Adds zero, whose derivative is NaN."""

    def forward(self, output, target):
        return super().forward(output, target) + (0 * output).square().sqrt().sum()


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_checkpoint(tmp_path, monkeypatch):
    config = tiny("swap.last=1", f"run.dir={tmp_path}/r")
    folder = open_run_folder(config)
    trainer = Trainer(config, folder)
    trainer.criterion = SteepLoss()
    result = run_trainer(trainer, lambda: None)
    folder.close()
    assert result["status"] == "diverged"
    assert result["reason"].startswith("gradient is not finite at step 0 (epoch 1, lr 0.001); there is no checkpoint")
    assert not (tmp_path / "r" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------------ the trials


@pytest.mark.slow
def test_fault_trials(tmp_path):
    import subprocess
    import sys

    from convnn.config.compose import CONF_DIR

    few = ["kills=6", "writes=10", "signals=6", "checkpoints=8", "files=6", "disks=2", "limits=3", "torchrun=4"]
    script = [sys.executable, str(CONF_DIR.parent / "scripts" / "fault_trials.py"), *few]
    done = subprocess.run([*script, f"dir={tmp_path}/t", f"out={tmp_path}/table.md"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "table.md").read_text().splitlines()[-1].count("**0**") >= 2


def test_run_names_do_not_lead_out_of_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("../x", "/x", "a/../../x"):
        with pytest.raises(ConfigError, match=r"leads out of run\.root=runs; set run.dir instead"):
            run(tiny(f"run.name={name}"))
    assert not list(tmp_path.iterdir())
    folder = open_run_folder(tiny("run.name=a/b"))
    folder.close()
    assert folder.path.parent == (tmp_path / "runs" / "a").relative_to(tmp_path)
