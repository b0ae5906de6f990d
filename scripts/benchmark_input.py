"""Benchmark cases of the input: batches beside torchvision's loader, and their share of a training step."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_cases import Case, Step, train_once
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from convnn.config.schema import BackboneConfig, DataConfig
from convnn.data.batches import Batches
from convnn.data.datasets import load_dataset
from convnn.data.splits import Split
from convnn.data.stream import make_batches
from convnn.models.backbones import create_backbone

SIDE, BATCH = 32, 128

AUGMENTATION: dict[str, Any] = {
    "crop_padding": 4,
    "flip": True,
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2470, 0.2435, 0.2616],
}

"""What all input cases do: a random crop after padding, a flip, and normalisation."""


class _Pictures(Dataset):
    """Pillow images made of an array (N, h, w, 3), as torchvision's CIFAR data sets make them."""

    def __init__(self, images: np.ndarray, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(SIDE, AUGMENTATION["crop_padding"]),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(AUGMENTATION["mean"], AUGMENTATION["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def _noise(count: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % 10)


def _write_folder(root: Path, split: Split) -> None:
    """Write the images as JPEG files, all for training and one a class for testing."""
    for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        for part in ("train", "test") if i < 10 else ("train",):
            folder = root / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.jpg", quality=90)


def _whole(open_epoch: Callable[[], Iterable[Any]], device: torch.device) -> Step:
    """Return a step that takes all batches of an epoch: nothing is read ahead while another case has its turn."""

    def step() -> None:
        for images, _ in open_epoch():
            images.to(device, non_blocking=True)

    return step


def input_cases(quick: bool) -> list[Case]:
    """Return epochs of images of 32x32 in batches of 128: on the device, by two workers, streamed from JPEG files."""
    count = (10 if quick else 40) * BATCH

    def on_device(device: torch.device) -> Step:
        batches = Batches(_noise(count).to(device), BATCH, DataConfig(**AUGMENTATION), SIDE, train=True)
        return _whole(batches.epoch, device)

    def torchvision(device: torch.device) -> Step:
        split = _noise(count)
        pictures = _Pictures(split.images.permute(0, 2, 3, 1).contiguous().numpy(), split.labels)
        loader: DataLoader = DataLoader(
            pictures,
            BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=2,
            persistent_workers=True,  # they start in the rounds that are not timed
            pin_memory=device.type == "cuda",
        )
        return _whole(lambda: loader, device)

    def streamed(device: torch.device) -> Step:
        root = Path(tempfile.mkdtemp(prefix="convnn-input-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        _write_folder(root, _noise(count))
        config = DataConfig(
            "imagefolder", "convnn.data.load_imagefolder", str(root), stream="true", workers=2, **AUGMENTATION
        )
        batches = make_batches(load_dataset(config).train.to(device), BATCH, config, SIDE, train=True)
        return _whole(batches.epoch, device)

    cases = {"Batches": on_device, "torchvision, 2 workers": torchvision, "JPEG stream, 2 workers": streamed}
    return [Case("input", name, 0, 0, build, count) for name, build in cases.items()]


def input_share_cases(quick: bool) -> list[Case]:
    """Return training steps of a ResNet-18 on one batch that stays, and on ``Batches``: the difference is the input."""
    batch = 16 if quick else 256
    sizes: dict[str, Any] = {"channels": [16, 16, 32, 32]} if quick else {}

    def training(fresh: bool) -> Callable[[torch.device], Step]:
        def build(device: torch.device) -> Step:
            torch.manual_seed(0)
            model = create_backbone(BackboneConfig("resnet18", stem="small", kwargs=sizes), 10, 3, SIDE)
            model = model.to(device).to(memory_format=torch.channels_last).train()
            optimizer = torch.optim.SGD(model.parameters(), 1e-4)
            config = DataConfig(**AUGMENTATION)
            split = _noise(32 * batch).to(device)
            batches = Batches(split, batch, config, SIDE, train=True, channels_last=True)

            def endless() -> Iterator[tuple[Tensor, Tensor]]:
                epoch = 0
                while True:
                    yield from batches.epoch(epoch)
                    epoch += 1

            running = endless()
            kept = next(running)

            return lambda: train_once(model, optimizer, *(next(running) if fresh else kept))

        return build

    names = {"ResNet-18, one batch that stays": False, "ResNet-18, Batches": True}
    return [Case("input share", name, 0, 0, training(fresh), batch) for name, fresh in names.items()]
