"""What a job of a cluster does for its point: train it, and go back into the queue if it was stopped. No torch.

``python -m convnn.sweep.cluster_job FOLDER SUBMISSION`` runs once on each node of the job; the first node keeps the
records, the others only help to train.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convnn.config.overrides import key_of, quoted
from convnn.runs.status import COMPLETE, FAILED, INTERRUPTED
from convnn.runtime.files import read_json, write_json
from convnn.runtime.scheduler import RUNNING, Scheduler, SchedulerError, Slurm
from convnn.runtime.signals import StopSignals
from convnn.sweep.attempts import next_record
from convnn.sweep.budget import Budget
from convnn.sweep.plan import Point, load_point
from convnn.sweep.process import Start, run_point
from convnn.sweep.state import point_state, status_file
from convnn.sweep.submission import Submission, read_submission


def run_job(folder: Path, name: str, environment: Mapping[str, str], scheduler: Scheduler) -> int:
    """Carry out one job of a submission; return its exit code.

    Args:
        folder: of the sweep.
        name: of the submission.
        environment: of the job, as SLURM sets it.
        scheduler: asked whether the job is to go back into the queue.
    """
    submission = read_submission(folder, name)
    index = int(environment["SLURM_ARRAY_TASK_ID"])
    point = load_point(folder, submission.points[index])
    number = f"{environment['SLURM_ARRAY_JOB_ID']}_{index}"
    orders = submission.sweep
    extra = _extra_overrides(point, orders)
    if "SLURM_CPUS_PER_TASK" in environment and int(orders.get("processes", 1)) == 1:
        os.environ.setdefault("OMP_NUM_THREADS", environment["SLURM_CPUS_PER_TASK"])
    start = Start(int(orders.get("processes", 1)), meeting(environment, int(orders.get("nodes", 1))), reserve=False)
    if environment.get("SLURM_PROCID", "0") != "0":
        return _help(start.command(folder, point, extra))
    record = read_json(status_file(folder, point)) or {}
    progress = next_record(record, folder / point.folder, submission.call)
    limit = int(orders.get("requeues", 3))
    if progress["stalled"] > limit and point_state(folder, point).status != COMPLETE:
        return _give_up(folder, point, record, progress, number)
    start.record.update(progress, job=number, node=environment.get("SLURMD_NODENAME", ""))
    start.record["restarts"] = int(environment.get("SLURM_RESTART_COUNT", "0"))
    with StopSignals() as signals:
        status = run_point(
            folder,
            point,
            extra_overrides=extra,
            budget=Budget(folder, orders.get("deadline")),
            start=start,
        )
        if signals.seen is not None and status != COMPLETE:
            _back_into_the_queue(scheduler, folder, submission, number)
    return 0 if status in (COMPLETE, INTERRUPTED) else 1


def _extra_overrides(point: Point, orders: Mapping[str, Any]) -> tuple[str, ...]:
    given = "tracker.group" in map(key_of, point.overrides)
    return () if given else (f"tracker.group={quoted(str(orders.get('name', 'custom')))}",)


def meeting(environment: Mapping[str, str], nodes: int) -> tuple[str, ...]:
    """Return torchrun's options by which the machines of a job meet."""
    if nodes == 1:
        return Start.meet
    job = int(environment["SLURM_JOB_ID"])
    host = environment.get("SLURM_LAUNCH_NODE_IPADDR", "localhost")  # of the job's first node
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return (f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={job}.{restart}",
            f"--rdzv-endpoint={host}:{20000 + job % 10000}")  # fmt: skip


def _help(command: list[str]) -> int:
    """Train along on another node than the first; a signal that comes is passed on."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    with StopSignals(lambda signum: child.send_signal(signum)):
        return child.wait()


def _give_up(folder: Path, point: Point, record: Mapping[str, Any], progress: Mapping[str, Any], number: str) -> int:
    """Record that a point's jobs get nowhere."""
    last = record.get("reason") or "it ended without a word"
    reason = f"{progress['stalled']} jobs in a row made no progress (sweep.requeues); the last: {last}"
    write_json(status_file(folder, point), {**record, **progress, "status": FAILED, "reason": reason, "job": number})
    return 1


def _back_into_the_queue(scheduler: Scheduler, folder: Path, submission: Submission, number: str) -> None:
    """Requeue a job that was stopped, unless it was cancelled or is on its way there already.

    A time limit that is near and a preemption with grace leave the job running, and it would count as done if it ended
    now. Where the scheduler refuses, whoever looks at the sweep next submits the point again.
    """
    try:
        job = scheduler.by_number([number]).get(number)
    except SchedulerError:
        return
    if job is not None and job.state == RUNNING and not read_submission(folder, submission.name).stopped:
        scheduler.requeue(number)


def main() -> None:
    """Carry out the job that the environment tells of."""
    signal.signal(signal.SIGCONT, lambda *_: None)
    folder, name = sys.argv[1:]
    sys.exit(run_job(Path(folder), name, os.environ, Slurm()))


if __name__ == "__main__":
    main()
