"""A report replaces its own files and nothing else, and is there whole or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from fake_runs import grid, write_run

from convnn.errors import ConfigError
from convnn.report.build import make_report
from convnn.report.writing import REPORT

pytest.importorskip("matplotlib")
MANIFEST = REPORT.manifest
PRINT_PNG = "matplotlib.backends.backend_agg.FigureCanvasAgg.print_png"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_report([grid(folder / "runs", ks=(4, 9), blends=(0.0, 1.0))], folder / "out")
    return folder


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def again(place):
    """Report over fewer runs, which draw fewer pictures."""
    return make_report([place / "runs" / "b0.0-k4-s0"], place / "out")


@pytest.mark.long
def test_pictures_of_the_user_stay_and_stale_ones_of_ours_go(place):
    mine = ["over_time.png", "run1_photo.png", "curves_mine.svg", "layers_of_onions.png", "notes.html"]
    for name in mine:
        (place / "out" / name).write_text(name)
    before = files(place / "out")
    assert {"heatmap.png", "over_blend.svg"} <= before.keys()
    report = again(place)
    after = files(place / "out")
    assert {name: after[name].decode() for name in mine} == {name: name for name in mine}
    names = {"index.html", "table.md", "summary.csv", "results.csv"}
    names |= {path.name for p in report.pictures for path in (p.png, p.svg)}
    assert after.keys() == names | {MANIFEST, *mine} and "heatmap.png" not in names
    assert json.loads(after[MANIFEST])["files"].keys() == names
    assert all(p.png.is_file() and p.svg.is_file() and p.png.parent == place / "out" for p in report.pictures)


@pytest.mark.parametrize("name", ["index.html", "results.csv", "curves.png"])
@pytest.mark.parametrize("how", ["file", "link", "folder"])
def test_a_file_that_no_report_wrote_is_not_replaced(name, how, place):
    shutil.rmtree(place / "out")
    (place / "out").mkdir()
    path = place / "out" / name
    if how == "file":
        path.write_text("mine")
    elif how == "link":
        (place / "mine").write_text("mine")
        path.symlink_to(place / "mine")
    else:
        path.mkdir()
    before = files(place)
    with pytest.raises(ConfigError, match=rf"out=.*: {name} would be replaced, which no report wrote"):
        again(place)
    assert files(place) == before and [p.name for p in (place / "out").iterdir()] == [name]


@pytest.mark.parametrize("name", ["index.html", "summary.csv"])
def test_a_file_that_was_changed_since_is_the_users(name, place):
    (place / "out" / name).write_text("my own words")
    before = files(place)
    with pytest.raises(ConfigError, match=rf"{name} would be replaced, .* changed since; move it"):
        again(place)
    assert files(place) == before
    (place / "out" / name).rename(place / name)
    again(place)
    assert (place / "out" / name).exists()


def test_a_changed_picture_that_is_not_drawn_again_stays(place):
    (place / "out" / "heatmap.png").write_text("mine")
    again(place)
    assert (place / "out" / "heatmap.png").read_text() == "mine" and not (place / "out" / "heatmap.svg").exists()
    again(place)
    assert (place / "out" / "heatmap.png").exists()


def test_a_report_of_version_0_1_is_known_by_its_page(place):
    (place / "out" / MANIFEST).unlink()
    for name in ("over_mine.svg", "over_mine.png"):
        (place / "out" / name).write_text("<svg/>")
    again(place)
    left = files(place / "out")
    assert "over_mine.svg" in left and "over_mine.png" in left and "heatmap.png" not in left and MANIFEST in left


@pytest.mark.parametrize("content", ["", "[1]", '{"files": 3}', '{"files": {"../runs/x": ["a"], "index.html": 3}}'])
def test_a_damaged_list_loses_nothing(content, place):
    (place / "out" / MANIFEST).write_text(content)
    (place / "runs" / "x").write_text("x")
    (place / "out" / "over_mine.png").write_text("x")
    try:
        again(place)
    except ConfigError as error:
        assert "would be replaced" in str(error)
    assert (place / "runs" / "x").exists() and (place / "out" / "over_mine.png").exists()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


DISKS = {
    "results.csv": ("pandas.DataFrame.to_csv", full),
    "curves.png": (PRINT_PNG, full),
    "table.md": ("pathlib.Path.write_text", full),
}


@pytest.mark.parametrize("name", DISKS)
@pytest.mark.parametrize("first", [True, False])
def test_a_full_disk_is_named_and_leaves_the_earlier_report(name, first, place, monkeypatch):
    if first:
        shutil.rmtree(place / "out")
    before = files(place)
    with monkeypatch.context() as patch:
        patch.setattr(*DISKS[name])
        with pytest.raises(OSError, match=rf"out/{name} cannot be written: No space left on device; an earlier report"):
            again(place)
    assert files(place) == before and (place / "out").exists() != first
    again(place)


def test_a_disk_that_is_full_for_the_list_or_an_encoder(place, monkeypatch):
    write = Path.write_text

    def refuses(self, *args, **kwargs):
        return full() if self.name == ".new" else write(self, *args, **kwargs)

    def encoder(*_, **__):
        raise OSError("encoder error -2 when writing image file")  # as Pillow words it, without a number

    before = files(place)
    for target, broken, hint in (
        ("pathlib.Path.write_text", refuses, r"\.convnn-report cannot be written: No space"),
        (PRINT_PNG, encoder, r"\.png cannot be written: encoder error -2"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, broken)
            with pytest.raises(OSError, match=hint):
                again(place)
        assert files(place) == before


@pytest.mark.parametrize("at", range(1, 9, 2))
@pytest.mark.long
def test_a_kill_between_the_renames_is_mended_by_the_next_report(at, place, monkeypatch):
    replace, calls = Path.replace, []

    def killed(self, target):
        calls.append(target)
        if len(calls) == at:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            again(place)
    again(place)
    clean = make_report([place / "runs" / "b0.0-k4-s0"], place / "clean")
    assert files(place / "out").keys() == files(place / "clean").keys() and clean.pictures


def test_a_run_folder_as_out_keeps_its_pictures(tmp_path):
    folder = write_run(tmp_path / "r")
    (folder / "pictures").mkdir()
    (folder / "curves.png").write_text("mine")
    with pytest.raises(ConfigError, match=r"curves\.png would be replaced"):
        make_report([folder], folder)
    assert (folder / "curves.png").read_text() == "mine"
