"""What several processes share, tried without starting any: batches, draws, refusals."""

import os

import numpy as np
import pytest
import torch
from helpers import tiny

from convnn.config.compose import compose_config
from convnn.data.batches import Batches
from convnn.data.datasets import load_dataset
from convnn.data.splits import Split
from convnn.errors import ConfigError
from convnn.models.build import build_model
from convnn.models.cost import parameters_without_gradient
from convnn.ops.subsets import random_subset, seed_subsets
from convnn.runtime import distributed
from convnn.runtime.device import seed_step
from convnn.runtime.distributed import World


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


def test_a_call_of_torchrun_is_told_from_the_next(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.launch_name() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    assert distributed.launch_name() == "job-7"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # of every call with --master-port alone
    first = distributed.launch_name()
    assert first == distributed.launch_name() and str(os.getppid()) in first
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert distributed.launch_name() != first
