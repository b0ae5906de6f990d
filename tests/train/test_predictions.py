"""A model without its training data: any folder of images, corrupted copies, tables, single images."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from folder_runs import copied, folder_config, write_pets
from helpers import tiny
from PIL import Image
from programs import assert_refused, snapshot

from convnn.cli.evaluate import evaluate
from convnn.cli.export import export
from convnn.cli.predict import predict
from convnn.cli.visualize import visualize
from convnn.config.load import load_config
from convnn.data.corruptions import corrupted
from convnn.data.datasets import load_dataset
from convnn.errors import ConfigError
from convnn.runs.contents import MARKER
from convnn.train.restore import Asked, load_run, predict_run
from convnn.train.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    given = ["operator=conv2d", "swap.init=transfer"]  # which can be exported
    run(folder_config(write_pets(folder / "pets"), folder / "run", *given))
    return folder


@pytest.fixture
def pets(finished, tmp_path):
    """The data and the folder of a run."""
    return copied(finished, tmp_path)


@pytest.fixture
def alone(pets):
    """The folder of a run whose data is gone, and its test images somewhere else."""
    root, where = pets
    shutil.move(root / "test", where.parent / "images")
    shutil.rmtree(root)
    return where, where.parent / "images"


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def scores(capsys, *args):
    capsys.readouterr()
    evaluate([*args, "device=cpu"])
    return json.loads(capsys.readouterr().out)


# ------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_leaves_tables_that_say_what_it_printed(pets, capsys):
    _, where = pets
    found = scores(capsys, f"run={where}")
    result = json.loads((where / "result.json").read_text())
    assert found["top1"] == result["top1_last"] and found["out"] == f"{where}/evaluation/last"
    out = where / "evaluation" / "last"
    classes, images = table(out / "per_class.csv"), table(out / "per_image.csv")
    assert [row["class"] for row in classes] == ["cat", "dog"] and [row["images"] for row in classes] == ["4", "4"]
    assert sum(int(row["correct"]) for row in classes) == found["top1"] * 8 / 100
    assert [float(row["accuracy"]) for row in classes] == [25 * int(row["correct"]) for row in classes]
    right = [row["label"] == row["predicted"] for row in images]
    assert 100 * np.mean(right) == found["top1"] and all(0.5 <= float(row["probability"]) <= 1 for row in images)
    assert [row["file"] for row in images] == [f"test/{c}/{i}.png" for c in ("cat", "dog") for i in range(4)]
    assert json.loads((out / "scores.json").read_text())["loss"] == found["loss"]
    before = snapshot(out)
    assert scores(capsys, f"run={where}") == found and snapshot(out) == before
    (out / "per_class.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"per_class.csv would be replaced, which no evaluation wrote"):
        scores(capsys, f"run={where}")


def test_the_arrays_hold_what_the_tables_say(pets):
    _, where = pets
    values, found, classes = predict_run(load_config(where), where, "last")
    arrays = found.kept().arrays()
    assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
        "index": ("int32", (8,)), "label": ("uint8", (8,)), "predicted": ("uint8", (8,)),
        "probabilities": ("float16", (8, 2)),
    }  # fmt: skip
    assert np.allclose(found.probabilities.sum(1), 1) and arrays["index"].tolist() == list(range(8))
    assert -np.log(found.probabilities[range(8), found.label]).mean() == pytest.approx(values["loss"], rel=1e-5)
    assert classes == ["cat", "dog"]


def test_any_folder_of_the_classes_is_a_test_set(alone, capsys):
    where, images = alone
    result = json.loads((where / "result.json").read_text())
    found = scores(capsys, f"run={where}", f"data={images}")
    assert (found["top1"], found["images"], found["data"]) == (result["top1_last"], 8, str(images))
    assert found["same_images"] is True and re.search(r"evaluation/last-images-[0-9a-f]{6}$", found["out"])
    shutil.rmtree(images / "cat")
    (images / "dog" / "3.png").unlink()
    found = scores(capsys, f"run={where}", f"data={images}", f"out={where.parent}/other")
    assert found["images"] == 3 and found["same_images"] is False
    rows = table(where.parent / "other" / "per_class.csv")
    assert (rows[0]["images"], rows[0]["accuracy"]) == ("0", "") and rows[1]["images"] == "3"
    assert [row["file"] for row in table(where.parent / "other" / "per_image.csv")] == [
        f"dog/{i}.png" for i in range(3)
    ]


REFUSED = {
    "data={images}/none": "data={images}/none: there is no such folder",
    "data={where}": "data={where} has classes that the run lacks: 'checkpoints'|data={where}: .* has no images",
    "data={images} data_root=x": "data= is another test set and data_root= the run's own; give one of them",
    "data={images} corruption=mist": "corruption=mist is not one of gaussian_noise, shot_noise, impulse_noise",
    "data={images} severity=2": "severity=2 is that of a corruption; give corruption=NAME too",
    "data={images} corruption=contrast severity=6": r"severity=6 must lie in \[1, 5\]",
    "data={images} limit=0": "limit=0 must lie in",
    "data={images}/cat": "data={images}/cat: .* has no class folders",
    "checkpoint=last": "data.root=.*/pets: no folder .*/pets/train",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_evaluated_is_one_line(line, alone, call):
    where, images = alone
    args, said = (text.format(where=where, images=images) for text in (line, REFUSED[line]))
    assert_refused(call, "scripts/evaluate.py", [f"run={where}", *args.split()], said, where=where)


def test_other_classes_are_refused_by_name(pets, call):
    root, where = pets
    assert_refused(
        call, "scripts/evaluate.py", [f"run={where}", f"data={root}"],
        f"has classes that the run lacks: 'test', 'train'; give the folder of one split: data={root}/test", where=where,
    )  # fmt: skip
    (root / "test" / "cat").rename(root / "test" / "Cat")
    said = "has classes that the run lacks: 'Cat'; the run has 'cat', 'dog'"
    assert_refused(call, "scripts/evaluate.py", [f"run={where}", f"data={root}/test"], said, where=where)
    (root / "test" / "Cat").rename(root / "test" / "cat")
    (root / "test" / "cat" / "0.png").write_bytes(b"torn")
    said = f"data={root}/test: {root}/test/cat/0.png cannot be read as an image"
    assert_refused(call, "scripts/evaluate.py", [f"run={where}", f"data={root}/test"], said, where=where)


def test_a_corrupted_copy_is_of_the_same_images_each_time(pets, capsys, monkeypatch):
    _, where = pets
    config = load_config(where)
    plain = predict_run(config, where, "last")[1]
    noisy = {
        size: predict_run(
            load_config(where), where, "last", Asked(corruption="gaussian_noise", severity=5, limit=size)
        )[1]
        for size in (None, 4)
    }
    assert not np.array_equal(noisy[None].probabilities, plain.probabilities)
    assert len(set(noisy[4].label.tolist())) == 2 and len(noisy[4].index) == 4  # evenly over the classes
    assert np.allclose(noisy[4].probabilities, noisy[None].probabilities[noisy[4].index], atol=1e-6)

    test = load_dataset(config.data).test.images
    made = where.parent / "made"
    for i, x in enumerate(corrupted(test, range(8), "gaussian_noise", 5)):
        place = made / ("cat", "dog")[i // 4] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x.permute(1, 2, 0).numpy()).save(place)
    by_hand = predict_run(load_config(where), where, "last", Asked(folder=made))[1]
    assert np.allclose(by_hand.probabilities, noisy[None].probabilities, atol=1e-6)

    found = scores(capsys, f"run={where}", "corruption=gaussian_noise", "severity=5", "limit=4")
    assert found["images"] == 4 and (found["corruption"], found["severity"]) == ("gaussian_noise", 5)
    assert found["out"] == f"{where}/evaluation/last-gaussian_noise-5-limit4"


def test_a_folder_that_takes_no_files_is_a_warning(pets, capsys, monkeypatch):
    _, where = pets
    (where / "evaluation").write_text("a file")
    evaluate([f"run={where}", "device=cpu"])
    out, err = capsys.readouterr()
    assert "out" not in json.loads(out) and "out=FOLDER chooses another place" in err
    with pytest.raises(OSError):
        evaluate([f"run={where}", "device=cpu", f"out={where}/evaluation/x"])


def test_overwriting_takes_evaluations_and_leaves_what_others_wrote(pets, capsys):
    root, where = pets
    scores(capsys, f"run={where}")
    scores(capsys, f"run={where}", "limit=2")
    (where / "evaluation" / "last" / "notes.txt").write_text("mine")
    run(folder_config(root, where, "run.if_exists=overwrite"))
    kept = [path.relative_to(where) for path in (where / "evaluation").rglob("*") if path.is_file()]
    assert kept == [Path("evaluation/last/notes.txt")]


# ------------------------------------------------------------------------------------------- without data


def test_programs_that_need_no_data_do_without(alone, capsys):
    where, images = alone
    loaded = load_run(load_config(where), where, "last", splits=())
    assert (loaded.classes, loaded.shape, loaded.image_size, loaded.dataset) == (["cat", "dog"], [3, 8, 8], 8, None)
    export([f"run={where}", f"out={where.parent}/w.pt"])
    assert json.loads((where.parent / "w.json").read_text())["classes"] == ["cat", "dog"]
    visualize([f"run={where}", f"image={images}/cat/0.png", f"out={where.parent}/drawn"])
    assert (where.parent / "drawn" / "neighbors.png").exists()


def without_record(where, shape_alone):
    """Make a run folder one of before runs recorded their data, or its shape."""
    for path in (where / MARKER, where / "result.json"):
        values = json.loads(path.read_text())
        values["data"] = {**values["data"], "shape": None} if shape_alone else None
        path.write_text(json.dumps(values))
    for path in (where / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        state["data"] = {**state["data"], "shape": None} if shape_alone else None
        torch.save(state, path)


@pytest.mark.parametrize("shape_alone", [False, True])
def test_an_old_folder_takes_it_from_the_data_or_says_what_is_missing(shape_alone, pets, call, capsys):
    root, where = pets
    without_record(where, shape_alone)
    args = [f"run={where}", f"image={root}/test/cat/0.png"]
    assert call("scripts/predict.py", args)[0] == 0
    moved = root.rename(root.parent / "moved")
    args[1] = f"image={moved}/test/cat/0.png"
    lacks = "the size of its images" if shape_alone else "the names of its classes and the size of its images"
    said = rf"run={where} is of before runs recorded {lacks}, and its data cannot be read \(.*\); give .*data_root=DIR"
    assert_refused(call, "scripts/predict.py", args, said)
    assert_refused(call, "scripts/export.py", args[:1], said)
    assert call("scripts/predict.py", [*args, f"data_root={moved}"])[0] == 0


# ------------------------------------------------------------------------------------------- predictions


def test_predictions_are_those_of_an_evaluation(alone, capsys, tmp_path):
    where, images = alone
    expected = predict_run(load_config(where), where, "last", Asked(folder=images))[1]
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.png").write_text("no image")
    capsys.readouterr()
    predict([f"run={where}", f"image={images}", "device=cpu", "top=2", f"csv={tmp_path}/p.csv"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["file", "class", "probability", "class", "probability"] and len(lines) == 9
    assert [line[1] for line in lines[1:]] == [("cat", "dog")[c] for c in expected.predicted]
    rows = table(tmp_path / "p.csv")
    assert [row["file"] for row in rows[::2]] == expected.files and [row["rank"] for row in rows[:2]] == ["1", "2"]
    for row, shares in zip(rows[::2], expected.probabilities, strict=True):
        assert float(row["probability"]) == pytest.approx(shares.max(), abs=1e-4)
    assert float(rows[0]["probability"]) + float(rows[1]["probability"]) == pytest.approx(1, abs=2e-4)
    predict([f"run={where}", f"image={images}/dog/1.png", "device=cpu"])
    one = capsys.readouterr().out.split()[-2:]
    assert re.fullmatch(r"(cat|dog) 0\.\d{4}", " ".join(one))
    predict([f"run={where}", f"{images}/cat", f"{images}/dog/1.png", "device=cpu", f"image={images}/dog/0.png"])
    several = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    names = [f"cat/{i}.png" for i in range(4)] + ["dog/1.png", "dog/0.png"]
    assert [Path(line[0]).resolve() for line in several] == [(images / name).resolve() for name in names]
    assert several[4][1:] == one


def test_grey_runs_take_image_files(tmp_path, capsys):
    run(tiny("data=digits", "data.limit=64", "train.max_steps=1", "swap.last=1", f"run.dir={tmp_path}/r"))
    test = load_dataset(load_config(tmp_path / "r").data).test
    for i in range(3):
        Image.fromarray(test.images[i, 0].numpy()).save(tmp_path / f"{i}.png")
    whole = predict_run(load_config(tmp_path / "r"), tmp_path / "r", "last")[1]
    capsys.readouterr()
    predict([f"run={tmp_path}/r", f"image={tmp_path}", "device=cpu"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    for i in range(3):
        assert lines[i][1:] == [str(whole.predicted[i]), f"{whole.probabilities[i].max():.4f}"]


BAD = {
    "image={images}/none.png": "image={images}/none.png: there is no such file or folder",
    "image={where}/checkpoints": "image={where}/checkpoints holds no image files",
    "image={where}/config.yaml": "image={where}/config.yaml cannot be read as an image",
    "": "name an image file or a folder; see --help",
    "{images} {images}/none.png": "image={images}/none.png: there is no such file or folder",
    "image={images} top=0": "top=0 must lie in",
    "image={images} csv={where}/config.yaml": "csv={where}/config.yaml is there already; choose another file",
    "image={images} csv={where}/x/y.csv": "csv={where}/x/y.csv names a folder that is not there",
    "image={images} run=none": "none is not a run folder",
}


@pytest.mark.parametrize("line", BAD)
def test_what_cannot_be_predicted_is_one_line(line, alone, call):
    where, images = alone
    args, said = (text.format(where=where, images=images) for text in (line, BAD[line]))
    assert_refused(call, "scripts/predict.py", [f"run={where}", *args.split()], said, where=where)
