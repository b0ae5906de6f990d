"""CIFAR's archive: unpacked once and whole, however many processes ask for it."""

import hashlib
import multiprocessing
import shutil
import tarfile
import time

import pytest
import torch
import torchvision.datasets
import torchvision.datasets.utils as utils
from helpers import write_cifar

from convnn.config.schema import DataConfig
from convnn.data import cifar
from convnn.data.datasets import load_dataset
from convnn.errors import ConfigError


def config(root, **kwargs):
    return DataConfig("cifar10", "convnn.data.load_cifar", str(root), **({"download": False} | kwargs))


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """A folder with an archive in torchvision's format, and the data set in it."""
    write_cifar(tmp_path / "whole", "cifar10", monkeypatch, train=5000, test=1000)
    kind, root = torchvision.datasets.CIFAR10, tmp_path / "packed"
    root.mkdir()
    with tarfile.open(root / kind.filename, "w:gz") as archive:
        archive.add(tmp_path / "whole" / kind.base_folder, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((root / kind.filename).read_bytes()).hexdigest())
    return root, load_dataset(config(tmp_path / "whole"))


def same(a, b):
    return all(torch.equal(getattr(a, s).images, getattr(b, s).images) for s in ("train", "test"))


def names(root):
    return sorted(path.name for path in (root / torchvision.datasets.CIFAR10.base_folder).iterdir())


def at_once(root, barrier, queue):
    try:
        barrier.wait(60)
        dataset = load_dataset(config(root))
        queue.put((len(dataset.train), int(dataset.train.images.sum())))
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.parametrize("trial", range(3))
@pytest.mark.long
def test_processes_that_start_at_once_all_read_whole_files(trial, packed):
    root, expected = packed
    context = multiprocessing.get_context("fork")  # which takes the checksums along
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=at_once, args=(root, barrier, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(30)
    assert answers == [(5000, int(expected.train.images.sum()))] * 3
    assert len(names(root)) == 7 and len(list(root.iterdir())) == 2  # no lock is left


@pytest.mark.long
def test_one_unpacks_and_the_others_find_it_done(packed, monkeypatch):
    root, expected = packed
    calls, whole = [], utils.extract_archive
    monkeypatch.setattr(utils, "extract_archive", lambda *args: calls.append(args) or whole(*args))
    for _ in range(2):
        assert same(load_dataset(config(root)), expected)
    assert len(calls) == 1


def test_an_archive_is_unpacked_without_a_download_too(packed):
    root, expected = packed
    assert same(load_dataset(config(root, download=True)), expected)  # and the archive is not fetched again
    shutil.rmtree(root / torchvision.datasets.CIFAR10.base_folder)
    assert same(load_dataset(config(root)), expected)


@pytest.mark.long
def test_damaged_files_are_replaced_and_others_kept(packed):
    root, expected = packed
    load_dataset(config(root))
    folder = root / torchvision.datasets.CIFAR10.base_folder
    (folder / "data_batch_2").write_bytes(b"half a file")
    (folder / "batches.meta").unlink()
    (folder / "notes.txt").write_text("mine")
    assert same(load_dataset(config(root)), expected)
    assert (folder / "notes.txt").read_text() == "mine" and len(names(root)) == 8


@pytest.mark.long
def test_a_process_killed_while_it_unpacks_leaves_no_half_file(packed, monkeypatch):
    root, expected = packed

    def killed(archive, aside):
        with tarfile.open(archive) as file:
            file.extract(file.getmembers()[1], aside)
        raise KeyboardInterrupt

    folder = root / torchvision.datasets.CIFAR10.base_folder
    with monkeypatch.context() as patch:
        patch.setattr(utils, "extract_archive", killed)
        with pytest.raises(KeyboardInterrupt):
            load_dataset(config(root))
    assert names(root) == []
    (folder / ".unpacking-dead").mkdir()
    (folder / ".unpacking-dead" / "data_batch_1").write_bytes(b"half")
    assert same(load_dataset(config(root)), expected) and len(names(root)) == 7


def test_a_damaged_archive_and_a_process_that_hangs_are_one_line(packed, monkeypatch):
    root, _ = packed
    guard = cifar.lock(root / ".cifar-10-python.tar.gz.lock")
    monkeypatch.setattr(cifar, "WAIT", 0.2)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"no valid files .*pid \d+ on .* has been unpacking cifar-10-python.tar.gz"):
        load_dataset(config(root))
    assert time.monotonic() - start < 5
    cifar.release(guard)
    archive = root / torchvision.datasets.CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cifar-10-python.tar.gz is damaged, and data.download=false"):
        load_dataset(config(root))


def test_a_failed_download_leaves_no_folder(tmp_path, monkeypatch):
    def offline(url, root, name, md5):
        (root / name).touch()
        raise OSError("no route to host")

    monkeypatch.setattr(utils, "download_url", offline)
    with pytest.raises(ConfigError, match=r"no valid files .*no route to host"):
        load_dataset(config(tmp_path / "new", download=True))
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(ConfigError, match="no route to host"):
        load_dataset(config(tmp_path / "old", download=True))
    assert not list((tmp_path / "old").iterdir())


def test_the_home_folder_is_understood(packed, monkeypatch):
    root, expected = packed
    monkeypatch.setenv("HOME", str(root.parent))
    assert same(load_dataset(config("~/packed")), expected)


def test_another_name_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data.name=mine is not one of cifar10, cifar100"):
        load_dataset(DataConfig("mine", "convnn.data.load_cifar", str(tmp_path)))
