"""A finished run as an object."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from folder_runs import folder_config, write_pets

import convnn
from convnn.data.images import open_square
from convnn.errors import CheckpointError, ConfigError
from convnn.train.run import run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder_config(write_pets(folder / "pets"), folder / "run", "operator=convnn"))
    return folder


def test_what_a_run_left(place):
    found = convnn.load_run(place / "run")
    assert found.result == json.loads((place / "run" / "result.json").read_text())
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    assert list(found.metrics["epoch"]) == [json.loads(line)["epoch"] for line in lines]
    assert found.config.operator.name == "convnn" and not found.model.training
    images = torch.zeros(1, found.shape[0], found.image_size, found.image_size)
    assert found.model(images).shape == (1, len(found.classes))
    assert convnn.neighbors_of(found.model, images)


def test_tensors_files_and_folders_are_predicted_alike(place):
    found = convnn.load_run(str(place / "run"), device="cpu")
    files = sorted((place / "pets" / "test").rglob("*.*"))[:4]
    pixels = [np.asarray(open_square(os.fsencode(file), found.shape[2])) for file in files]
    several = found.predict(files)
    one = found.predict(files[1])
    tensor = found.predict(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
    whole = found.predict(place / "pets" / "test")
    assert np.array_equal(several.probabilities, tensor.probabilities) and several.predicted.tolist()
    assert np.allclose(one.probabilities[0], several.probabilities[1], atol=1e-6)
    assert len(whole.files) >= len(files) and not any(name.startswith("/") for name in whole.files)
    assert np.allclose(several.probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"images of \(2, 3, 8, 8\) float32 are not \(N, 3, h, w\) uint8"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"\(2, 1, 8, 8\) uint8 are not"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"\(0, 3, 8, 8\)"),
        ([], "empty list"),
        ("nowhere", "no such file or folder"),
    ],
)
def test_what_are_no_images_is_refused(images, message, place):
    with pytest.raises(ConfigError, match=message):
        convnn.load_run(place / "run", device="cpu").predict(images)


def test_what_is_no_run_is_refused(place, tmp_path):
    with pytest.raises(ConfigError):
        convnn.load_run(tmp_path)
    with pytest.raises(CheckpointError, match="newest"):
        convnn.load_run(place / "run", checkpoint="newest")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", r"^device=cuda:1: this machine has 0 usable CUDA devices; set device=cpu or auto$"),
        ("gpu", r"^device=gpu is not one of auto, cpu, cuda, cuda:N, mps$"),
        ("meta", r"^device=meta is not one of auto"),
    ],
)
def test_a_device_that_is_not_there_is_refused_at_once(device, message, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        convnn.load_run(place / "run", device=device)
    with pytest.raises(ConfigError, match=message):
        convnn.load_exported(place, device=device)
    assert convnn.load_run(place / "run").config.device == "cpu"


def test_metrics_need_pandas(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pip install convnn\[report\]"):
        _ = convnn.load_run(place / "run").metrics
