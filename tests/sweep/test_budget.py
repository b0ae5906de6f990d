"""A sweep with a limited time: which points begin, what stops, and that the next call goes on."""

import json
import time

import pytest
from sweeps import FAKE, point_of, statuses, sweep

from convnn.errors import ConfigError
from convnn.runtime.files import write_json
from convnn.sweep import process
from convnn.sweep.budget import SPENT, Budget
from convnn.sweep.plan import Point
from convnn.sweep.process import run_point
from convnn.sweep.state import point_state, status_file
from convnn.sweep.times import budget_seconds


@pytest.mark.parametrize(
    "text, seconds",
    [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172800), (" 1h 5s ", 3605), (None, None)],
)
def test_times_that_can_be_read(text, seconds):
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "m", "-5m", "30 minutes", "1h,5s", "0s", "inf", "5M"])
def test_times_that_cannot(text):
    with pytest.raises(ConfigError, match=r"budget=.* is no time; write 90s, 30m or 1h30m"):
        budget_seconds(text)


def done(folder, points):
    """A sweep's folder with complete points; ``points``: seconds by overrides."""
    listed = []
    (folder / "status").mkdir(parents=True)
    for number, (overrides, seconds) in enumerate(points.items()):
        point = Point(f"p{number}", f"f{number}", tuple(overrides.split()))
        listed.append({"name": point.name, "fingerprint": point.fingerprint, "overrides": list(point.overrides)})
        listed[-1] |= {"label": "", "folder": point.folder}
        write_json(status_file(folder, point), {"status": "complete", "seconds": seconds})
    write_json(folder / "plan.json", {"points": listed})


KNOWN = {"a=1 k=4 seed=0": 10, "a=1 k=4 seed=1": 12, "a=1 k=9 seed=0": 50, "a=2 k=4 seed=0": 30}


@pytest.mark.parametrize(
    "overrides, seconds",
    [
        ("a=1 k=4 seed=7", 12),  # the longest of its like
        ("a=1 k=9 seed=7", 50),
        ("a=2 k=9 seed=7", 50),  # as like a=2 as k=9: the longer counts
        ("a=3 k=25 seed=0", 50),  # like none; an equal seed makes no likeness
    ],
)
def test_a_point_takes_as_long_as_the_points_most_like_it(overrides, seconds, tmp_path):
    done(tmp_path, KNOWN)
    point = Point("new", "new", tuple(overrides.split()))
    assert Budget(tmp_path, 1e9).expected(point) == seconds
    for left, admitted in ((seconds + 0.1, True), (seconds - 0.1, False)):
        assert Budget(tmp_path, 100.0 + left, clock=lambda: 100.0).admits(point) is admitted
    assert Budget(tmp_path).admits(point)  # no limit


def test_where_nothing_is_known_points_begin_until_the_time_is_over(tmp_path):
    point = Point("new", "new", ())
    assert Budget(tmp_path, 101.0, clock=lambda: 100.0).admits(point)
    assert not Budget(tmp_path, 100.0, clock=lambda: 100.0).admits(point)


def test_of_a_stopped_point_the_epochs_that_are_left_count(tmp_path):
    done(tmp_path, {"a=1": 40})
    point = Point("new", "new", ("a=1",))
    run = tmp_path / point.folder
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {epochs: 4}\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"epoch": e}) + "\n" for e in range(3)))
    assert Budget(tmp_path, 1e9).expected(point) == 10
    (run / "config.yaml").write_text("train: [\n")
    assert Budget(tmp_path, 1e9).expected(point) == 40


def test_damaged_records_tell_nothing(tmp_path):
    done(tmp_path, {"a=1": 40, "a=2": "long"})
    (tmp_path / "status" / "f0.json").write_text("{")
    assert Budget(tmp_path, 1e9).expected(Point("new", "new", ("a=1",))) is None


def test_a_point_that_runs_when_the_time_is_over_stops_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "TRAIN", (str(FAKE),))
    point = point_of("data.name=sleep")
    budget = Budget(tmp_path, time.time() + 6)
    assert run_point(tmp_path, point, budget=budget) == "interrupted"
    state = point_state(tmp_path, point)
    assert state.reason == SPENT and 4 < state.seconds < 30
    assert (tmp_path / point.folder / "checkpoints" / "last.pt").exists()
    before = status_file(tmp_path, point).read_text()
    assert run_point(tmp_path, point, budget=budget) == "interrupted"  # not begun again
    assert status_file(tmp_path, point).read_text() == before


@pytest.mark.long
def test_a_sweep_leaves_what_does_not_fit_to_the_next_call(driver, tmp_path):
    points = ["seed=range(0,12)", "+data.options.seconds=2"]
    code, text = sweep(driver, tmp_path, *points, "sweep.budget=20s")
    found = [r["status"] for r in statuses(tmp_path, by="name").values()]
    assert code == 1 and found.count("complete") >= 1 and len(found) < 12
    left = 12 - found.count("complete")
    assert f"sweep.budget=20s leaves {left} points to another call" in text and "the same command goes on" in text
    code, text = sweep(driver, tmp_path, *points)
    assert code == 0 and "to another call" not in text
    calls = [len(p.read_text().splitlines()) for p in tmp_path.glob("sweep/points/*/calls")]
    assert len(calls) == 12 and sum(calls) <= 13  # at most one was under way when the time was over


def test_a_time_that_cannot_be_read_stops_everything(driver, tmp_path):
    code, text = sweep(driver, tmp_path, "seed=0,1", "sweep.budget=soon")
    assert code == 2 and text.strip() == "error: sweep.budget=soon is no time; write 90s, 30m or 1h30m"


def test_another_sweeper_says_that_the_time_is_over(driver, tmp_path):
    code, text = sweep(driver, tmp_path, "hydra/sweeper=basic", "seed=0,1", "sweep.budget=0.001s")
    assert code == 1 and "sweep.budget=0.001s is spent" in text and not statuses(tmp_path)


def test_the_deadline_is_not_given(driver, tmp_path):
    code, text = sweep(driver, tmp_path, "seed=0,1", "sweep.deadline=5")
    told = "error: sweep.deadline=5: it is set by sweep.py; sweep.budget=30m is a time from now"
    assert code == 2 and text.strip() == told


def test_points_that_are_left_are_not_even_composed(driver, tmp_path):
    begun = time.monotonic()
    code, text = sweep(driver, tmp_path, "seed=range(0,100)", "sweep.budget=0.001s", "sweep.on_invalid=skip")
    assert code == 1 and "leaves 100 points to another call" in text and time.monotonic() - begun < 60
