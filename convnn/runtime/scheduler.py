"""What SLURM is asked and told, all of it in this place; tests put another scheduler here. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

Run = Callable[[Sequence[str], str], str]
"""Carries out a command with a text on its standard input and returns what it says."""

CANCELLED = "CANCELLED"
RUNNING = "RUNNING"
SUSPENDED = "SUSPENDED"
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = (RUNNING, "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", SUSPENDED)
_USUAL = ("", "None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit", "Prolog", "Cleaning")
"""Reasons that say no more than that a job waits, or has begun."""
_FIELDS = "ArrayJobID:|,ArrayTaskID:|,State:|,RestartCnt:|,NodeList:|,Reason:|"
_QUEUE = ("squeue", "--noheader", "--all", "--array", "--states=all", f"-O{_FIELDS}")  # hidden partitions too
_OF_OTHERS = ("SLURM_", "SBATCH_ARRAY", "SQUEUE_", "SCANCEL_", "SACCT_")
"""Beginnings of variables that a job around us has set, or that narrow what the user sees of the queue."""
_PATIENCE = 60.0
"""Seconds in which a command of SLURM has to answer."""


class SchedulerError(RuntimeError):
    """The scheduler does not answer, or refuses; the message is one line."""


@dataclass(frozen=True)
class Job:
    """A job as the scheduler has it."""

    state: str
    """In SLURM's words, such as ``PENDING``."""
    restarts: int = 0
    """How often it was requeued."""
    node: str = ""
    """Where it runs, or ran."""
    reason: str = ""
    """Why it waits, or ended."""

    @property
    def told(self) -> str:
        """Why it waits or has ended, where that is not what all jobs wait for: ``PartitionTimeLimit`` for one."""
        return "" if self.reason in _USUAL else self.reason

    @property
    def waiting(self) -> bool:
        """Whether it is in the queue."""
        return self.state in _WAITING

    @property
    def alive(self) -> bool:
        """Whether it waits or runs."""
        return self.waiting or self.state in _RUNNING


class Scheduler(Protocol):
    """What a sweep needs of a scheduler. A job's number is such as ``35_2``, the third one of array 35."""

    def submit(self, options: Sequence[str], script: str) -> int:
        """Hand in a batch script; return the job's number.

        Raises:
            SchedulerError: if it is refused.
        """

    def jobs(self, names: Iterable[str]) -> dict[str, Job]:
        """Return the jobs of these names by number: all that live, and those that ended some minutes ago at most.

        Raises:
            SchedulerError: if there is no answer, which says nothing about the jobs.
        """

    def by_number(self, numbers: Iterable[str]) -> dict[str, Job]:
        """Return the jobs of the arrays that these numbers are of, whatever they are called by now.

        Raises:
            SchedulerError: if there is no answer.
        """

    def ended(self, numbers: Iterable[str]) -> dict[str, str]:
        """Return how jobs ended, as far as the scheduler keeps accounts of that."""

    def cancel(self, numbers: Iterable[str]) -> None:
        """Cancel jobs; those that run get TERM first."""

    def requeue(self, number: str) -> bool:
        """Put a job that runs back into the queue; return whether that was granted."""

    def largest_array(self) -> int:
        """Return how many jobs an array may have."""


def _run(command: Sequence[str], text: str = "") -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(_OF_OTHERS)}
    clean |= {k: v for k, v in os.environ.items() if k == "SLURM_CONF"}
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_PATIENCE, env=clean)
    except (OSError, subprocess.SubprocessError) as error:
        raise SchedulerError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise SchedulerError(f"{command[0]}: {_complaint(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def _complaint(said: str) -> str:
    """Return in one line what a command has printed as it failed, without its name and its offer of help."""
    lines = [re.sub(r"^(\w+: )?(error: |fatal: )?", "", line.strip()) for line in said.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith("Try ")))[:300]


