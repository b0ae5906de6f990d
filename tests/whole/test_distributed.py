"""Several processes train one model: two gloo processes on the CPU against one process."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, without_times

from convnn.config.compose import compose_config
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.metrics import read_metrics
from convnn.runs.predictions import read_predictions
from convnn.train.run import run

ROOT = Path(__file__).resolve().parents[2]

# No batch normalisation and no dropout, but all else that is random.
VIT = [
    "data=digits",
    "data.limit=32",
    "data.limit_test=65",
    "data.crop_padding=1",
    "data.flip=true",
    "train.batch_size=32",
    "train.epochs=20",
    "optim.warmup_epochs=0",
    "optim.lr=0.003",
    "optim.clip_grad=1.0",
    "tracker=jsonl",
    "device=cpu",
    "backbone=vit_tiny",
    "backbone.image_size=16",
    "+backbone.kwargs.depth=2",
    "+backbone.kwargs.embed_dim=24",
    "operator=convnn_attention",
    "swap=all_attention",
    "operator.k=4",
    "operator.candidates=random",
    "operator.num_candidates=11",
    "operator.eval_candidates=resample",
    "schedule=linear",
    "train.mixup=0.4",
    "train.cutmix=0.5",
    "train.label_smoothing=0.1",
    "train.ema=0.9",
    "diagnostics.enabled=false",
]


def start(*args, path=None, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "train.py", *args]
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def call(*args, path=None, timeout=400):
    process = start(*args, path=path)
    out, err = process.communicate(timeout=timeout)
    # torchrun adds a report of its own.
    own = [line for line in err.splitlines() if line.startswith(("error:", "RuntimeError")) or "train.py" in line]
    return process.returncode, out, err, [line for line in own if line.startswith("error:")]


def rows(folder):
    return [without_times(row) for row in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.long
def test_two_processes_equal_one_with_the_joint_batch(tmp_path):
    """One step an epoch, so that the epochs' losses are the steps'; the last evaluation batch has a single image."""
    one = run(compose_config([*VIT, f"run.dir={tmp_path}/one"]))
    code, out, err, _ = call(*VIT, f"run.dir={tmp_path}/two")
    assert code == 0, err
    a, b = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(a) == len(b) == 20 and a[0]["train_loss"] - a[-1]["train_loss"] > 0.01
    for x, y in zip(a, b, strict=True):
        assert y["train_loss"] == pytest.approx(x["train_loss"], rel=1e-5)
        assert y["test_loss"] == pytest.approx(x["test_loss"], rel=1e-6)
        for mine, theirs in zip(x.pop("layers"), y.pop("layers"), strict=True):
            for key in ("name", "blend", "k", "temperature"):
                assert mine[key] == theirs[key]
        for key in ("grad_norm", "grad_norm_max"):
            assert y.pop(key) == pytest.approx(x.pop(key), rel=1e-3)
        assert {k: v for k, v in x.items() if not k.endswith("loss")} == {
            k: v for k, v in y.items() if not k.endswith("loss")
        }
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    for key in ("top1_last", "top5_last", "steps", "params", "gflops", "fingerprint"):
        assert one[key] == two[key]
    weights = [load_checkpoint(tmp_path / d / "checkpoints" / "last.pt") for d in ("one", "two")]
    for part in ("model", "ema"):
        for key, value in weights[0][part].items():
            assert torch.allclose(value, weights[1][part][key], atol=1e-4)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {p.name for p in (tmp_path / "two").iterdir()}
    for which in ("last", "best"):
        mine, theirs = (read_predictions(tmp_path / name, which) for name in ("one", "two"))
        assert np.array_equal(mine.index, theirs.index) and np.array_equal(mine.label, theirs.label)
        assert np.array_equal(mine.predicted, theirs.predicted) and mine.epoch == theirs.epoch
        assert np.allclose(mine.probabilities, theirs.probabilities, atol=2e-3)
    for text in (out, (tmp_path / "two" / "train.log").read_text()):
        assert len(re.findall(r"epoch +20/20 ", text)) == 1


# -------------------------------------------------------------------------------------------- slow: more starts


# Batch normalisation and dropout, which are each process' own.
LONG = [
    *TINY,
    "swap.last=4",
    "operator=spectrum",
    "schedule=linear",
    "operator.candidates=random",
    "operator.num_candidates=24",
    "data.size=1024",
    "train.epochs=4",
    "data.flip=true",
    "backbone.drop_rate=0.2",
    "train.mixup=0.3",
    "train.ema=0.9",
]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_a_run_anew_that_lost_a_process(rank, tmp_path):
    """``--max-restarts`` with the default run.if_exists: the run goes on from its checkpoint, in one folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command += ["train.py", *LONG, f"run.dir={tmp_path}/run"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    os.kill(worker(process.pid, rank), signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "resumed at epoch" in out, out
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "complete"
    assert not [line for line in err.splitlines() if line.startswith("error:") and "another process" not in line], err


def worker(parent, rank):
    """Return the number of the process of a rank that torchrun has started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            said = b"\0" + path.with_name("environ").read_bytes()
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent and f"\0RANK={rank}\0".encode() in said:
                return int(path.parent.name)
    raise AssertionError(f"no process of rank {rank}")


def stop(folder, args, signum, whom):
    """Start two processes, and end them within the second epoch."""
    process = start(*args, f"run.dir={folder}")
    end = time.monotonic() + 300
    while not read_metrics(folder / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    time.sleep(0.3)
    pid = process.pid
    if whom == "worker":
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
        pid = max(map(int, found.stdout.split()))
    os.kill(pid, signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    return err


@pytest.mark.slow
def test_stopped_and_resumed_processes_equal_uninterrupted_ones(tmp_path):
    code, _, err, _ = call(*LONG, f"run.dir={tmp_path}/whole")
    assert code == 0, err
    for name, signum, whom in (("term", signal.SIGTERM, "torchrun"), ("kill", signal.SIGKILL, "worker")):
        err = stop(tmp_path / name, LONG, signum, whom)
        last = load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")
        if name == "term":
            assert json.loads((tmp_path / name / "result.json").read_text())["status"] == "interrupted"
            assert last["step_in_epoch"] > 0
        else:
            assert err.count("another process of the run has ended") == 1
        code, out, err, _ = call(*LONG, f"run.dir={tmp_path / name}", "run.if_exists=resume")
        assert code == 0 and out.count("resumed at epoch") == 1, err
        assert rows(tmp_path / name) == rows(tmp_path / "whole")
        final = [load_checkpoint(tmp_path / d / "checkpoints" / "last.pt") for d in (name, "whole")]
        assert all(torch.equal(value, final[1]["ema"][key]) for key, value in final[0]["ema"].items())


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_another_number_of_processes_continues_a_run(first, tmp_path, monkeypatch):
    args = [*VIT, "data.limit=320", "train.epochs=4"]
    whole = tmp_path / "whole"
    run(compose_config([*args, f"run.dir={whole}"]))
    folder = tmp_path / "r"
    again = [*args, f"run.dir={folder}", "run.if_exists=resume"]
    if first == 2:
        stop(folder, args, signal.SIGTERM, "torchrun")
        run(compose_config(again))
    else:
        from training import stop_after

        with monkeypatch.context() as patch:
            stop_after(patch, 14)
            run(compose_config([*args, f"run.dir={folder}"]))
        code, _, err, _ = call(*again)
        assert code == 0, err
    for x, y in zip(rows(whole), rows(folder), strict=True):
        assert y["train_loss"] == pytest.approx(x["train_loss"], rel=1e-5)
        assert y["test_top1"] == x["test_top1"]


@pytest.mark.slow
def test_two_then_one_then_two_processes(tmp_path, monkeypatch):
    """What docs/several_gpus.md says is equal: losses to rounding, accuracies, schedules and all that is drawn."""
    from training import stop_after

    args = [*VIT, "data.limit=320", "train.epochs=4"]
    whole, folder = tmp_path / "whole", tmp_path / "r"
    code, _, err, _ = call(*args, f"run.dir={whole}")
    assert code == 0, err
    again = [*args, f"run.dir={folder}", "run.if_exists=resume"]
    stop(folder, args, signal.SIGTERM, "torchrun")
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        assert run(compose_config(again))["status"] == "interrupted"
    code, out, err, _ = call(*again)
    assert code == 0 and out.count("resumed at epoch") == 1, err
    assert json.loads((folder / "result.json").read_text())["processes"] == 2
    for x, y in zip(rows(whole), rows(folder), strict=True):
        assert y["train_loss"] == pytest.approx(x["train_loss"], rel=1e-5)
        assert y["test_loss"] == pytest.approx(x["test_loss"], rel=1e-5)
        assert (y["test_top1"], y["lr"]) == (x["test_top1"], x["lr"])
    final = [load_checkpoint(f / "checkpoints" / "last.pt") for f in (whole, folder)]
    for key, value in final[0]["model"].items():
        assert torch.allclose(value, final[1]["model"][key], atol=1e-4), key


FAULT = """
import os, signal
from convnn.data.datasets import load_synthetic

def load(config):
    if os.environ.get("RANK") == "1":
        {fault}
    return load_synthetic(config)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, message",
    [
        ("raise RuntimeError('a fault of the test')", r"^error: rank 1: RuntimeError$"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"^error: another process of the run has ended"),
        ("raise OSError('no such disk')", r"^error: rank 1: no such disk$"),
    ],
)
def test_a_failing_rank_ends_all_with_one_message(fault, message, tmp_path):
    (tmp_path / "fault.py").write_text(FAULT.format(fault=fault))
    begin = time.monotonic()
    code, _, err, lines = call(*TINY, "data.target=fault.load", f"run.dir={tmp_path}/r", path=tmp_path)
    assert code == 1 and len(lines) == 1 and re.search(message, lines[0]), err
    assert time.monotonic() - begin < 200
    assert "RuntimeError" not in message or "RuntimeError: a fault of the test" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, hint",
    [
        (["operator.kk=9"], "did you mean 'operator.k'?"),
        (["operator.k=200"], "k=200 exceeds"),
        (["optim=sgd", "optim.lr=1e30"], None),
    ],
)
def test_a_wrong_configuration_is_one_line(args, hint, tmp_path):
    code, out, err, lines = call(*TINY, *args, f"run.dir={tmp_path}/r")
    assert code == 1
    if hint:
        assert len(lines) == 1 and hint in lines[0] and not lines[0].startswith("error: rank"), err
        assert not (tmp_path / "r").exists()
    else:
        assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "diverged"
        assert (out + err).count("diverged: loss is not finite at step") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["train.compile=true"],
        ["train.grad_accumulation=3"],
        ["train.amp=bf16", "tracker=wandb"],
        ["+backbone.kwargs.qk_norm=true", "operator.weighting=ones"],
    ],
)
def test_other_settings_work_in_two_processes(more, tmp_path):
    """Compiled, with steps in parts, in low precision with W&B, and with parameters that get no gradient."""
    args = [*VIT, "train.epochs=3", *more]
    code, _, err, _ = call(*args, f"run.dir={tmp_path}/two")
    assert code == 0, err
    run(compose_config([*args, "train.compile=false", f"run.dir={tmp_path}/one"]))
    for x, y in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert y["train_loss"] == pytest.approx(x["train_loss"], rel=1e-3 if "bf16" in more[0] else 1e-5)
    assert len(list((tmp_path / "two").glob("wandb/offline-run-*"))) == ("tracker=wandb" in more)


@pytest.mark.slow
def test_learned_blends_agree(tmp_path):
    args = [*VIT, "schedule=constant", "operator.blend=0.4", "operator.learn_blend=head", "operator.mix=sum"]
    run(compose_config([*args, f"run.dir={tmp_path}/one"]))
    code, _, err, _ = call(*args, f"run.dir={tmp_path}/two")
    assert code == 0, err
    for x, y in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert y["train_loss"] == pytest.approx(x["train_loss"], rel=1e-5)
