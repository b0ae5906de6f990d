"""Data sets of other modules: what is taken, what is converted, and one line for what is refused."""

import numpy as np
import pytest
import torch

from convnn.config.compose import compose_config
from convnn.config.schema import DataConfig
from convnn.data import Dataset, FileSplit, Split
from convnn.data.datasets import load_dataset
from convnn.data.images import image_size
from convnn.errors import ConfigError

LABELS = torch.arange(64) % 4
IMAGES = torch.arange(64 * 3 * 5 * 5).remainder(256).to(torch.uint8).view(64, 3, 5, 5)
CLASSES = ["a", "b", "c", "d"]


def load_made(config):
    return config.options["make"]()


def load(make, **kwargs):
    return load_dataset(DataConfig("mine", "test_checks.load_made", options={"make": make}, **kwargs))


def dataset(images=IMAGES, labels=LABELS, classes=CLASSES, test=None, **kwargs):
    return Dataset(Split(images, labels), test or Split(IMAGES, LABELS), classes, **kwargs)


def test_a_proper_data_set_is_taken_as_it_is():
    data = load(dataset)
    assert data.train.images is IMAGES or torch.equal(data.train.images, IMAGES)
    assert torch.equal(data.train.labels, LABELS) and data.classes == CLASSES and data.val is None
    assert len(load(lambda: dataset(val=Split(IMAGES[:8], LABELS[:8]))).val) == 8


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int16", "uint16", ">i8", ">i4"])
def test_arrays_and_other_integers_become_tensors(dtype):
    array = IMAGES.numpy().copy()
    array.flags.writeable = False
    data = load(lambda: dataset(array, LABELS.numpy().astype(dtype), tuple(CLASSES)))
    assert torch.equal(data.train.images, IMAGES) and torch.equal(data.train.labels, LABELS)
    assert data.train.labels.dtype == torch.int64 and data.classes == CLASSES
    data = load(lambda: dataset(array[::-1], LABELS.flip(0).int().tolist(), np.array(CLASSES)))
    assert torch.equal(data.train.images, IMAGES.flip(0)) and torch.equal(data.train.labels, LABELS.flip(0))


def test_files_may_be_given_as_text(tmp_path):
    from PIL import Image

    Image.new("RGB", (5, 5), "red").save(tmp_path / "x.png")
    split = FileSplit([str(tmp_path / "x.png")] * 4, [0, 1, 2, 3], 5)
    data = load(lambda: Dataset(split, split, CLASSES), stream="true", val_fraction=0.0)
    assert image_size(data.train.paths[0]) == (5, 5) and data.train.labels.tolist() == [0, 1, 2, 3]


