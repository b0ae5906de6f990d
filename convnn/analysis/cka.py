"""Linear CKA: how alike the features of two layers are, of one network or of two.

Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019 (arXiv 1905.00414), equation 3:

    CKA(K, L) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),   K = X X^T, L = Y Y^T

of the features X and Y of the same n images. With their HSIC, <H K H, H L H> for the centring H, features of many more
dimensions than there are images look alike whatever they are; the unbiased HSIC of Song et al. (JMLR 2012, equation 5)
does not have that, and ``debiased`` takes it: it is <K~, L~> / (n (n - 3)) with K~ centred so that the diagonal is 0
and all rows sum to 0 (Székely & Rizzo, Annals of Statistics 2014, definition 2). Either way CKA is the cosine of two
centred matrices, and a layer is kept as one unit vector: the upper triangle, what is off the diagonal times sqrt(2).

Two networks are compared at the same layer on the same images; runs of one arm with other seeds say how alike networks
are that differ in nothing but that. Shapes: N images, D features, V numbers of a triangle.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from convnn.analysis.base import Analysis, ArmResults, NotApplicable, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, drawn_arms, figure_of, short_names
from convnn.analysis.features import depths, feature_maps
from convnn.analysis.subject import Subject
from convnn.data.splits import split_fingerprint
from convnn.figures.style import COLOUR_MAP, evenly_spread, plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_IMAGES = 4
"""The unbiased HSIC divides by n - 3."""
_TILES = 3
FIRST = "likeness to the first arm"
OWN = "likeness among seeds"


def gram_vector(features: Tensor, *, debiased: bool = True) -> Tensor:
    """Return the centred Gram matrix of features (N, D) as a vector (V,) float64 of norm 1; all 0 where all are alike.

    The dot product of two such vectors is their CKA.
    """
    x = features.double()
    x = x - x.mean(0)  # changes neither, and keeps large means from drowning the rest
    gram, n = x @ x.T, len(x)
    if debiased:
        gram.fill_diagonal_(0)
        rows = gram.sum(1) / (n - 2)
        gram = gram - rows[:, None] - rows[None] + gram.sum() / ((n - 1) * (n - 2))
        gram.fill_diagonal_(0)
    row, column = torch.triu_indices(n, n, device=gram.device)
    twice = 2 - (row == column).to(gram)
    vector = gram[row, column] * twice.sqrt()
    norm = vector.norm()
    return vector / norm if norm > 0 else vector


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = True) -> float:
    """Return the CKA of two layers' features of the same images, (N, D) and (N, E)."""
    return float(gram_vector(x, debiased=debiased) @ gram_vector(y, debiased=debiased))


@torch.no_grad()
def measure(subject: Subject) -> Result:
    """Measure how alike the depths of a run's model are, and keep what other runs can be compared with."""
    if len(subject.split) < LEAST_IMAGES:
        raise NotApplicable(f"CKA needs {LEAST_IMAGES} images or more, not {len(subject.split)}")
    names = depths(subject.model)
    vectors = []
    for name in names:  # one after another, since the features of all would take much memory
        maps = [feature_maps(subject.model, [name], images)[name].flatten(1) for images, _ in subject.batches()]
        vectors.append(gram_vector(torch.cat(maps)).float().cpu().numpy())
    found = np.stack(vectors)
    likeness = (found @ found.T).clip(-1, 1).tolist()
    content = f"{split_fingerprint(subject.split)} {subject.index.tolist()}"
    series = {"likeness to the last depth": {"at": names, "values": likeness[-1]}}
    return {
        "series": series,
        "layers": names,
        "likeness": likeness,
        "images": hashlib.sha256(content.encode()).hexdigest()[:16],
        "arrays": {"vectors": found},
    }


def headline(result: Result) -> dict[str, float]:
    """Return how alike the first and the last depth are, and neighbouring depths on average."""
    likeness = result["likeness"]
    near = [likeness[i][i + 1] for i in range(len(likeness) - 1)]
    return {"cka_first_last": likeness[0][-1], "cka_adjacent": statistics.fmean(near) if near else 1.0}


