"""One run in its folder: open it, train or go on training, track, draw, and write result.json."""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

from convnn.config.schema import Config
from convnn.errors import EXIT_DIVERGED, EXIT_FAILED, DivergedError
from convnn.models.cost import dear_swap
from convnn.models.schedule import describe_schedule
from convnn.models.sites import patches_alone
from convnn.models.swap import count_parameters, neighbor_layers
from convnn.ops import choice
from convnn.ops.subsets import seed_subsets
from convnn.runs.checkpoint import settle
from convnn.runs.environment import record_choices, record_environment
from convnn.runs.folder import RunFolder, open_run_folder
from convnn.runs.status import COMPLETE, DIVERGED, INTERRUPTED
from convnn.runs.tracking import Tracker
from convnn.runtime import distributed
from convnn.runtime.device import (
    device_name,
    explain_compilation,
    explain_out_of_memory,
    explain_small_batches,
    pick_device,
    set_determinism,
)
from convnn.runtime.signals import StopSignals
from convnn.text import size
from convnn.train.disk import CheckpointBytes, checkpoint_bytes
from convnn.train.pictures import draw_at_end
from convnn.train.result import result_of
from convnn.train.trainer import Trainer

log = logging.getLogger("convnn")
Result = dict[str, Any]


def run(config: Config) -> Result:
    """Carry out a run in its folder and return the content of its result.json.

    Raises:
        ConfigError: if the configuration cannot work here.
        CheckpointError: if a run to be resumed has no usable checkpoint.
    """
    with distributed.process_group(config.device):
        pick_device(config.device)
        folder = open_run_folder(config)
        try:
            if folder.done is not None:
                log.info("%s is complete (top-1 %.2f); nothing to do", folder.path, folder.done["top1_last"])
                if folder.writes:  # the run may have been killed before it did
                    with suppress(OSError):
                        settle(folder.checkpoints, config.checkpoint.keep)
                return folder.done
            return _run_in(folder, config)
        finally:
            folder.close()


def _run_in(folder: RunFolder, config: Config) -> Result:
    set_determinism(config.train.deterministic)
    mode = config.train.compile
    explained = explain_compilation(mode) if mode else nullcontext()  # loads what only a compiler needs
    with (
        StopSignals(_say_that_it_stops, leaving=True) as signals,
        explain_out_of_memory(config.train.batch_size, config.train.grad_accumulation),
        explained,
    ):
        try:
            trainer = Trainer(config, folder)
        except Exception:
            folder.discard()
            raise
        result = run_trainer(trainer, distributed.agreed_stop(lambda: signals.seen))
    if result["status"] == COMPLETE:
        log.info("%s, %d parameters, %s", _best_of(result), result["params"], folder.path)
    return result


def _best_of(result: Result) -> str:
    on_test = result["val_top1_best"] is None  # a best accuracy of 0 is one too
    chosen_on, best = ("test", "top1_best_on_test") if on_test else ("validation", "val_top1_best")
    return f"top-1 {result['top1_last']:.2f}% (last epoch), best on {chosen_on} {result[best]:.2f}%"


def _say_that_it_stops(signum: int) -> None:
    log.warning("%s: stopping after this step with a checkpoint", signal.Signals(signum).name)


