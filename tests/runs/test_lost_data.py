"""A run's folder is known by our marker; overwriting takes what runs wrote, and leaves and names everything else."""

import json
import logging
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from helpers import tiny
from training import rows

from convnn.errors import ConfigError
from convnn.runs import contents
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.contents import MARKER, is_run_folder
from convnn.train.run import run

SMALL = ("swap.last=1", "train.max_steps=1", "train.epochs=1")
POLICIES = ("fail", "resume", "skip", "overwrite")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "r"
    run(tiny(*SMALL, f"run.dir={folder}"))
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "r", symlinks=True))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def overwrite(folder, *overrides, policy="overwrite"):
    return run(tiny(*SMALL, "seed=7", *overrides, f"run.dir={folder}", f"run.if_exists={policy}"))


def project(folder, *others):
    """A project of others, with what the folders of our runs are called too."""
    for name in ("config.yaml", "checkpoints/last.pt", "pictures/holiday.png", "train.log", *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"status": "complete", "versions": {"torch": "2"}, "epoch": 0}')
    return folder


@pytest.mark.parametrize("policy", POLICIES)
def test_projects_of_others_are_no_runs(policy, tmp_path):
    before = files(project(tmp_path, "env.json", "result.json", "metrics.jsonl"))
    with pytest.raises(ConfigError, match="is not empty and not a run folder; choose another"):
        overwrite(tmp_path, policy=policy)
    assert files(tmp_path) == before


@pytest.mark.parametrize("policy", POLICIES)
def test_a_configuration_of_ours_alone_makes_no_run(policy, folder, tmp_path):
    shutil.copy(folder / "config.yaml", project(tmp_path / "p") / "config.yaml")
    before = files(tmp_path / "p")
    with pytest.raises(ConfigError, match="not a run folder"):
        overwrite(tmp_path / "p", policy=policy)
    assert files(tmp_path / "p") == before


@pytest.mark.parametrize("policy", POLICIES)
def test_the_folder_of_options_is_refused(policy, tmp_path):
    conf = Path(shutil.copytree(Path(__file__).parents[2] / "conf", tmp_path / "conf"))
    before = files(conf)
    with pytest.raises(ConfigError, match="not a run folder"):
        overwrite(conf, policy=policy)
    assert files(conf) == before


def test_a_folder_with_a_log_alone_keeps_it(tmp_path):
    (tmp_path / "train.log").write_text("mine\n")
    overwrite(tmp_path)
    assert (tmp_path / "train.log").read_text().startswith("mine\n")


def test_overwriting_leaves_and_names_what_others_wrote(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("convnn"), "propagate", True)
    mine = ("notes.txt", "checkpoints/mine.pt", "pictures/holiday.png", "wandb/offline-run-1-other/a", ".x.tmp",
            "exported.pt", "checkpoints/old/last.pt", "data/train/a.png")  # fmt: skip
    for name in mine:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    ours = ("pictures/neighbors.png", "wandb/offline-run-2-abcd/b", "wandb_id", "checkpoints/.last.pt.7.tmp",
            "checkpoints/last.previous.damaged.pt")  # fmt: skip
    for name in ours:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("abcd")
    assert overwrite(folder)["status"] == "complete"
    assert {name: text.decode() for name, text in files(folder).items() if name in mine} == {n: n for n in mine}
    assert not [name for name in ours if (folder / name).exists()]
    (line,) = [m for m in caplog.messages if "left what no run wrote" in m]
    assert line.endswith(
        ".x.tmp, checkpoints/mine.pt, checkpoints/old, data, exported.pt, notes.txt, pictures/holiday.png, "
        "wandb/offline-run-1-other"
    )
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["identity"]["seed"] == 7


def test_nothing_is_named_where_nothing_is_left(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("convnn"), "propagate", True)
    overwrite(folder)
    assert not [m for m in caplog.messages if "left" in m]


