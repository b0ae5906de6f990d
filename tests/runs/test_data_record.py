"""A run is one of its data: another content at the same place is refused, the same content at another is not."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from folder_runs import CHANGES, copied, folder_config, remove_one, rename_class, write_pets
from helpers import tiny
from training import stop_after

from convnn.config.load import load_config, read_values
from convnn.data.datasets import load_dataset
from convnn.errors import ConfigError
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.contents import MARKER
from convnn.runs.data_record import DataRecord, RecordReader
from convnn.runs.folder import known_record
from convnn.train.run import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_pets(folder / "pets")
    run(folder_config(folder / "pets", folder / "run", data="imagenet"))
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The same, stopped after one of two steps."""
    folder = tmp_path_factory.mktemp("half")
    write_pets(folder / "pets")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert run(folder_config(folder / "pets", folder / "run", data="imagenet"))["steps"] == 1
    return folder


def again(root, where, policy="resume", *overrides, data="imagenet"):
    return run(folder_config(root, where, f"run.if_exists={policy}", *overrides, data=data))


def test_marker_checkpoint_and_result_hold_the_record(finished):
    folder = finished / "run"
    record = known_record(folder)
    assert record.classes == ["cat", "dog"] and record.images == {"train": 16, "test": 8}
    data = load_dataset(load_config(folder).data)
    assert record == replace(DataRecord.of(data), shape=[3, 8, 8]) and data.train.shape == (3, 8, 8)
    places = [json.loads((folder / name).read_text()) for name in (MARKER, "result.json")]
    places += [load_checkpoint(folder / "checkpoints" / f"{name}.pt") for name in ("last", "best")]
    assert [DataRecord.read(place) for place in places] == [record] * 4
    assert json.loads((folder / "result.json").read_text())["classes"] == 2


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", ["skip", "resume", "half"])
def test_other_data_is_refused(state, change, finished, half, tmp_path):
    root, where = copied(half if state == "half" else finished, tmp_path)
    change(root)
    before = (where / "checkpoints" / "last.pt").read_bytes(), (where / "result.json").read_text()
    with pytest.raises(ConfigError) as error:
        again(root, where, "skip" if state == "skip" else "resume")
    text = str(error.value)
    assert CHANGES[change] in text and f"run.dir={where} was made with other data" in text and "\n" not in text
    assert ((where / "checkpoints" / "last.pt").read_bytes(), (where / "result.json").read_text()) == before


@pytest.mark.parametrize("change", [remove_one, rename_class])
@pytest.mark.parametrize("lost", ["marker", "result", "both"])
def test_each_of_the_three_places_is_enough(lost, change, half, tmp_path):
    root, where = copied(half, tmp_path)
    if lost in ("marker", "both"):
        (where / MARKER).write_text('{"folder": "run"}')
    if lost in ("result", "both"):
        (where / "result.json").unlink()
    change(root)
    with pytest.raises(ConfigError, match=re.escape(CHANGES[change])):
        again(root, where)


@pytest.mark.parametrize("data", ["imagenet", "imagefolder"])
def test_data_that_moved_is_the_same(data, tmp_path):
    root, where = write_pets(tmp_path / "pets"), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        run(folder_config(root, where, "tracker.project=mine", data=data))
    moved = root.rename(tmp_path / "moved")
    done = again(moved, where, data=data)
    assert done["status"] == "complete" and done["steps"] == 2
    kept = read_values(where)
    assert kept["data"]["root"] == str(moved) and kept["tracker"]["project"] == "mine"  # where programs look for it now
    back = moved.rename(tmp_path / "again")
    for policy in ("skip", "resume"):
        assert again(back, where, policy, data=data) == done


