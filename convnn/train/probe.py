"""Where each layer sits between convolution and attention, measured on a few fixed images.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convnn.config.schema import DiagnosticsConfig
from convnn.data.batches import Batches
from convnn.models.inspect import choosing_layers, neighbors_of
from convnn.ops.neighborhood import Neighborhood
from convnn.ops.precision import has_float64
from convnn.runs.metrics import MEASURES
from convnn.train.state import RunState

COMPARED_QUERIES = 256
"""Queries per image and head whose neighbours are kept to compare the next ones with."""

_MAX_DISTANCES = 1 << 20
"""Distances that quantiles are taken of; more are thinned out evenly."""


def neighbor_measures(found: Neighborhood, previous: Tensor | None = None) -> dict[str, float | None]:
    """Return all ``MEASURES`` of a layer's neighbours.

    Overlap and distances are those of grid tokens: queries on the grid, and for distances neighbours there. Hubness
    is taken per image and head over all N tokens and averaged; its skewness is that of Radovanović et al. (2010), 0
    when all are chosen as often, as by a convolution up to the border.

    Args:
        found: the neighbours.
        previous: what ``neighbors_to_compare`` returned for the measurement before, if there was one.
    """
    if not has_float64(found.index.device):
        found = found.cpu()
    g, valid = found.geometry, found.valid
    count = valid.sum().double()
    of_grid = (valid & (found.queries >= g.prefix)[:, None]).sum().double()
    distance = found.distance()[found.on_grid] / max(g.height, g.width)
    distance = distance[:: -(-len(distance) // _MAX_DISTANCES)] if len(distance) else distance.new_full((1,), torch.nan)
    quantiles = distance.quantile(torch.tensor([0.1, 0.5, 0.9], device=distance.device))
    chosen = torch.zeros(*found.index.shape[:2], g.num_tokens, dtype=torch.float64, device=valid.device)
    chosen.scatter_add_(2, found.index.flatten(2), valid.flatten(2).double())
    away = chosen - chosen.mean(-1, keepdim=True)
    spread = away.square().mean(-1).sqrt()
    skewness = (away / spread.clamp(min=1e-9)[..., None]).pow(3).mean(-1)
    values = [
        found.in_window().sum() / of_grid,
        distance.mean(),
        *quantiles,
        _entropy(found),
        skewness.mean(),
        chosen.amax(-1).mean() / len(found.queries),
        found.is_padding.sum() / count,
        found.is_prefix.sum() / count,
        _agreement(neighbors_to_compare(found), previous),
    ]
    numbers = torch.stack([v.double() for v in values]).tolist()
    return {name: v if math.isfinite(v) else None for name, v in zip(MEASURES, numbers, strict=True)}


def _entropy(found: Neighborhood) -> Tensor:
    """Return the mean over queries of the weights' entropy over that of equal weights; NaN without weights."""
    if found.weights is None:
        return found.valid.new_full((), torch.nan, dtype=torch.float64)
    weights, most = found.weights.double(), found.valid.sum(-1).double().log()
    share = torch.special.entr(weights).sum(-1)[most > 0] / most[most > 0]
    return share.mean()


def neighbors_to_compare(found: Neighborhood) -> Tensor:
    """Return neighbours of at most ``COMPARED_QUERIES`` queries, -1 where not valid: (B, H, <= that, K) int32."""
    step = -(-found.index.shape[2] // COMPARED_QUERIES)
    return found.index.masked_fill(~found.valid, -1)[:, :, ::step].to(torch.int32)


def _agreement(now: Tensor, previous: Tensor | None) -> Tensor:
    if previous is None or previous.shape[:3] != now.shape[:3]:
        return now.new_full((), torch.nan, dtype=torch.float64)
    # Where the sorted old neighbours would take a new one in, it must stand already.
    old = previous.to(now.device).sort(dim=-1).values
    place = torch.searchsorted(old, now.contiguous()).clamp(max=old.shape[-1] - 1)
    return ((old.gather(-1, place) == now) & (now >= 0)).sum() / (now >= 0).sum().double()


class Probe:
    """Measures, on fixed images of a split, what each layer chooses."""

    def __init__(self, config: DiagnosticsConfig, batches: Batches, autocast: Callable[[], Any] = nullcontext) -> None:
        """Take ``config.images`` images, evenly spread over the split, as the model takes them."""
        self.config, self.autocast = config, autocast
        total = len(batches.split)
        places = torch.linspace(0, total - 1, min(config.images, total), dtype=torch.float64).round().long()
        few = replace(batches, split=batches.split.take(places), batch_size=len(places), rank=0, world_size=1)
        few.config = replace(few.config, workers=0)  # none is worth starting for one batch
        self.images = next(few.epoch())[0]

    def measure(self, model: nn.Module, state: RunState) -> dict[str, dict[str, float | None]]:
        """Return the measures of every layer that chooses neighbours, by name. The model stays as it is.

        ``state`` has the neighbours of the last measurement, and those of this one afterwards.
        """
        if not choosing_layers(model):
            return {}
        with self.autocast():
            found = neighbors_of(model, self.images)
        measures = {name: neighbor_measures(one, state.neighbors.get(name)) for name, one in found.items()}
        state.neighbors = {name: neighbors_to_compare(one).cpu() for name, one in found.items()}
        return measures

    def add_to(self, row: dict[str, Any], model: nn.Module, state: RunState) -> None:
        """Add the measures to a row of metrics, to its ``layers`` by name, where its epoch is one to measure in."""
        if not self.config.enabled or (row["epoch"] + 1) % self.config.every:
            return
        start = time.perf_counter()
        layers = {layer["name"]: layer for layer in row["layers"]}
        for name, measures in self.measure(model, state).items():
            layers.setdefault(name, {"name": name}).update(measures)
        row["layers"] = list(layers.values())
        row["diagnostics_seconds"] = round(time.perf_counter() - start, 3)
