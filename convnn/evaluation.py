"""From a configuration to a model and its scores: building, counting, evaluating."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn import distributed
from convnn.backbones import create_backbone
from convnn.checkpoint import load_checkpoint, load_model_state
from convnn.config import Config, ConfigError, ScheduleConfig
from convnn.data import Batches, Dataset, load_dataset
from convnn.flops import Cost, count_operations, on_meta
from convnn.runtime import StoppedError, make_autocast, pick_device, seed_everything
from convnn.schedule import apply_schedule
from convnn.streaming import make_batches
from convnn.swap import SwapReport, neighbor_layers, swap_layers

# ------------------------------------------------------------------------------------------------ building


def build_model(config: Config, dataset: Dataset) -> tuple[nn.Module, SwapReport, int]:
    """Build the backbone from ``config.seed`` and swap its layers; return model, report and image side in pixels.

    Raises:
        ConfigError: if the parts do not fit together.
    """
    channels, height, width = dataset.train.shape
    image_size = config.data.image_size or config.backbone.image_size
    if image_size is None and height != width:
        raise ConfigError(f"data={config.data.name} has {height}x{width} images; set data.image_size")
    image_size = image_size or height
    seed_everything(config.seed)
    model = create_backbone(config.backbone, len(dataset.classes), channels, image_size)
    report = swap_layers(model, config.swap, config.operator)
    return model, report, image_size


@contextmanager
def _name_failing_layer(model: nn.Module) -> Iterator[None]:
    """Turn a ValueError from inside a swapped layer into a ConfigError that names the layer."""
    running: list[str] = []
    hooks = []
    for name, layer in neighbor_layers(model).items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(layer.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield
    except ValueError as error:
        where = f"layer '{running[-1]}': " if running else ""
        raise ConfigError(f"{where}{error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def forward_cost(model: nn.Module, channels: int, image_size: int, watch: Iterable[str] = ()) -> Cost:
    """Return the operations of the forward pass of one image (see ``convnn.flops``), without computing it.

    Raises:
        ConfigError: if the model cannot process an image of this size, for instance for lack of candidates.
    """
    model = on_meta(model)
    image = torch.empty(1, channels, image_size, image_size, device="meta")
    with _name_failing_layer(model):
        try:
            return count_operations(model, image, watch)
        except ValueError:
            raise
        except Exception as error:  # whatever a backbone makes of arguments that its constructor let pass
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"the model cannot process a {image_size}x{image_size} image: {line}") from error


def idle_parameters(model: nn.Module, schedule: ScheduleConfig, channels: int, image_size: int) -> set[str]:
    """Return the trainable parameters that get no gradient at the start, the middle or the end of a schedule.

    An example: at blend 1 a layer whose neighbours all count alike selects by its queries and keys, but no gradient
    passes a selection, so that what belongs to these alone gets none.
    """
    training, device = model.training, next(model.parameters()).device
    idle: set[str] = set()
    model.eval()
    for time in (0.5, 1.0, 0.0):
        apply_schedule(model, schedule, time)
        with torch.random.fork_rng():
            output = model(torch.zeros(1, channels, image_size, image_size, device=device))
        seen: set[Any] = set()
        left = [output.grad_fn]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                left += [function for function, _ in node.next_functions]
        reached = {id(node.variable) for node in seen if hasattr(node, "variable")}
        idle |= {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached}
    model.train(training)
    return idle


# ---------------------------------------------------------------------------------------------- evaluation


@dataclass
class Meter:
    """Sums over samples, kept on the device in float64."""

    sums: Tensor

    @classmethod
    def new(cls, device: torch.device) -> Meter:
        """Return an empty meter."""
        return cls(torch.zeros(4, dtype=torch.float64, device=device))

    def add(self, loss: Tensor, output: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss and its logits (B, classes)."""
        top = output.topk(min(5, output.shape[1]), dim=1).indices == labels[:, None]
        n = torch.tensor(len(labels), device=self.sums.device)
        self.sums += torch.stack([loss.double() * n, top[:, 0].sum(), top.any(1).sum(), n])

    def means(self) -> tuple[float, float, float]:
        """Return mean loss, top-1 and top-5 in percent, averaged over samples; NaN of none."""
        loss, top1, top5, n = self.sums.tolist()
        n = n or math.nan
        return loss / n, 100 * top1 / n, 100 * top5 / n


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    autocast: Callable[[], Any] = nullcontext,
    stop: Callable[[], int | None] | None = None,
) -> tuple[float, float, float]:
    """Return mean loss, top-1 and top-5 (percent) over all samples of a split, whichever process has them.

    Raises:
        StoppedError: when ``stop()`` names a signal.
    """
    training = model.training
    model.eval()
    meter = Meter.new(batches.device)
    with closing(batches.epoch()) as epoch:
        for images, labels in epoch:
            if stop is not None and (signum := stop()) is not None:
                raise StoppedError(signum)
            with autocast():
                output = model(images)
            if len(labels):
                output = output.float()
                meter.add(F.cross_entropy(output, labels), output, labels)
    if batches.world_size > 1:
        meter.sums = distributed.reduce(meter.sums)
    model.train(training)
    return meter.means()


def load_run(config: Config, folder: Path, checkpoint: str, dataset: Dataset) -> tuple[nn.Module, int, dict[str, Any]]:
    """Rebuild the model of ``checkpoints/<checkpoint>.pt`` (the averaged one if there is one), on the CPU.

    Returns:
        The model, its image side in pixels, and the checkpoint.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or does not fit.
    """
    path = folder / "checkpoints" / f"{checkpoint}.pt"
    state = load_checkpoint(path)
    config.backbone.pretrained = False  # the checkpoint has all weights
    config.backbone.kwargs.pop("checkpoint_path", None)  # and timm is not to open other files
    model, _, image_size = build_model(config, dataset)
    load_model_state(model, state["ema"] or state["model"], path)
    for name, layer in neighbor_layers(model).items():
        layer.set_spectrum(**state["spectrum"][name])
        layer.backend = "auto"  # a run that demanded kernels may be evaluated without them
    return model, image_size, state


def evaluate_run(config: Config, folder: Path, checkpoint: str) -> dict[str, Any]:
    """Evaluate ``checkpoints/<checkpoint>.pt`` of a run on its test set, on the device that ``config`` names.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or does not fit.
    """
    device = pick_device(config.device)
    dataset = load_dataset(config.data)
    model, image_size, state = load_run(config, folder, checkpoint, dataset)
    train = config.train
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    size = train.eval_batch_size or train.batch_size
    split = dataset.test.to(device)
    batches = make_batches(split, size, config.data, image_size, channels_last=train.channels_last)
    loss, top1, top5 = evaluate(model.to(device), batches, make_autocast(train.amp, device))
    scores = {"loss": loss, "top1": top1, "top5": top5}
    return {"checkpoint": checkpoint, "epochs": state["epoch"], "images": len(split)} | scores