class Slurm:
    """SLURM by its commands."""

    def __init__(self, run: Run = _run) -> None:
        self._run = run

    def submit(self, options: Sequence[str], script: str) -> int:
        """Hand in a batch script; see ``Scheduler``."""
        said = self._run(["sbatch", "--parsable", *options], script)
        number = said.strip().splitlines()[-1].partition(";")[0] if said.strip() else ""
        if not number.isdecimal():
            raise SchedulerError(f"sbatch names no job: {said.strip()[:200]}")
        return int(number)

    def jobs(self, names: Iterable[str]) -> dict[str, Job]:
        """Return the jobs of these names; see ``Scheduler``."""
        chosen = ",".join(names)
        if not chosen:
            return {}
        said = self._run([*_QUEUE, f"--name={chosen}"], "")
        return _read_queue(said)

    def job(self, number: str) -> Job | None:
        """Return a job by its number; None if SLURM does not know it any more.

        Raises:
            SchedulerError: if there is no answer.
        """
        return self.by_number([number]).get(number)

    def by_number(self, numbers: Iterable[str]) -> dict[str, Job]:
        """Return the jobs of some arrays; see ``Scheduler``."""
        found: dict[str, Job] = {}
        for array in sorted({number.partition("_")[0] for number in numbers}, key=int):
            try:
                found |= _read_queue(self._run([*_QUEUE, f"--jobs={array}"], ""))
            except SchedulerError as error:
                if "Invalid job id" not in str(error):
                    raise
        return found

    def ended(self, numbers: Iterable[str]) -> dict[str, str]:
        """Return how jobs ended, where there is accounting; see ``Scheduler``."""
        wanted = list(numbers)
        arrays = sorted({number.partition("_")[0] for number in wanted})
        if not arrays:
            return {}
        try:
            said = self._run(["sacct", "-nPX", f"--jobs={','.join(arrays)}", "--format=JobID,State"], "")
        except SchedulerError:  # without accounting
            return {}
        return _read_accounts(said, wanted)

    def cancel(self, numbers: Iterable[str]) -> None:
        """Cancel jobs; see ``Scheduler``."""
        chosen = list(numbers)
        for at in range(0, len(chosen), 500):
            self._run(["scancel", "--quiet", *chosen[at : at + 500]], "")

    def requeue(self, number: str) -> bool:
        """Put a job that runs back into the queue; see ``Scheduler``."""
        try:
            self._run(["scontrol", "requeue", number], "")
        except SchedulerError:
            return False
        return True

    def largest_array(self) -> int:
        """Return how many jobs an array may have; see ``Scheduler``."""
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", self._run(["scontrol", "show", "config"], ""), re.MULTILINE)
        return max(1, int(found[1])) if found else 1000


def _read_queue(said: str) -> dict[str, Job]:
    found = {}
    for line in said.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) < 6 or not parts[0].isdecimal():
            continue
        number = f"{parts[0]}_{parts[1]}" if parts[1].isdecimal() else parts[0]
        found[number] = Job(parts[2], int(parts[3] or 0), parts[4], parts[5])
    return found


def _read_accounts(said: str, wanted: Iterable[str]) -> dict[str, str]:
    """Return how jobs ended, from sacct's rows: a number, often of several tasks, and a state."""
    rows = [line.split("|")[:2] for line in said.splitlines() if "|" in line]
    rows = [[number, state.split()[0]] for number, state in rows if state.strip()]  # "CANCELLED by 1000"
    found = {number: state for number, state in rows if "[" not in number}  # of a requeued job the last row counts
    arrays = set()
    for number, state in rows:
        array, _, task = number.partition("_")
        if task:
            arrays.add(array)
        for single in _expanded(number):  # some of which may have begun, and have a row of their own
            found.setdefault(single, state)
    for number in wanted:  # a task that was cancelled alone, before it began, has no row at all
        if number not in found and number.partition("_")[0] in arrays:
            found[number] = CANCELLED
    return found


def _expanded(number: str) -> list[str]:
    """Return the numbers of jobs that accounts name together, such as ``35_[4-6,9%2]``, which never began."""
    array, bracket, rest = number.partition("_[")
    if not bracket:
        return []
    singles = []
    for part in rest.rstrip("]").partition("%")[0].split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            singles += [f"{array}_{i}" for i in range(int(first), int(last or first) + 1)]
    return singles
