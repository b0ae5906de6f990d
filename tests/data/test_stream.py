"""Streamed files: the batches of a folder in memory, timm's transforms, and nothing that depends on the workers."""

import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import equal_states, tiny, without_times, write_image_folder

import convnn.data
from convnn.config.compose import CONF_DIR
from convnn.config.schema import DataConfig
from convnn.data.batches import Batches
from convnn.data.datasets import load_dataset
from convnn.data.readers import count_workers
from convnn.data.splits import FileSplit, Split
from convnn.data.stream import Stream, make_batches
from convnn.errors import ConfigError
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.metrics import read_metrics
from convnn.train import trainer
from convnn.train.run import run

TIMM = {
    "scale": [0.2, 1.0],
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.5,
    "crop_pct": 0.8,
    "crop_padding": 0,
    "interpolation": "random",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_image_folder(folder, per_class=9)
    return folder


def config(root, **kwargs):
    values = {"name": "imagefolder", "target": "convnn.data.load_imagefolder", "root": str(root), "workers": 0}
    values |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop_padding": 2, "flip": True, "stream": "true"}
    return DataConfig(**(values | kwargs))


def batches(root, train=True, size=4, image_size=12, rank=0, world_size=1, **kwargs):
    c = config(root, **kwargs)
    dataset = load_dataset(c)
    split = dataset.train if train else dataset.test
    return make_batches(split, size, c, image_size, train, seed=3, rank=rank, world_size=world_size)


def equal(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) > 0 and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


# ------------------------------------------------------------------------------------------ the same batches


@pytest.mark.parametrize("train", [True, False])
def test_a_stream_without_transforms_is_the_folder_in_memory(root, train):
    for size in (12, 10):
        memory = batches(root, train, image_size=size, stream="false", limit=14, val_fraction=0.2)
        stream = batches(root, train, image_size=size, limit=14, val_fraction=0.2)
        assert isinstance(stream, Stream) and not isinstance(memory, Stream) and len(stream) == len(memory)
        assert equal(memory.epoch(1), stream.epoch(1))
    memory.channels_last = stream.channels_last = True
    images, _ = next(stream.epoch())
    assert images.is_contiguous(memory_format=torch.channels_last) and equal(memory.epoch(), stream.epoch())


@pytest.mark.parametrize("more", [{}, TIMM])
def test_batches_do_not_depend_on_the_workers(root, more):
    alone = list(batches(root, **more).epoch(1))
    for workers in (1, 2):
        assert equal(alone, batches(root, workers=workers, **more).epoch(1))
    assert not equal(alone, batches(root, **more).epoch(2))
    assert not multiprocessing.active_children()


def test_an_epoch_can_be_entered_at_any_step(root):
    whole = list(batches(root, **TIMM).epoch(1))
    for first in range(1, 4):
        assert equal(whole[first:], batches(root, **TIMM).epoch(1, first))
    assert len(whole) == 4 and len({tuple(x[0].flatten().tolist()) for x, _ in whole}) == 4


@pytest.mark.parametrize("more", [None, {}, TIMM])
def test_ranks_share_each_joint_batch(root, more):
    """In training in order; in evaluation no image is seen twice, whatever the remainder."""
    more = {"stream": "false"} if more is None else more
    joint = list(batches(root, **more).epoch(1))
    parts = [list(batches(root, rank=r, world_size=2, **more).epoch(1)) for r in range(2)]
    assert equal(
        joint, [tuple(torch.cat(pair) for pair in zip(*both, strict=True)) for both in zip(*parts, strict=True)]
    )
    joint = torch.cat([x for x, _ in batches(root, False, size=5, **more).epoch()])
    shares = [list(batches(root, False, 5, rank=r, world_size=4, **more).epoch()) for r in range(4)]
    assert {len(share) for share in shares} == {4}  # a batch of three has one image without a label for the fourth
    parts = [torch.cat([x[: len(labels)] for x, labels in share]) for share in shares]
    assert len(joint) == sum(map(len, parts)) == 18
    rows = torch.cat(parts).flatten(1)
    assert torch.equal(rows.unique(dim=0), joint.flatten(1).unique(dim=0))


def test_generators_of_the_training_process_are_left_alone(root):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for workers in (0, 1):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        expected = draw()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        list(batches(root, workers=workers, **TIMM).epoch())
        assert draw() == expected


# --------------------------------------------------------------------------------------------- what is loaded


def test_auto_streams_what_needs_it(root, monkeypatch):
    assert isinstance(load_dataset(config(root, stream="auto")).train, Split)
    assert isinstance(load_dataset(config(root, stream="auto", crop_pct=0.9)).train, FileSplit)
    monkeypatch.setattr(convnn.data.datasets, "MAX_BYTES", 18 * 12 * 12 * 3 - 1)
    assert isinstance(load_dataset(config(root, stream="auto")).train, FileSplit)
    with pytest.raises(ConfigError, match=r"exceed the .* set data.stream=auto, lower data.load_size"):
        load_dataset(config(root, stream="false"))


def test_val_folder_limits_and_validation_split(tmp_path):
    write_image_folder(tmp_path, per_class=8)
    (tmp_path / "test").rename(tmp_path / "val")
    (tmp_path / "test").mkdir()  # ImageNet's test images have no labels
    (tmp_path / "test" / "1.png").touch()
    data = load_dataset(config(tmp_path, limit=10, limit_test=6, val_fraction=0.2))
    assert [len(s) for s in (data.train, data.val, data.test)] == [8, 2, 6]
    assert data.train.labels.bincount().tolist() == [4, 4] and data.val.labels.tolist() == [0, 1]
    names = [os.fsdecode(path) for path in (*data.train.paths, *data.val.paths)]
    assert len(set(names)) == 10 and all("/train/" in name for name in names)
    assert all(b"/val/" in path for path in data.test.paths)
    pairs = zip(data.train.paths, data.train.labels.tolist(), strict=True)
    assert all(f"/{data.classes[label]}/" in os.fsdecode(path) for path, label in pairs)
    (tmp_path / "val").rename(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"test has no class folders"):
        load_dataset(config(tmp_path))
    (tmp_path / "test" / "1.png").unlink(), (tmp_path / "test").rmdir()
    with pytest.raises(ConfigError, match=r"no folder .*/test or .*/val; expected test\|val/CLASS/IMAGE"):
        load_dataset(config(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"<html>", None])
def test_unreadable_image_is_named_in_one_line(tmp_path, workers, content):
    write_image_folder(tmp_path, per_class=4, suffix="jpg")
    bad = tmp_path / "train" / "dog" / "2.jpg"
    bad.write_bytes(content or bad.read_bytes()[:-300])  # cut off in the middle
    for more in ({}, TIMM):
        with pytest.raises(ConfigError, match=r"dog/2.jpg cannot be read as an image") as error:
            list(batches(tmp_path, workers=workers, load_size=12, **more).epoch())
        assert "\n" not in str(error.value)
        assert not multiprocessing.active_children()


# ---------------------------------------------------------------------------------------------------- workers


def test_workers_end_with_the_epoch_however_it_ends(root):
    loader = batches(root, workers=2, size=2)
    for _ in loader.epoch():
        assert len(multiprocessing.active_children()) == 2
        break
    assert not multiprocessing.active_children()
    epoch = loader.epoch()
    next(epoch)
    epoch.close()
    assert not multiprocessing.active_children()

    def consume():
        for _ in loader.epoch():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        consume()
    error.traceback, error.value.__traceback__ = None, None
    del error
    assert not multiprocessing.active_children()


def test_signals_to_the_whole_group_leave_the_workers_reading(root):
    expected = list(batches(root, size=1).epoch())
    seen = []
    for batch in batches(root, size=1, workers=2, prefetch=1).epoch():
        if len(seen) == 1:  # both workers are at work
            workers = multiprocessing.active_children()
            for worker in workers:
                for number in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM):
                    os.kill(worker.pid, number)
        seen.append(batch)
    assert len(workers) == 2 and equal(seen, expected)


