"""What the stages of gpu_check.py do in processes of their own: steps, indices, an exact resume, a process group.

usage: python scripts/gpu_steps.py FOLDER [KIND]     reads FOLDER/plan.json, writes FOLDER/rows.json
"""

from __future__ import annotations

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from gpu_indices import compare_indices
from torch._dynamo.utils import counters, get_compilation_metrics

from convnn.config.compose import compose_config
from convnn.config.schema import Config
from convnn.errors import first_line
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.folder import RunFolder, open_run_folder
from convnn.runs.metrics import read_metrics
from convnn.runtime.device import pick_device, set_determinism
from convnn.runtime.distributed import data_parallel
from convnn.train.run import run, run_trainer
from convnn.train.trainer import Trainer

Row = dict[str, Any]


def compiled_so_far() -> dict[str, int]:
    """Return how often torch.compile made a graph, broke one off, and made one anew for other values."""
    again = [m for m in get_compilation_metrics() if m.compile_id and not m.compile_id.endswith("/0")]
    stats = counters["stats"]["unique_graphs"]
    return {"graphs": stats, "graph_breaks": sum(counters["graph_break"].values()), "recompiles": len(again)}


class Arm:
    """A configuration whose training steps are timed."""

    def __init__(self, config: Config, folder: Path, block: int) -> None:
        """Build it, and take the first steps, in which kernels are chosen and compiled."""
        self.device, self.block = pick_device(config.device), block
        self.seconds: list[float] = []
        self.counts: dict[str, int] = {}
        before = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        self.trainer = Trainer(config, RunFolder(folder, resume=False, writes=False))
        self._counted(lambda: self.trainer.time_steps(1))
        self.first = time.perf_counter() - begin
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # of a step like all others: the first tries out kernels
        self.waits = self._waits()
        self.peak = torch.cuda.max_memory_allocated() - before if self.device.type == "cuda" else None

    def round(self) -> None:
        """Time a block of steps; the run moves on by a step, so that schedules move."""
        self.trainer.state.step = min(self.trainer.state.step + 1, self.trainer.total_steps - 1)
        self._counted(lambda: self.seconds.append(self.trainer.time_steps(1, self.block)))

    def _waits(self) -> int | None:
        """Return how often the host waits for the GPU in a training step."""
        if self.device.type != "cuda":
            return None
        counts = []
        for block in (1, 3):  # the clock waits twice, whatever the block
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                self.trainer.time_steps(1, block)
                torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchroniz" in str(w.message) for w in caught))
        return (counts[1] - counts[0]) // 4

    def _counted(self, call: Any) -> None:
        before = compiled_so_far()
        call()
        for name, count in compiled_so_far().items():
            self.counts[name] = self.counts.get(name, 0) + count - before[name]

    def row(self) -> Row:
        """Return what was measured."""
        times = [1000 * s for s in self.seconds]
        low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
        middle = statistics.median(times)
        memory = self.trainer.report.memory
        return {
            "step_ms": round(middle, 3),
            "step_ms_q1": round(low, 3),
            "step_ms_q3": round(high, 3),
            "rounds": len(times),
            "images_per_second": round(1000 * self.trainer.config.train.batch_size / middle, 1),
            "cifar_epoch_seconds": round(50 * middle / self.trainer.config.train.batch_size, 2),
            "steps_per_epoch": self.trainer.steps_per_epoch,
            "peak_mib": None if self.peak is None else round(self.peak / 2**20, 1),
            "counted_mib": None if memory is None else round(memory.extra / 2**20, 1),
            "first_seconds": round(self.first, 1),
            "waits_per_step": self.waits,
            **self.counts,
        }