def run_trainer(trainer: Trainer, stop: Callable[[], int | None]) -> Result:
    """Train from the newest checkpoint of the trainer's folder, if it has one; write result.json and return it.

    Args:
        trainer: newly built.
        stop: names the signal that asks the run to stop; alike on all processes, see ``distributed.agreed_stop``.
    """
    config, folder = trainer.config, trainer.folder
    distributed.fail_together(lambda: folder.begin(config, trainer.data))
    resumed = folder.resume and distributed.fail_together(trainer.resume)
    if folder.extends:
        distributed.fail_together(lambda: folder.extend(config, resumed))
    disk = checkpoint_bytes(trainer.model, config)
    changes: list[str] = []
    if folder.writes:
        changes = record_environment(folder.path, device_name(trainer.device), trainer.state.step)
        (folder.path / "swap.txt").write_text(str(trainer.report))
    _announce(trainer, resumed)
    _say_disk(disk, folder)
    tracker = Tracker(config.tracker, folder.path, asdict(config), trainer.state.rows)
    ending = partial(
        result_of,
        config,
        trainer.state,
        model=trainer.model,
        params=trainer.params,
        gflops=trainer.gflops,
        layers_replaced=len(trainer.report),
        data=trainer.data,
        device=trainer.device,
        environment_changes=changes,
        lengths=trainer.lengths,
    )
    exit_code, result = EXIT_FAILED, {}
    try:
        with explain_small_batches(config.train.batch_size, config.train.grad_accumulation):
            signum = trainer.fit(stop, tracker.log)
        if signum is None and tracker.takes_images and config.diagnostics.pictures:
            tracker.log_images(draw_at_end(trainer.eval_model, trainer.batches["test"], folder.path))
        result = ending(COMPLETE if signum is None else INTERRUPTED)
        if signum is not None:
            result["signal"] = signal.Signals(signum).name
        exit_code = 0 if signum is None else 128 + signum
    except DivergedError as error:
        result = ending(DIVERGED) | {"reason": str(error)}
        exit_code = EXIT_DIVERGED
        log.error("diverged: %s", error)
    finally:
        if result:
            result["exit_code"] = exit_code
            folder.write_json("result.json", result)
            if folder.writes:
                record_choices(folder.path, choice.choices())
            if result["status"] == COMPLETE:
                _settle(trainer)
        tracker.finish(result, exit_code)
        seed_subsets(None)
    return result


def _settle(trainer: Trainer) -> None:
    """Leave of the checkpoints what a complete run keeps; it is complete also where the disk refuses that."""
    try:
        trainer.settle()
    except OSError as error:
        log.warning("more checkpoints are kept than checkpoint.keep says: %s", error)


def _say_disk(need: CheckpointBytes, folder: RunFolder) -> None:
    """Log what checkpoints take; a warning if the disk has less."""
    if not folder.writes:
        return
    there = sum(path.stat().st_size for path in folder.checkpoints.glob("*.pt"))
    free = shutil.disk_usage(folder.path).free + there
    text = f"checkpoints: {size(need.training)} while it trains, {size(need.complete)} when complete"
    if need.training > free:
        log.warning("%s, but %s are free; see checkpoint.keep in docs/configuration.md", text, size(free))
    else:
        log.info("%s", text)


def _announce(trainer: Trainer, resumed: bool) -> None:
    """Log what is about to be trained, and from where."""
    config = trainer.config
    log.info("run folder %s", trainer.folder.path)
    log.info("%s on %s, %s", config.backbone.name, trainer.device, config.data.name)
    for line in str(trainer.report).splitlines():
        log.info("%s", line)
    kept = trainer.kept
    if trainer.lost is not None:
        log.info("%s; going on from the checkpoint of this run", trainer.lost)
    elif kept is not None:
        way = "" if kept[1] or config.swap.init != "fresh" else "; swap.init=auto transfers those of replaced layers"
        log.log(logging.INFO if kept[1] else logging.WARNING, "%s%s", kept[0], way)
    if config.backbone.freeze:
        log.info("%s of %s parameters are trained", f"{count_parameters(trainer.model):,}", f"{trainer.params:,}")
    patches = patches_alone(trainer.model, [row.name for row in trainer.report.rows])
    for warning in (patches, dear_swap(trainer.gflops, trainer.report)):
        if warning:
            log.warning("%s", warning)
    schedule = describe_schedule(config.schedule)
    if schedule:
        log.info("%s", schedule)
        if not neighbor_layers(trainer.model):
            log.warning("the schedule moves nothing: no replaced layer lies on the spectrum")
    for (_, before), (_, after) in pairwise(trainer.lengths):
        log.info(
            "extended from %g to %g epochs: from step %d on the learning rate is what a run of %d steps has at that "
            "step; blend, k and temperature stay as they are at step %d",
            *(before / trainer.steps_per_epoch, after / trainer.steps_per_epoch, before, after, trainer.lengths[0][1]),
        )
    if resumed:
        log.info("resumed at epoch %d, step %d", trainer.state.epoch + 1, trainer.state.step)