def test_a_killed_worker_is_one_line(root):
    epoch = batches(root, size=1, workers=1, prefetch=1).epoch()
    next(epoch)
    with pytest.raises(ConfigError, match=r"data.workers=1: a worker ended \(.*\); with too little memory, lower"):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        list(epoch)


def test_workers_can_be_started_by_any_method(root):
    stream = batches(root, **TIMM)
    again = pickle.loads(pickle.dumps(stream))
    assert equal(stream.epoch(), again.epoch())


def test_number_of_workers():
    assert count_workers(0) == 0 and count_workers(5, 4) == 5 and count_workers(None, 10**6) == 1
    assert 1 <= count_workers(None) <= 16


# ------------------------------------------------------------------------------------------------- whole runs


def streamed(root, *overrides):
    data = ["data=imagenet", f"data.root={root}", "data.load_size=null", "data.image_size=8", "data.workers=1"]
    more = ["data.rand_augment=rand-m9-mstd0.5-inc1", "data.random_erasing=0.25", "train.batch_size=4", "swap=none"]
    return tiny(*data, *more, "train.mixup=0.4", "backbone.drop_rate=0.2", *overrides)


@pytest.mark.long
def test_a_resumed_stream_equals_an_uninterrupted_one(root, tmp_path, monkeypatch):
    from training import stop_after

    whole = run(streamed(root, f"run.dir={tmp_path}/whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(streamed(root, f"run.dir={tmp_path}/parts"))["status"] == "interrupted"
    resumed = run(streamed(root, f"run.dir={tmp_path}/parts", "run.if_exists=resume", "data.workers=0"))
    assert resumed["status"] == whole["status"] == "complete" and trainer.Batches is Batches
    lines = [[without_times(r) for r in read_metrics(tmp_path / d / "metrics.jsonl")] for d in ("whole", "parts")]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    states = [load_checkpoint(tmp_path / d / "checkpoints" / "last.pt")["model"] for d in ("whole", "parts")]
    assert equal_states(*states)


@pytest.mark.slow
def test_a_stopped_run_leaves_a_checkpoint_and_no_process(root, tmp_path):
    """TERM to the whole process group, as a cluster sends it."""
    overrides = [f"data.root={root}", "data.load_size=null", "data.image_size=32", "data.workers=2", "tracker=jsonl"]
    command = [sys.executable, str(CONF_DIR.parent / "train.py"), "data=imagenet", *overrides, "train.batch_size=2"]
    command += ["train.epochs=1000", f"run.dir={tmp_path}/r", "device=cpu", "swap=none"]
    process = subprocess.Popen(command, start_new_session=True, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "r" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert (tmp_path / "r" / "checkpoints" / "last.pt").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
