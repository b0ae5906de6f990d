"""Every tracker, by what it left to read: rows once each after a kill, pictures, tables, final numbers."""

import logging
import socket
import sys

import pytest
from helpers import tiny
from PIL import Image

from convnn.config.compose import compose_config
from convnn.config.load import load_config
from convnn.config.schema import TRACKERS, TrackerConfig
from convnn.errors import ConfigError
from convnn.runs.contents import remove_earlier
from convnn.runs.metrics import read_metrics
from convnn.runs.trackers.base import RunTracker
from convnn.runs.tracking import Tools, Tracker, publish_report
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import make_plan

VALUES = {"seed": 3, "operator": {"k": 9, "blend": 0.5, "options": {}}, "swap": {"stages": [3, 4]}, "data": {"x": None}}
RESULT = {"status": "complete", "top1_last": 42.5, "params": 7, "val_top1_best": None, "layers": []}


def row_of(epoch):
    layer = {"name": "layer1.0.conv1", "blend": 0.25, "agreement": None}
    return {
        "epoch": epoch,
        "step": 3 * (epoch + 1),
        "train_loss": 1 / (epoch + 1),
        "train_top1": None,
        "layers": [layer],
    }


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def trackio_logs(project):
    """Return what the dashboard is given of a project's one run, and the run."""
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs(project)
    return SQLiteStorage.get_logs(project, run.name, run_id=run.id), run


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "neighbors.png")
    return tmp_path / "neighbors.png"


def a_killed_and_resumed_run(config, folder, picture):
    """Track two epochs, lose the second to a kill, resume from the first, and end after the third."""
    folder.mkdir()
    killed = Tracker(config, folder, VALUES)
    killed.log(row_of(0))
    killed.log({**row_of(1), "train_loss": 77.0})
    for tool in killed._tools.running:
        tool.finish(1)  # all the same as a kill for what is on disk, and it ends the threads
    tracker = Tracker(config, folder, VALUES, [row_of(0)])
    tracker.log(row_of(1))
    tracker.log(row_of(2))
    assert tracker.takes_images
    tracker.log_images([picture])
    tracker.finish(RESULT, 0)
    assert read_metrics(folder / "metrics.jsonl") == [row_of(epoch) for epoch in range(3)]


def test_tensorboard_has_each_step_once(tmp_path, picture):
    pytest.importorskip("tensorboard")
    a_killed_and_resumed_run(TrackerConfig(name="tensorboard"), tmp_path / "r", picture)
    found = scalars(tmp_path / "r" / "tensorboard")
    for name, values in (("train_loss", [1, 1 / 2, 1 / 3]), ("layers/layer1.0.conv1/blend", [0.25] * 3)):
        events = found.Scalars(name)
        assert [event.step for event in events] == [3, 6, 9]
        assert [event.value for event in events] == pytest.approx(values)
    assert "train_top1" not in found.Tags()["scalars"]  # null, which no axis has
    (end,) = found.Scalars("result/top1_last")
    assert (end.step, end.value) == (9, 42.5)
    (image,) = found.Images("pictures/neighbors")
    assert (image.width, image.height) == (6, 4)
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    seed: 3\n" in text and "      k: 9\n" in text
    parts = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"operator.k" in parts and b"swap.stages" in parts


def test_trackio_has_each_step_once(tmp_path, picture):
    pytest.importorskip("trackio")
    config = TrackerConfig(name="trackio", project="once", group="g", tags=["t"])
    a_killed_and_resumed_run(config, tmp_path / "r", picture)
    logs, run = trackio_logs("once")
    rows = [log for log in logs if "train_loss" in log]
    assert [(log["step"], log["train_loss"]) for log in rows] == [(3, 1), (6, 1 / 2), (9, 1 / 3)]
    assert all(log["layers/layer1.0.conv1/blend"] == 0.25 for log in rows)
    (end,) = [log for log in logs if "result/top1_last" in log]
    assert (end["step"], end["result/top1_last"], end["result/status"]) == (9, 42.5, "complete")
    (shown,) = [log["pictures/neighbors"] for log in logs if "pictures/neighbors" in log]
    assert shown["_type"] == "trackio.image"
    assert (run.name, run.config["_Group"], run.config["operator"]["k"]) == ("r", "g", 9)


def test_trackio_needs_no_network(tmp_path, monkeypatch):
    """Also where a token lies and an environment variable names a Space: nobody asked for it to be sent there."""
    pytest.importorskip("trackio")
    asked = []

    def refuse(self, address):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/space")
    tracker = Tracker(TrackerConfig(name="trackio", project="offline"), tmp_path, {})
    tracker.log(row_of(0))
    tracker.finish(RESULT, 0)
    assert not asked and trackio_logs("offline")[0][0]["train_loss"] == 1