def time_arms(plan: Row, folder: Path) -> list[Row]:
    """Time blocks of training steps of each arm; ratios are to the first. One that cannot be had says why.

    One after another, each in an empty memory and with an empty cache of torch.compile.
    """
    begin, names = time.monotonic(), list(plan["arms"])
    rows: list[Row] = []
    set_determinism("false")
    for number, name in enumerate(names):
        until = begin + plan["seconds"] * (number + 1) / len(names)
        rows.append({"case": plan["case"], "arm": name} | _time_arm(plan, plan["arms"][name], folder, until))
        reference = next((row for row in rows if "step_ms" in row), {})
        if "step_ms" in rows[-1]:
            rows[-1]["ratio"] = round(rows[-1]["step_ms"] / reference["step_ms"], 4)
            if rows[-1]["peak_mib"]:
                rows[-1]["peak_ratio"] = round(rows[-1]["peak_mib"] / reference["peak_mib"], 4)
        write(folder, rows)  # of an arm that ends the process, or takes too long, the ones before it are kept
        torch.compiler.reset()
        gc.collect()
    return rows


def _time_arm(plan: Row, overrides: list[str], folder: Path, until: float) -> Row:
    arm, note = None, ""
    try:
        arm = Arm(compose_config(overrides), folder / "run", plan["block"])
        for done in range(plan["rounds"]):
            if done > 1 and time.monotonic() > until:
                break
            arm.round()
    except Exception as error:  # whatever fails is what is to be found out
        note = f"{type(error).__name__}: {first_line(error)}"
        traceback.print_exc()
    return (arm.row() if arm is not None and arm.seconds else {}) | {"note": note}


def first_step(plan: Row, folder: Path) -> list[Row]:
    """Take the first steps of a configuration, in which kernels are chosen and compiled."""
    set_determinism("false")
    Arm(compose_config(plan["arm"]), folder / "run", 1)
    return []


def warm(plan: Row, folder: Path) -> list[Row]:
    """Run commands side by side, for what they leave in the caches of compilers.

    What they time beside one another says nothing, so that their table of choices is not the usual one.
    """
    until = time.monotonic() + plan["seconds"]
    rows: list[Row] = []

    def run_job(name: str) -> Row:
        begin, place = time.monotonic(), f"{list(plan['jobs']).index(name)}"
        environment = os.environ | {"TORCH_HOME": str(folder / f"home {place}")}
        with (folder / f"log {place}").open("w") as log:
            try:
                left = max(0.1, until - begin)
                code: int | str = subprocess.run(
                    plan["jobs"][name], env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=left
                ).returncode
            except subprocess.TimeoutExpired:
                code = "cut off"
        return {"case": name, "code": code, "seconds": round(time.monotonic() - begin, 1)}

    with ThreadPoolExecutor(plan["workers"]) as pool:
        for done in as_completed([pool.submit(run_job, name) for name in plan["jobs"]]):
            rows.append(done.result())
            write(folder, rows)
    return rows


def indices(plan: Row, folder: Path) -> list[Row]:
    """Compare neighbours by the kernel with plain torch's."""
    return compare_indices(plan, folder, write)


def begin_resume(plan: Row, folder: Path) -> list[Row]:
    """Train each case to its end, and once more only into its second half; rows are of those that cannot be trained."""
    rows = []
    for name, overrides in plan["arms"].items():
        try:
            _train_whole_and_half(overrides, folder / name)
        except Exception as error:
            traceback.print_exc()
            rows.append({"case": name, "note": f"{type(error).__name__}: {first_line(error)}"})
    return rows


def _train_whole_and_half(overrides: list[str], folder: Path) -> None:
    run(compose_config([*overrides, f"run.dir={folder / 'whole'}"]))
    config = compose_config([*overrides, f"run.dir={folder / 'stopped'}"])
    set_determinism(config.train.deterministic)
    opened = open_run_folder(config)
    trainer = Trainer(config, opened)
    last = trainer.total_steps // 2 + 1
    run_trainer(trainer, lambda: signal.SIGTERM if trainer.state.step >= last else None)
    opened.close()


