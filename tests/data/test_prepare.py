"""scripts/prepare_data.py: from local archives to what ``data=cifar10`` and ``data=imagefolder`` read."""

import hashlib
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import write_cifar, write_image_folder
from PIL import Image
from programs import assert_refused

from convnn.config.data_schema import DataConfig
from convnn.data import load_cifar, load_imagefolder

SCRIPT = "scripts/prepare_data.py"


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """cifar-10-python.tar.gz in the true format, whose checksum counts as the expected one."""
    from torchvision.datasets import CIFAR10

    write_cifar(tmp_path / "made", "cifar10", monkeypatch, train=100, test=40)
    file = tmp_path / CIFAR10.filename
    with tarfile.open(file, "w:gz") as tar:
        tar.add(tmp_path / "made" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(file.read_bytes()).hexdigest())
    return file


def test_cifars_archive_becomes_ready_for_training(archive, call):
    assert call(SCRIPT, [f"source={archive}"])[0] == 0
    assert len(load_cifar(DataConfig(name="cifar10", root="data", download=False)).train) == 100
    assert call(SCRIPT, [f"source={archive}"])[0] == 0  # again: nothing to do


def test_a_folder_of_some_images_of_each_class(archive, call):
    assert call(SCRIPT, [f"source={archive}", "root=here", "folder=few", "train=30", "test=20"])[0] == 0
    whole = load_cifar(DataConfig(name="cifar10", root="here", download=False))
    found = load_imagefolder(DataConfig(root="few"))
    assert (len(found.train), len(found.test)) == (30, 20) and found.train.shape == (3, 32, 32)
    assert np.bincount(found.train.labels).tolist() == [3] * 10
    pixels = {
        bytes(image.numpy()): int(label) for image, label in zip(whole.train.images, whole.train.labels, strict=True)
    }
    names = [whole.classes.index(found.classes[int(label)]) for label in found.train.labels]
    assert [pixels[bytes(image.contiguous().numpy())] for image in found.train.images] == names
    assert not list(Path().glob(".few*"))


@pytest.mark.parametrize("kind", ["folder", "xztar", "zip"])
@pytest.mark.parametrize("nested", [False, True])
def test_image_folders_and_their_archives(kind, nested, tmp_path, call):
    top = tmp_path / "top"
    write_image_folder(top / "images" if nested else top, per_class=6, suffix="jpg")
    source = top if kind == "folder" else Path(shutil.make_archive(str(tmp_path / "packed"), kind, top))
    assert call(SCRIPT, [f"source={source}", "folder=out/mine", "train=4"])[0] == 0
    files = sorted(Path("out/mine").glob("*/*/*"))
    assert len([f for f in files if f.parts[2] == "train"]) == 4 and len(files) == 4 + 12
    originals = {f.read_bytes() for f in top.rglob("*.jpg")}
    assert all(f.read_bytes() in originals for f in files)  # copied, not compressed anew


def test_what_is_refused(archive, tmp_path, call):
    (tmp_path / "text.tar").write_text("no archive")
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "other" / archive.name
    damaged.parent.mkdir()
    damaged.write_bytes(archive.read_bytes()[:-50])
    Path("there").mkdir()
    write_image_folder(tmp_path / "images")
    for args, hint in (
        ([], "source: is required"),
        (["source=none.tar"], "there is no such file"),
        ([f"source={tmp_path}/text.tar"], "name the folder to make: folder=DIR"),
        ([f"source={tmp_path}/text.tar", "folder=new"], "cannot be unpacked"),
        ([f"source={tmp_path}/empty", "folder=new"], "has no folder train/CLASS"),
        ([f"source={archive}", "folder=there"], "is there already"),
        ([f"source={archive}", "folder=new", "train=0"], "train=0 must"),
        ([f"source={tmp_path}/images", "folder=new", "train=1"], "train=1 is less than the 2 classes"),
    ):
        assert_refused(call, SCRIPT, args, hint)
    code, err = call(SCRIPT, [f"source={damaged}", "root=bad"])
    assert code == 2 and "md5" in err and len(err.splitlines()) == 1


def test_validation_images_come_along(tmp_path, call):
    write_image_folder(tmp_path / "images", per_class=4)
    shutil.copytree(tmp_path / "images" / "test", tmp_path / "images" / "val")
    assert call(SCRIPT, [f"source={tmp_path}/images", "folder=made"])[0] == 0
    assert len(load_imagefolder(DataConfig(root="made")).val) == 8


def test_a_tar_that_leads_out_is_refused(tmp_path, call):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "../../evil.png")
    assert_refused(call, SCRIPT, [f"source={tmp_path}/evil.tar", "folder=new"], "cannot be unpacked")
