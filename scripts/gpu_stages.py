"""The stages of gpu_check.py: what each starts in processes of their own, and what its rows say. Imports no torch."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_verdicts as verdicts
from gpu_verdicts import Row

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Context:
    """What all stages are told."""

    device: str
    """``cuda`` or ``cpu``."""
    gpus: int
    tiny: bool
    data: tuple[str, ...] | None
    """Overrides that name CIFAR-10's images; None: there are none."""
    row_epochs: int | None
    seed: int

    def arm(self, *overrides: str) -> list[str]:
        """Return the overrides of a run that leaves nothing but numbers."""
        own = ["tracker=jsonl", "diagnostics.enabled=false", "checkpoint.predictions=off", f"seed={self.seed}"]
        return [*overrides, *own, f"device={self.device}"]


@dataclass(frozen=True)
class Unit:
    """A part of a stage: commands that run one after another, and what they leave."""

    name: str
    commands: Callable[[Path, float], list[list[str]]]
    """Given a folder of its own and the seconds that are left."""
    read: Callable[[Path], list[Row]]
    """Rows, perhaps of half the work, from the folder."""
    least: float = 15.0
    """Seconds below which it is not begun."""
    ends: tuple[int, ...] = (0,)
    """Exit codes of a unit that came to its end."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Something to be found out."""

    name: str
    about: str
    weight: float
    """Its share of the time that is left, beside those of the stages after it."""
    units: Callable[[Context], list[Unit]]
    judge: Callable[[list[Row]], tuple[str, str]]
    """``pass``, ``fail`` or ``figure``, and a line that says so."""


def script(name: str) -> list[str]:
    """Return the beginning of the command of a program of this repository."""
    return [sys.executable, str(ROOT / name)]


def read_csv(path: Path) -> list[Row]:
    """Return the rows of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _read_rows(folder: Path) -> list[Row]:
    path = folder / "rows.json"
    return json.loads(path.read_text()) if path.is_file() else []


def _steps(folder: Path, **plan: Any) -> list[str]:
    """Write a plan for gpu_steps.py; return the arguments of its process."""
    (folder / "plan.json").write_text(json.dumps(plan))
    return [str(ROOT / "scripts" / "gpu_steps.py"), str(folder)]


# ------------------------------------------------------------------------------------------------------------- tests


def _test_units(context: Context) -> list[Unit]:
    pytest = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    workers = f"-n{0 if context.tiny else min(4, os.cpu_count() or 1)}"
    checks = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/support").glob("kernel*_checks.py"))
    marked = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text()
    )
    # It starts the checks once more, in a process of its own.
    again = "--deselect=tests/ops/test_kernels.py::test_the_kernels_on_the_gpu"
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # which deterministic algorithms need on CUDA
    if context.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    few = ["-k", "itself"] if context.tiny else []
    plans: dict[str, list[str]] = {
        "kernels": [workers, "-m", "", *checks, *few],
        "marked gpu": [workers, "-m", "gpu", again, *marked],
        "backends": [workers, "-m", "not long and not slow and not network", again, "tests/ops/test_kernels.py", *few],
    }
    if context.tiny:
        plans = {"kernels": plans["kernels"]}

    def unit(name: str, words: list[str]) -> Unit:
        return Unit(name, lambda *_: [[*pytest, *words]], verdicts.read_tests, 10, (0, 1, 5), environment)

    return [unit(name, words) for name, words in plans.items()]


# ------------------------------------------------------------------------------------------------------ benchmarks


def _benchmark(context: Context, name: str, groups: str, *options: str, least: float = 15.0) -> Unit:
    """Return a unit of benchmark.py's cases."""
    quick = "true" if context.tiny else "false"

    def commands(folder: Path, seconds: float) -> list[list[str]]:
        each = max(0.2, min(3.0, seconds / 40))
        words = [f"device={context.device}", f"groups={groups}", f"quick={quick}", f"seconds={each:.1f}", "repeats=10"]
        return [[*script("scripts/benchmark.py"), *words, *options, f"out={folder}"]]

    columns = ("group", "case", "tokens", "k", "ms_median", "ms_q1", "ms_q3", "ratio", "peak_mib", "rounds", "note")

    def read(folder: Path) -> list[Row]:
        told = " ".join(options)
        return [
            {key: row.get(key, "") for key in columns} | {"options": told} for row in read_csv(folder / "benchmark.csv")
        ]

    return Unit(name, commands, read, least)


def _layer_units(context: Context) -> list[Unit]:
    backends = "backends=auto" if context.device == "cpu" else "backends=torch,triton,auto"
    if context.tiny:
        return [_benchmark(context, "attention", "attention 1 heads forward", backends)]
    wide = ("batch=256", "amp=true", backends)
    return [
        _benchmark(context, "training's shapes", "attention*,conv*activations", *wide),
        _benchmark(context, "naive", "conv forward,conv forward+backward", "batch=64", "amp=true", backends),
        _benchmark(context, "first layer", "conv*images", *wide),
        _benchmark(context, "kernels", "backend*"),
        _benchmark(context, "float32", "conv*activations,attention*", "batch=256", backends),
        _benchmark(context, "scaling", "tokens,neighbours"),
    ]


