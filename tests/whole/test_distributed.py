"""Several processes train one model: two gloo processes on the CPU against one process."""

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
from helpers import TINY, tiny, without_times

from convnn.config.compose import compose_config
from convnn.data.batches import Batches
from convnn.data.datasets import load_dataset
from convnn.data.splits import Split
from convnn.errors import ConfigError
from convnn.models.build import build_model
from convnn.models.cost import parameters_without_gradient
from convnn.ops.subsets import random_subset, seed_subsets
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.metrics import read_metrics
from convnn.runs.predictions import read_predictions
from convnn.runtime import distributed
from convnn.runtime.device import seed_step
from convnn.runtime.distributed import World
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


# ------------------------------------------------------------------------------------------- without processes


@pytest.mark.parametrize("drop_last", ["true", "false"])
@pytest.mark.parametrize("size, mirrored", [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_the_parts_of_a_batch_make_up_the_batch(size, mirrored, drop_last):
    images = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 1, 4, 4).contiguous()
    split = Split(images, torch.arange(60))
    config = compose_config(["data=digits", "data.crop_padding=1", f"data.drop_last={drop_last}"]).data
    whole = list(Batches(split, 24, config, 4, train=True, seed=5).epoch(3, 1))
    parts = [
        list(Batches(split, 24, config, 4, True, 5, rank=r, world_size=size, mirrored=mirrored).epoch(3, 1))
        for r in range(size)
    ]
    assert len(whole) == (1 if drop_last == "true" else 2)  # of 24, 24 and 12 images, from the second on
    for step, (x, labels) in enumerate(whole):
        own, last = [p[step] for p in parts], len(labels) - 1
        assert len(own[0][1]) == len(labels) // size
        place = {int(label): i for i, label in enumerate(labels)}
        for pixels, part in own:
            assert torch.equal(pixels, x[[place[int(label)] for label in part]])
            if mirrored:
                assert [last - place[int(label)] for label in part.flip(0)] == [place[int(label)] for label in part]
        assert sorted(int(i) for _, part in own for i in part) == sorted(labels.tolist())


def test_evaluation_parts_hold_every_image_once():
    split = Split(torch.zeros(26, 1, 4, 4, dtype=torch.uint8), torch.arange(26))
    config = compose_config(["data=digits"]).data
    parts = [list(Batches(split, 8, config, 4, rank=r, world_size=3).epoch()) for r in range(3)]
    assert [len(p) for p in parts] == [4, 4, 4]  # as many forward passes, and so draws, in each
    assert all(len(images) >= max(1, len(labels)) for p in parts for images, labels in p)
    assert sorted(int(i) for p in parts for _, labels in p for i in labels) == list(range(26))


def test_what_ranks_draw_alike_and_what_not(monkeypatch):
    import numpy as np

    def draw(rank, step=3, evaluation=False):
        monkeypatch.setattr(distributed, "_world", World(rank, 2))
        seed_step(7, step, torch.device("cpu"), evaluation=evaluation)
        return np.random.rand(), random_subset(50, 9, torch.device("cpu")).tolist(), torch.rand(1).item()

    a, b = draw(0), draw(1)
    assert a[:2] == b[:2] and a[2] != b[2]
    assert draw(0) == a
    for other in (draw(0, step=4), draw(0, evaluation=True)):
        assert all(x != y for x, y in zip(a, other, strict=True))
    seed_subsets(None)
    torch.manual_seed(1)
    free = random_subset(50, 9, torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(free, random_subset(50, 9, torch.device("cpu")))  # a library user's seed counts again


@pytest.mark.parametrize(
    "overrides, idle",
    [
        ([], set()),
        (
            ["+backbone.kwargs.qk_norm=true", "operator.weighting=ones"],
            {f"blocks.{i}.attn.{n}.weight" for i in (0, 1) for n in ("q_norm", "k_norm")},
        ),
        (["+backbone.kwargs.qk_norm=true"], set()),
    ],
)
def test_parameters_without_gradient_are_found(overrides, idle):
    config = tiny(*overrides, vit=True)
    dataset = load_dataset(config.data)
    model, _, size = build_model(config, dataset)
    found = parameters_without_gradient(model, config.schedule, 3, size)
    assert {name for name in found if not name.endswith("bias")} == idle  # the selection alone has them
    model(torch.randn(2, 3, size, size)).sum().backward()
    assert found == {name for name, p in model.named_parameters() if p.grad is None}


GROUP = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "env, device, gpus, message",
    [
        ({"WORLD_SIZE": "4"}, "cpu", 0, "WORLD_SIZE=4 is set without RANK, .*MASTER_ADDR.*torchrun"),
        (GROUP | {"MASTER_PORT": "1"}, "cpu", 0, "without MASTER_ADDR; start"),
        (GROUP | MEETING | {"RANK": "one"}, "cpu", 0, "must be numbers"),
        (GROUP | MEETING, "auto", 2, "4 processes on a machine with 2 usable.*--nproc-per-node=2 or set device=cpu"),
        (GROUP | MEETING, "cuda", 0, "with 0 usable CUDA devices; set device=cpu"),
        (GROUP | MEETING, "cuda:1", 4, "set device=cuda"),
    ],
)
def test_a_wrong_start_is_one_line(env, device, gpus, message, monkeypatch):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=message), distributed.process_group(device):
        raise AssertionError("never reached")
    with pytest.raises(ConfigError, match=r"sweep.py is one process, but WORLD_SIZE=4"):
        distributed.refuse_several("sweep.py")


def test_batch_sizes_that_cannot_be_shared(monkeypatch):
    distributed.check_batch_size(7, pairs=True)
    monkeypatch.setattr(distributed, "_world", World(0, 3))
    distributed.check_batch_size(9, pairs=False)
    with pytest.raises(ConfigError, match=r"batch_size=10 over 3 processes must be a multiple of 3; set it to 12"):
        distributed.check_batch_size(10, pairs=False)
    with pytest.raises(ConfigError, match=r"batch_size=9 .*with train.mixup.* multiple of 6; set it to 12"):
        distributed.check_batch_size(9, pairs=True)


def test_batch_normalisation_is_synchronised_on_gpus_only(monkeypatch):
    def kinds(size, device, choice):
        monkeypatch.setattr(distributed, "_world", World(0, size))
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        return type(distributed.with_sync_batchnorm(model, torch.device(device), choice)[1])

    assert kinds(2, "cuda", "auto") is kinds(2, "cuda", "true") is torch.nn.SyncBatchNorm
    for plain in ((1, "cuda", "true"), (2, "cuda", "false"), (2, "cpu", "auto")):
        assert kinds(*plain) is torch.nn.BatchNorm2d
    with pytest.raises(ConfigError, match="sync_batchnorm=true needs GPUs"):
        kinds(2, "cpu", "true")


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
        ["train.amp=bf16", "tracker=wandb"],
        ["+backbone.kwargs.qk_norm=true", "operator.weighting=ones"],
    ],
)
def test_other_settings_work_in_two_processes(more, tmp_path):
    """Compiled, in low precision with W&B, and with parameters that get no gradient."""
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
