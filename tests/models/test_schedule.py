"""Schedules against values worked out by hand."""

import pytest
from torch import nn

from convnn import ConvNN2d, apply_schedule
from convnn.config.schema import ScheduleConfig, TrackConfig
from convnn.models.schedule import track_value


@pytest.mark.parametrize(
    "track, values",
    [
        (TrackConfig("linear", start=0.2, end=1.0), {0.0: 0.2, 0.25: 0.4, 0.5: 0.6, 1.0: 1.0}),
        (TrackConfig("linear", start=0, end=1, begin=0.5), {0.0: 0, 0.5: 0, 0.75: 0.5, 1.0: 1}),
        (TrackConfig("linear", start=1, end=0, begin=0.2, finish=0.6), {0.1: 1, 0.4: 0.5, 0.6: 0, 0.9: 0}),
        (TrackConfig("cosine", start=0, end=2), {0.0: 0, 1 / 3: 0.5, 0.5: 1, 2 / 3: 1.5, 1.0: 2}),
        (TrackConfig("step", start=0, end=1, steps=2), {0.0: 0, 0.3: 0, 0.4: 0.5, 0.65: 0.5, 0.7: 1, 1.0: 1}),
        (TrackConfig("step", start=0, end=1, steps=4), {0.19: 0, 0.21: 0.25, 0.41: 0.5, 0.61: 0.75, 0.81: 1}),
    ],
)
def test_over_time(track, values):
    for time, value in values.items():
        assert track_value(track, time, depth=0.3) == pytest.approx(value)


def test_ends_are_exact():
    track = TrackConfig("linear", start=0.1, end=0.7)
    assert track_value(track, 0.0, 0.0) == 0.1 and track_value(track, 1.0, 0.0) == 0.7


def test_over_depth_and_both():
    depth, both = (TrackConfig("linear", over=o, start=0.0, end=1.0) for o in ("depth", "both"))
    assert track_value(depth, time=0.9, depth=0.25) == 0.25
    assert track_value(both, time=0.5, depth=0.5) == 0.25
    assert track_value(both, time=1.0, depth=1.0) == 1.0


def test_layers_are_set_by_their_depth():
    model = nn.Sequential(*(ConvNN2d(2, 2, 9) for _ in range(3)))
    ramp = TrackConfig("linear", over="depth", start=0.0, end=1.0)
    shrink = TrackConfig("linear", start=9, end=4)
    apply_schedule(model, ScheduleConfig(blend=ramp, k=shrink), time=0.5)
    assert [m.blend for m in model] == [0.0, 0.5, 1.0]
    assert [m.k for m in model] == [6, 6, 6]  # 6.5, rounded to even
    assert [m.temperature for m in model] == [1.0] * 3


def test_constant_leaves_the_operators_own_values():
    model = nn.Sequential(ConvNN2d(2, 2, 5, blend=0.3, temperature=2.0))
    apply_schedule(model, ScheduleConfig(), time=0.7)
    assert model[0].spectrum() == {"blend": 0.3, "k": 5, "temperature": 2.0}
