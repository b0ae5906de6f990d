"""Time operators and training steps side by side: naive references, the limits, and ours.

usage: uv run scripts/benchmark.py [quick=true] [device=auto|cpu|cuda|mps] [out=DIR] [threads=N] [compile=true]
                                   [groups=GLOB,...] [repeats=N] [seconds=S]

{options}

Times are medians over interleaved rounds, with quartiles; ratios are to the first case of each group. Peak memory is
what one call needs above what was there before it.

input: epochs of CIFAR-size images through convnn's batches on the device, torchvision's loader and the stream of JPEG
files. input share: a training step with the same and with new batches; the ratio on CUDA is what the input costs.
"""

import csv
import fnmatch
from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import run_program, script_options
from convnn.errors import ConfigError


@dataclass
class Options:
    """The script's keys."""

    quick: bool = False
    """Small shapes and few repeats: under a minute on two CPU cores."""
    device: str = "auto"
    """What to measure, as ``device=`` of train.py."""
    out: str = "benchmarks"
    """Folder of benchmark.csv and benchmark.png."""
    threads: int | None = None
    """CPU threads; null: torch's."""
    compile: bool = False
    """Compiled layers too (minutes of compilation on a CPU)."""
    groups: str = "*"
    """Globs of the groups, with commas between: conv*, attention*, tokens, neighbours, "training step", input, "input
    share", backend* (torch beside the Triton kernels, on CUDA only)."""
    repeats: int = 30
    """Rounds of a group at most."""
    seconds: float = 30.0
    """No new round of a group begins after so many seconds."""


def main(argv: list[str]) -> None:
    """Run the script."""
    options: Options = script_options(Options, argv, __doc__ or "")
    import torch
    from benchmark_cases import backend_cases, operator_cases, scaling_cases, training_cases
    from benchmark_input import input_cases, input_share_cases

    from convnn.runs.environment import environment
    from convnn.runtime.device import pick_device

    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = [*operator_cases(options.quick, options.compile), *scaling_cases(options.quick)]
    cases += training_cases(options.quick) + backend_cases(options.quick, device)
    cases += input_cases(options.quick) + input_share_cases(options.quick)
    patterns = options.groups.split(",")
    cases = [c for c in cases if any(fnmatch.fnmatch(c.group, p) for p in patterns)]
    if not cases:
        raise ConfigError(f"groups={options.groups} matches no group; see --help")
    facts = environment()
    rows = run_all(cases, device, options, facts)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "benchmark.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out / "benchmark.png", f"{facts['gpu'] or facts['processor']}, torch {torch.__version__}")
    print(f"written: {out / 'benchmark.csv'}, {out / 'benchmark.png'}")


def run_all(cases: list, device: object, options: Options, facts: dict) -> list[dict]:
    """Measure group by group, print as it goes, and return the rows of the CSV file."""
    from benchmark_cases import measure, peak_memory

    # Memory first: what timing leaves free in this process, a fork of it would fill before it grows.
    peak_of = {id(c): None if c.group == "input" else peak_memory(c, device) for c in cases}  # type: ignore[arg-type]
    rows = []
    for group in dict.fromkeys(c.group for c in cases):
        own = [c for c in cases if c.group == group]
        scaling = group in ("tokens", "neighbours")
        timings = measure(own, device, 5 if options.quick else options.repeats, 3 if options.quick else options.seconds)  # type: ignore[arg-type]
        print(f"\n{group}")
        for timing in timings:
            peak = peak_of[id(timing.case)]
            ratio = timing.median / timings[0].median
            low, high = timing.quartiles
            text = f"  {timing.case.name:<36} {timing.median:>9.2f} ms  [{low:.2f}, {high:.2f}]"
            text += f"  N={timing.case.tokens} k={timing.case.k}" if scaling else f"  x{ratio:.2f}"
            if timing.case.images:
                text += f"  {1000 * timing.case.images / timing.median:.0f} images/s"
            print(text if peak is None else f"{text}  {peak / 2**20:.1f} MiB", flush=True)
            rows.append(
                {
                    "group": group,
                    "case": timing.case.name,
                    "tokens": timing.case.tokens,
                    "k": timing.case.k,
                    "ms_median": round(timing.median, 4),
                    "ms_q1": round(low, 4),
                    "ms_q3": round(high, 4),
                    "rounds": len(timing.milliseconds),
                    "ratio": round(ratio, 4),
                    "images_per_second": round(1000 * timing.case.images / timing.median, 1) or "",
                    "peak_mib": "" if peak is None else round(peak / 2**20, 2),
                    "device": facts["gpu"] or facts["processor"],
                    "threads": facts["threads"],
                    "torch": facts["versions"]["torch"],
                    "commit": facts["git_commit"],
                    "quick": options.quick,
                }
            )
    return rows


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Draw one panel a group: bars of times, or curves over N and k."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: uv sync --extra report") from error
    groups = list(dict.fromkeys(row["group"] for row in rows))
    columns = min(3, len(groups))
    height = -(-len(groups) // columns)
    size = (6 * columns, 3.4 * height)
    figure, axes = plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, group in zip(axes.flat, groups, strict=False):
        own = [row for row in rows if row["group"] == group]
        axis.set_title(group)
        if group in ("tokens", "neighbours"):
            key = "tokens" if group == "tokens" else "k"
            for name in dict.fromkeys(row["case"] for row in own):
                line = [row for row in own if row["case"] == name]
                axis.plot([r[key] for r in line], [r["ms_median"] for r in line], marker="o", label=name)
            axis.set(xscale="log", yscale="log", xlabel="tokens N" if group == "tokens" else "neighbours k")
            axis.set_ylabel("forward + backward (ms)")
            axis.legend(frameon=False)
        else:
            names = [row["case"] for row in own]
            axis.barh(names[::-1], [row["ms_median"] for row in own][::-1], color="#4477aa")
            for i, row in enumerate(own[::-1]):
                axis.text(row["ms_median"], i, f" ×{row['ratio']:.1f}", va="center")
            axis.set_xlabel("ms")
            axis.margins(x=0.18)
    for axis in list(axes.flat)[len(groups) :]:
        axis.axis("off")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_program(main)
