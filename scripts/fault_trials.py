"""Break a small training run in every way that machines do, go on, and compare with the uninterrupted run bit for bit.

usage: uv run scripts/fault_trials.py [kills=100] [writes=40] [signals=30] [checkpoints=50] [files=20] [disks=10]
                                      [limits=10] [torchrun=100] [seed=0] [dir=DIR] [out=FILE]

{options}

The run has all on that could break a resume: augmentation, Mixup and CutMix, EMA, dropout, random candidates drawn anew
in training and evaluation, a blend schedule, a validation split. A fault is survived if the run then ends with the same
metrics and the same weights, or, where no whole checkpoint or configuration is left, if it is refused with one line.
Exit codes: 0 all survived, 1 some not (their folders and logs are kept and named), 2 wrong arguments.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fault_runs import RUN, Operations, compare, metrics, start, wait
from fault_torchrun import torchrun_trials

from convnn.cli.program import run_program, script_options
from convnn.config.compose import compose_config
from convnn.errors import EXIT_FAILED, ConfigError

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass
class Options:
    """Arguments of this script: how many faults of each kind, and where."""

    kills: int = 100
    """SIGKILL at a random moment."""
    writes: int = 40
    """SIGKILL inside the writing of a checkpoint or another file, before or after a random operation on it."""
    signals: int = 30
    """TERM, INT and USR2 at a random moment."""
    checkpoints: int = 50
    """Damaged checkpoints: flipped bits, cut off, overwritten; the last one, the last two, or all of them."""
    files: int = 20
    """metrics.jsonl, result.json, env.json, .lock or config.yaml cut off, deleted or with flipped bytes."""
    disks: int = 10
    """A disk (tmpfs) with too little room, which later has enough; needs the right to mount."""
    limits: int = 10
    """A quota on the size of a file (RLIMIT_FSIZE), later lifted."""
    torchrun: int = 100
    """KILL and TERM of a process of two under torchrun, of torchrun itself, or of both."""
    seed: int = 0
    """Of the faults."""
    dir: str | None = None
    """Folder for the runs; null: a temporary one."""
    out: str | None = None
    """File for the table, besides standard output."""


@dataclass
class Tally:
    """Faults of one kind, and what came of them."""

    label: str
    faults: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass
class Bench:
    """The uninterrupted run, and the means to start others."""

    folder: Path
    rng: random.Random
    seconds: float = 0.0
    operations: int = 0
    count: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def place(self) -> Path:
        """Return a new folder for a trial."""
        self.count += 1
        path = self.folder / f"trial{self.count:04d}"
        path.mkdir(parents=True)
        return path


def go_on(place: Path) -> int:
    """Start a run again and return its exit code."""
    return wait(start(place))


def finish(
    bench: Bench,
    place: Path,
    kind: str,
    faults: int,
    *,
    refusable: bool = False,
    again: Callable[[Path], int] = go_on,
    whole: Path | None = None,
) -> None:
    """Go on without faults by ``again``, compare with the run in ``whole``, and enter the outcome."""
    tally = bench.tallies[kind]
    tally.faults += faults
    log = place / "log"
    before = log.stat().st_size if log.exists() else 0
    code = again(place)
    said = log.read_text()[before:]
    if code == 0:
        difference = compare((whole or bench.folder / "whole") / "run", place / "run")
        outcome = "the same" if difference is None else "silently wrong"
        if "going on from" in said:
            tally.notes[f"from {said.split('going on from ')[1].split(',')[0]}"] += 1
    else:
        one_line = said.count("error: ") == 1 and code in (1, 2)
        outcome, difference = ("refused" if refusable and one_line else "lost"), f"exit code {code}"
    if any(line.startswith("Traceback") for line in log.read_text().splitlines()):  # torchrun's own have a time before
        outcome, difference = "lost", "a traceback"
    tally.outcomes[outcome] += faults
    if outcome in ("the same", "refused"):
        shutil.rmtree(place)
    else:
        bench.kept.append(f"{kind}: {outcome} ({difference}): {place}")
        print(bench.kept[-1])


# ------------------------------------------------------------------------------------------------ faults


def kill_trials(bench: Bench, kind: str, total: int) -> None:
    """End runs at random moments, up to three times each."""
    left = total
    while left > 0:
        place, faults = bench.place(), 0
        for _ in range(bench.rng.randint(1, min(3, left))):
            signum = {"kills": signal.SIGKILL, "writes": None}.get(kind, bench.rng.choice(STOPS))
            if signum is None:
                last = bench.rng.randint(1, bench.operations)
                code = wait(start(place, lambda last=last: Operations(last)))  # type: ignore[misc]
            else:
                pid = start(place)
                time.sleep(bench.rng.uniform(0, bench.seconds))
                os.kill(pid, signum)
                code = wait(pid)
            if code == 0:  # it had come to its end already
                break
            faults += 1
            right = (-signal.SIGKILL,) if signum in (None, signal.SIGKILL) else (128 + signum, -signum)
            if code not in right:
                print(f"{kind}: exit code {code} in {place}")
                bench.tallies[kind].notes[f"exit code {code}"] += 1
        if faults:
            finish(bench, place, kind, faults)
            left -= faults
        else:
            shutil.rmtree(place)


def damage(rng: random.Random, path: Path) -> None:
    """Spoil a file."""
    data = bytearray(path.read_bytes())
    way = rng.choice(["bit", "bits", "bits", "cut", "block", "other", "gone"])
    if way == "gone" or not data:
        path.unlink()
        return
    if way in ("bit", "bits"):
        for _ in range(1 if way == "bit" else rng.randint(2, 64)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del data[rng.randrange(len(data)) :]
    elif way == "block":
        at = rng.randrange(len(data))
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    else:
        data = bytearray(rng.choice([b"", b"<html>404 Not Found</html>", b"PK\x03\x04", rng.randbytes(5000)]))
    path.write_bytes(data)


def make_templates(bench: Bench) -> list[Path]:
    """Return folders of runs that were interrupted in the second, third and fourth epoch."""
    found = []
    for rows in (1, 2, 3):
        place = bench.folder / f"template{rows}"
        place.mkdir()
        pid = start(place)
        while len(metrics(place / "run")) < rows:
            time.sleep(0.005)
        os.kill(pid, signal.SIGTERM)
        if wait(pid) != 128 + signal.SIGTERM:
            raise RuntimeError(f"the run in {place} was not interrupted")
        found.append(place / "run")
    return found


def damage_trials(bench: Bench, kind: str, total: int) -> None:
    """Damage files of interrupted runs."""
    templates = make_templates(bench) if total else []
    for _ in range(total):
        place = bench.place()
        run = place / "run"
        shutil.copytree(bench.rng.choice(templates), run)
        if kind == "checkpoints":
            every = sorted((run / "checkpoints").glob("*.pt"))
            last = [run / "checkpoints" / name for name in ("last.pt", "last.previous.pt")]
            chosen = bench.rng.choice([last[:1], last[:1], last[:1], last, last, every])
            whole = {path for path in last if path.exists()}  # best.pt has weights alone
            for path in chosen:
                if path.exists():
                    damage(bench.rng, path)
            finish(bench, place, kind, 1, refusable=whole <= set(chosen))
        else:
            name = bench.rng.choice(
                ["metrics.jsonl", "metrics.jsonl", "result.json", "env.json", ".lock", "config.yaml"]
            )
            damage(bench.rng, run / name)
            finish(bench, place, kind, 1, refusable=name == "config.yaml")
    for path in templates:
        shutil.rmtree(path.parent)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """Mount a tmpfs of ``size`` bytes for the first attempt; the caller makes it larger."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def disk_trials(bench: Bench, kind: str, total: int) -> None:
    """Let the disk be full for a while."""
    whole = sum(p.stat().st_size for p in (bench.folder / "whole" / "run").rglob("*") if p.is_file())
    left = total
    while left > 0:
        place = bench.place()
        if kind == "disks":
            with small_disk(place / "run", 4096 * bench.rng.randint(1, whole // 4096)):
                code = wait(start(place))
                if code:
                    grow = ["mount", "-o", "remount,size=64m", str(place / "run")]
                    subprocess.run(grow, check=True, capture_output=True)
                    _check_refusal(bench, kind, code, place)
                    keep = place.with_name(place.name + "-log")
                    keep.mkdir()
                    (keep / "run").symlink_to(place / "run")
                    shutil.copy(place / "log", keep / "log")
                    finish(bench, keep, kind, 1)
                    left -= 1
            shutil.rmtree(place)
            continue
        largest = max(p.stat().st_size for p in (bench.folder / "whole" / "run").rglob("*.pt"))
        size = bench.rng.randint(1, largest - 1)
        code = wait(start(place, lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))))  # type: ignore[misc]
        _check_refusal(bench, kind, code, place)
        finish(bench, place, kind, 1)
        left -= 1


