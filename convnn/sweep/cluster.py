"""The points of a sweep as jobs of a cluster: which are queued, run or are gone, by the scheduler's word. No torch.

All that is known lies in the sweep's folder (``status/``) and in the scheduler, so that any process may ask.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convnn.errors import ConfigError
from convnn.runs.status import CANCELLED, COMPLETE, DIVERGED, FAILED, INTERRUPTED, QUEUED, RUNNING
from convnn.runtime.files import read_json, write_json
from convnn.runtime.locks import lock, lock_owner, release
from convnn.runtime.scheduler import CANCELLED as JOB_CANCELLED
from convnn.runtime.scheduler import SUSPENDED, Job, Scheduler, SchedulerError
from convnn.sweep.attempts import next_record
from convnn.sweep.plan import Point
from convnn.sweep.sbatch import Settings, batch_script
from convnn.sweep.state import PointState, point_state, status_file
from convnn.sweep.submission import (
    FOLDER,
    Submission,
    chunks,
    new_name,
    read_submissions,
    save_submission,
    shares,
)

_OUTPUT = "hydra/slurm-{}.out"
"""What SLURM and the batch script say, by the array's number, in the sweep's folder."""


@dataclass
class Cluster:
    """A sweep's points among the jobs of a cluster."""

    folder: Path
    points: Sequence[Point]
    scheduler: Scheduler
    call: str
    """Of sweep.py; names those jobs that this call has submitted."""
    limit: int = 3
    """Jobs in a row that may save nothing before a point has failed."""
    records: bool = True
    """Write down how jobs ended that could not do so themselves."""
    alive: dict[str, str] = field(default_factory=dict)
    """Numbers of the jobs that waited or ran at the last look, by fingerprint."""
    lost: list[Point] = field(default_factory=list)
    """Points whose jobs were gone at the last look, and that have not ended: they need another job."""
    own: set[str] = field(default_factory=set)
    """Fingerprints of the points whose latest job is of this call."""
    _waited: set[str] = field(default_factory=set)
    _settled: dict[str, tuple[str, PointState]] = field(default_factory=dict)

    def look(self) -> dict[str, PointState]:
        """Ask for all points at once; return the state of each, by fingerprint.

        Raises:
            SchedulerError: if the scheduler does not answer; then nothing is known.
        """
        latest = self._latest()
        open_ = {p.fingerprint: latest[p.fingerprint] for p in self.points if p.fingerprint in latest}
        open_ = {f: (s, n) for f, (s, n) in open_.items() if self._settled.get(f, ("",))[0] != n}
        jobs = self.scheduler.jobs({submission.name: None for submission, _ in open_.values()})
        missing = [n for p in self.points if (n := open_.get(p.fingerprint, (None, ""))[1]) and n not in jobs
                   and point_state(self.folder, p).status != COMPLETE]  # fmt: skip
        if missing:  # jobs may have been given other names
            jobs |= self.scheduler.by_number(missing)
            missing = [n for n in missing if n not in jobs]
        ended = self.scheduler.ended(missing) if missing else {}
        self.alive, self.lost, self.own, states = {}, [], set(), {}
        for point in self.points:
            key = point.fingerprint
            submission, number = latest.get(key, (None, ""))
            if submission is not None and submission.call == self.call:
                self.own.add(key)
            job = jobs.get(number)
            if submission is None:
                states[key] = point_state(self.folder, point)
            elif key not in open_:
                states[key] = self._settled[key][1]
            elif job is not None and job.alive:
                self.alive[key] = number
                self._waited.discard(number)
                if job.waiting:
                    self._waited.add(number)
                states[key] = _shown(job, number)
            else:
                final = _final(job) if job else ended.get(number, "")
                array = jobs.get(number.partition("_")[0])  # of a cancelled one tasks that never began are forgotten
                cancelled = array is not None and array.state.startswith(JOB_CANCELLED)
                states[key] = self._gone(point, submission, number, final, cancelled or number in self._waited)
        return states

    def _latest(self) -> dict[str, tuple[Submission, str]]:
        found = {}
        for submission in read_submissions(self.folder):
            if submission.job is not None:
                for index, key in enumerate(submission.points):
                    found[key] = (submission, submission.number(index))
        return found

    def _gone(self, point: Point, submission: Submission, number: str, final: str, waited: bool) -> PointState:
        """Return the state of a point whose job is gone.

        Args:
            point: of the sweep.
            submission: of its job.
            number: of its job.
            final: how the job ended, in the scheduler's words, if it knows.
            waited: if it never began, it was cancelled.
        """
        key, record = point.fingerprint, read_json(status_file(self.folder, point)) or {}
        state = point_state(self.folder, point)
        begun = record.get("job") == number
        if state.status == RUNNING:  # another process has the point's lock, on this machine or in another's job
            return state
        # Without accounts: one that waited a moment ago, and is not even among those that ended, never ran.
        cancelled = final.startswith(JOB_CANCELLED) or (not final and not begun and waited)
        if state.status == COMPLETE or (begun and state.status in (FAILED, DIVERGED, CANCELLED)) or submission.stopped:
            pass
        elif cancelled:
            reason = f"its job {number} was cancelled"
            state = self._record(point, self._base(point, record, number) | {"status": CANCELLED, "reason": reason})
        else:
            if not begun:
                state = self._never_began(point, record, number, final)
            if state.status != FAILED:
                self.lost.append(point)
                return state
        self._settled[key] = (number, state)
        return state

    def _never_began(self, point: Point, record: Mapping[str, Any], number: str, final: str) -> PointState:
        """Count a job that ended before it wrote a word."""
        progress = next_record(record, self.folder / point.folder, self.call)
        reason = f"job {number} ended before it began ({final or 'the scheduler does not know why'})"
        status = INTERRUPTED
        if progress["stalled"] >= self.limit:
            status, reason = FAILED, f"{reason}, the last of {progress['stalled'] + 1} without progress"
        output = self.folder / _OUTPUT.format(number.partition("_")[0])
        if output.exists():
            reason += f"; it said more in {output}"
        return self._record(point, self._base(point, record, number) | progress | {"status": status, "reason": reason})

    def _record(self, point: Point, record: dict[str, Any]) -> PointState:
        if self.records:
            write_json(status_file(self.folder, point), record)
        return PointState(record["status"], record["reason"], record["attempts"])

    def _base(self, point: Point, record: Mapping[str, Any], number: str) -> dict[str, Any]:
        return {"attempts": 0, "token": None, **record, "name": point.name, "log": point.log, "job": number}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from submitting points of this folder meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".jobs.lock"
        held = lock(path, wait=3.0)
        if held is None:
            print(f"waiting for another call that submits jobs of this sweep: {lock_owner(path)}", flush=True)
            held = lock(path, wait=297.0)
        if held is None:
            raise ConfigError(f"sweep.dir={self.folder}: another call has been submitting its jobs for five minutes")
        try:
            yield
        finally:
            release(held)

    def recover(self) -> None:
        """Find the jobs of calls that were killed as they submitted them."""
        with self._alone():
            self._recover()

    def _recover(self) -> None:
        for submission in read_submissions(self.folder):
            if submission.job is None:
                self._take(submission)

    def _take(self, submission: Submission) -> bool:
        """Take over a submission whose number is not known; without jobs it goes."""
        numbers = list(self.scheduler.jobs([submission.name]))
        if numbers:
            submission.job = int(numbers[0].partition("_")[0])
            save_submission(self.folder, submission)
        else:
            (self.folder / FOLDER / f"{submission.name}.json").unlink(missing_ok=True)
        return bool(numbers)

    def submit(
        self, wanted: Callable[[Mapping[str, PointState]], Sequence[Point]], settings: Settings, name: str, orders: Any,
        tell: Callable[[Submission], None] = lambda submission: None,
    ) -> list[Submission]:  # fmt: skip
        """Submit points as arrays of jobs.

        Args:
            wanted: chooses them, after all states; those in the queue by then are left out.
            settings: of the jobs.
            name: of the sweep.
            orders: what jobs have to know.
            tell: called for each array that was submitted.

        Raises:
            SchedulerError: if the scheduler refuses; the arrays before are submitted.
        """
        made: list[Submission] = []
        with self._alone():
            self._recover()
            states = self.look()
            points = [p for p in wanted(states) if states[p.fingerprint].status not in (QUEUED, RUNNING, COMPLETE)]
            if not points:
                return []
            parts = chunks([p.fingerprint for p in points], self.scheduler.largest_array())
            free, before = self._free(settings.parallel)
            cpus = any(option.startswith("--cpus-per-task") for option in settings.options)
            for index, (part, share) in enumerate(zip(parts, shares(len(parts), free), strict=True)):
                submission = Submission(
                    new_name(settings.name or name), part, self.call, settings.options, settings.setup,
                    at_once=max(1, share), sweep=orders,
                )  # fmt: skip
                array = f"--array=0-{len(part) - 1}%{submission.at_once}"
                after = before if share else [*before, made[index - free].job]
                wait = [f"--dependency=afterany:{':'.join(map(str, after))}"] if after else []
                script = batch_script(self.folder, submission.name, settings.setup, cpus=cpus)
                self._hand_in(submission, [array, *settings.options, *wait], script)
                made.append(submission)
                tell(submission)
        return made

    def _free(self, parallel: int) -> tuple[int, list[int | None]]:
        """Return how many more jobs may run at once, and the arrays that new ones have to wait for if none may."""
        living = Counter(number.partition("_")[0] for number in self.alive.values())
        arrays = [s for s in read_submissions(self.folder) if str(s.job) in living]
        free = parallel - sum(min(s.at_once or living[str(s.job)], living[str(s.job)]) for s in arrays)
        return (free, []) if free > 0 else (parallel, [s.job for s in arrays])

    def submit_end(self, settings: Settings, name: str, script: str) -> Submission | None:
        """Submit the job that follows all others and sums the sweep up, unless one waits for the same points."""
        with self._alone():
            ends = [s for s in read_submissions(self.folder) if set(s.covers) >= set(self.alive) and s.job is not None]
            jobs = self.scheduler.jobs([s.name for s in ends])
            if any(job.waiting for job in jobs.values()):
                return None
            arrays = sorted({number.partition("_")[0] for number in self.alive.values()}, key=int)
            submission = Submission(
                f"{new_name(settings.name or name)}-end", [], self.call, [], settings.setup, covers=sorted(self.alive)
            )
            after = f"--dependency=afterany:{':'.join(arrays)}"
            self._hand_in(submission, [after, *settings.light], script)
        return submission

    def _hand_in(self, submission: Submission, options: Sequence[str], script: str) -> None:
        save_submission(self.folder, submission)
        output = str(self.folder).replace("%", "%%") + "/" + _OUTPUT.format("%A")
        (self.folder / "hydra").mkdir(exist_ok=True)
        own = [f"--job-name={submission.name}", f"--output={output}", f"--chdir={Path.cwd()}"]
        try:
            submission.job = self.scheduler.submit([*options, *own], script)
        except SchedulerError:
            with contextlib.suppress(SchedulerError):  # perhaps it was taken, and only the answer was lost
                if self._take(submission):
                    return
            raise
        save_submission(self.folder, submission)

    def others(self, options: Sequence[str]) -> list[str]:
        """Return the numbers of jobs that wait with other options than these, by the last look."""
        waiting = {number.partition("_")[0] for number in self.alive.values() if number in self._waited}
        known = {str(s.job): s for s in read_submissions(self.folder)}
        return sorted((a for a in waiting if a in known and known[a].options != list(options)), key=int)

    def cancel(self, keys: Iterable[str]) -> list[str]:
        """Cancel jobs of points, by fingerprint, for the user; return the jobs' numbers."""
        numbers = {self.alive[key] for key in keys if key in self.alive}
        arrays = {number.partition("_")[0] for number in numbers}
        for submission in read_submissions(self.folder):
            if str(submission.job) in arrays:
                submission.stopped = True
                save_submission(self.folder, submission)
        self.scheduler.cancel(sorted(numbers))
        return sorted(numbers)


def _shown(job: Job, number: str) -> PointState:
    """Return the state of a point by its job."""
    again = f"requeued ({job.restarts}), " if job.restarts else ""
    if not job.waiting:
        suspended = "suspended, " if job.state == SUSPENDED else ""
        return PointState(RUNNING, f"{again}{suspended}on {job.node or 'a node'} (job {number})", job.restarts)
    return PointState(QUEUED, f"{again}job {number}" + (f": {job.told}" if job.told else ""), job.restarts)


def _final(job: Job) -> str:
    """Return how a job ended, in the scheduler's words."""
    return f"{job.state}, {job.told}" if job.told else job.state
