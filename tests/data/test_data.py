"""Data sets in their true formats, splits, and batches."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as T
from helpers import tiny, write_cifar, write_image_folder
from PIL import Image

from convnn.config.schema import DataConfig
from convnn.data.batches import Batches, random_crop
from convnn.data.datasets import load_dataset
from convnn.data.splits import Split
from convnn.errors import ConfigError
from convnn.train.run import run


def config(**kwargs):
    return DataConfig(**({"name": "digits", "target": "convnn.data.load_digits"} | kwargs))


def folder(root, **kwargs):
    return config(name="imagefolder", target="convnn.data.load_imagefolder", root=str(root), **kwargs)


def test_digits_are_those_that_scikit_learn_loads(monkeypatch):
    from convnn.data import datasets

    config = DataConfig(name="digits", target="convnn.data.load_digits")
    plain = datasets.load_digits(config)
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    loaded = datasets.load_digits(config)
    for split in ("train", "test"):
        one, other = getattr(plain, split), getattr(loaded, split)
        assert one.images.equal(other.images) and one.labels.equal(other.labels)


def test_digits_are_split_by_class():
    data = load_dataset(config())
    assert len(data.train) + len(data.test) == 1797 and data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() == 255
    counts = data.test.labels.bincount()
    assert counts.min() >= 35 and counts.max() <= 37


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_in_torchvisions_format(name, classes, tmp_path, monkeypatch):
    write_cifar(tmp_path, name, monkeypatch, train=200)
    data = load_dataset(config(name=name, target="convnn.data.load_cifar", root=str(tmp_path), download=False))
    assert data.train.images.shape == (200, 3, 32, 32) and len(data.test) == 20 and len(data.classes) == classes
    result = run(
        tiny(
            f"data={name}", f"data.root={tmp_path}", "data.download=false", "data.image_size=8", f"run.dir={tmp_path}/r"
        )
    )
    assert result["status"] == "complete" and result["steps"] == 2 * (200 // 32)


def test_missing_cifar_names_the_place_and_leaves_nothing(tmp_path):
    missing = config(name="cifar10", target="convnn.data.load_cifar", root=str(tmp_path / "no"), download=False)
    with pytest.raises(ConfigError, match=r"no/cifar-10-batches-py and no download .* put cifar-10-python.tar.gz"):
        load_dataset(missing)
    assert not (tmp_path / "no").exists()


def test_damaged_cifar_is_refused(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar10", monkeypatch)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="no valid files"):
        load_dataset(config(name="cifar10", target="convnn.data.load_cifar", root=str(tmp_path), download=False))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tiff"])
def test_image_folder_reads_any_format(suffix, tmp_path):
    write_image_folder(tmp_path, per_class=3, suffix=suffix)
    data = load_dataset(folder(tmp_path))
    assert data.classes == ["cat", "dog"] and data.train.images.shape == (6, 3, 12, 12)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    means = data.train.images.float().mean((2, 3))
    assert (means[:3].argmax(1) == 0).all() and (means[3:].argmax(1) == 1).all()


def test_image_folder_faults(tmp_path):
    with pytest.raises(ConfigError, match=r"no folder .*/train"):
        load_dataset(folder(tmp_path))
    write_image_folder(tmp_path, per_class=2)
    (tmp_path / "test" / "bird").mkdir()
    with pytest.raises(ConfigError, match=r"bird has no images"):
        load_dataset(folder(tmp_path))
    Image.new("L", (5, 5)).save(tmp_path / "test" / "bird" / "x.png")
    with pytest.raises(ConfigError, match="classes differ: train lacks 'bird'"):
        load_dataset(folder(tmp_path))
    (tmp_path / "train" / "bird").mkdir()
    (tmp_path / "train" / "bird" / "x.png").write_bytes(b"<html>not an image</html>")
    with pytest.raises(ConfigError, match=r"x.png cannot be read as an image"):
        load_dataset(folder(tmp_path, load_size=8))
    Image.new("RGBA", (5, 5)).save(tmp_path / "train" / "bird" / "x.png")  # grey and alpha become RGB
    assert load_dataset(folder(tmp_path, load_size=8)).train.images.shape == (5, 3, 8, 8)


def test_limit_is_balanced_and_seeded():
    labels = load_dataset(config(limit=100, limit_test=30)).train.labels
    assert labels.bincount().tolist() == [10] * 10
    again = load_dataset(config(limit=100))
    assert torch.equal(load_dataset(config(limit=100)).train.images, again.train.images)
    assert not torch.equal(load_dataset(config(limit=100, split_seed=1)).train.images, again.train.images)
    assert len(load_dataset(config(limit=10**6)).train) == 1433


def test_limit_reads_only_the_chosen_images(tmp_path):
    write_image_folder(tmp_path, per_class=6)
    whole = load_dataset(folder(tmp_path, limit=4))
    assert whole.train.labels.bincount().tolist() == [2, 2] and len(whole.test) == 12


def test_validation_split_is_disjoint_balanced_and_seeded():
    whole, parts = load_dataset(config()), load_dataset(config(val_fraction=0.1))
    assert len(parts.val) == round(0.1 * len(whole.train)) and len(parts.train) + len(parts.val) == len(whole.train)
    assert parts.val.labels.bincount().min() >= 14 - 1
    rows = torch.cat([parts.train.images, parts.val.images]).flatten(1)
    assert torch.equal(rows.unique(dim=0), whole.train.images.flatten(1).unique(dim=0))
    with pytest.raises(ConfigError, match="leaves a split empty"):
        load_dataset(config(val_fraction=0.0001))


def batches(n=10, size=3, train=True, **kwargs):
    images = torch.arange(n * 2 * 4 * 4).remainder(256).to(torch.uint8).view(n, 2, 4, 4)
    return Batches(Split(images, torch.arange(n)), size, config(mean=[0.0], std=[1.0], **kwargs), 4, train, seed=7)


def test_order_depends_on_seed_and_epoch_and_can_be_entered_anywhere():
    loader = batches(crop_padding=1, flip=True)
    first, second = ([(x, y) for x, y in loader.epoch(e)] for e in (0, 1))
    assert [y.tolist() for _, y in first] != [y.tolist() for _, y in second]
    assert len(first) == 3 and len(batches(train=False)) == 4
    for (x, y), (x2, y2) in zip(loader.epoch(0, first=1), first[1:], strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    seen = torch.cat([y for _, y in first])
    assert len(set(seen.tolist())) == 9


def test_the_last_batch_is_trained_on_where_asked():
    loader, usual = batches(crop_padding=1, flip=True, drop_last=False), batches(crop_padding=1, flip=True)
    found = list(loader.epoch(2))
    assert [len(y) for _, y in found] == [3, 3, 3, 1] == [loader.images_of(step) for step in range(4)]
    assert sorted(int(i) for _, y in found for i in y) == list(range(10))
    for (x, y), (x2, y2) in zip(found, usual.epoch(2), strict=False):
        assert torch.equal(x, x2) and torch.equal(y, y2)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_have_the_memory_format_that_was_asked_for(channels_last):
    """Crops once came out with their channels last, which crashed a convolution of few channels on the CPU."""
    for options in ({}, {"crop_padding": 1}, {"flip": True}):
        loader = batches(n=12, size=4, **options)
        loader.channels_last = channels_last
        images, _ = next(loader.epoch())
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert images.is_contiguous(memory_format=wanted), options


def test_evaluation_sees_every_image_once_unchanged():
    loader = batches(train=False, crop_padding=1, flip=True)
    x = torch.cat([x for x, _ in loader.epoch()])
    assert torch.equal(x, loader.split.images / 255)


def test_random_crop_equals_torchvisions_crop_of_the_padded_image():
    images = torch.randint(0, 256, (9, 3, 6, 5), dtype=torch.uint8)
    shifts = torch.tensor(list(itertools.product((0, 2, 4), (0, 1, 4))))
    for out, image, (top, left) in zip(random_crop(images, shifts, 2), images, shifts.tolist(), strict=True):
        assert torch.equal(out, T.crop(T.pad(image, [2, 2, 2, 2]), top, left, 6, 5))


def test_flips_and_crops_happen_at_the_stated_rates():
    n = 4000
    images = torch.zeros(n, 1, 3, 3, dtype=torch.uint8)
    images[:, 0, 1, 0] = 255
    loader = Batches(Split(images, torch.zeros(n)), n, config(mean=[0.0], std=[1.0], flip=True), 3, True)
    (x, _) = next(loader.epoch())
    assert abs((x[:, 0, 1, 2] == 1).float().mean() - 0.5) < 0.05
    loader.config = config(mean=[0.0], std=[1.0], crop_padding=1)
    (x, _) = next(loader.epoch())
    rows = x.sum((1, 3)).bool().float().mean(0)
    # each row in a third of the crops, times two thirds that keep the column
    assert (rows - 2 / 9).abs().max() < 0.05


def test_resize_and_normalise():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    loader = Batches(Split(images, torch.arange(4)), 4, config(mean=mean, std=std), 16)
    (x, _) = next(loader.epoch())
    expected = T.normalize(T.resize(images / 255, [16, 16], antialias=True), mean, std)
    assert (x - expected).abs().max() < 1e-6
    assert np.isclose(x.mean(), expected.mean())