@pytest.mark.long
def test_the_folder_named_after_the_old_place_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_pets(tmp_path / "pets")
    first = run(folder_config(root, "null", "run.root=runs"))
    (folder,) = (tmp_path / "runs").iterdir()
    shutil.copytree(root, tmp_path / "moved")
    reads, of = [], DataRecord.of.__func__
    monkeypatch.setattr(DataRecord, "of", classmethod(lambda cls, d: reads.append(1) or of(cls, d)))
    assert run(folder_config("moved", "null", "run.root=runs", "run.if_exists=resume")) == first
    assert len(reads) == 1 and [folder] == list((tmp_path / "runs").iterdir())
    (folder / "result.json").unlink()
    run(folder_config("moved", "null", "run.root=runs", "run.if_exists=resume"))
    assert len(reads) == 2 and [folder] == list((tmp_path / "runs").iterdir())
    remove_one(tmp_path / "moved")  # other images: another run, in a folder of its own
    run(folder_config("moved", "null", "run.root=runs", "run.if_exists=resume"))
    both = sorted((tmp_path / "runs").iterdir())
    assert len(both) == 2
    for place in ("pets", "moved"):  # of two runs of one configuration each is found by its data
        (tmp_path / place).rename(tmp_path / f"{place} again")
        run(folder_config(f"{place} again", "null", "run.root=runs", "run.if_exists=resume"))
    assert sorted((tmp_path / "runs").iterdir()) == both


def test_data_that_is_gone_is_told(finished, tmp_path, caplog):
    root, where = copied(finished, tmp_path)
    shutil.rmtree(root)
    with caplog.at_level("WARNING", "convnn"):
        assert again(root, where, "skip")["status"] == "complete"
    assert "cannot be told" in caplog.text and str(root) in caplog.text


def test_a_folder_without_a_record_goes_on_and_gets_one(half, tmp_path):
    root, where = copied(half, tmp_path)
    known = known_record(where)
    (where / MARKER).write_text('{"folder": "run"}')
    (where / "result.json").unlink()
    path = where / "checkpoints" / "last.pt"
    import torch

    state = load_checkpoint(path)
    del state["data"]
    torch.save(state, path)
    assert again(root, where)["steps"] == 2 and known_record(where) == known


@pytest.mark.parametrize("damage", ["[]", "{", '{"data": 3}', '{"data": {"classes": 5, "images": 3, "content": 1}}'])
def test_a_damaged_marker_is_no_record(damage, half, tmp_path):
    root, where = copied(half, tmp_path)
    (where / MARKER).write_text(damage)
    remove_one(root)
    with pytest.raises(ConfigError, match="test: 8 -> 7 images"):  # the other places tell
        again(root, where)


def test_reading_a_record_opens_few_files_and_each_set_once(tmp_path, monkeypatch):
    root = write_pets(tmp_path / "pets")
    config = folder_config(root, tmp_path / "run", "data.load_size=null").data
    whole = DataRecord.of(load_dataset(config))
    opened = []
    monkeypatch.setattr("convnn.data.datasets.open_square", lambda *_: opened.append(1))
    monkeypatch.setattr("convnn.data.datasets.image_size", lambda *_: opened.append(1))
    read = RecordReader()
    assert read(config) == whole and not opened
    monkeypatch.setattr("convnn.data.datasets.load_dataset", None)
    assert read(config) == whole == read.known(config)


def test_sets_that_the_configuration_tells_are_not_read_to_skip(tmp_path, monkeypatch):
    done = run(tiny("swap.last=1", "train.epochs=1", f"run.dir={tmp_path}/r"))
    monkeypatch.setattr("convnn.data.datasets.load_dataset", None)
    assert run(tiny("swap.last=1", "train.epochs=1", f"run.dir={tmp_path}/r", "run.if_exists=skip")) == done


def test_a_data_set_of_ones_own_is_compared(tmp_path, monkeypatch):
    (tmp_path / "own_set.py").write_text(
        "import torch\nfrom convnn.data import Dataset, Split\n"
        "names = ['a', 'b']\nshift = 0\n"
        "def load(config):\n"
        "    split = Split((torch.arange(16 * 64).view(16, 1, 8, 8) % 251 + shift).byte(), torch.arange(16) % 2)\n"
        "    return Dataset(split, split, names)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["data.name=mine", "data.target=own_set.load", "swap.last=1", "train.batch_size=8", "train.epochs=1"]
    done = run(tiny(*given, f"run.dir={tmp_path}/r"))
    import own_set

    same = tiny(*given, f"run.dir={tmp_path}/r", "run.if_exists=skip")
    assert run(same) == done
    for name, value, said in (
        ("shift", 1, "train: other images; test: other images"),
        ("names", ["b", "a"], "the classes are in another order: 'a', 'b' -> 'b', 'a'"),
        ("names", ["a", "c"], "the run lacks 'c'; the data lacks 'b'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(own_set, name, value)
            with pytest.raises(ConfigError, match=re.escape(said)):
                run(same)