def _input_units(context: Context) -> list[Unit]:
    return [
        _benchmark(context, "share", "input share"),
        *([] if context.tiny else [_benchmark(context, "input", "input")]),
    ]


# ---------------------------------------------------------------------------------------------------------- steps


VGG = ("backbone=vgg11_bn", "swap=all_conv", "operator=hybrid", "train.batch_size=256", "optim=paper")
VIT = (
    "backbone=vit_tiny_224",
    "swap=all_attention",
    "operator=convnn_attention",
    "train.batch_size=128",
    "optim=paper",
    "backbone.drop_rate=0",  # dropped weights of neighbours have no kernel
)
RESNET = ("backbone=resnet18", "operator=hybrid", "swap=last_half", "train.batch_size=256", "train.channels_last=true")
_NOISE = ("data=synthetic", "data.size=8192", "data.load_size=32")
_LITTLE_NOISE = ("data=synthetic", "data.size=64", "data.load_size=8", "train.batch_size=8", "train.amp=off")
_LITTLE = ("+backbone.kwargs.channels=[4,4,8,8]", "+backbone.kwargs.layers=[1,1,1,1]", "operator.k_policy=clamp")
LITTLE_RESNET = ("backbone=resnet18", "operator=hybrid", "swap=last_half", *_LITTLE)
LITTLE_VIT = ("backbone=vit_tiny", "swap=all_attention", "operator=convnn_attention", "data.load_size=16",
              "backbone.image_size=16", "+backbone.kwargs.depth=1", "+backbone.kwargs.embed_dim=24")  # fmt: skip


def _timed(context: Context, case: str, arms: dict[str, Sequence[str]], block: int, least: float) -> Unit:
    """Return a unit that times the steps of arms beside each other."""
    own = {name: context.arm(*words) for name, words in arms.items()}
    rounds = 2 if context.tiny else 10

    def commands(folder: Path, seconds: float) -> list[list[str]]:
        plan = {"kind": "steps", "case": case, "arms": own, "block": block, "rounds": rounds, "seconds": seconds - 12}
        return [[sys.executable, *_steps(folder, **plan)]]

    return Unit(case, commands, _read_rows, least)


def _by_backend(base: Sequence[str], context: Context) -> dict[str, Sequence[str]]:
    backends = ("auto",) if context.device == "cpu" else ("auto", "torch", "triton")
    plain: dict[str, Sequence[str]] = {"plain": [*base, "swap=none"]}
    return plain | {name: [*base, f"operator.backend={name}"] for name in backends}


def _ratio_units(context: Context) -> list[Unit]:
    if context.tiny:
        return [_timed(context, "ResNet", _by_backend([*LITTLE_RESNET, *_LITTLE_NOISE], context), 1, 0)]
    return [
        _timed(context, "VGG-11 hybrid", _by_backend([*VGG, *_NOISE], context), 5, 25),
        _timed(context, "ViT-Tiny/224", _by_backend([*VIT, *_NOISE], context), 5, 25),
    ]


def _compile_units(context: Context) -> list[Unit]:
    def arms(base: Sequence[str]) -> dict[str, Sequence[str]]:
        found: dict[str, Sequence[str]] = {"plain path": [*base, "operator.backend=torch"]}
        if context.device == "cuda":
            found["kernels"] = [*base, "operator.backend=triton"]
        found["plain path compiled"] = [*base, "operator.backend=torch", "train.compile=true"]
        if context.device == "cuda":
            found["kernels compiled"] = [*base, "operator.backend=triton", "train.compile=true"]
            found["auto compiled"] = [*base, "operator.backend=auto", "train.compile=true"]
            found["auto, reduce-overhead"] = [*base, "operator.backend=auto", "train.compile=reduce-overhead"]
            found["auto compiled, moving blend"] = [*base, "schedule=cosine", "train.compile=true"]
        return found

    if context.tiny:
        return [_timed(context, "ViT", arms([*_LITTLE_NOISE, *LITTLE_VIT]), 1, 0)]
    return [
        _timed(context, "ViT-Tiny/224, 4 blocks", arms([*VIT, *_NOISE, "+backbone.kwargs.depth=4"]), 5, 30),
        _timed(context, "ResNet-18", arms([*RESNET, *_NOISE]), 5, 40),
    ]


# -------------------------------------------------------------------------------------------------- resume, groups


def _resume_units(context: Context) -> list[Unit]:
    common = ["train.deterministic=true", "train.epochs=2", "optim.warmup_epochs=0", "data.flip=true"]
    if context.tiny:
        cases = {"ResNet": [*LITTLE_RESNET, *_LITTLE_NOISE], "ViT": [*_LITTLE_NOISE, *LITTLE_VIT]}
    else:
        small = ["data=synthetic", "data.size=2048", "data.load_size=32", "train.batch_size=128", "data.crop_padding=4"]
        cases = {
            "hybrid": ["backbone=resnet_tiny", "operator=hybrid", "swap=all_conv", "train.channels_last=true", *small],
            "spectrum": ["backbone=resnet_tiny", "operator=spectrum", "swap=all_conv", "schedule=cosine", *small],
            "attention": ["backbone=vit_mini", "operator=convnn_attention", "swap=all_attention", *small],
        }
    arms = {name: context.arm(*words, *common) for name, words in cases.items()}

    def commands(folder: Path, seconds: float) -> list[list[str]]:
        words = [sys.executable, *_steps(folder, kind="begin_resume", arms=arms)]
        return [words, [*words, "end_resume"]]

    return [Unit("exact", commands, _read_rows, 0 if context.tiny else 25)]


