"""The trainer: builds model, data and optimizer, and has the loop over epochs and steps, with its checkpoints."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from convnn.config.identity import fingerprint, identity
from convnn.config.schema import Config
from convnn.data.batches import Batches
from convnn.data.datasets import load_dataset
from convnn.data.readers import Readers
from convnn.data.splits import AnySplit, Dataset
from convnn.data.stream import make_batches
from convnn.errors import CheckpointError, DivergedError, StoppedError, WeightsError
from convnn.models.build import build_model, kept_weights
from convnn.models.cost import check_output, count_cost, count_memory, parameters_without_gradient
from convnn.models.freezing import freeze
from convnn.models.schedule import apply_schedule, describe_schedule
from convnn.models.swap import SwapReport, count_parameters, neighbor_layers
from convnn.ops.triton.dispatch import require
from convnn.runs.checkpoint import check_identity, load_latest, load_model_state, save_checkpoint, settle
from convnn.runs.data_record import DataRecord
from convnn.runs.folder import RunFolder
from convnn.runs.metrics import describe_row
from convnn.runtime import distributed
from convnn.runtime.device import check_compiler, make_autocast, pick_device, seed_step
from convnn.train.compiling import compiled_by_choice
from convnn.train.divergence import DivergenceCheck
from convnn.train.evaluate import Meter, evaluate
from convnn.train.gradient import backward, gradient_summary, layer_norms, parameter_norm, parts_of_step
from convnn.train.kept import TestOutputs
from convnn.train.lengths import planned_lengths
from convnn.train.optim import learning_rate, make_optimizer, make_schedules
from convnn.train.probe import Probe
from convnn.train.progress import Progress
from convnn.train.sizes import check_sizes
from convnn.train.state import RunState

log = logging.getLogger("convnn")
Stop = Callable[[], int | None]
"""Returns the signal that asks the run to stop, or None."""
Row = dict[str, Any]
"""What metrics.jsonl has of an epoch."""


class Trainer:
    """Model, data and optimizer of a run, and how far it has come."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        """Build everything.

        Args:
            config: of the run.
            folder: where its checkpoints are.

        Raises:
            ConfigError: if the parts do not fit together.
        """
        self.config, self.folder = config, folder
        self.device = pick_device(config.device)
        self.world = distributed.world()
        dataset = distributed.one_per_machine_first(lambda: load_dataset(config.data))
        if config.train.compile:
            distributed.fail_together(lambda: check_compiler(self.device, config.train.compile))
        distributed.fail_together(lambda: self._build(dataset))
        self.forward: Callable[[Tensor], Tensor] = self.model
        self.unsynchronised: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.world.size > 1:
            idle = parameters_without_gradient(self.model, config.schedule, dataset.train.shape[0], self.image_size)
            parallel = distributed.data_parallel(self.model, self.device, bool(idle))
            self.forward, self.unsynchronised = parallel, parallel.no_sync
        if config.train.compile:
            self.forward = compiled_by_choice(self.model, self.forward, config.train.compile)

    def _build(self, dataset: Dataset) -> None:
        config, train = self.config, self.config.train
        check_sizes(config, dataset)
        self.data = replace(self.folder.data or DataRecord.of(dataset), shape=list(dataset.train.shape))
        model, self.report, self.image_size = self._network(dataset)
        self.params, self.kept = count_parameters(model), kept_weights(config, model, self.report, self.image_size)
        self.model = distributed.with_sync_batchnorm(model, self.device, train.sync_batchnorm).to(self.device)
        freeze(self.model, config.backbone.freeze)
        for layer in neighbor_layers(self.model).values():
            require(layer.backend, self.device)
        if train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.readers = Readers(config.data, self.device, self.world.size)
        self.batches = {
            name: self._batches(split.to(self.device), name == "train")
            for name in ("train", "val", "test")
            if (split := getattr(dataset, name)) is not None
        }
        self.steps_per_epoch = len(self.batches["train"])
        self.lengths = planned_lengths(train, self.steps_per_epoch)
        self.total_steps = self.lengths[-1][1]
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.num_classes = len(dataset.classes)
        self._examine(dataset.train.shape[0])
        self._build_training()
        self.probe = Probe(config.diagnostics, self.batches["test"], self.autocast)
        self.outputs = TestOutputs(config.checkpoint.predictions, self.batches["test"], self.folder)
        self.state = RunState(Meter.new(self.device))

    def _network(self, dataset: Dataset) -> tuple[nn.Module, SwapReport, int]:
        """Build the model; one that goes on from a checkpoint needs no file of weights to begin from."""
        self.lost: WeightsError | None = None
        try:
            return build_model(self.config, dataset)
        except WeightsError as error:
            if not self.folder.resume:
                raise
            self.lost = error
        return build_model(self.config, dataset, weights=False)

    def _examine(self, channels: int) -> None:
        """Check what the model returns at both ends of a schedule, and count its operations at the last."""
        for now in (1.0, 0.0) if describe_schedule(self.config.schedule) else (1.0,):
            apply_schedule(self.model, self.config.schedule, now)
            check_output(self.model, channels, self.image_size, self.num_classes)
            if now:
                what = self.model, channels, self.image_size
                self.gflops, self.report = count_cost(*what, self.report)
                self.report = count_memory(*what, self.report, self._images_at_once())

    def _images_at_once(self) -> int:
        """Return how many images a forward pass of training has, on one process."""
        train = self.config.train
        return -(-train.batch_size // self.world.size // train.grad_accumulation)

    def _batches(self, split: AnySplit, train: bool) -> Batches:
        c = self.config
        size = c.train.batch_size if train else c.train.eval_batch_size or c.train.batch_size
        batches = make_batches(split, size, c.data, self.image_size, train, c.seed, c.train.channels_last)
        batches.rank, batches.world_size = self.world.rank, self.world.size
        batches.mirrored = bool(c.train.mixup or c.train.cutmix)
        batches.share(self.readers)
        return batches

    def _build_training(self) -> None:
        optim, train = self.config.optim, self.config.train
        self.optimizer = make_optimizer(self.model, optim)
        self.scheduler = make_schedules(self.optimizer, optim, self.lengths, self.steps_per_epoch)
        self.mixup = None
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        if train.mixup or train.cutmix:
            args = {"label_smoothing": train.label_smoothing, "num_classes": len(self.data.classes)}
            self.mixup = Mixup(mixup_alpha=train.mixup, cutmix_alpha=train.cutmix, **args)
            self.criterion = SoftTargetCrossEntropy()
        self.ema = ModelEmaV3(self.model, decay=train.ema) if train.ema else None
        self.divergence = DivergenceCheck(self.model, optim.clip_grad, train.skip_nonfinite)
        self.autocast = make_autocast(train.amp, self.device)

    @property
    def eval_model(self) -> nn.Module:
        """The model whose accuracy counts: the average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    # ------------------------------------------------------------------------------------------- checkpoints

    def save(self, name: str, whole: bool = True) -> None:
        """Write ``checkpoints/<name>.pt``; every process must ask for it, the first writes.

        Args:
            name: ``last`` or ``best``.
            whole: with the optimizer's state and the file before it, to go on from; else weights alone.
        """
        content = {
            "identity": identity(self.config),
            "fingerprint": fingerprint(self.config),
            **self.data.entry(),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict() if whole else None,
            "spectrum": {name: layer.movable() for name, layer in neighbor_layers(self.model).items()},
            **self.state.to_checkpoint(),
        }
        if self.folder.writes:
            save_checkpoint(self.folder.checkpoints / f"{name}.pt", content, previous=whole)

    def settle(self) -> None:
        """Leave of a complete run's checkpoints what ``checkpoint`` says."""
        kept = self.config.checkpoint
        if not kept.optimizer and kept.keep != "best":
            self.save("last", whole=False)
        if self.folder.writes:
            settle(self.folder.checkpoints, kept.keep)

    def resume(self) -> bool:
        """Load the newest whole checkpoint; return whether there was one.

        Raises:
            CheckpointError: if it fits another configuration or model, or if none is whole.
            ConfigError: if it is of other data; without one, if the weights to begin from cannot be had.
        """
        found = load_latest(self.folder.checkpoints, self.device)
        if found is None and self.lost is not None:
            raise self.lost
        if found is None:
            return False
        path, content = found
        check_identity(path, content, identity(self.config), self.data)
        load_model_state(self.model, content["model"], path)
        if self.ema is not None:
            load_model_state(self.ema.module, content["ema"], path)
        self.state = RunState.from_checkpoint(content, self.device)
        if content["optimizer"] is not None:
            self.optimizer.load_state_dict(content["optimizer"])
        elif self.state.epoch < self.epochs:
            raise CheckpointError(f"{path} holds weights alone, without the optimizer's state to go on with")
        return True

    # ------------------------------------------------------------------------------------------- the loop

    def time_steps(self, count: int = 3, block: int = 1) -> float:
        """Train for one block of steps and ``count`` more; return the median seconds of a step in these.

        The clock is read when the device is done with a block.
        """
        times, taken = [time.perf_counter()], 0
        self.model.train()
        with self.readers.explained(), closing(self.readers):
            while len(times) < count + 2:
                with closing(self.batches["train"].epoch(0)) as batches:
                    for images, labels in itertools.islice(batches, block * (count + 1) - taken):
                        self._train_step(images, labels)
                        taken += 1
                        if taken % block == 0:
                            self.state.meter.means()  # waits for the device
                            times.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(times[1:])) / block

    def fit(self, stop: Stop, track: Callable[[Row], None]) -> int | None:
        """Train to the end, or until a signal asks to stop, which is returned after a checkpoint.

        Args:
            stop: asked before every step and every batch of an evaluation.
            track: gets the row of every epoch, before its checkpoint is written.
        """
        with self.readers.explained(), closing(self.readers):
            return self._fit(stop, track)

    def _fit(self, stop: Stop, track: Callable[[Row], None]) -> int | None:
        self.model.train()
        while self.state.epoch < self.epochs:
            signum = self._train_epoch(stop)
            try:
                if signum is None:
                    self._end_epoch(stop, track)
            except StoppedError as stopped:
                # The checkpoint is then one of the epoch's last step: a run that goes on from it evaluates anew. That
                # gives the same numbers, as an evaluation draws by its step, and nothing of half an evaluation is kept.
                signum = stopped.signum
            if signum is not None:
                self.save("last")
                return signum
            signum = stop()
            if signum is not None and self.state.epoch < self.epochs:
                return signum
        return None

    def _train_epoch(self, stop: Stop) -> int | None:
        """Train what is left of an epoch; return the signal that ended it early, or None."""
        state = self.state
        # The order of the images follows from the seed and the epoch alone, so that an epoch is entered at any step.
        batches = self.batches["train"].epoch(state.epoch, state.step_in_epoch)
        left = min(self.steps_per_epoch - state.step_in_epoch, self.total_steps - state.step)
        start, images_before = time.perf_counter(), state.train_images
        name = f"epoch {state.epoch + 1}/{self.epochs}"
        progress = Progress(self.config, name, left, self.total_steps - state.step, self.folder.writes)
        signum = None
        with progress, closing(batches):
            for _, (images, labels) in zip(range(left), batches, strict=False):
                signum = stop()
                if signum is not None:
                    break
                self._train_step(images, labels)
                state.train_images += self.batches["train"].images_of(state.step_in_epoch)
                state.step += 1
                state.step_in_epoch += 1
                progress.step(state.meter)
                if state.step % 50 == 0 or self.device.type == "cpu":
                    self._check_finite()
        self._check_finite()  # on CUDA this also waits for the last step
        if state.train_images > images_before:
            state.train_seconds += time.perf_counter() - start
        return signum

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        step = self.state.step
        seed_step(self.config.seed, step, self.device)
        apply_schedule(self.model, self.config.schedule, self._time(step))
        if self.scheduler is not None:
            self.scheduler.step_update(step)
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        self.divergence.before_forward()
        self.optimizer.zero_grad(set_to_none=True)  # gradients that a CUDA graph made are gone with its next step
        train, count = self.config.train, self.batches["train"].images_of(self.state.step_in_epoch)
        parts = parts_of_step(train.grad_accumulation, count, train.batch_size, self.world.size)
        what = self.forward, self.criterion, images, targets, parts, self.autocast, self.unsynchronised
        loss, output = backward(*what)
        if not self.divergence.may_step(loss, self.state):
            return
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        with torch.no_grad():
            self.state.meter.add(loss, output, labels)

    def _time(self, step: int) -> float:
        """Fraction of training at a step: 0 at the first, 1 at the last of the first plan, and after an extension."""
        return min(step / max(self.lengths[0][1] - 1, 1), 1.0)

    def _check_finite(self) -> None:
        """Raise DivergedError if a step was not finite, naming it and the last good checkpoint."""
        found = self.divergence.first_nonfinite()
        if found is None:
            return
        step, what = found
        if self.scheduler is not None:
            self.scheduler.step_update(step)
        lr = learning_rate(self.optimizer)
        kept = self.folder.checkpoints / "last.pt"
        good = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
        raise DivergedError(f"{what} is not finite at step {step} (epoch {self.state.epoch + 1}, lr {lr:.3g}); {good}")

    def _end_epoch(self, stop: Stop, track: Callable[[Row], None]) -> None:
        """Evaluate, log and checkpoint; the run is then at the start of the next epoch."""
        row, state = self._evaluate(stop), self.state
        chosen_on = "val_top1" if "val" in self.batches else "test_top1"
        is_best = row[chosen_on] > state.best.get(chosen_on, -1.0)
        if is_best:
            state.best = {k: row[k] for k in ("epoch", "val_top1", "test_top1") if k in row}
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
        state.meter, state.grad_norms, state.layer_norms = Meter.new(self.device), [], {}
        state.rows.append(row)
        track(row)
        log.info("%s", describe_row(row, self.epochs, moving=self.config.schedule.blend.shape != "constant"))
        self.outputs.write(row["epoch"], state.best, state.epoch == self.epochs)
        if is_best and self.config.checkpoint.keep != "last":
            self.save("best", whole=False)
        self.save("last")

    def _evaluate(self, stop: Stop) -> Row:
        """Return the row of the epoch whose steps have been taken.

        Raises:
            StoppedError: when a signal asks to stop; the state is then as it was.
        """
        state, schedule, now = self.state, self.config.schedule, self._time(self.state.step - 1)
        apply_schedule(self.model, schedule, now)
        if self.ema is not None:
            apply_schedule(self.ema.module, schedule, now)
        if self.config.diagnostics.enabled and not state.layer_norms:  # kept for a run that a signal stops below
            state.layer_norms = layer_norms(self.model)
        start = time.perf_counter()
        row: Row = {"epoch": state.epoch, "step": state.step}
        loss, top1, _ = Meter(distributed.reduce(state.meter.sums)).means()
        seeds = self.config.seed, state.step
        seed_step(*seeds, self.device, evaluation=True)
        distributed.broadcast_buffers(self.model, self.eval_model)
        row |= {"train_loss": loss, "train_top1": None if self.mixup is not None else top1}
        for name, batches in self.batches.items():
            if name != "train":
                scores = evaluate(self.eval_model, batches, self.autocast, stop, seeds, self.outputs.taking(name))
                row |= dict(zip((f"{name}_loss", f"{name}_top1", f"{name}_top5"), scores, strict=True))
        row["lr"] = learning_rate(self.optimizer)
        row |= gradient_summary(state.grad_norms)
        if self.config.diagnostics.enabled:
            row["param_norm"] = parameter_norm(self.model.parameters())
        row["layers"] = [
            {"name": n, **layer.spectrum(), **state.layer_norms.get(n, {})}
            for n, layer in neighbor_layers(self.model).items()
        ]
        self.probe.add_to(row, self.eval_model, state)
        row["train_seconds"] = round(state.train_seconds, 3)
        row["eval_seconds"] = round(time.perf_counter() - start, 3)
        return row
