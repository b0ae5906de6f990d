"""What the measures are, against loops and known layers; measuring changes nothing about a run."""

import json
import math
import statistics

import pytest
import torch
from helpers import equal_states, tiny, without_times

from convnn import ConfigError, ConvNN2d, ConvNNAttention
from convnn.data.batches import Batches
from convnn.data.datasets import load_dataset
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.metrics import MEASURES, read_metrics
from convnn.train.evaluate import Meter
from convnn.train.probe import Probe, neighbor_measures, neighbors_to_compare
from convnn.train.run import run
from convnn.train.state import RunState


def by_loops(found, before=None):
    """The measures of one head each, averaged, in plain Python."""
    g, cols = found.geometry, found.geometry.padded_shape[1]
    total, in_grid, inside, pads, prefix, distances, entropies, same, old = 0, 0, 0, 0, 0, [], [], 0, 0
    skews, hubs = [], []
    queries = found.queries.tolist()
    for b in range(found.index.shape[0]):
        for h in range(found.index.shape[1]):
            chosen = [0] * g.num_tokens
            for q, own in enumerate(queries):
                valid = [r for r in range(found.index.shape[3]) if found.valid[b, h, q, r]]
                tokens = [int(found.index[b, h, q, r]) for r in valid]
                weights = [] if found.weights is None else [float(found.weights[b, h, q, r]) for r in valid]
                if len(weights) > 1:
                    entropies.append(-sum(w * math.log(w) for w in weights if w) / math.log(len(weights)))
                if before is not None:
                    same += len(set(tokens) & set(before[b, h, q].tolist()))
                    old += len(tokens)
                for token in tokens:
                    chosen[token] += 1
                    total += 1
                    in_grid += own >= g.prefix
                    prefix += token < g.prefix
                    row, col = divmod(token - g.prefix, cols)
                    (ph, pw), here = g.padding, divmod(own - g.prefix, cols)
                    if token >= g.prefix:
                        pads += not (ph <= row < ph + g.height and pw <= col < pw + g.width)
                        if own >= g.prefix:
                            away = (row - here[0], col - here[1])
                            distances.append(math.hypot(*away) / max(g.height, g.width))
                            inside += max(abs(away[0]), abs(away[1])) <= found.window[0] // 2
            mean, std = statistics.fmean(chosen), statistics.pstdev(chosen)
            skews.append(statistics.fmean(((c - mean) / std) ** 3 for c in chosen) if std else 0.0)
            hubs.append(max(chosen) / len(queries))
    nine = statistics.quantiles(distances, n=10, method="inclusive")
    return {
        "overlap": inside / in_grid,
        "distance_mean": statistics.fmean(distances),
        "distance_q10": nine[0],
        "distance_q50": nine[4],
        "distance_q90": nine[8],
        "entropy": statistics.fmean(entropies) if entropies else None,
        "hub_skewness": statistics.fmean(skews),
        "hub_share": statistics.fmean(hubs),
        "padding": pads / total,
        "prefix": prefix / total,
        "agreement": same / old if old else None,
    }


def layers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7)
    yield ConvNN2d(3, 4, 9, 2, blend=0.8), x
    yield ConvNN2d(3, 4, 5, 1, padding=0, kernel_size=3, weighting="softmax"), x
    options = {"num_prefix_tokens": 1, "grid_size": (3, 4), "k_policy": "clamp"}
    yield ConvNNAttention(8, 2, 4, **options), torch.randn(2, 13, 8)
    yield ConvNNAttention(8, 2, 9, candidates="window", num_candidates=1, **options), torch.randn(2, 13, 8)


