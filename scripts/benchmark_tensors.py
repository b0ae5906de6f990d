"""What layers are timed on: noise, images, and activations of a network that was trained on them.

Scores of noise are never equal. Those of images are: grey pixels point all in one direction.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn import measure_choices


def photographs(count: int, side: int) -> tuple[Tensor, Tensor]:
    """Return crops of scikit-learn's two photographs, normalised, (count, 3, side, side), and of which each is.

    They are made a quarter as large first, so that 32 pixels show as much as they do in CIFAR.
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    photos = [torch.tensor(photo)[::4, ::4].permute(2, 0, 1).float() / 255 for photo in load_sample_images().images]
    labels = torch.arange(count) % len(photos)
    crops = []
    for label in labels.tolist():
        top, left = (int(torch.randint(0, n - side + 1, (), generator=generator)) for n in photos[label].shape[1:])
        crops.append(photos[label][:, top : top + side, left : left + side])
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)))
    return (torch.stack(crops) - mean) / std, labels


@lru_cache(maxsize=1)
def activations(count: int, channels: int, side: int) -> Tensor:
    """Return what stands behind a convolution, BatchNorm and ReLU that learned to tell the photographs apart."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        head = nn.Linear(channels, 2)
        images, labels = photographs(64, side)
        optimizer = torch.optim.AdamW([*stem.parameters(), *head.parameters()], 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(head(stem(images).mean((2, 3))), labels).backward()
            optimizer.step()
    with torch.no_grad():
        return stem.eval()(photographs(count, side)[0])


def noise(*shape: int) -> Tensor:
    """Return Gaussian noise."""
    return torch.randn(*shape)


def real(count: int, channels: int, side: int, _: int) -> Tensor:
    """Return images if they are to have three channels, else activations."""
    return photographs(count, side)[0] if channels == 3 else activations(count, channels, side)


class Compiled(nn.Module):
    """A compiled layer. What its graph chooses among is measured on its first input."""

    def __init__(self, layer: nn.Module) -> None:
        """Compile it when it is first called."""
        super().__init__()
        self.layer, self.graph, self.known = layer, torch.compile(layer), False

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer does."""
        if not self.known:
            self.known = True
            measure_choices(self.layer, x)
        return self.graph(x)
