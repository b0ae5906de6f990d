"""Time operators and training steps side by side: naive references, the limits, and ours.

usage: uv run scripts/benchmark.py [quick=true] [device=auto|cpu|cuda|mps] [out=DIR] [threads=N] [compile=true]
                                   [groups=GLOB,...] [repeats=N] [seconds=S] [batch=N] [amp=true] [backends=NAME,...]

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
from typing import Any

from convnn.cli.program import run_program, script_options
from convnn.errors import ConfigError, first_line


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
    batch: int | None = None
    """Images per call of the groups conv* and attention*; null: 4 if quick, else 16."""
    amp: bool = False
    """These groups under autocast to bfloat16, as training on CUDA is."""
    backends: str = "auto"
    """Of our layers in these groups, with commas between: auto, torch, triton (operator.backend)."""


def main(argv: list[str]) -> None:
    """Run the script."""
    options: Options = script_options(Options, argv, __doc__ or "")
    import torch
    from benchmark_cases import backend_cases, operator_cases, scaling_cases, training_cases
    from benchmark_input import input_cases, input_share_cases

    from convnn.ops import choice
    from convnn.runs.environment import environment
    from convnn.runtime.device import pick_device

    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    backends = options.backends.split(",")
    cases = operator_cases(options.quick, options.compile, options.batch, backends, options.amp)
    cases += scaling_cases(options.quick)
    cases += training_cases(options.quick) + backend_cases(options.quick, device)
    cases += input_cases(options.quick) + input_share_cases(options.quick)
    patterns = options.groups.split(",")
    cases = [c for c in cases if any(fnmatch.fnmatch(c.group, p) for p in patterns)]
    if not cases:
        raise ConfigError(f"groups={options.groups} matches no group; see --help")
    facts = environment()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = run_all(cases, device, options, facts, out / "benchmark.csv")
    title = f"{facts['gpu'] or facts['processor']}, torch {torch.__version__}"
    draw(rows, title).savefig(out / "benchmark.png", dpi=110)
    for case, found in choice.choices().items():
        times = ", ".join(f"{way} {ms:.3f}" for way, ms in found["ms"].items() if ms is not None)
        print(f"auto took {found['way']} for {case} ({f'ms: {times}' if times else 'not measured'})")
    print(f"written: {out / 'benchmark.csv'}, {out / 'benchmark.png'}")


def run_all(cases: list, device: Any, options: Options, facts: dict, table: Path) -> list[dict]:
    """Measure group by group, print and write the CSV file as it goes, and return its rows."""
    from benchmark_cases import measure

    # Memory first: what timing leaves free in this process, a fork of it would fill before it grows.
    peaks = _peaks(cases, device) if device.type != "cuda" else {}
    rows: list[dict] = []
    for group in dict.fromkeys(c.group for c in cases):
        own = [c for c in cases if c.group == group]
        peak_of = peaks or _peaks(own, device)
        own = [c for c in own if id(c) in peak_of]
        scaling = group in ("tokens", "neighbours")
        timings = measure(own, device, 5 if options.quick else options.repeats, 3 if options.quick else options.seconds)
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
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return rows


def _peaks(cases: list, device: Any) -> dict[int, int | None]:
    """Return the peak memory of each case by its id; one that cannot be had on a GPU is left out, and that is said."""
    from benchmark_cases import peak_memory

    found: dict[int, int | None] = {}
    for case in cases:
        try:
            found[id(case)] = None if case.group == "input" else peak_memory(case, device)
        except Exception as error:  # no room, no kernel for these settings, one that does not compile
            if device.type != "cuda":
                raise
            print(f"left out: {case.group}, {case.name}: {type(error).__name__}: {first_line(error)}", flush=True)
    return found


def draw(rows: list[dict], title: str) -> Any:
    """Return a figure of one panel a group: bars of times with quartiles, or curves over N or k.

    Names of curves have the same colour in all panels.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the plot needs matplotlib: uv sync --extra report") from error
    from convnn.figures.style import RC_PARAMS, add_title, line_styles

    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    columns = min(2, len(groups))
    lines = [list(groups.values())[i : i + columns] for i in range(0, len(groups), columns)]
    heights = [max(3.4 if own[0]["group"] in CURVES else 0.9 + 0.36 * len(own) for own in line) for line in lines]
    looks = line_styles(list(dict.fromkeys(row["case"] for row in rows if row["group"] in CURVES)))
    sizes = {"font.size": 11, "axes.titlesize": 13, "legend.fontsize": 10, "figure.constrained_layout.hspace": 0.06}
    with mpl.rc_context(RC_PARAMS | sizes):
        figure = Figure(figsize=(7.4 * columns, 0.5 + sum(heights)))
        axes = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights).flatten().tolist()
        for axis, (group, own) in zip(axes, groups.items(), strict=False):
            axis.set_title(group)
            if group in CURVES:
                _curves(axis, own, CURVES[group], looks)
            else:
                _bars(axis, own)
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
        add_title(figure, title, 15)
    return figure


CURVES = {"tokens": ("tokens", "tokens N"), "neighbours": ("k", "neighbours k")}
"""Groups drawn as curves, with the column that they are drawn over and its name."""


def _curves(axis: Any, rows: list[dict], over: tuple[str, str], looks: dict) -> None:
    key, label = over
    for name in dict.fromkeys(row["case"] for row in rows):
        line = [row for row in rows if row["case"] == name]
        axis.plot([float(r[key]) for r in line], [float(r["ms_median"]) for r in line], label=name, **looks[name])
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="forward + backward (ms)")
    axis.legend()


def _bars(axis: Any, rows: list[dict]) -> None:
    from convnn.figures.style import COLOURS, NEUTRAL, plain_text

    times, lows, highs = ([float(row[key]) for row in rows] for key in ("ms_median", "ms_q1", "ms_q3"))
    errors = [[t - low for t, low in zip(times, lows, strict=True)], [h - t for t, h in zip(times, highs, strict=True)]]
    places = range(len(rows))
    axis.barh(places, times, color=[NEUTRAL, *[COLOURS[0]] * (len(rows) - 1)], height=0.7)
    axis.errorbar(times, places, xerr=errors, fmt="none", ecolor="#999999", elinewidth=1.5, capsize=3)
    for place, row, high in zip(places, rows, highs, strict=True):
        axis.text(high, place, f"  ×{float(row['ratio']):.2g}", va="center")
    axis.set_yticks(places, [plain_text(row["case"], 34) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlim(0, 1.16 * max(highs))
    axis.set_xlabel("ms (median and quartiles)")
    axis.grid(axis="y", visible=False)


if __name__ == "__main__":
    run_program(main)