def _group_units(context: Context) -> list[Unit]:
    def unit(processes: int) -> Unit:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]

        def commands(folder: Path, seconds: float) -> list[list[str]]:
            return [[*launch, *_steps(folder, kind="group", device=context.device)]]

        return Unit(f"{processes} process{'es' * (processes > 1)}", commands, _read_rows, 0 if context.tiny else 15)

    if context.tiny:
        return [unit(2)]
    return [unit(n) for n in (1, 2) if n == 1 or context.gpus >= n]


# ------------------------------------------------------------------------------------------------------------ runs


def _fast_units(context: Context) -> list[Unit]:
    if context.data is None:
        return []
    words = ["experiment=cifar10_fast", *context.data, "data.crop_padding=4", "data.flip=true", "tracker=jsonl"]
    words += [f"device={context.device}", f"seed={context.seed}"]
    if context.tiny:
        words += [
            "train.epochs=4",
            "train.batch_size=8",
            "train.eval_batch_size=8",
            "train.amp=off",
            "train.compile=false",
        ]
        words += [*_LITTLE, "data.limit=16", "data.limit_test=16"]

    def commands(folder: Path, seconds: float) -> list[list[str]]:
        return [[*script("train.py"), *words, f"run.dir={folder / 'run'}", "run.if_exists=skip"]]

    def read(folder: Path) -> list[Row]:
        path = folder / "run" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [
            {key: row[key] for key in ("epoch", "step", "train_loss", "test_top1", "train_seconds")} for row in lines
        ]

    return [Unit("cifar10_fast", commands, read, 0 if context.tiny else 40)]


ROWS = (
    ("vgg11_branching", "cifar10-features-r0,cifar10-features-r0.5"),
    ("vit_tiny_baselines", "cifar10-attention,cifar10-convnn-all-k9"),
    ("vgg11_branching", "cifar10-features-r1"),
    ("vit_tiny_baselines", "cifar10-convnn-random32-k9,cifar10-kvt-k9,cifar10-local"),
    ("vgg11_branching", "cifar10-*"),
    ("vgg11_k", "cifar10-*"),
    ("vit_tiny_k", "cifar10-*"),
)
"""Tables and rows in order of their worth: the paper's main claims first, each beside its baseline."""


def _row_units(context: Context) -> list[Unit]:
    if context.data is None:
        return []
    given = [*context.data, "tracker=jsonl", f"device={context.device}"]
    if context.row_epochs:
        given.append(f"train.epochs={context.row_epochs}")
    rows: Sequence[tuple[str, str]] = ROWS
    if context.tiny:
        rows = (("vit_tiny_baselines", "cifar10-attention"),)
        given += [
            "train.epochs=1",
            "data.limit=4",
            "data.limit_test=2",
            "train.batch_size=2",
            "+backbone.kwargs.depth=1",
        ]

    def unit(table: str, names: str) -> Unit:
        def commands(folder: Path, seconds: float) -> list[list[str]]:
            words = [f"table={table}", f"rows={names}", f"dir={folder / 'rows'}", f"budget={max(5, seconds - 25):.0f}s"]
            return [[*script("scripts/reproduce.py"), *words, *given]]

        def read(folder: Path) -> list[Row]:
            return [{"table": table} | row for row in read_csv(folder / "rows" / "reproduction.csv")]

        return Unit(f"{table} {names}", commands, read, 0 if context.tiny else 60)

    return [unit(*words) for words in rows]


STAGES = (
    Stage("tests", "the CUDA tests", 5, _test_units, verdicts.judge_tests),
    Stage("layers", "layers beside F.conv2d, fused attention and a naive one", 4, _layer_units, verdicts.judge_layers),
    Stage(
        "ratio",
        "steps of VGG-11 and ViT-Tiny beside the plain ones'",
        4,
        _ratio_units,
        verdicts.judge_steps,
    ),
    Stage("resume", "exact resume under train.deterministic=true", 3, _resume_units, verdicts.judge_resume),
    Stage("input", "the share of the input in a step", 1.5, _input_units, verdicts.judge_input),
    Stage("compile", "train.compile with and without kernels", 4, _compile_units, verdicts.judge_compile),
    Stage("nccl", "NCCL with one process, and two where there are two GPUs", 1.5, _group_units, verdicts.judge_groups),
    Stage("fast", "experiment=cifar10_fast", 8, _fast_units, verdicts.judge_fast),
    Stage("rows", "rows of the paper's tables", 6, _row_units, verdicts.judge_rows),
)