def end_resume(plan: Row, folder: Path) -> list[Row]:
    """Go on with the stopped runs, in this new process, and compare all they leave with the whole runs, bit by bit."""
    path = folder / "rows.json"
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    failed = [row["case"] for row in rows]
    for name, overrides in plan["arms"].items():
        if name in failed:
            continue
        places = [folder / name / part for part in ("whole", "stopped")]
        steps = load_checkpoint(places[1] / "checkpoints" / "last.pt")["step"]
        run(compose_config([*overrides, f"run.dir={places[1]}", "run.if_exists=resume"]))
        whole, resumed = (load_checkpoint(place / "checkpoints" / "last.pt") for place in places)
        pairs = dict(_tensors(whole["model"], "model")) | dict(_tensors(whole["optimizer"], "optimizer"))
        others = dict(_tensors(resumed["model"], "model")) | dict(_tensors(resumed["optimizer"], "optimizer"))
        unequal = [key for key, value in pairs.items() if not torch.equal(value, others[key])]
        far = max((float((pairs[k].double() - others[k].double()).abs().max()) for k in unequal), default=0.0)
        rows_of = [[_without_times(row) for row in read_metrics(place / "metrics.jsonl")] for place in places]
        rows.append(
            {
                "case": name,
                "stopped_at_step": steps,
                "steps": whole["step"],
                "tensors": len(pairs),
                "unequal": len(unequal),
                "largest_difference": far,
                "equal_metrics": rows_of[0] == rows_of[1],
                "note": "",
            }
        )
    return rows


def _tensors(values: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(values, torch.Tensor):
        return [(name, values)]
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [pair for key, value in items for pair in _tensors(value, f"{name}.{key}")]


def _without_times(row: Row) -> Row:
    return {key: value for key, value in row.items() if not key.endswith("seconds")}


def in_a_group(plan: Row, folder: Path) -> list[Row]:
    """Take steps in a group of processes by DistributedDataParallel: alike in all, and in one as without a group."""
    import torch.distributed as dist

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if plan["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    set_determinism("true")
    dist.init_process_group(backend)
    begin = time.perf_counter()
    alone, grouped = (_train_a_little(device, group) for group in (False, True))
    first = [weight.clone() for weight in grouped]
    for weight in first:
        dist.broadcast(weight, 0)
    apart = torch.stack([(a - b).abs().max() for a, b in zip(grouped, first, strict=True)]).max()
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    row = {
        "case": f"{dist.get_world_size()} process(es)",
        "backend": backend,
        "processes": dist.get_world_size(),
        "apart": float(apart),
        "as_without": all(torch.equal(a, b) for a, b in zip(alone, grouped, strict=True)),
        "seconds": round(time.perf_counter() - begin, 2),
    }
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    return [row] if rank == 0 else []


def _train_a_little(device: torch.device, group: bool) -> list[torch.Tensor]:
    from convnn import ConvNN2d

    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(ConvNN2d(3, 16, 4), torch.nn.ReLU(), ConvNN2d(16, 8, 4))
    model = model.to(device)
    weights = list(model.parameters())
    forward = data_parallel(model, device, idle=False) if group else model
    optimizer = torch.optim.SGD(weights, 0.1)
    torch.manual_seed(1 + int(os.environ["RANK"]))
    for _ in range(3):
        optimizer.zero_grad()
        forward(torch.randn(4, 3, 8, 8).to(device)).square().mean().backward()
        optimizer.step()
    return [weight.detach() for weight in weights]


def write(folder: Path, rows: list[Row]) -> None:
    """Write the rows, whole or not at all."""
    aside = folder / "rows.json.new"
    aside.write_text(json.dumps(rows))
    aside.replace(folder / "rows.json")


KINDS = {"first": first_step, "warm": warm, "indices": indices, "steps": time_arms, "begin_resume": begin_resume,
         "end_resume": end_resume, "group": in_a_group}  # fmt: skip


def main(folder: Path, kind: str | None) -> None:
    """Carry out the plan in a folder, or its part of another kind."""
    plan = json.loads((folder / "plan.json").read_text())
    rows = KINDS[kind or plan["kind"]](plan, folder)
    if rows:
        write(folder, rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
