"""The training loop: build, train, evaluate, and go on exactly where a run stopped."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from convnn.config.identity import fingerprint, identity
from convnn.config.schema import Config
from convnn.data.batches import Batches
from convnn.data.datasets import load_dataset
from convnn.data.splits import AnySplit, Dataset
from convnn.data.stream import make_batches
from convnn.errors import ConfigError, DivergedError, StoppedError
from convnn.models.build import build_model
from convnn.models.cost import forward_cost, idle_parameters
from convnn.models.schedule import apply_schedule, describe_schedule
from convnn.models.swap import neighbor_layers
from convnn.ops.subsets import seed_subsets
from convnn.ops.triton.dispatch import require
from convnn.runs.checkpoint import check_identity, load_latest, load_model_state, save_checkpoint
from convnn.runs.environment import record_environment
from convnn.runs.folder import RunFolder, open_run_folder
from convnn.runs.metrics import describe_row
from convnn.runs.tracking import Tracker
from convnn.runtime import distributed
from convnn.runtime.device import device_name, explain_memory, make_autocast, pick_device, seed_step, set_determinism
from convnn.runtime.signals import stop_on_signal
from convnn.train.divergence import StepGuard
from convnn.train.evaluate import Meter, evaluate
from convnn.train.optim import make_optimizer, make_scheduler
from convnn.train.pictures import draw_at_end
from convnn.train.probe import Probe
from convnn.train.result import result_of

log = logging.getLogger("convnn")
Result = dict[str, Any]


class Trainer:
    """One run: its model, data and state, from the first step to result.json."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        """Build everything; raises ConfigError before anything is trained."""
        self.config, self.folder = config, folder
        self.device = pick_device(config.device)
        self.world = distributed.world()
        dataset = distributed.one_first(lambda: load_dataset(config.data))
        distributed.joint(lambda: self._build(dataset))
        self.forward: Callable[[Tensor], Tensor] = self.model
        if self.world.size > 1:
            idle = idle_parameters(self.model, config.schedule, dataset.train.shape[0], self.image_size)
            self.forward = distributed.parallel(self.model, self.device, bool(idle))
        if config.train.compile:
            self.forward = torch.compile(self.forward)

    def _build(self, dataset: Dataset) -> None:
        config, train = self.config, self.config.train
        self._check_sizes(dataset)
        model, self.report, self.image_size = build_model(config, dataset)
        self.model = distributed.synchronised(model, self.device, train.sync_batchnorm).to(self.device)
        for layer in neighbor_layers(self.model).values():
            require(layer.backend, self.device)
        if train.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.batches = {
            name: self._batches(split.to(self.device), name == "train")
            for name in ("train", "val", "test")
            if (split := getattr(dataset, name)) is not None
        }
        self.steps_per_epoch = len(self.batches["train"])
        self.total_steps = self.steps_per_epoch * train.epochs
        if train.max_steps is not None:
            self.total_steps = min(self.total_steps, train.max_steps)
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        channels = dataset.train.shape[0]
        apply_schedule(self.model, config.schedule, 1.0)
        cost = forward_cost(self.model, channels, self.image_size, [r.name for r in self.report.rows])
        self.gflops, self.report = cost.total / 1e9, self.report.with_costs(cost)
        apply_schedule(self.model, config.schedule, 0.0)
        forward_cost(self.model, channels, self.image_size)
        self.num_classes = len(dataset.classes)
        self._build_training()
        self.probe = Probe(config.diagnostics, self.batches["test"], self.autocast)
        self.epoch = self.step_in_epoch = self.step = 0
        self.best: dict[str, float] = {}
        self.meter = Meter.new(self.device)
        self.train_seconds, self.train_images = 0.0, 0
        self.rows: list[dict[str, Any]] = []
        self.environment_changes: list[str] = []

    def _check_sizes(self, dataset: Dataset) -> None:
        train, data = self.config.train, self.config.data
        if train.batch_size > len(dataset.train):
            raise ConfigError(
                f"train.batch_size={train.batch_size} exceeds the {len(dataset.train)} training images of {data.name}"
            )
        distributed.check_batch_size(train.batch_size, pairs=bool(train.mixup or train.cutmix))
        channels = dataset.train.shape[0]
        if len(data.mean) not in (1, channels):
            raise ConfigError(f"data.mean has {len(data.mean)} values for images of {channels} channels")

    def _batches(self, split: AnySplit, train: bool) -> Batches:
        c = self.config
        size = c.train.batch_size if train else c.train.eval_batch_size or c.train.batch_size
        batches = make_batches(split, size, c.data, self.image_size, train, c.seed, c.train.channels_last)
        batches.rank, batches.world_size = self.world.rank, self.world.size
        batches.mirrored = bool(c.train.mixup or c.train.cutmix)
        return batches

    def _build_training(self) -> None:
        optim, train = self.config.optim, self.config.train
        self.optimizer = make_optimizer(self.model, optim)
        self.scheduler = make_scheduler(self.optimizer, optim, self.epochs, self.steps_per_epoch)
        self.mixup = None
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        if train.mixup or train.cutmix:
            args = {"label_smoothing": train.label_smoothing, "num_classes": self.num_classes}
            self.mixup = Mixup(mixup_alpha=train.mixup, cutmix_alpha=train.cutmix, **args)
            self.criterion = SoftTargetCrossEntropy()
        self.ema = ModelEmaV3(self.model, decay=train.ema) if train.ema else None
        self.guard = StepGuard(self.model, optim.clip_grad, train.skip_nonfinite)
        self.autocast = make_autocast(train.amp, self.device)

    @property
    def eval_model(self) -> nn.Module:
        """The model whose accuracy counts: the average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    # ------------------------------------------------------------------------------------ state of the run

    def state(self) -> dict[str, Any]:
        """Return all that decides how the run goes on, as plain types and tensors."""
        return {
            "identity": identity(self.config),
            "fingerprint": fingerprint(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "step": self.step,
            "meter": distributed.gather(self.meter.sums.tolist()),
            "best": self.best,
            "rows": json.dumps(self.rows),
            "skipped_steps": self.guard.skipped,
            "train_seconds": self.train_seconds,
            "train_images": self.train_images,
            "spectrum": {name: layer.movable() for name, layer in neighbor_layers(self.model).items()},
            "neighbors": self.probe.before,
        }

    def save(self, name: str) -> None:
        """Write ``checkpoints/<name>.pt``; every process must ask for it, the first writes."""
        state = self.state()
        if self.folder.writes:
            save_checkpoint(self.folder.checkpoints / f"{name}.pt", state)

    def resume(self) -> bool:
        """Load the newest whole checkpoint; return whether there was one.

        Raises:
            CheckpointError: if it fits another configuration or model, or if none is whole.
        """
        found = load_latest(self.folder.checkpoints, self.device)
        if found is None:
            return False
        path, state = found
        check_identity(path, state, identity(self.config))
        load_model_state(self.model, state["model"], path)
        if self.ema is not None:
            load_model_state(self.ema.module, state["ema"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        for key in ("epoch", "step_in_epoch", "step", "best", "train_seconds", "train_images"):
            setattr(self, key, state[key])
        self.probe.before = state.get("neighbors", {})
        self.rows, self.guard.skipped = json.loads(state["rows"]), state["skipped_steps"]
        sums = torch.tensor(state["meter"], dtype=torch.float64, device=self.device).view(-1, 4)
        if len(sums) != self.world.size:  # written by another number of processes
            sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(self.world.size - 1, 4)])
        self.meter.sums = sums[self.world.rank].clone()
        return True

    # ------------------------------------------------------------------------------------------- the loop

    def fit(self, stop: Callable[[], int | None]) -> int | None:
        """Train to the end, or until ``stop()`` names a signal, which is returned after a checkpoint."""
        self.model.train()
        while self.epoch < self.epochs:
            signum = self._train_epoch(stop)
            try:
                if signum is None:
                    self._end_epoch(stop)
            except StoppedError as stopped:  # a run that goes on evaluates anew
                signum = stopped.signum
            if signum is not None:
                self.save("last")
                return signum
            signum = stop()
            if signum is not None and self.epoch < self.epochs:
                return signum
        return None

    def _train_epoch(self, stop: Callable[[], int | None]) -> int | None:
        batches = self.batches["train"].epoch(self.epoch, self.step_in_epoch)
        left = min(self.steps_per_epoch - self.step_in_epoch, self.total_steps - self.step)
        start, images_before = time.perf_counter(), self.train_images
        hidden = None if self.folder.writes else True  # None: where there is no terminal
        progress = tqdm(total=left, desc=f"epoch {self.epoch + 1}/{self.epochs}", leave=False, disable=hidden)
        signum = None
        with progress, closing(batches):
            for _, (images, labels) in zip(range(left), batches, strict=False):
                signum = stop()
                if signum is not None:
                    break
                self._train_step(images, labels)
                self.train_images += self.config.train.batch_size
                self.step += 1
                self.step_in_epoch += 1
                progress.update()
                if self.step % 50 == 0 or self.device.type == "cpu":
                    self._check_finite()
        self._check_finite()  # on CUDA this also waits for the last step
        if self.train_images > images_before:
            self.train_seconds += time.perf_counter() - start
        return signum

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        seed_step(self.config.seed, self.step, self.device)
        apply_schedule(self.model, self.config.schedule, self._time(self.step))
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        self.guard.before_forward()
        with self.autocast():
            output = self.forward(images)
            loss = self.criterion(output.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not self.guard.may_step(loss, self.step):
            return
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        with torch.no_grad():
            self.meter.add(loss.detach(), output.detach(), labels)

    def _time(self, step: int) -> float:
        """Fraction of training at a step: 0 at the first, 1 at the last."""
        return step / max(self.total_steps - 1, 1)

    def _check_finite(self) -> None:
        bad = self.guard.first_bad()
        if bad is None:
            return
        step, what = bad
        if self.scheduler is not None:
            self.scheduler.step_update(step)
        lr = self.optimizer.param_groups[0]["lr"]
        kept = self.folder.checkpoints / "last.pt"
        good = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
        raise DivergedError(f"{what} is not finite at step {step} (epoch {self.epoch + 1}, lr {lr:.3g}); {good}")

    def _end_epoch(self, stop: Callable[[], int | None]) -> None:
        """Evaluate, log and checkpoint; the run is then at the start of the next epoch."""
        time_now = self._time(self.step - 1)
        apply_schedule(self.model, self.config.schedule, time_now)
        if self.ema is not None:
            apply_schedule(self.ema.module, self.config.schedule, time_now)
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": self.epoch, "step": self.step}
        loss, top1, _ = Meter(distributed.reduce(self.meter.sums)).means()
        seed_step(self.config.seed, self.step, self.device, evaluation=True)
        distributed.share_buffers(self.model, self.eval_model)
        row |= {"train_loss": loss, "train_top1": None if self.mixup is not None else top1}
        for name in ("val", "test"):
            if name in self.batches:
                scores = evaluate(self.eval_model, self.batches[name], self.autocast, stop)
                row |= dict(zip((f"{name}_loss", f"{name}_top1", f"{name}_top5"), scores, strict=True))
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["layers"] = [{"name": n, **layer.spectrum()} for n, layer in neighbor_layers(self.model).items()]
        self.probe.add_to(row, self.eval_model)
        row["train_seconds"] = round(self.train_seconds, 3)
        row["eval_seconds"] = round(time.perf_counter() - start, 3)
        chosen_on = "val_top1" if "val" in self.batches else "test_top1"
        is_best = row[chosen_on] > self.best.get(chosen_on, -1.0)
        if is_best:
            self.best = {k: row[k] for k in ("epoch", "val_top1", "test_top1") if k in row}
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.meter = Meter.new(self.device)
        self.rows.append(row)
        self.tracker.log(row)
        log.info("%s", describe_row(row, self.epochs, moving=self.config.schedule.blend.shape != "constant"))
        if is_best:
            self.save("best")
        self.save("last")

    # ------------------------------------------------------------------------------------------- results

    def run(self, stop: Callable[[], int | None]) -> Result:
        """Train, write result.json and return it."""
        distributed.joint(lambda: self.folder.begin(self.config))
        resumed = self.folder.resume and distributed.joint(self.resume)
        if self.folder.writes:
            self.environment_changes = record_environment(self.folder.path, device_name(self.device), self.step)
            (self.folder.path / "swap.txt").write_text(str(self.report))
        log.info("run folder %s", self.folder.path)
        log.info("%s on %s, %s", self.config.backbone.name, self.device, self.config.data.name)
        for line in str(self.report).splitlines():
            log.info("%s", line)
        schedule = describe_schedule(self.config.schedule)
        if schedule:
            log.info("%s", schedule)
            if not neighbor_layers(self.model):
                log.warning("the schedule moves nothing: no replaced layer lies on the spectrum")
        if resumed:
            log.info("resumed at epoch %d, step %d", self.epoch + 1, self.step)
        self.tracker = Tracker(self.config.tracker, self.folder.path, asdict(self.config), self.rows)
        exit_code = 1
        result: Result = {}
        try:
            signum = self.fit(stop)
            if signum is None and self.tracker.takes_images and self.config.diagnostics.pictures:
                self.tracker.log_images(draw_at_end(self.eval_model, self.batches["test"], self.folder.path))
            result = result_of(self, "complete" if signum is None else "interrupted")
            if signum is not None:
                result["signal"] = signal.Signals(signum).name
            exit_code = 0 if signum is None else 128 + signum
        except DivergedError as error:
            result = result_of(self, "diverged") | {"reason": str(error)}
            exit_code = 3
            log.error("diverged: %s", error)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            size = self.config.train.batch_size
            raise ConfigError(f"train.batch_size={size}: batch normalisation needs more than one value") from error
        finally:
            if result:
                result["exit_code"] = exit_code
                self.folder.write_json("result.json", result)
            self.tracker.finish(result, exit_code)
            seed_subsets(None)
        return result


def run(config: Config) -> Result:
    """Carry out a run in its folder and return the content of its result.json.

    Raises:
        ConfigError: if the configuration cannot work here.
        CheckpointError: if a run to be resumed has no usable checkpoint.
    """
    with distributed.group(config.device):
        return _run(config)


def _run(config: Config) -> Result:
    pick_device(config.device)
    folder = open_run_folder(config)
    try:
        if folder.done is not None:
            log.info("%s is complete (top-1 %.2f); nothing to do", folder.path, folder.done["top1_last"])
            return folder.done
        set_determinism(config.train.deterministic)
        with stop_on_signal() as stop, explain_memory(config.train.batch_size):
            try:
                trainer = Trainer(config, folder)
            except Exception:
                folder.discard()
                raise
            result = trainer.run(distributed.agreed(stop))
        if result["status"] == "complete":
            log.info(
                "top-1 %.2f%% (last epoch), best on %s %.2f%%, %d parameters, %s",
                result["top1_last"],
                "validation" if result["top1_best_on_test"] is None else "test",
                result["val_top1_best"] or result["top1_best_on_test"],
                result["params"],
                folder.path,
            )
        return result
    finally:
        folder.close()
