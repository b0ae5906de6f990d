"""Which points were handed to a cluster as which jobs: a small file for each array of jobs. Imports no torch.

The file is written before the jobs are submitted, and their number is added after. The jobs bear a name of their own,
by which a submission is found again whose process was killed between the two.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from convnn.errors import ConfigError
from convnn.runtime.files import read_json, write_json

FOLDER = "status/jobs"
"""Where the files are, in the sweep's folder."""


@dataclass
class Submission:
    """One array of jobs."""

    name: str
    """Of the jobs; no other submission has it."""
    points: list[str]
    """Fingerprints, by the jobs' number in the array."""
    call: str
    """Of the call of sweep.py; points count their jobs without progress anew in each."""
    options: list[str]
    """For sbatch, without the array and the name."""
    script: list[str]
    """Commands before the jobs' own: ``hydra.launcher.setup``."""
    at_once: int = 0
    """Jobs of this array that may run at once; 0: all."""
    job: int | None = None
    """Number of the array; None: it was about to be submitted."""
    stopped: bool = False
    """The user ended the sweep, by Ctrl-C."""
    sweep: dict[str, Any] = field(default_factory=dict)
    """What jobs have to know besides; see ``ClusterSweep``."""
    covers: list[str] = field(default_factory=list)
    """Fingerprints of the points after which this job sums up, if it is one that does."""

    def number(self, index: int) -> str:
        """Return the number of a point's job."""
        return f"{self.job}_{index}"


def new_name(sweep: str) -> str:
    """Return a name for jobs that no others have, of characters that a scheduler takes."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', sweep)[:40]}-{secrets.token_hex(4)}"


def save_submission(folder: Path, submission: Submission) -> None:
    """Write a submission into the sweep's folder."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(folder / FOLDER / f"{submission.name}.json", asdict(submission))


def read_submissions(folder: Path) -> list[Submission]:
    """Return all submissions of a sweep's folder, oldest first by the jobs' numbers, which a scheduler counts up."""
    found = [read_submission(folder, path.stem) for path in (folder / FOLDER).glob("*.json") if path.exists()]
    return sorted(found, key=lambda s: (s.job is None, s.job or 0, s.name))


def read_submission(folder: Path, name: str) -> Submission:
    """Return a submission by its name.

    Raises:
        ConfigError: if its file is damaged.
    """
    path = folder / FOLDER / f"{name}.json"
    if not path.exists():
        raise ConfigError(f"{path} is gone: another call took these jobs for lost, and has submitted others")
    values = read_json(path) or {}
    known = {f.name for f in fields(Submission)}
    if not {"name", "points", "call", "options", "script"} <= set(values) <= known:
        raise ConfigError(f"{path} is damaged; cancel its jobs (scancel --name={name}) and remove it")
    return Submission(**values)


def chunks(points: Sequence[str], largest: int) -> list[list[str]]:
    """Share points among as few arrays as a site allows, in order and about equally."""
    count = -(-len(points) // largest)
    size = -(-len(points) // count) if count else 1
    return [list(points[at : at + size]) for at in range(0, len(points), size)]


def shares(parts: int, at_once: int) -> list[int]:
    """Share the jobs that may run at once among arrays; 0: the array waits for the one ``at_once`` places before it."""
    return [at_once // parts + (i < at_once % parts) for i in range(parts)]