def between(a: Result, b: Result) -> list[float | None]:
    """Return the CKA of two networks at each depth of the first; None where the second has none of that name.

    All are None where they have seen other images.
    """
    if a["images"] != b["images"]:
        return [None] * len(a["layers"])
    other = dict(zip(b["layers"], b["arrays"]["vectors"], strict=True))
    own = zip(a["layers"], a["arrays"]["vectors"], strict=True)
    return [float(vector @ other[name]) if name in other else None for name, vector in own]


def compare(arms: Sequence[ArmResults]) -> list[ArmResults]:
    """Add to every run how alike it is, at each depth, to the first arm's runs and to its own arm's other runs.

    A value of a seed is that with the other arm's run of the next seed, the first one after the last: no pair counts
    twice, and two runs of one seed begin with the same weights, which would make them more alike. Within an arm each
    run is in two pairs, so that its interval is somewhat too narrow; two runs are one pair. The first arm is that of
    ``first_arm``.
    """
    first = first_arm(arms)
    return [
        replace(arm, results={seed: _compared(seed, result, arm, first) for seed, result in arm.results.items()})
        for arm in arms
    ]


def first_arm(arms: Sequence[ArmResults]) -> ArmResults:
    """Return the arm of the lowest blend among those that saw the same images at the same layers as most arms did."""
    seen = [(one["images"], tuple(one["layers"])) for arm in arms for one in [next(iter(arm.results.values()))]]
    most = Counter(seen).most_common(1)[0][0]
    return drawn_arms([arm for arm, own in zip(arms, seen, strict=True) if own == most])[0]


def _compared(seed: int, result: Result, arm: ArmResults, first: ArmResults) -> Result:
    series = dict(result["series"])
    for name, other in ((FIRST, first), (OWN, arm)):
        seeds = sorted({*other.results, seed})
        after = seeds[(seeds.index(seed) + 1) % len(seeds)]
        if after == seed or after not in other.results or (other is arm and len(seeds) == 2 and after < seed):
            continue
        values = between(result, other.results[after])
        if any(value is not None for value in values):
            series[name] = {"at": result["layers"], "values": values}
    return result | {"series": series}


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw how alike the depths of a network are, and networks to the first arm's over depth."""
    shown, short = evenly_spread(drawn_arms(arms), _TILES), short_names(arms)
    first = first_arm(arms).name
    ylabels = {
        FIRST: f"CKA to {plain_text(short.get(first, first), 20)}",
        OWN: "CKA between seeds",
        "likeness to the last depth": "CKA to the last depth",
    }
    results = [result for arm in drawn_arms(arms) for result in arm.results.values()]
    ylabels = {name: text for name, text in ylabels.items() if any(name in result["series"] for result in results)}
    count = len(ylabels) + 1

    def panels(axes: list[Any]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for panel, (name, ylabel) in zip(axes, ylabels.items(), strict=False):
            entries = draw_series(panel, arms, name, ylabel)
            panel.set_ylim(top=1.02)
        draw_headline(axes[count - 1], arms, headline, "cka_adjacent", "CKA of adjacent depths")
        for panel, arm in zip(axes[count:], shown, strict=True):
            _draw_depths(panel, arm, short[arm.name])
        return entries

    return figure_of(count, panels, f"Linear CKA, debiased ({INTERVAL})", tiles=len(shown))


def _draw_depths(axes: Any, arm: ArmResults, title: str) -> None:
    first = next(iter(arm.results.values()))
    mean = np.mean([r["likeness"] for r in arm.results.values() if r["layers"] == first["layers"]], axis=0)
    image = axes.imshow(mean, cmap=COLOUR_MAP, vmin=0, vmax=1, origin="lower")
    names = [plain_text(name, 20) for name in first["layers"]]
    places = evenly_spread(list(range(len(names))), 8)
    axes.set_xticks(places, [names[i] for i in places], rotation=35, ha="right", fontsize=10)
    axes.set_yticks(places, [names[i] for i in places], fontsize=10)
    axes.set_title(plain_text(title, 24), fontsize=12)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


ANALYSIS = Analysis(
    title="Likeness of layers (linear CKA)",
    source="Kornblith et al., ICML 2019 (arXiv 1905.00414), equation 3; unbiased HSIC: Song et al., JMLR 2012",
    measure=measure,
    headline=headline,
    draw=draw,
    compare=compare,
    images=256,
)