def test_a_report_is_published_in_all_trackers(tmp_path, picture, monkeypatch):
    for name in ("tensorboard", "trackio"):
        pytest.importorskip(name)
    config = TrackerConfig(name=["tensorboard", "trackio"], project="report")
    rows = [{"blend": 0.5, "top1": "41.0 ± 2.0"}, {"blend": 1.0, "top1": None}]
    publish_report(config, tmp_path, "my sweep", rows, [{"name": "a|b", "seed": 0}], [picture])
    found = scalars(tmp_path / "tensorboard")
    text = found.Tensors("summary/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| blend | top1 |" and text.splitlines()[-1] == "| 1.0 |  |"
    assert found.Images("pictures/neighbors") and "runs/text_summary" in found.Tags()["tensors"]
    logs, run = trackio_logs("report")
    (table,) = [log["summary"] for log in logs if "summary" in log]
    assert table["_value"] == rows and run.config["_Group"] == "my sweep" and run.config["kind"] == "report"


class Failing(RunTracker):
    title = "It"

    def __init__(self, run, method=""):
        self.method, self.calls = method, []

    def _call(self, name, *_):
        self.calls.append(name)
        if name == self.method:
            raise OSError("disk full\nwith more")

    def log(self, row):
        self._call("log")

    def images(self, files):
        self._call("images")

    def table(self, name, rows):
        self._call("table")

    def summary(self, values):
        self._call("summary")

    def finish(self, exit_code):
        self._call("finish")


@pytest.mark.parametrize("method", ["log", "images", "summary", "finish"])
def test_one_that_fails_is_left_out_and_the_others_go_on(method, tmp_path, caplog, picture):
    tracker, good, bad = Tracker(TrackerConfig(name="jsonl"), tmp_path, {}), Failing(None), Failing(None, method)
    assert not tracker.takes_images
    tracker._tools = Tools([bad, good])
    with caplog.at_level(logging.WARNING, logger="convnn"):
        tracker.log(row_of(0))
        tracker.log_images([picture])
        tracker.log(row_of(1))
        tracker.finish(RESULT, 0)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert good.calls == ["log", "images", "log", "summary", "finish"]
    assert bad.calls == good.calls[: good.calls.index(method) + 1]
    assert [r.getMessage() for r in caplog.records] == ["It failed (disk full); metrics.jsonl goes on without it"]


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_not_installed_is_a_warning_with_the_way(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, name, None)
    if name == "tensorboard":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with caplog.at_level(logging.WARNING, logger="convnn"):
        tracker = Tracker(TrackerConfig(name=name), tmp_path, {})
    assert not tracker.takes_images
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith(f"tracker={name}, but {name} is not installed; metrics.jsonl goes on without it")
    assert (f"uv sync --extra {name}" in message) == (name != "wandb")  # which convnn always brings


def test_one_that_cannot_start_is_a_warning(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="convnn"):
        tracker = Tracker(TrackerConfig(name="tensorboard"), tmp_path, {})
    assert not tracker.takes_images and "TensorBoard did not start" in caplog.records[0].getMessage()


def test_several_are_chosen_as_hydra_chooses_options(tmp_path):
    assert compose_config(["tracker=[wandb,tensorboard]"]).tracker.names == ["wandb", "tensorboard"]
    assert compose_config(["tracker=[trackio]"]).tracker.name == "trackio"
    assert compose_config(["tracker=[jsonl,wandb]"]).tracker.name == "wandb"
    assert compose_config(["tracker=jsonl", "tracker.name=wandb", "tracker.group=g"]).tracker.name == "wandb"
    assert compose_config(["tracker=jsonl"]).tracker.names == compose_config(["tracker=[]"]).tracker.names == []
    assert compose_config([]).tracker.names == ["wandb"]
    assert TrackerConfig(name=["wandb", "jsonl", "trackio"], mode="disabled").running == ["trackio"]
    for wrong in ("tracker.name=[wandb,trackio]", "tracker=wandb,trackio"):
        with pytest.raises(ConfigError, match=r"'tracker=\[wandb,trackio\]'"):
            compose_config([wrong])
    with pytest.raises(ConfigError, match=r"'tracker=\[trackio\]'"):
        compose_config(["tracker.name=[trackio]"])
    for wrong in ("5", "true"):
        with pytest.raises(ConfigError, match=r"tracker\.name"):
            compose_config([f"tracker.name={wrong}"])
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        compose_config(["tracker.name=tensorbord"])


def test_a_sweep_takes_a_list_as_one_value_and_refuses_an_axis():
    plan = make_plan(SweepConfig(), ["tracker=[wandb,tensorboard]", "data=digits", "seed=0,1"])
    assert [point.overrides[0] for point in plan.points] == ["tracker=[wandb,tensorboard]"] * 2
    assert [config.tracker.names for config in plan.configs.values()] == [["wandb", "tensorboard"]] * 2
    assert "tracker" not in plan.axes
    for wrong in ("tracker=wandb,tensorboard", "tracker.name=wandb,tensorboard"):
        with pytest.raises(ConfigError, match=r"^tracker.*: several trackers of one run are a list"):
            make_plan(SweepConfig(), [wrong, "data=digits"])


@pytest.mark.long
def test_a_run_in_several_trackers_is_read_and_overwritten(tmp_path):
    """Its config.yaml says which, an old one with one name loads, and a new run removes what this one wrote."""
    for name in ("tensorboard", "trackio"):
        pytest.importorskip(name)
    from convnn.train.run import run

    folder = tmp_path / "r"
    config = tiny("tracker=[tensorboard,trackio]", "tracker.project=several", "swap.last=1", f"run.dir={folder}")
    assert run(config)["status"] == "complete"
    rows = read_metrics(folder / "metrics.jsonl")
    assert [e.step for e in scalars(folder / "tensorboard").Scalars("test_top1")] == [row["step"] for row in rows]
    assert [log["step"] for log in trackio_logs("several")[0] if "test_top1" in log] == [row["step"] for row in rows]
    assert load_config(folder, to_read=False).tracker.names == ["tensorboard", "trackio"]
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("  name:\n  - tensorboard\n  - trackio\n", "  name: wandb\n"))
    assert load_config(folder, to_read=False).tracker.name == "wandb"
    (folder / "tensorboard" / "events.out.tfevents.1.mine").write_text("a user's own")
    assert remove_earlier(folder) == ["tensorboard/events.out.tfevents.1.mine"]
    assert not (folder / "trackio_id").exists()