@pytest.mark.parametrize("name", ["checkpoints", "pictures", "wandb"])
def test_overwriting_stops_at_links_before_anything_is_removed(name, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (folder / name).mkdir(exist_ok=True)
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    before = files(folder), files(elsewhere)
    with pytest.raises(ConfigError, match=rf"r/{name} is a link to .*elsewhere, which overwriting leaves alone"):
        overwrite(folder)
    assert (files(folder), files(elsewhere)) == before
    assert run(tiny(*SMALL, f"run.dir={folder}", "run.if_exists=resume"))["status"] == "complete"


@pytest.mark.parametrize("how", ["dangling", "file"])
def test_overwriting_stops_where_checkpoints_is_no_folder(how, folder):
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").symlink_to("/nowhere/x") if how == "dangling" else (folder / "checkpoints").write_text("x")
    before = files(folder)
    with pytest.raises(ConfigError, match="r/checkpoints is a "):
        overwrite(folder)
    assert files(folder) == before


def test_a_link_in_place_of_a_file_goes_and_its_target_stays(folder, tmp_path):
    for name in ("checkpoints/last.pt", "result.json"):
        target = tmp_path / Path(name).name
        (folder / name).rename(target)
        (folder / name).symlink_to(target)
    before = (tmp_path / "last.pt").read_bytes()
    assert overwrite(folder)["steps"] == 1
    assert (tmp_path / "last.pt").read_bytes() == before and not (folder / "result.json").is_symlink()


@pytest.mark.parametrize("kept", ["checkpoints/last.pt", "result.json", "metrics.jsonl"])
def test_a_removal_that_fails_stops_and_the_old_run_is_not_resumed(kept, folder, monkeypatch):
    unlink = Path.unlink

    def refuses(self, missing_ok=False):
        if str(self).endswith(kept):
            raise PermissionError(13, "Permission denied", str(self))
        unlink(self, missing_ok=missing_ok)

    old = (folder / "config.yaml").read_bytes()
    same = [*SMALL, f"run.dir={folder}"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuses)
        with pytest.raises(ConfigError, match=rf"run.dir=.* cannot be written: .*{kept}: Permission denied"):
            run(tiny(*same, "run.if_exists=overwrite"))
    assert (folder / "config.yaml").read_bytes() == old and (folder / kept).exists()
    stamp = (folder / kept).stat().st_ino, (folder / kept).stat().st_mtime_ns
    assert run(tiny(*same, "run.if_exists=resume"))["steps"] == 1  # trained anew, as was asked for
    assert ((folder / kept).stat().st_ino, (folder / kept).stat().st_mtime_ns) != stamp
    assert len(rows(folder)) == 1 and "overwriting" not in json.loads((folder / MARKER).read_text())


def test_a_kill_while_the_old_run_is_removed(folder, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("convnn.runs.folder.remove_earlier", killed)
        with pytest.raises(KeyboardInterrupt):
            overwrite(folder)
    assert overwrite(folder, policy="skip")["status"] == "complete"  # of seed 7: the other run is not in the way
    assert load_checkpoint(folder / "checkpoints" / "last.pt")["identity"]["seed"] == 7


def test_folders_of_version_0_1_are_known_without_a_marker(tmp_path, finished):
    with tarfile.open(Path(__file__).parents[1] / "support" / "old_runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for path in tmp_path.rglob("config.yaml"):
        assert is_run_folder(path.parent)
    for name in ("env.json", "result.json", "checkpoints/last.pt"):  # each of them is enough
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(finished / "config.yaml", folder)
        assert not is_run_folder(folder)
        shutil.copy(finished / name, folder / name)
        assert is_run_folder(folder)
        (folder / "config.yaml").unlink()
        assert not is_run_folder(folder)
    half = tmp_path / "old_runs" / "resnet_half"
    (half / "mine.txt").write_text("x")
    assert overwrite(half)["status"] == "complete" and (half / "mine.txt").exists() and (half / MARKER).exists()


def test_what_runs_and_programs_write_is_known(folder):
    """Whatever a run leaves is either removed by the next or kept on purpose."""
    left = contents.remove_earlier(folder)
    assert not left and {path.name for path in folder.iterdir()} <= {MARKER, ".lock", "config.yaml"}


def test_a_disk_that_refuses_the_marker_leaves_no_folder(tmp_path, monkeypatch):
    def full(path, *_):
        if path.name in ("config.yaml", MARKER):
            raise OSError(28, os.strerror(28))

    for name in ("write_text", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(f"convnn.runs.folder.{name}", full)
            with pytest.raises(ConfigError, match="cannot be written: No space left"):
                overwrite(tmp_path / "a" / "r")
        assert not (tmp_path / "a").exists()
