"""Kills under torchrun: of a process of the run, of torchrun, or of both, by KILL and TERM, at random moments."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fault_runs import Operations, forked, train

from convnn.errors import EXIT_FAILED
from convnn.runs.status import COMPLETE
from convnn.runtime.files import read_json
from convnn.runtime.signals import follow_parent

TORCHRUN = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=3",
            "--start-method=fork", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR2", "train.py"]  # fmt: skip
AGENT, FIRST, SECOND, BOTH = "torchrun", "process 0", "process 1", "torchrun and a process"
PATIENCE = 90.0
"""Seconds in which all processes have to end once torchrun has."""


def start_torchrun(place: Path, last: int | None = None, *, with_agent: bool = False) -> int:
    """Fork a process that is torchrun, of two processes that train in ``place``/run; return its number.

    It is torchrun but for one thing: its processes are forked from it, as importing takes longer than the run.

    Args:
        place: of the trial.
        last: operation on a file after which the first process is killed, in its first attempt; None: it is not.
        with_agent: torchrun is killed with it.
    """
    return forked(place, lambda: _become_torchrun(place, last, with_agent))


def _become_torchrun(place: Path, last: int | None, with_agent: bool) -> int:
    os.setsid()
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launch = torchrun.elastic_launch
    torchrun.elastic_launch = lambda config, **_: lambda *_: launch(config, _process)(place, last, with_agent)  # type: ignore
    try:
        torchrun.run(torchrun.parse_args(TORCHRUN))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError:
        return EXIT_FAILED
    return 0


def _process(place: Path, last: int | None, with_agent: bool) -> None:
    """Train, as one of torchrun's processes."""
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_DFL)  # torchrun's own handlers are no part of a process that is not forked
    signal.signal(signal.SIGINT, signal.default_int_handler)
    follow_parent()
    (place / f"rank{os.environ['RANK']}").write_text(str(os.getpid()))
    if last is not None and os.environ["RANK"] == os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Operations(last, os.getppid() if with_agent else None)
    code = train(place)
    if code:
        os._exit(code)


def alive(pid: int, parent: int | None = None) -> bool:
    """Return whether a process runs, as a child of ``parent``; one that has ended and was not asked about does not."""
    try:
        state, of = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state not in "ZX" and parent in (None, int(of))


class Attempt:
    """A call of torchrun that is to be broken."""

    def __init__(self, place: Path, rng: random.Random, seconds: float, operations: int) -> None:
        self.place, self.rng, self.seconds = place, rng, seconds
        self.whom = rng.choice([AGENT, FIRST, SECOND, BOTH])
        write = rng.random() < 0.25 and self.whom in (FIRST, BOTH)
        self.last = rng.randint(1, operations) if write else None
        for path in place.glob("rank?"):
            path.unlink()
        self.agent = start_torchrun(place, self.last, with_agent=self.whom == BOTH)
        self.code: int | None = None

    def ended(self) -> bool:
        """Return whether torchrun has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.agent, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def complete(self) -> bool:
        """Return whether the run has come to its end."""
        return (read_json(self.place / "run" / "result.json") or {}).get("status") == COMPLETE

    def processes(self) -> list[int]:
        """Return the numbers of the processes that train at this moment, by rank, as far as they have begun."""
        numbers = []
        for rank in range(2):
            with suppress(OSError, ValueError):
                numbers.append(int((self.place / f"rank{rank}").read_text()))
        return numbers

    def strike(self) -> str | None:
        """Wait for a moment and end whom it is to hit; return what was done, or None if the run was over by then."""
        if self.last is not None:
            first = self._first_dies()
            self.last = None
            return f"KILL of {self.whom} in a write" if first else None
        until = time.monotonic() + self.rng.uniform(0, self.seconds)
        while time.monotonic() < until and not self.ended():
            time.sleep(0.002)
        running = [pid for pid in self.processes() if alive(pid, self.agent)]  # numbers come again
        targets = {
            AGENT: [self.agent],
            FIRST: running[:1],
            SECOND: running[1:],
            BOTH: [self.agent, *self.rng.sample(running, min(1, len(running)))],
        }[self.whom]
        if self.ended() or self.complete() or not targets:
            return None
        signum = self.rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        return f"{signum.name[3:]} of {self.whom}"

    def _first_dies(self) -> bool:
        """Wait until the first process has killed itself; return whether it did before the run was complete."""
        begun: list[int] = []
        while not self.ended() and not self.complete():
            begun = begun or self.processes()[:1]
            if begun and not alive(begun[0]):
                return True
            time.sleep(0.002)
        return self.code not in (None, 0)

    def wait(self) -> float:
        """Wait until torchrun and all its processes are gone; return how long its processes outlived it, in seconds."""
        while not self.ended():
            time.sleep(0.01)
        end = time.monotonic()
        while any(map(alive, self.processes())):
            if time.monotonic() - end > PATIENCE:
                raise RuntimeError(f"processes of {self.place} have outlived torchrun by {PATIENCE:.0f} s")
            time.sleep(0.01)
        return time.monotonic() - end


def torchrun_trials(bench: Any, kind: str, total: int) -> None:
    """Break runs of two processes up to three times each, and let them go on."""
    from fault_trials import finish

    def again(place: Path) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(start_torchrun(place), 0)[1])

    if not total:
        return
    whole = bench.folder / "whole2"
    whole.mkdir()
    begin = time.monotonic()
    if again(whole):
        raise RuntimeError((whole / "log").read_text())
    seconds, left, longest = time.monotonic() - begin, total, 0.0
    while left > 0:
        place = bench.place()
        struck: list[str] = []
        wanted = bench.rng.randint(1, min(3, left))
        while len(struck) < wanted:
            attempt = Attempt(place, bench.rng, seconds, bench.operations)
            while len(struck) < wanted and (done := attempt.strike()):
                struck.append(done)
                if AGENT in attempt.whom:
                    break
                attempt.whom = bench.rng.choice([AGENT, FIRST, SECOND, BOTH])
            longest = max(longest, attempt.wait())
            if attempt.code == 0:
                break
        if struck:
            bench.tallies[kind].notes.update(what.partition(" ")[2] for what in struck)
            finish(bench, place, kind, len(struck), again=again, whole=whole)
            left -= len(struck)
        print(f"{kind}: {total - left} of {total}, {', '.join(struck) or 'over before a kill'}", flush=True)
    print(f"{kind}: processes outlived torchrun by {longest:.1f} s at most")
