"""A run's pictures replace its earlier ones, and no file of others."""

import errno
import json
import os

import pytest
import timm
import torch
from fake_runs import write_run
from programs import snapshot

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from convnn import swap_layers
from convnn.errors import ConfigError
from convnn.train.pictures import ShownImage, draw_run, save_figures

LIST = ".convnn-pictures"


def figures(*names):
    return {name: Figure((1, 1)) for name in names}


def test_the_next_pictures_replace_the_first_and_leave_none_of_them(tmp_path):
    for out in (None, tmp_path / "out"):
        where = out or tmp_path / "pictures"
        assert save_figures(figures("neighbors", "weights"), tmp_path, out) == [
            where / "neighbors.png",
            where / "weights.png",
        ]
        (where / "holiday.png").write_text("mine")
        save_figures(figures("neighbors"), tmp_path, out)
        assert sorted(snapshot(where)) == [LIST, "holiday.png", "neighbors.png", "neighbors.svg"]
        assert json.loads((where / LIST).read_text())["files"].keys() == {"neighbors.png", "neighbors.svg"}


@pytest.mark.parametrize("name", ["neighbors.png", "training.svg"])
@pytest.mark.parametrize("how", ["before", "changed since", "link"])
def test_a_file_of_others_is_not_replaced(name, how, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if how == "changed since":
        save_figures(figures("neighbors", "training"), tmp_path, out)
    if how == "link":
        (tmp_path / "mine").write_text("mine")
        (out / name).symlink_to(tmp_path / "mine")
    else:
        (out / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=rf"out=.*: {name} would be replaced, which no picture wrote"):
        save_figures(figures("neighbors", "training"), tmp_path, out)
    assert snapshot(tmp_path) == before


def test_pictures_of_an_older_version_in_a_run_folder_are_the_runs(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("neighbors.png", "weights.svg", "holiday.png"):
        (tmp_path / "pictures" / name).write_text("old")
    save_figures(figures("neighbors"), tmp_path)
    assert sorted(snapshot(tmp_path / "pictures")) == [LIST, "holiday.png", "neighbors.png", "neighbors.svg"]
    (tmp_path / "pictures" / "neighbors.png").write_text("mine")
    with pytest.raises(ConfigError, match=r"neighbors\.png would be replaced"):
        save_figures(figures("neighbors"), tmp_path)


def test_a_full_disk_leaves_the_earlier_pictures(tmp_path, monkeypatch):
    save_figures(figures("neighbors", "training"), tmp_path)
    before = snapshot(tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", full)
    with pytest.raises(ConfigError, match=r"neighbors\.png cannot be written: No space left on device"):
        save_figures(figures("neighbors"), tmp_path)
    assert snapshot(tmp_path) == before


def test_overwriting_a_run_takes_its_pictures_along(tmp_path):
    from convnn.runs.contents import remove_earlier

    folder = write_run(tmp_path / "r")
    save_figures(figures("neighbors", "training"), folder)
    assert remove_earlier(folder) == [] and not (folder / "pictures").exists()


def test_layers_inside_windows_have_no_place_on_the_image():
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (2,), "num_heads": (2,)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **shape)
    swap_layers(model, "*attn", {"kind": "attention", "aggregation": "sum", "k": 4})
    shown = ShownImage(torch.randn(1, 3, 32, 32), torch.rand(3, 32, 32))
    with pytest.raises(ConfigError, match=r"no picture of neighbours: layers\.0.* choose inside windows"):
        draw_run(model, shown)
    swap_layers(model, "patch_embed.proj", {"name": "convnn", "k": 4, "blend": 0.5})
    assert draw_run(model, shown).keys() == {"neighbors", "blends"}
    with pytest.raises(ConfigError, match=r"this run has patch_embed\.proj"):
        draw_run(model, shown, layers=["layers.0.blocks.0.attn"])
