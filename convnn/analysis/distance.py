"""How far away the tokens are that a layer mixes: mean distance of its neighbours, per head and layer.

Dosovitskiy et al., *An Image Is Worth 16x16 Words*, ICLR 2021 (arXiv 2010.11929), figure 7 right, and Raghu et al., *Do
Vision Transformers See Like Convolutional Neural Networks?*, NeurIPS 2021 (arXiv 2108.08810), figure 3: the mean
attention distance of a head is the distance to the tokens that a query attends to, weighted by the attention weights
and averaged over queries and images. Here the tokens are a query's k neighbours:

    distance = mean over images and queries of (sum_k w_k d_k / sum_k w_k),   d in pixels of the image

with Euclidean distances between the tokens' positions. Where a layer does not weigh its neighbours (``weighting=ones``)
all count alike: the weights that it has learned per slot say nothing of distance. Zero padding counts where it is
chosen, as a convolution's window has it too; prefix tokens such as CLS have no place and do not. Shapes: B batch, H
heads, Q queries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convnn.analysis.base import Analysis, ArmResults, NotApplicable, Result
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, figure_of
from convnn.analysis.subject import Subject
from convnn.models.inspect import choosing_layers, neighbors_of
from convnn.ops.neighborhood import Neighborhood

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mean_distance(found: Neighborhood) -> tuple[Tensor, Tensor]:
    """Return the sum over images and queries of the weighted mean distance in tokens, and how many there are.

    Returns:
        Twice (H,) float64. Queries without a neighbour on the grid are left out.
    """
    on_grid = found.on_grid
    weights = torch.ones_like(on_grid, dtype=torch.float64) if found.weights is None else found.weights.double().abs()
    weights = weights.masked_fill(~on_grid, 0)
    total = weights.sum(-1)
    distance = found.distance().double().masked_fill(~on_grid, 0)
    means = (weights * distance).sum(-1) / total.clamp(min=1e-300)
    return means.sum((0, 2)), (total > 0).sum((0, 2)).double()


def measure(subject: Subject) -> Result:
    """Measure all layers of a run's model that choose neighbours."""
    if not choosing_layers(subject.model):
        raise NotApplicable("no layer chooses neighbours (swap.txt says what was replaced)")
    sums: dict[str, list[Tensor]] = {}
    for images, _ in subject.batches():
        for name, found in neighbors_of(subject.model, images).items():
            g = found.geometry
            if len(found.index) != len(images) or (g.height == 1 and g.width > 1):
                continue  # inside windows or on a line: where the tokens lie on the image is not known
            total, count = (part.cpu() for part in mean_distance(found))
            scale = images.shape[-2] / g.height
            parts = sums.setdefault(name, [torch.zeros_like(total), torch.zeros_like(count)])
            parts[0] += total * scale
            parts[1] += count
    if not sums:
        raise NotApplicable("its layers choose inside windows or on a line, not on the image")
    heads = {name: (total / count).tolist() for name, (total, count) in sums.items()}
    means = {name: sum(values) / len(values) for name, values in heads.items()}
    series = {"distance": {"at": list(means), "values": list(means.values())}}
    most = max(map(len, heads.values()))
    # Heads have no order that means something: sorted, the same place of two networks can be compared.
    for i in range(most if most > 1 else 0):
        own = {name: sorted(values)[i] for name, values in heads.items() if len(values) == most}
        series[f"distance of head {i + 1} from the nearest"] = {"at": list(own), "values": list(own.values())}
    return {"series": series, "heads": heads}


def headline(result: Result) -> dict[str, float]:
    """Return the mean over layers and the last layer's distance, in pixels."""
    values = result["series"]["distance"]["values"]
    return {"neighbor_distance": sum(values) / len(values), "neighbor_distance_last": values[-1]}


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw the distance over depth, its nearest and farthest head where there are several, and along the spectrum."""
    results = [result for arm in arms for result in arm.results.values()]
    heads = max((len(values) for result in results for values in result["heads"].values()), default=1)

    def panels(axes: list[Any]) -> dict[str, Any]:
        entries = draw_series(axes[0], arms, "distance", "mean distance (pixels)")
        draw_headline(axes[1], arms, headline, "neighbor_distance", "mean over layers (pixels)")
        if heads > 1:
            for panel, i, word in ((axes[2], 1, "nearest"), (axes[3], heads, "farthest")):
                draw_series(panel, arms, f"distance of head {i} from the nearest", f"{word} head (pixels)")
        for panel in axes:
            panel.set_ylim(bottom=0)
        return entries

    return figure_of(4 if heads > 1 else 2, panels, f"Distance of the neighbours ({INTERVAL})")


ANALYSIS = Analysis(
    title="Distance of the neighbours",
    source="Dosovitskiy et al., ICLR 2021 (arXiv 2010.11929), figure 7; Raghu et al., NeurIPS 2021 (arXiv 2108.08810)",
    measure=measure,
    headline=headline,
    draw=draw,
    images=256,
)
