"""Training, validation and test images: which folders they come from, and how many of each class."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from helpers import tiny
from image_sets import from_sizes, load, lopsided, refused

from convnn.config.identity import fingerprint, fingerprint_of, identity_of
from convnn.config.load import load_config
from convnn.data.datasets import load_dataset
from convnn.data.splits import stratified
from convnn.errors import ConfigError
from convnn.train.run import run


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_beside_test_is_the_validation_set(name, root, lines):
    shutil.copytree(root / "test", root / name)
    (root / name / "cat" / "0.png").unlink()
    data = load(root)
    assert [len(split) for split in data.splits().values()] == [8, 7, 8]
    assert f"8 train, 8 test, 7 {name} (the validation set) images" in "".join(lines)
    assert load(root, val_folder=False).val is None
    refused(
        root, r"data.val_fraction=0.2 holds out .* set data.val_fraction=0, or .*val_folder=false", val_fraction=0.2
    )
    assert len(load(root, val_folder=False, val_fraction=0.25).val) == 2
    (root / name / "cat").rename(root / name / "bird")
    refused(root, f"train lacks 'bird'; {name} lacks 'cat'")


@pytest.mark.long
def test_the_best_checkpoint_is_chosen_on_the_validation_folder(root, tmp_path):
    shutil.copytree(root / "test", root / "val")
    (root / "val" / "cat" / "0.png").unlink()
    more = [f"data.root={root}", "data.load_size=8", "data.image_size=8", "train.batch_size=4", "train.epochs=1"]
    result = run(tiny("data=imagefolder", *more, f"run.dir={tmp_path}/r"))
    assert result["val_top1_best"] is not None and result["top1_best_on_test"] is None


def test_without_test_val_is_the_test_set(root, lines):
    (root / "test").rename(root / "val")
    data = load(root)
    assert data.val is None and len(data.test) == 8 and "8 val (the test set) images" in "".join(lines)
    (root / "test").mkdir()
    assert load(root).val is None and f"data.root={root}: folders left out: 'test'" in lines
    (root / "Val").mkdir()
    load(root, val_folder=False)
    assert f"data.root={root}: folders left out: 'Val', 'test'" in lines
    (root / "valid").symlink_to(root / "val")
    assert load(root).val is None  # one folder under two names
    (root / "valid").unlink(), shutil.copytree(root / "val", root / "valid")
    refused(root, "has val and valid; keep one of them")


def test_a_validation_folder_that_is_test_or_train_is_said(root, lines):
    (root / "val").symlink_to(root / "test")
    assert load(root).val is None
    (root / "val").unlink(), (root / "val").symlink_to(root / "train")
    assert len(load(root).val) == 8 and any("val is the folder of train" in line for line in lines)


def test_the_key_for_validation_folders_leaves_older_runs_the_same():
    base = tiny("data=imagefolder", "data.root=x")
    assert fingerprint(base) == fingerprint(tiny("data=imagefolder", "data.root=x", "data.val_folder=true"))
    assert fingerprint(base) != fingerprint(tiny("data=imagefolder", "data.root=x", "data.val_folder=false"))


def test_a_run_older_than_the_key_took_no_notice_of_a_validation_folder(root, tmp_path):
    shutil.copytree(root / "test", root / "val")
    for fraction in (0.25, 0.0):
        more = ["data=imagefolder", f"data.root={root}", f"data.val_fraction={fraction}"]
        values = asdict(tiny(*more))
        del values["data"]["val_folder"]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        config = load_config(tmp_path)
        assert fingerprint(config) == fingerprint_of(identity_of(values)) == fingerprint(tiny(*more))
        assert len(load_dataset(config.data).val) == (2 if fraction else 8)


@pytest.mark.parametrize(
    "sizes, count, expected",
    [
        ((900, 100), 200, (180, 20)),
        ((100, 900), 200, (20, 180)),
        ((5, 995), 100, (1, 100)),  # its share of 0.5 is one image
        ((10, 20, 30), 6, (1, 2, 3)),
        ((2, 2, 996), 500, (1, 1, 498)),
        ((3, 997), 900, (2, 897)),
    ],
)
def test_validation_takes_each_class_its_share(sizes, count, expected):
    labels = lopsided(sizes)
    for seed in range(3):
        chosen = stratified(labels, count, np.random.default_rng(seed))
        taken = np.bincount(labels[chosen], minlength=len(sizes))
        assert np.abs(taken - expected).max() <= 1 and (taken > 0).all() and (taken < sizes).all()
        assert len(set(chosen)) == len(chosen) and (np.diff(chosen) > 0).all()


def test_where_classes_are_equal_the_validation_set_is_the_one_of_earlier_versions():
    """A run that goes on must not train on what it validates on."""
    labels = np.tile(np.arange(7), 30)
    for count in (7, 40, 100):
        order = np.random.default_rng(3).permutation(len(labels))
        rank = np.empty(len(labels), int)
        for c in range(7):
            own = order[labels[order] == c]
            rank[own] = np.arange(len(own))
        before = np.sort(order[np.argsort(rank[order], kind="stable")][:count])
        assert np.array_equal(stratified(labels, count, np.random.default_rng(3)), before)


def test_a_class_that_cannot_be_on_both_sides_is_an_error():
    data = from_sizes(900, 100, val_fraction=0.2)
    assert data.val.labels.bincount().tolist() == [180, 20] and data.train.labels.bincount().tolist() == [720, 80]
    for sizes, fraction, message in (
        ((1, 99, 1), 0.2, r"classes of one image \('c0', 'c2'\) cannot be on both sides"),
        ((50, 50, 50), 0.01, "leaves 2 images for 3 classes on one side; choose from 0.02 to 0.98"),
        ((50, 50, 50), 0.99, "leaves 2 images for 3 classes on one side"),
        ((50, 50), 0.001, "leaves a split empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_sizes(*sizes, val_fraction=fraction)


def test_classes_that_a_limit_leaves_without_images_are_said(lines):
    from_sizes(5, 5, 5, limit=2)
    (line,) = lines
    assert line.startswith("data=mine: train has no images of 1 of the 3 classes ('c")
