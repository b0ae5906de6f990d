"""The training loop: build, train, evaluate, and go on exactly where a run stopped."""

from __future__ import annotations

import logging
import math
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from convnn.checkpoint import CheckpointError, load_checkpoint, load_model_state, previous_of, save_checkpoint
from convnn.checks import nearest
from convnn.config import Config, ConfigError, fingerprint, identity
from convnn.data import Batches, Dataset, Split, load_dataset
from convnn.diagnostics import Probe
from convnn.evaluation import Meter, build_model, evaluate, forward_cost
from convnn.looking import draw_at_end
from convnn.rundir import RunFolder, environment, open_run_folder, versions
from convnn.runtime import make_autocast, pick_device, rng_state, set_determinism, set_rng_state, stop_on_signal
from convnn.schedule import apply_schedule, describe_schedule
from convnn.swap import count_parameters, neighbor_layers
from convnn.tracking import Tracker

log = logging.getLogger("convnn")

Result = dict[str, Any]


class DivergedError(RuntimeError):
    """The loss is no longer finite."""


# ------------------------------------------------------------------------------------------------ training


class Trainer:
    """One run: its model, data and state, from the first step to result.json."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        """Build everything; raises ConfigError before anything is trained."""
        self.config, self.folder = config, folder
        train = config.train
        self.device = pick_device(config.device)
        dataset = load_dataset(config.data)
        self._check_sizes(dataset)
        model, self.report, self.image_size = build_model(config, dataset)
        self.model = model.to(self.device)
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
        channels = dataset.train.images.shape[1]
        apply_schedule(self.model, config.schedule, 1.0)
        cost = forward_cost(self.model, channels, self.image_size, [r.name for r in self.report.rows])
        self.gflops, self.report = cost.total / 1e9, self.report.with_costs(cost)
        apply_schedule(self.model, config.schedule, 0.0)
        forward_cost(self.model, channels, self.image_size)
        self._build_training(len(dataset.classes))
        self.probe = Probe(config.diagnostics, self.batches["test"], self.autocast)
        self.epoch = self.step_in_epoch = self.step = 0
        self.best: dict[str, float] = {}
        self.meter = Meter.new(self.device)
        self.train_seconds, self.train_images = 0.0, 0
        self.last_row: dict[str, Any] = {}

    def _check_sizes(self, dataset: Dataset) -> None:
        train, data = self.config.train, self.config.data
        if train.batch_size > len(dataset.train):
            raise ConfigError(
                f"train.batch_size={train.batch_size} exceeds the {len(dataset.train)} training images of {data.name}"
            )
        channels = dataset.train.images.shape[1]
        if len(data.mean) not in (1, channels):
            raise ConfigError(f"data.mean has {len(data.mean)} values for images of {channels} channels")

    def _batches(self, split: Split, train: bool) -> Batches:
        c = self.config
        size = c.train.batch_size if train else c.train.eval_batch_size or c.train.batch_size
        return Batches(split, size, c.data, self.image_size, train, c.seed, c.train.channels_last)

    def _build_training(self, num_classes: int) -> None:
        optim, train = self.config.optim, self.config.train
        known = [str(name) for name in list_optimizers()]
        if optim.name not in known:
            raise ConfigError(f"optim.name={optim.name} is not a timm optimizer{nearest(optim.name, known)}")
        if get_optimizer_info(optim.name).second_order:
            raise ConfigError(f"optim.name={optim.name} needs second derivatives, which train.py does not compute")
        try:
            self.optimizer = create_optimizer_v2(
                self.model,
                optim.name,
                lr=optim.lr,
                weight_decay=optim.weight_decay,
                momentum=optim.momentum,
                filter_bias_and_bn=not optim.decay_norm_and_bias,
            )
        except Exception as error:  # optional packages, devices, arguments
            raise ConfigError(
                f"optim.name={optim.name} cannot be used here: {error or type(error).__name__}"
            ) from error
        self.scheduler = None
        if optim.sched != "constant":
            try:
                self.scheduler, _ = create_scheduler_v2(
                    self.optimizer,
                    optim.sched,
                    num_epochs=self.epochs,
                    warmup_epochs=optim.warmup_epochs,
                    warmup_lr=optim.warmup_lr,
                    min_lr=optim.min_lr,
                    warmup_prefix=False,
                    step_on_epochs=False,
                    updates_per_epoch=self.steps_per_epoch,
                )
            except (AssertionError, ValueError) as error:
                raise ConfigError(f"optim.sched={optim.sched} is not usable: {error}") from error
            if self.scheduler is None:
                raise ConfigError(
                    f"optim.sched={optim.sched} is not a timm schedule; use constant, cosine, step, poly, ..."
                )
        self.mixup = None
        self.criterion: nn.Module = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        if train.mixup or train.cutmix:
            args = {"label_smoothing": train.label_smoothing, "num_classes": num_classes}
            self.mixup = Mixup(mixup_alpha=train.mixup, cutmix_alpha=train.cutmix, **args)
            self.criterion = SoftTargetCrossEntropy()
        self.ema = ModelEmaV3(self.model, decay=train.ema) if train.ema else None
        self.autocast = make_autocast(train.amp, self.device)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.model) if train.compile else self.model

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
            "meter": self.meter.sums.tolist(),
            "best": self.best,
            "last_row": self.last_row,
            "train_seconds": self.train_seconds,
            "train_images": self.train_images,
            "spectrum": {name: layer.movable() for name, layer in neighbor_layers(self.model).items()},
            "neighbors": self.probe.before,
            "rng": rng_state(self.device),
        }

    def save(self, name: str) -> None:
        """Write ``checkpoints/<name>.pt``."""
        save_checkpoint(self.folder.checkpoints / f"{name}.pt", self.state())

    def resume(self) -> bool:
        """Load the last good checkpoint; return whether there was one.

        Raises:
            CheckpointError: if it fits another configuration or model.
        """
        path = self.folder.checkpoints / "last.pt"
        if not path.exists() and not previous_of(path).exists():
            return False
        try:
            state = load_checkpoint(path, self.device)
        except CheckpointError as error:
            if not previous_of(path).exists():
                raise
            log.warning("%s; going on from the one before it", error)
            path = previous_of(path)
            state = load_checkpoint(path, self.device)
        if state["fingerprint"] != fingerprint(self.config):
            raise CheckpointError(f"{path} belongs to another configuration")
        load_model_state(self.model, state["model"], path)
        if self.ema is not None:
            load_model_state(self.ema.module, state["ema"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        for key in ("epoch", "step_in_epoch", "step", "best", "last_row", "train_seconds", "train_images"):
            setattr(self, key, state[key])
        self.probe.before = state.get("neighbors", {})
        self.meter.sums = torch.tensor(state["meter"], dtype=torch.float64, device=self.device)
        set_rng_state(state["rng"], self.device)
        return True

    # ------------------------------------------------------------------------------------------- the loop

    def fit(self, stop: Callable[[], int | None]) -> int | None:
        """Train to the end, or until ``stop()`` names a signal, which is returned after a checkpoint."""
        self.model.train()
        while self.step < self.total_steps:
            signum = self._train_epoch(stop)
            if signum is not None:
                self.save("last")
                return signum
            self._end_epoch()
            signum = stop()
            if signum is not None and self.step < self.total_steps:
                return signum
        return None

    def _train_epoch(self, stop: Callable[[], int | None]) -> int | None:
        batches = self.batches["train"].epoch(self.epoch, self.step_in_epoch)
        left = min(self.steps_per_epoch - self.step_in_epoch, self.total_steps - self.step)
        bad_step = torch.full((), torch.iinfo(torch.int64).max, device=self.device)
        start, images_before = time.perf_counter(), self.train_images
        progress = tqdm(total=left, desc=f"epoch {self.epoch + 1}/{self.epochs}", leave=False, disable=None)
        signum = None
        with progress:
            for _, (images, labels) in zip(range(left), batches, strict=False):
                signum = stop()
                if signum is not None:
                    break
                loss = self._train_step(images, labels)
                bad_step = torch.where(loss.isfinite(), bad_step, bad_step.clamp(max=self.step))
                self.train_images += len(labels)
                self.step += 1
                self.step_in_epoch += 1
                progress.update()
                if self.step % 50 == 0 or self.device.type == "cpu":
                    self._check_finite(bad_step)
        self._check_finite(bad_step)  # on CUDA this also waits for the last step
        if self.train_images > images_before:
            self.train_seconds += time.perf_counter() - start
        return signum

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        apply_schedule(self.model, self.config.schedule, self._time(self.step))
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
        with self.autocast():
            output = self.forward(images)
            loss = self.criterion(output.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        with torch.no_grad():
            self.meter.add(loss.detach(), output.detach(), labels)
        return loss.detach()

    def _time(self, step: int) -> float:
        """Fraction of training at a step: 0 at the first, 1 at the last."""
        return step / max(self.total_steps - 1, 1)

    def _check_finite(self, bad_step: Tensor) -> None:
        bad = int(bad_step)
        if bad <= self.step:
            lr = self.optimizer.param_groups[0]["lr"]
            kept = self.folder.checkpoints / "last.pt"
            good = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
            raise DivergedError(f"loss is not finite at step {bad} (epoch {self.epoch + 1}, lr {lr:.3g}); {good}")

    def _end_epoch(self) -> None:
        """Evaluate, log and checkpoint; the run is then at the start of the next epoch."""
        time_now = self._time(self.step - 1)
        apply_schedule(self.model, self.config.schedule, time_now)
        if self.ema is not None:
            apply_schedule(self.ema.module, self.config.schedule, time_now)
        start = time.perf_counter()
        row: dict[str, Any] = {"epoch": self.epoch, "step": self.step}
        loss, top1, _ = self.meter.means()
        row |= {"train_loss": loss, "train_top1": None if self.mixup is not None else top1}
        for name in ("val", "test"):
            if name in self.batches:
                scores = evaluate(self.eval_model, self.batches[name], self.autocast)
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
        self.meter, self.last_row = Meter.new(self.device), row
        self.tracker.log(row)
        self._print(row)
        if is_best:
            self.save("best")
        self.save("last")

    def _print(self, row: dict[str, Any]) -> None:
        text = f"epoch {row['epoch'] + 1:>3}/{self.epochs}  train loss {row['train_loss']:.4f}"
        if row["train_top1"] is not None:
            text += f" top1 {row['train_top1']:.2f}"
        for name in ("val", "test"):
            if name in self.batches:
                text += f"  {name} loss {row[f'{name}_loss']:.4f} top1 {row[f'{name}_top1']:.2f}"
        blends = [layer["blend"] for layer in row["layers"] if "blend" in layer]
        if blends and self.config.schedule.blend.shape != "constant":
            text += f"  blend {min(blends):.2f}..{max(blends):.2f}"
        log.info("%s  %.1f s", text, row["train_seconds"])

    # ------------------------------------------------------------------------------------------- results

    def run(self, stop: Callable[[], int | None]) -> Result:
        """Train, write result.json and return it."""
        self.folder.write_json("env.json", environment())
        (self.folder.path / "swap.txt").write_text(str(self.report))
        resumed = self.folder.resume and self.resume()
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
        self.tracker = Tracker(self.config.tracker, self.folder.path, asdict(self.config), self.epoch)
        exit_code = 1
        result: Result = {}
        try:
            signum = self.fit(stop)
            if signum is None and self.tracker.takes_images and self.config.diagnostics.pictures:
                self.tracker.log_images(draw_at_end(self.eval_model, self.batches["test"], self.folder.path))
            result = self.result("complete" if signum is None else "interrupted")
            if signum is not None:
                result["signal"] = signal.Signals(signum).name
            exit_code = 0 if signum is None else 128 + signum
        except DivergedError as error:
            result = self.result("diverged") | {"reason": str(error)}
            exit_code = 3
            log.error("diverged: %s", error)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            size = self.config.train.batch_size
            raise ConfigError(f"train.batch_size={size}: batch normalisation needs more than one value") from error
        except torch.cuda.OutOfMemoryError as error:
            half = max(self.config.train.batch_size // 2, 1)
            raise ConfigError(f"out of CUDA memory; try train.batch_size={half}") from error
        finally:
            if result:
                result["exit_code"] = exit_code
                self.folder.write_json("result.json", result)
            self.tracker.finish(result, exit_code)
        return result

    def result(self, status: str) -> Result:
        """Return the content of result.json. Accuracies are in percent; sizes in bytes; times in seconds."""
        row, best = self.last_row, self.best
        on_val = "val" in self.batches
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "status": status,
            "fingerprint": fingerprint(self.config),
            "top1_last": row.get("test_top1"),
            "top5_last": row.get("test_top5"),
            "top1_best_on_test": None if on_val else best.get("test_top1"),
            "top1_at_best_val": best.get("test_top1") if on_val else None,
            "val_top1_best": best.get("val_top1"),
            "best_epoch": best.get("epoch"),
            "epochs": self.epoch,
            "steps": self.step,
            "seconds": round(self.train_seconds, 3),
            "params": count_parameters(self.model),
            "gflops": self.gflops,
            "images_per_second": round(self.train_images / self.train_seconds, 1) if self.train_seconds else None,
            "peak_memory_bytes": peak,
            "layers_replaced": len(self.report),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "versions": versions(),
        }


def run(config: Config) -> Result:
    """Carry out a run in its folder and return the content of its result.json.

    Raises:
        ConfigError: if the configuration cannot work here.
        CheckpointError: if a run to be resumed has no usable checkpoint.
    """
    pick_device(config.device)
    folder = open_run_folder(config)
    try:
        if folder.done is not None:
            log.info("%s is complete (top-1 %.2f); nothing to do", folder.path, folder.done["top1_last"])
            return folder.done
        set_determinism(config.train.deterministic)
        with stop_on_signal() as stop:
            try:
                trainer = Trainer(config, folder)
            except Exception:
                folder.discard()
                raise
            result = trainer.run(stop)
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