WRONG = [
    (lambda: None, "returned None; it must return a convnn.data.Dataset"),
    (lambda: (IMAGES, LABELS), "returned a tuple; it must return a convnn.data.Dataset"),
    (lambda: Dataset((IMAGES, LABELS), Split(IMAGES, LABELS), CLASSES), "train is a tuple; give a convnn.data.Split"),
    (lambda: Dataset(Split(IMAGES, LABELS), None, CLASSES), "test is None; give a convnn.data.Split"),
    (lambda: dataset(IMAGES / 255), r"train images are float32; give uint8 .* such as \(255 \* images\).round\(\)"),
    (lambda: dataset((IMAGES / 255).double().numpy()), "train images are float64; give uint8 from 0 to 255"),
    (lambda: dataset(IMAGES.half()), "train images are float16; give uint8"),
    (lambda: dataset(IMAGES.long()), r"train images are int64; give uint8 .* such as images.to\(torch.uint8\)"),
    (lambda: dataset(IMAGES > 9), r"train images are bool; give uint8 .* \(255 \* images\)"),
    (lambda: dataset(IMAGES.numpy().astype(np.uint16)), "train images are uint16; give uint8"),
    (lambda: dataset(IMAGES.permute(0, 2, 3, 1)), r"\(64, 5, 5, 3\), channels last; give images.permute\(0, 3, 1, 2\)"),
    (lambda: dataset(IMAGES[:, 0]), r"train images have the shape \(64, 5, 5\); give \(images, channels, rows"),
    (lambda: dataset(None), r"train images \(None\) cannot be made a tensor"),
    (lambda: dataset(["x.png"] * 64), r"train images \(a list\) cannot be made a tensor"),
    (lambda: dataset(IMAGES[:, :, :0]), "no pixels"),
    (lambda: dataset(IMAGES[:0], LABELS[:0]), "train has no images"),
    (lambda: dataset(labels=LABELS[:32]), "train has 64 images and 32 labels; give each image one label"),
    (lambda: dataset(labels=LABELS.float()), "train labels are float32; give integers"),
    (lambda: dataset(labels=torch.eye(4)[LABELS].long()), r"train labels have the shape \(64, 4\); give one integer"),
    (lambda: dataset(labels=LABELS[:, None].numpy()), r"train labels have the shape \(64, 1\)"),
    (lambda: dataset(labels=LABELS + 1), "train has labels from 1 to 4; for 4 classes give 0 to 3"),
    (lambda: dataset(labels=LABELS - 1), "train has labels from -1 to 2"),
    (lambda: dataset(labels=["a"] * 64), r"train labels \(a list\) cannot be made a tensor"),
    (lambda: dataset(labels=None), r"train labels \(None\) cannot be made a tensor"),
    (lambda: dataset(classes=4), "classes is a int; give a list with the name of each class"),
    (lambda: dataset(classes=None), "classes is None; give a list"),
    (lambda: dataset(classes="abcd"), "classes is a str; give a list"),
    (lambda: dataset(classes=["a", "b", "c", "a"]), "has two classes of one name, 'a', 'a'; rename one"),
    (lambda: dataset(labels=LABELS * 0, classes=["a"]), r"has 1 classes \('a'\); classification needs two or more"),
    (
        lambda: dataset(test=Split(IMAGES[:, :1], LABELS)),
        r"train are \(3, 5, 5\) and of test \(1, 5, 5\) .* one shape$",
    ),
    (lambda: dataset(test=Split(IMAGES[..., :4], LABELS)), r"of test \(3, 5, 4\) .* one shape, or set data.image_size"),
    (lambda: dataset(test=Split(IMAGES, LABELS.float())), "test labels are float32"),
    (lambda: dataset(val=Split(IMAGES, LABELS + 9)), "val has labels from 9 to 12"),
    (lambda: dataset(test=FileSplit(["x.png"] * 4, [0, 1, 2, 3], None)), "test: side is None; give the images' side"),
    (lambda: dataset(test=FileSplit(["x.png"] * 4, [0, 1, 2], 8)), "test has 4 images and 3 labels"),
]


@pytest.mark.parametrize("make, message", WRONG)
def test_what_does_not_fit_is_one_line(make, message):
    with pytest.raises(ConfigError, match=rf"^data.target=test_checks.load_made.*{message}") as error:
        load(make)
    assert "\n" not in str(error.value)


def test_sizes_may_differ_where_images_are_resized():
    data = load(lambda: dataset(test=Split(IMAGES[..., :4], LABELS)), image_size=8)
    assert data.test.shape == (3, 5, 4)


def test_two_validation_sets_contradict_each_other():
    with pytest.raises(ConfigError, match=r"data.val_fraction=0.5 .* has a validation set of its own; set data.val_f"):
        load(lambda: dataset(val=Split(IMAGES, LABELS)), val_fraction=0.5)


def test_a_stream_needs_files():
    with pytest.raises(ConfigError, match=r"data.stream=true needs files that are streamed, not data=mine"):
        load(dataset, stream="true")


@pytest.mark.parametrize("mean", ["[123.7,116.3,103.5]", "[-0.1]", "[nan]"])
def test_means_are_of_pixels_from_0_to_1(mean):
    with pytest.raises(ConfigError, match=r"data.mean=.* must lie in \[0, 1\]"):
        compose_config([f"data.mean={mean}", "data.std=[1.0]" if "," not in mean else "data.std=[1.0,1.0,1.0]"])