def _check_refusal(bench: Bench, kind: str, code: int, place: Path) -> None:
    """Note whether a full disk ended the run with one line."""
    if code not in (1, 2) or (place / "log").read_text().count("error: ") != 1:
        bench.tallies[kind].notes[f"exit code {code}"] += 1
        print(f"{kind}: exit code {code} in {place}: {(place / 'log').read_text()[-300:]}")


def can_mount(folder: Path) -> bool:
    """Return whether this process may mount a tmpfs."""
    try:
        with small_disk(folder / "try", 4096):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


LABELS = {
    "kills": ("SIGKILL at a random moment", kill_trials),
    "writes": ("SIGKILL inside a write", kill_trials),
    "signals": ("TERM, INT, USR2 at a random moment", kill_trials),
    "checkpoints": ("damaged checkpoints", damage_trials),
    "files": ("other damaged files", damage_trials),
    "disks": ("full disk (tmpfs)", disk_trials),
    "limits": ("file size limit", disk_trials),
    "torchrun": ("KILL, TERM under torchrun", torchrun_trials),
}


def prepare(bench: Bench) -> None:
    """Import all that a run needs, then run it once without a fault."""
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from convnn.runs.folder import open_run_folder
    from convnn.train.evaluate import evaluate
    from convnn.train.trainer import Trainer

    config = compose_config([*RUN.split(), f"run.dir={bench.folder}/warm"])
    folder = open_run_folder(config)
    trainer = Trainer(config, folder)  # imports more on the way; backward is left out, for it starts a thread
    trainer.optimizer.step()
    evaluate(trainer.eval_model, trainer.batches["test"])
    folder.discard()
    folder.close()
    threads = len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").is_dir() else 1
    if threads != 1:
        raise RuntimeError(f"{threads} threads before the fork")
    place, counts = bench.folder / "whole", bench.folder / "operations"
    place.mkdir()

    def count_operations() -> None:
        operations = Operations(None)
        exit_now = os._exit

        def leave(code: int) -> None:
            counts.write_text(str(operations.done))
            exit_now(code)

        os._exit = leave  # type: ignore[assignment]

    if wait(start(place, count_operations)):
        raise RuntimeError((place / "log").read_text())
    bench.operations = int(counts.read_text())
    begin = time.monotonic()
    again = bench.folder / "again"
    again.mkdir()
    if wait(start(again)):
        raise RuntimeError((again / "log").read_text())
    bench.seconds = time.monotonic() - begin
    difference = compare(place / "run", again / "run")
    if difference:
        raise RuntimeError(f"two uninterrupted runs differ in {difference}")


