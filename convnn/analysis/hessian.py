"""Curvature: the largest eigenvalues of the Hessian of the loss by the parameters.

Park & Kim, *How Do Vision Transformers Work?*, ICLR 2022 (arXiv 2202.06709), figures 1 and 4: attention flattens the
loss. Computed as PyHessian does (Yao et al. 2020, arXiv 1912.07145), see ``convnn.analysis.curvature``. Negative
eigenvalues, which they look at too, are smaller than what the few products here resolve.

The loss is the mean cross entropy over training images without augmentation, of the model in evaluation mode: BatchNorm
uses its running statistics. Weight decay, label smoothing and Mixup are no part of it. Neighbours are chosen anew by no
derivative: the Hessian is that of the network whose choices stay. Eigenvalues depend on the scale of the weights, which
a normalisation behind a layer makes arbitrary, so that those of two architectures are no measure of flatness by
themselves (Dinh et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from convnn.analysis.base import Analysis, ArmResults, Result
from convnn.analysis.curvature import hessian_product, lanczos, twice_differentiable
from convnn.analysis.drawing import INTERVAL, draw_headline, draw_series, figure_of
from convnn.analysis.subject import Subject
from convnn.analysis.training import training_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNT, STEPS, TOLERANCE = 3, 16, 0.02


def measure(subject: Subject) -> Result:
    """Measure on as many training images as the analysis has of test images."""
    trained = replace(subject, split=training_images(subject), _images=None)
    parameters = [p for p in trained.model.parameters() if p.requires_grad]
    with twice_differentiable(trained.model), torch.enable_grad():
        losses = [
            F.cross_entropy(trained.model(images), labels, reduction="sum") / len(trained.split)
            for images, labels in trained.batches()
        ]
        product = hessian_product(losses, parameters)
        size = sum(p.numel() for p in parameters)
        start = torch.randn(size, generator=subject.generator(), dtype=parameters[0].dtype).to(subject.device)
        found = lanczos(product, start, STEPS, TOLERANCE, COUNT)
    at = list(range(1, min(COUNT, found.steps) + 1))
    return {
        "errors": list(found.errors[:COUNT]),
        "steps": found.steps,
        "parameters": size,
        "loss": float(sum(loss.item() for loss in losses)),
        "series": {"eigenvalues": {"at": at, "values": list(found.values[:COUNT])}},
    }


def headline(result: Result) -> dict[str, float]:
    """Return the largest eigenvalue."""
    return {"hessian_largest": result["series"]["eigenvalues"]["values"][0]}


def draw(arms: Sequence[ArmResults]) -> Figure:
    """Draw the largest eigenvalue along the spectrum, and those after it."""

    def panels(axes: list[Any]) -> dict[str, Any]:
        draw_headline(axes[0], arms, headline, "hessian_largest", "largest eigenvalue")
        entries = draw_series(axes[1], arms, "eigenvalues", "eigenvalue", "number, the largest first")
        axes[1].set_xticks(range(1, COUNT + 1))
        for panel in axes:
            panel.set_ylim(bottom=0)
        return entries

    return figure_of(2, panels, f"Hessian of the training loss ({INTERVAL})")


ANALYSIS = Analysis(
    title="Eigenvalues of the Hessian",
    source="Yao et al., PyHessian, 2020 (arXiv 1912.07145); Park & Kim, ICLR 2022 (arXiv 2202.06709), figure 4",
    measure=measure,
    headline=headline,
    draw=draw,
    images=48,
)
