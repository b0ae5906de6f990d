"""A scheduler for tests: what it is told it keeps, and a test says what becomes of the jobs."""

import json

from convnn.runtime.scheduler import Job, SchedulerError
from convnn.sweep.plan import Point
from convnn.sweep.sbatch import Settings
from convnn.sweep.state import status_file

SETTINGS = Settings(["--time=5"], parallel=6, light=["--time=5"])
POINTS = [Point(f"p{i}", f"{i:016x}", (f"seed={i}",)) for i in range(5)]


class FakeScheduler:
    """Jobs by number; ``accounts`` as of sacct, empty where a site keeps none."""

    def __init__(self, largest=1000):
        self.largest, self.asked, self.silent = largest, 0, False
        self.found: dict[str, Job] = {}
        self.accounts: dict[str, str] = {}
        self.names: dict[int, str] = {}
        self.scripts: dict[int, tuple[list[str], str]] = {}
        self.on_jobs = lambda: None

    def submit(self, options, script):
        if self.silent:
            raise SchedulerError("sbatch: no")
        given = dict(o.partition("=")[::2] for o in options)
        number = 10 * (len(self.names) + 1)
        self.names[number], self.scripts[number] = given["--job-name"], (list(options), script)
        if "--array" in given:
            last = int(given["--array"].partition("%")[0].partition("-")[2])
            self.found |= {f"{number}_{i}": Job("PENDING", reason="Priority") for i in range(last + 1)}
        else:
            self.found[str(number)] = Job("PENDING", reason="Dependency")
        return number

    def jobs(self, names):
        self.asked += 1
        if self.silent:
            raise SchedulerError("squeue: no answer")
        wanted = set(names)
        self.on_jobs()
        return {n: j for n, j in self.found.items() if self.names[int(n.partition("_")[0])] in wanted}

    def by_number(self, numbers):
        arrays = {n.partition("_")[0] for n in numbers}
        return {n: j for n, j in self.found.items() if n.partition("_")[0] in arrays}

    def ended(self, numbers):
        return {n: self.accounts[n] for n in numbers if n in self.accounts}

    def cancel(self, numbers):
        for number in numbers:
            self.found.pop(number, None)

    def requeue(self, number):
        self.found[number] = Job("PENDING", self.found[number].restarts + 1)
        return True

    def largest_array(self):
        return self.largest


def record(cluster, point, **values):
    path = status_file(cluster.folder, point)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": point.name, "log": point.log, "attempts": 1, "call": "call", **values}))