def table(bench: Bench) -> str:
    """Return the outcomes as Markdown."""
    head = ["fault", "times", "went on to the same numbers", "refused with one line", "lost", "silently wrong", "notes"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * 5 + "|---|"]
    total: Counter[str] = Counter()
    for tally in bench.tallies.values():
        counts = [tally.outcomes[o] for o in ("the same", "refused", "lost", "silently wrong")]
        total += tally.outcomes
        total["faults"] += tally.faults
        notes = ", ".join(f"{what}: {n}" for what, n in sorted(tally.notes.items()))
        lines.append("| " + " | ".join([tally.label, str(tally.faults), *map(str, counts), notes]) + " |")
    last = [total[o] for o in ("faults", "the same", "refused", "lost", "silently wrong")]
    lines.append("| **all** | " + " | ".join(f"**{n}**" for n in last) + " | |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Carry out the trials; return the exit code."""
    options: Options = script_options(Options, argv, __doc__ or "")
    wanted = {kind: getattr(options, kind) for kind in LABELS}
    for kind, n in wanted.items():
        if n < 0:
            raise ConfigError(f"{kind}={n} must be 0 or more")
    folder = Path(options.dir or tempfile.mkdtemp(prefix="convnn-faults-")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"dir={folder} is not empty; name another folder")
    bench = Bench(folder, random.Random(options.seed))
    begin = time.monotonic()
    prepare(bench)
    for kind, (label, trials) in LABELS.items():
        bench.tallies[kind] = Tally(label)
        if kind == "disks" and wanted[kind] and not can_mount(folder):
            print("disks: this process may not mount a tmpfs; limits stand in for them")
            continue
        trials(bench, kind, wanted[kind])
        print(f"{label}: {bench.tallies[kind].faults} ({time.monotonic() - begin:.0f} s)", flush=True)
    text = table(bench)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")
    if not bench.kept and options.dir is None:
        shutil.rmtree(folder)
    return EXIT_FAILED if bench.kept else 0


if __name__ == "__main__":
    run_program(main)
