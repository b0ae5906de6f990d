"""Image folders: which files, classes and splits count, and the size that images get."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
import torch
from helpers import tiny
from image_sets import from_sizes, load, refused
from PIL import Image

from convnn.data.classes import class_order
from convnn.errors import ConfigError


def save(path, side=12, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)


# ---------------------------------------------------------------------------------------------- which files


def test_every_suffix_that_pillow_reads_counts(root, lines):
    image = Image.new("RGB", (12, 12), (9, 99, 199))
    formats = {"jfif": "JPEG", "jpe": "JPEG", "mpo": "JPEG", "PNG": "PNG", "apng": "PNG", "j2k": "JPEG2000"}
    for suffix, format in formats.items():
        image.save(root / "train" / "cat" / f"x.{suffix}", format=format)
    for suffix in ("gif", "tga", "jp2", "avif", "qoi", "icns", "pcx", "sgi", "dds", "ico"):
        try:
            image.save(root / "train" / "cat" / f"y.{suffix}", **({"sizes": [(12, 12)]} if suffix == "ico" else {}))
        except (OSError, KeyError, ValueError):  # a Pillow without this format, or without saving it
            (root / "train" / "cat" / f"y.{suffix}").unlink(missing_ok=True)
    count = len(list((root / "train" / "cat").iterdir()))
    data = load(root)
    assert count > 15 and data.train.labels.bincount().tolist() == [count, 4]
    assert "left out" not in "".join(lines)


def test_files_left_out_are_counted_in_one_line(root, lines):
    for name in ("a.txt", "b.txt", "labels.h5", "c.heic", "noname"):
        (root / "train" / "dog" / name).write_text("x")
    (root / "test" / "dog" / "more").mkdir()
    (root / "test" / "dog" / "more" / "d.TXT").write_text("x")
    (root / "train" / "stray.png").write_bytes(b"x")
    assert len(load(root).train) == 8
    left = [line for line in lines if "left out" in line]
    expected = "3 .txt, 1 .h5, 1 .heic, 1 beside the class folders, 1 without a suffix"
    assert left == [f"data.root={root}: files left out: {expected}"]
    shutil.rmtree(root / "test" / "dog"), (root / "test" / "dog").mkdir()
    (root / "test" / "dog" / "x.heic").write_bytes(b"x")
    refused(root, r"test/dog has no images \(left out: 1 .heic\)")


def test_hidden_files_and_folders_are_ignored_everywhere(root, lines):
    train = root / "train"
    (train / "cat" / "._0.png").write_bytes(b"Mac OS X")
    for place in (".ipynb_checkpoints", ".Trash-1000/files", "__MACOSX", "deep/.thumbs", "@eaDir/0.png"):
        save(train / "cat" / place / "copy.png")
    save(train / ".hidden" / "x.png")
    save(train / "__MACOSX" / "x.png")
    (train / ".DS_Store").write_bytes(b"x")
    assert len(load(root).train) == 8 and "left out" not in "".join(lines)
    save(train / "cat" / "deep" / "x.png")
    assert len(load(root).train) == 9


def test_linked_folders_are_followed_and_loops_end(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("pool") / "elsewhere"
    save(elsewhere / "a.png"), save(elsewhere / "sub" / "b.png")
    cat, dog = root / "train" / "cat", root / "train" / "dog"
    (cat / "link").symlink_to(elsewhere)
    assert load(root).train.labels.bincount().tolist() == [6, 4]
    (elsewhere / "back").symlink_to(cat)  # to the class, to itself, to all classes
    (elsewhere / "self").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(root / "train")
    (cat / "again").symlink_to(elsewhere / "sub")  # each real folder counts once
    assert load(root).train.labels.bincount().tolist() == [6, 4]
    (dog / "above").symlink_to(elsewhere.parent)  # through which the links of the other class are reached
    refused(root, "dog/above/elsewhere is a folder of both classes 'cat' and 'dog'")
    (dog / "above").unlink(), (dog / "more").symlink_to(elsewhere)
    refused(root, r"dog/more is a folder of both classes 'cat' and 'dog'; remove the link")


def test_a_class_that_has_only_links_and_a_linked_split(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (root / "train" / "cat").rename(elsewhere / "cat")
    (root / "train" / "cat").mkdir()
    (root / "train" / "cat" / "all").symlink_to(elsewhere / "cat")
    (root / "test").rename(elsewhere / "test")
    (root / "test").symlink_to(elsewhere / "test")
    data = load(root)
    assert len(data.train) == len(data.test) == 8
    (root / "train" / "bird").symlink_to(elsewhere / "cat")
    refused(root, "is a folder of both classes")


# -------------------------------------------------------------------------------------------------- the size


def test_one_thumbnail_sorted_first_does_not_set_the_size(root, lines):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(4):
                save(root / split / name / f"{i}.png", 64)
    save(root / "train" / "cat" / "+.png", 4)
    data = load(root)
    assert data.train.shape == data.test.shape == (3, 64, 64)
    assert any("squares of 64 pixels, the median of shorter sides from 4 to 64 (data.load_size" in x for x in lines)
    assert load(root, load_size=10).train.shape == (3, 10, 10) and "squares of 10 pixels" in lines[-1]


def test_the_size_comes_from_all_splits_and_is_always_said(root, lines):
    assert load(root).train.shape == (3, 12, 12) and "squares of 12 pixels, cut at the centre" in lines[-1]
    for name in ("cat", "dog"):
        for i in range(9):
            save(root / "test" / name / f"large{i}.png", 20)
    assert load(root, stream="true", workers=0).train.shape == (3, 20, 20)
    assert "the median of shorter sides from 12 to 20" in lines[-1]
    exif = Image.Exif()
    exif[274] = 6
    shutil.rmtree(root)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (9, 16), "red").save(root / split / name / "x.jpg", exif=exif)
    assert load(root).train.shape == (3, 9, 9)


def test_images_that_are_all_black_are_said(root, lines):
    for split in ("train", "test"):
        for path in (root / split).rglob("*.png"):
            Image.fromarray(np.full((12, 12), 200, np.uint16)).save(path)  # 8 bits in 16
    load(root)
    assert any("images are black" in line for line in lines)


# ----------------------------------------------------------------------------------------------- the classes


def test_class_folders_one_level_too_deep_are_named(root):
    for split in ("train", "test"):
        (root / split).rename(root / "images")
        (root / split).mkdir()
        (root / "images").rename(root / split / "images")
    refused(root, r"train has one class folder, 'images'; it holds the folders 'cat', 'dog': move them up one level")


def test_one_class_alone_is_refused(root):
    for split in ("train", "test"):
        shutil.rmtree(root / split / "dog")
    refused(root, r"train has one class folder, 'cat'; give at least two")
    save(root / "train" / "dog" / "x.png")
    refused(root, r"classes differ: test lacks 'dog'")
    (root / "test").rename(root / "deep"), (root / "test").mkdir(), (root / "deep").rename(root / "test" / "images")
    refused(root, r"test has one class folder, 'images'; it holds the folders 'cat': move them up")
    with pytest.raises(ConfigError, match=r"data.num_classes=1 must lie in \[2, inf\]"):
        tiny("data.num_classes=1")


def test_the_same_folders_in_every_class_are_said(root, lines):
    for split in ("train", "test"):
        for part in ("a", "b"):
            shutil.copytree(root / split, root / "new" / split / part)
    load(root / "new")
    (warning,) = {line for line in lines if "folders of one name" in line and "train" in line}
    assert "('cat', 'dog')" in warning
    assert any("2 classes ('a', 'b')" in line for line in lines)


def test_which_side_lacks_which_class(root):
    (root / "test" / "cat").rename(root / "test" / "katze")
    save(root / "train" / "bird" / "x.png")
    refused(root, r"classes differ: train lacks 'katze'; test lacks 'bird', 'cat'; rename the class folders alike")
    for i in range(9):
        save(root / "train" / f"x{i}" / "x.png")
    refused(root, "test lacks 'bird', 'cat', 'x0', 'x1', 'x2' and 6 more")


def test_two_spellings_of_a_name_are_shown_apart(root):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    (root / "train" / "cat").rename(root / "train" / composed)
    (root / "test" / "cat").rename(root / "test" / apart)
    refused(root, r"train lacks '.*' \('cafe\\u0301'\); test lacks '.*' \('caf\\xe9'\), which are two spellings")
    shutil.copytree(root / "train" / composed, root / "train" / apart)
    refused(root, r"train has two classes of one name, '.*' \('cafe\\u0301'\), '.*' \('caf\\xe9'\); rename one")
    (root / "train" / composed).rename(root / "train" / "Cat")
    (root / "train" / apart).rename(root / "train" / "dog ")
    (root / "test" / apart).rename(root / "test" / "cat")
    refused(root, r"train lacks 'cat'; test lacks 'Cat', 'dog ', which are two spellings of the same name")


def test_classes_are_matched_by_name():
    assert class_order(["a", "b", "c"], ["a", "b", "c"], ("x", "y")) == [0, 1, 2]
    assert class_order(["a", "b", "c"], ["c", "a", "b"], ("x", "y")) == [2, 0, 1]
    with pytest.raises(ConfigError, match="classes differ: the run lacks 'b'; the data lacks 'B', which are two"):
        class_order(["B", "a"], ["a", "b"], ("the run", "the data"))


def test_labels_follow_the_names_that_a_model_learnt(root):
    data = load(root, val_fraction=0.5)
    mapped = data.ordered_as(["dog", "cat"])
    assert mapped.classes == ["dog", "cat"] and data.ordered_as(["cat", "dog"]) is data
    for name, split in mapped.splits().items():
        before = data.splits()[name]
        assert torch.equal(split.labels, 1 - before.labels) and torch.equal(split.images, before.images)
    with pytest.raises(ConfigError, match="the run lacks 'dog'; the data lacks 'bird'"):
        data.ordered_as(["bird", "cat"])


# ---------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_of_a_folder_is_its_content(root, tmp_path_factory):
    first = load(root).content_fingerprint()
    assert len(first) == 16 and load(root, stream="true").content_fingerprint() == first
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.copytree(root, moved)
    assert load(moved).content_fingerprint() == first
    os.utime(moved / "train" / "cat" / "0.png", (1, 1))
    assert load(moved).content_fingerprint() == first

    def changed(change):
        shutil.rmtree(moved), shutil.copytree(root, moved)
        change()
        return load(moved).content_fingerprint() != first

    assert changed(lambda: (moved / "train" / "cat" / "0.png").unlink())
    assert changed(lambda: (moved / "test" / "cat" / "0.png").rename(moved / "test" / "dog" / "9.png"))
    assert changed(lambda: (moved / "train" / "cat" / "0.png").rename(moved / "train" / "cat" / "00.png"))
    assert changed(lambda: save(moved / "train" / "cat" / "0.png"))
    assert changed(lambda: [(moved / s / "cat").rename(moved / s / "kat") for s in ("train", "test")])
    assert changed(lambda: shutil.copytree(moved / "test", moved / "val"))


def test_the_fingerprint_in_memory_is_of_pixels_and_labels():
    first = from_sizes(5, 6)
    assert from_sizes(5, 6).content_fingerprint() == first.content_fingerprint()
    for change in ("images", "labels"):
        other = from_sizes(5, 6)
        values = getattr(other.test, change).clone()
        values[0] = 1 - values[0]
        setattr(other.test, change, values)
        assert other.content_fingerprint() != first.content_fingerprint()
    other.classes = ["c1", "c0"]
    assert len({first.content_fingerprint(), other.content_fingerprint(), from_sizes(6, 5).content_fingerprint()}) == 3
