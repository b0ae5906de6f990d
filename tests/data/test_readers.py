"""Workers that splits share: started once, read whatever is asked for, and gone when they should be."""

import multiprocessing
import os
import signal

import pytest
import torch
from test_stream import TIMM, batches, equal, streamed

from convnn.data.readers import Readers
from convnn.errors import ConfigError
from convnn.train.run import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from helpers import write_image_folder

    folder = tmp_path_factory.mktemp("images")
    write_image_folder(folder, per_class=9)
    return folder


def workers():
    return sorted(child.pid for child in multiprocessing.active_children())


@pytest.fixture
def starts(monkeypatch):
    """The processes that were started."""
    found, start = [], multiprocessing.process.BaseProcess.start

    def counted(self):
        found.append(self.name)
        return start(self)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", counted)
    return found


@pytest.fixture
def shared(root):
    """Training and test batches, two workers for both."""
    splits = [batches(root, train, size=4, workers=2, **TIMM) for train in (True, False)]
    readers = Readers(splits[0].config, CPU)
    for split in splits:
        split.share(readers)
    yield splits, readers
    readers.close()


def test_they_are_started_once_and_read_the_same(shared, root, starts):
    splits, readers = shared
    alone = [batches(root, train, size=4, workers=0, **TIMM) for train in (True, False)]
    for epoch in (0, 1, 3):
        for one, other in zip(splits, alone, strict=True):
            assert equal(one.epoch(epoch), other.epoch(epoch))
    assert equal(splits[0].epoch(3, 2), alone[0].epoch(3, 2))  # entered in the middle
    assert len(starts) == len(workers()) == 2
    readers.close()
    assert not workers()
    assert equal(splits[1].epoch(), alone[1].epoch()) and len(starts) == 4  # and again if asked


def test_an_epoch_closed_after_its_last_batch_keeps_them(shared, starts):
    """As the training loop leaves it, which counts its steps."""
    (train, _), _ = shared
    for number in range(3):
        epoch = train.epoch(number)
        for _ in range(len(train)):
            next(epoch)
        epoch.close()
    assert len(starts) == len(workers()) == 2


def test_an_epoch_left_before_its_end_ends_them(shared, starts):
    (train, test), _ = shared
    epoch = train.epoch()
    next(epoch)
    epoch.close()
    assert not workers()
    assert len(list(test.epoch())) == len(test) and len(starts) == 4
    with pytest.raises(ZeroDivisionError):
        for _ in train.epoch():
            raise ZeroDivisionError
    del _
    assert len(list(train.epoch(1))) == len(train)


def test_two_epochs_at_once_have_workers_of_their_own(shared, root):
    (train, test), _ = shared
    alone = list(batches(root, False, size=4, workers=0, **TIMM).epoch())
    epoch = train.epoch()
    first = next(epoch)
    assert equal(test.epoch(), alone) and len(workers()) == 2
    assert equal([first, *epoch], batches(root, True, size=4, workers=0, **TIMM).epoch())


@pytest.mark.parametrize("when", ["between", "within"])
def test_a_worker_killed_is_one_line_and_the_next_epoch_works(when, shared):
    (train, _), _ = shared
    if when == "between":
        list(train.epoch())
    epoch = train.epoch(1)
    if when == "within":
        next(epoch)
    os.kill(workers()[0], signal.SIGKILL)
    with pytest.raises(ConfigError, match=r"data\.workers=2: a worker ended"):
        list(epoch)
    assert not workers() and len(list(train.epoch(1))) == len(train)


def test_a_worker_killed_while_the_model_computes_is_one_line_too(root, tmp_path, monkeypatch):
    """torch raises in a signal handler, wherever the main thread is."""
    from convnn.train.trainer import Trainer

    for text, kind in (("DataLoader worker (pid 1) is killed by signal: Killed. ", ConfigError), ("x", RuntimeError)):

        def step(*_, text=text):
            raise RuntimeError(text)

        monkeypatch.setattr(Trainer, "_train_step", step)
        with pytest.raises(kind, match=r"a worker ended|^x$"):
            run(streamed(root, f"run.dir={tmp_path}/{kind.__name__}"))
        assert not workers()


def test_an_unreadable_file_ends_the_epoch_and_them(tmp_path):
    from helpers import write_image_folder

    write_image_folder(tmp_path, per_class=4, suffix="jpg")
    train = batches(tmp_path, True, size=2, workers=2, load_size=12, **TIMM)
    train.share(Readers(train.config, CPU))
    (tmp_path / "train" / "cat" / "1.jpg").write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=r"cat/1\.jpg cannot be read"):
        list(train.epoch())
    assert not workers()


@pytest.mark.parametrize("val", [False, True])
def test_a_run_starts_its_workers_once_and_leaves_none(val, root, tmp_path, starts):
    more = ["data.val_fraction=0.3"] if val else []
    result = run(streamed(root, "data.workers=2", "train.epochs=3", *more, f"run.dir={tmp_path}/r"))
    assert result["status"] == "complete" and len(starts) == 2 and not workers()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_methods_that_start_slowly_start_once(method, shared, root, starts):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        (train, test), _ = shared
        for epoch in range(3):
            assert equal(train.epoch(epoch), batches(root, True, size=4, workers=0, **TIMM).epoch(epoch))
            list(test.epoch())
        assert len(starts) == 2
    finally:
        multiprocessing.set_start_method(before, force=True)
