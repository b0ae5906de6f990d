"""Blend, k and temperature over training time and depth."""

from __future__ import annotations

import math

from torch import nn

from convnn.config.schema import ScheduleConfig, TrackConfig
from convnn.models.swap import neighbor_layers


def progress(track: TrackConfig, fraction: float) -> float:
    """Return the share of a track's change that is done, in [0, 1], at a fraction of training or depth."""
    u = min(max((fraction - track.begin) / (track.finish - track.begin), 0.0), 1.0)
    if track.shape == "cosine":
        return (1 - math.cos(math.pi * u)) / 2
    if track.shape == "step":
        return min(math.floor(u * (track.steps + 1)) / track.steps, 1.0)
    return u


def track_value(track: TrackConfig, time: float, depth: float) -> float:
    """Return a track's value at a fraction of training and of depth (0 first, 1 last swapped layer)."""
    if track.over == "time":
        p = progress(track, time)
    elif track.over == "depth":
        p = progress(track, depth)
    else:
        p = progress(track, time) * depth
    # Exact at both ends, where the fast paths look for 0 and 1.
    return track.end if p == 1 else track.start + (track.end - track.start) * p


def describe_schedule(schedule: ScheduleConfig) -> str:
    """Return the moving tracks in one line, such as ``schedule: blend 0 -> 1 (cosine over time)``; none: empty."""
    parts = []
    for name in ("blend", "k", "temperature"):
        track: TrackConfig = getattr(schedule, name)
        if track.shape != "constant":
            parts.append(f"{name} {track.start:g} -> {track.end:g} ({track.shape} over {track.over})")
    return f"schedule: {', '.join(parts)}" if parts else ""


def apply_schedule(model: nn.Module, schedule: ScheduleConfig, time: float) -> None:
    """Set every layer on the spectrum to its value at ``time`` in [0, 1]. Nothing is rebuilt."""
    tracks = {n: t for n in ("blend", "k", "temperature") if (t := getattr(schedule, n)).shape != "constant"}
    if not tracks:
        return
    layers = list(neighbor_layers(model).values())
    for i, layer in enumerate(layers):
        depth = i / (len(layers) - 1) if len(layers) > 1 else 1.0
        values = {name: track_value(track, time, depth) for name, track in tracks.items()}
        layer.set_spectrum(
            blend=values.get("blend"),
            k=round(values["k"]) if "k" in values else None,
            temperature=values.get("temperature"),
        )