@pytest.mark.parametrize("case", range(4))
def test_measures_are_what_loops_find(case):
    layer, x = list(layers())[case]
    found, other = layer.neighborhood(x), layer.neighborhood(x + 0.3 * torch.randn_like(x))
    expected = by_loops(found, neighbors_to_compare(other))
    values = neighbor_measures(found, neighbors_to_compare(other))
    assert list(values) == list(MEASURES)
    for name, value in expected.items():
        assert values[name] == (value if value is None else pytest.approx(value, abs=1e-6)), name
    assert values["agreement"] < 1 == neighbor_measures(found, neighbors_to_compare(found))["agreement"]
    assert neighbor_measures(found)["agreement"] is None


def test_a_convolution_is_at_one_end_and_a_hub_at_the_other():
    conv = neighbor_measures(ConvNN2d(2, 2, 9, blend=0.0).neighborhood(torch.randn(1, 2, 8, 8)))
    assert conv["overlap"] == 1 and conv["hub_share"] == 9 / 64 and conv["entropy"] is None
    x = torch.zeros(1, 1, 8, 8)
    x[..., 3, 3] = 1  # the only token that is like any other, so that all others tie to the first ones
    hub = neighbor_measures(ConvNN2d(1, 1, 2, padding=0, kernel_size=1).neighborhood(x))
    assert hub["hub_share"] > 0.9 and hub["hub_skewness"] > 5 and hub["overlap"] < 0.6


def test_a_smaller_k_is_compared_with_what_there_was():
    layer = ConvNN2d(2, 2, 9)
    x = torch.randn(1, 2, 6, 6)
    before = neighbors_to_compare(layer.neighborhood(x))
    layer.set_spectrum(k=4)
    assert neighbor_measures(layer.neighborhood(x), before)["agreement"] == 1


# What could betray a change: random candidates drawn at evaluation, dropout, averaged weights.
RISKY = ["operator.candidates=random", "operator.num_candidates=24", "operator.eval_candidates=resample"]
RISKY += ["backbone.drop_rate=0.2", "train.ema=0.9", "swap=first_half"]


@pytest.mark.long
def test_measuring_changes_neither_weights_nor_metrics(tmp_path):
    for name, more in (("with", []), ("without", ["diagnostics.enabled=false"])):
        run(tiny(*RISKY, *more, f"run.dir={tmp_path}/{name}"))
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("with", "without")]
    assert equal_states(states[0]["model"], states[1]["model"]) and equal_states(states[0]["ema"], states[1]["ema"])
    assert states[0]["fingerprint"] == states[1]["fingerprint"]
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("with", "without")]
    for measured, plain in zip(*rows, strict=True):
        assert all(MEASURES.keys() <= layer.keys() for layer in measured["layers"])
        for layer in measured["layers"]:
            for name in (*MEASURES, "grad_norm", "param_norm"):
                layer.pop(name, None)
        measured.pop("param_norm")
        assert without_times(measured) == without_times(plain)
    assert "diagnostics_seconds" in rows[0][0] and "diagnostics_seconds" not in rows[1][0]


def test_every_second_epoch_and_peers(tmp_path):
    overrides = ["operator=convit", "diagnostics.every=2", "diagnostics.images=3", f"run.dir={tmp_path}/r"]
    run(tiny(*overrides, vit=True))
    first, second = (row["layers"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl"))
    assert first == [] and [layer["name"] for layer in second] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(0 < layer["entropy"] <= 1 and layer["agreement"] is None for layer in second)
    json.dumps(second, allow_nan=False)


def test_a_model_without_neighbours_is_not_measured():
    config = tiny("diagnostics.images=100")
    probe = Probe(config.diagnostics, Batches(load_dataset(config.data).test, 4, config.data, 8))
    assert probe.images.shape == (16, 3, 8, 8)  # all there are
    state = RunState(Meter.new(torch.device("cpu")))
    assert probe.measure(torch.nn.Conv2d(3, 3, 3), state) == state.neighbors == {}


@pytest.mark.parametrize("key", ["images", "every"])
def test_bad_settings(key):
    with pytest.raises(ConfigError, match=rf"diagnostics\.{key}=0 must lie"):
        tiny(f"diagnostics.{key}=0")
