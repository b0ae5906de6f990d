"""The stages of gpu_check.py: what each starts in processes of their own, and what its rows say. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import gpu_verdicts as verdicts
from gpu_units import ROOT, Context, Row, Stage, Unit, read_csv, read_rows, script, steps

# ------------------------------------------------------------------------------------------------------------- tests


def _test_units(context: Context) -> list[Unit]:
    pytest = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    workers = f"-n{0 if context.tiny else min(12, os.cpu_count() or 1)}"
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


# ----------------------------------------------------------------------------------------------- kernels, beforehand


def _warm_units(context: Context) -> list[Unit]:
    """Have what later stages run compiled by processes side by side. What they time, alone on no GPU, is forgotten."""
    found = _ratio_arms(context)
    if not context.tiny:
        found |= {f"compile, {case}": arms for case, arms in _compile_arms(context).items()}
    arms = {f"{case}: {arm}": context.arm(*words) for case, own in found.items() for arm, words in own.items()}
    workers = 2 if context.tiny else min(16, os.cpu_count() or 1)

    def commands(folder: Path, seconds: float) -> list[list[str]]:
        jobs = {}
        for number, (name, words) in enumerate(arms.items()):
            jobs[name] = [sys.executable, *steps(folder / str(number), kind="first", arm=words)]
        if not context.tiny:
            for unit in _layer_units(context):
                (words,) = unit.commands(folder / unit.name.replace(" ", "-"), 0.0)
                jobs[f"layers, {unit.name}"] = [*(w for w in words if w != "repeats=10"), "repeats=1"]
        plan = {"kind": "warm", "jobs": jobs, "workers": workers, "seconds": seconds - 5}
        return [[sys.executable, *steps(folder, **plan)]]

    return [Unit("kernels", commands, read_rows, 0 if context.tiny else 20)]


# ----------------------------------------------------------------------------------------------------------- indices


def _index_units(context: Context) -> list[Unit]:
    environment = {"TRITON_INTERPRET": "1"} if context.device == "cpu" else {}
    size = (2, 4, 64) if context.tiny else (256, 32, 10_000_000)  # maps at once, their side, rows in all

    def unit(case: str) -> Unit:
        def commands(folder: Path, seconds: float) -> list[list[str]]:
            plan = {"kind": "indices", "case": case, "device": context.device, "size": size, "seconds": seconds - 12}
            return [[sys.executable, *steps(folder, **plan, seed=context.seed)]]

        return Unit(case, commands, read_rows, 0 if context.tiny else 15, (0,), environment)

    cases = ("ties",) if context.tiny else ("ties", "bfloat16", "float32", "many channels")
    return [unit(case) for case in cases]


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
VGG_WHOLE = ("backbone=vgg11_bn", "swap=all_conv", "operator=convnn", "train.batch_size=256", "optim=paper")
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
        return [[sys.executable, *steps(folder, **plan)]]

    return Unit(case, commands, read_rows, least)


def _by_backend(base: Sequence[str], context: Context) -> dict[str, Sequence[str]]:
    backends = ("auto",) if context.device == "cpu" else ("auto", "torch", "triton")
    plain: dict[str, Sequence[str]] = {"plain": [*base, "swap=none"]}
    return plain | {name: [*base, f"operator.backend={name}"] for name in backends}


def _ratio_arms(context: Context) -> dict[str, dict[str, Sequence[str]]]:
    if context.tiny:
        return {"ResNet": _by_backend([*LITTLE_RESNET, *_LITTLE_NOISE], context)}
    cases = {"VGG-11 hybrid": VGG, "VGG-11": VGG_WHOLE, "ViT-Tiny/224": VIT}
    return {case: _by_backend([*base, *_NOISE], context) for case, base in cases.items()}


def _ratio_units(context: Context) -> list[Unit]:
    block, least = (1, 0) if context.tiny else (5, 25)
    return [_timed(context, case, arms, block, least) for case, arms in _ratio_arms(context).items()]


def _compile_arms(context: Context) -> dict[str, dict[str, Sequence[str]]]:
    """Return the arms of each case, those that say most first."""

    def compiled(base: Sequence[str], *words: str, mode: str = "true") -> list[str]:
        return [*base, *words, f"train.compile={mode}"]

    if context.tiny:
        base = [*_LITTLE_NOISE, *LITTLE_VIT]
        return {"ViT": {"uncompiled": base, "auto": compiled(base)}}
    vit, resnet = [*VIT, *_NOISE, "+backbone.kwargs.depth=4"], [*RESNET, *_NOISE]
    return {
        "ViT-Tiny/224, 4 blocks": {
            "uncompiled": vit,
            "auto": compiled(vit),
            "torch": compiled(vit, "operator.backend=torch"),
            "triton": compiled(vit, "operator.backend=triton"),
            "auto, reduce-overhead": compiled(vit, mode="reduce-overhead"),
            "auto, moving k": compiled(vit, "schedule=shrink_k", "schedule.k.end=4"),
        },
        "ResNet-18": {
            "uncompiled": resnet,
            "auto": compiled(resnet),
            "auto, moving blend": compiled(resnet, "schedule=cosine"),
        },
    }


def _compile_units(context: Context) -> list[Unit]:
    rounds = 1 if context.tiny else 5
    return [
        _timed(context, case, arms, rounds, 0 if context.tiny else 40) for case, arms in _compile_arms(context).items()
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

    def unit(name: str, words: list[str]) -> Unit:
        arms = {name: context.arm(*words, *common)}

        def commands(folder: Path, seconds: float) -> list[list[str]]:
            begin = [sys.executable, *steps(folder, kind="begin_resume", arms=arms)]
            return [begin, [*begin, "end_resume"]]

        return Unit(name, commands, read_rows, 0 if context.tiny else 25)

    return [unit(*case) for case in cases.items()]


def _group_units(context: Context) -> list[Unit]:
    def unit(processes: int) -> Unit:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]

        def commands(folder: Path, seconds: float) -> list[list[str]]:
            return [[*launch, *steps(folder, kind="group", device=context.device)]]

        return Unit(f"{processes} process{'es' * (processes > 1)}", commands, read_rows, 0 if context.tiny else 15)

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
    Stage("warm", "kernels compiled by processes side by side, before anything is timed", 3, _warm_units,
          verdicts.judge_warm),
    Stage("tests", "the CUDA tests", 5, _test_units, verdicts.judge_tests),
    Stage("indices", "neighbours of 10 million rows by the kernels beside plain torch's", 2, _index_units,
          verdicts.judge_indices),
    Stage("ratio", "steps and memory of VGG-11 and ViT-Tiny beside the plain ones'", 4, _ratio_units,
          verdicts.judge_steps),
    Stage("layers", "layers beside F.conv2d, fused attention and a naive one", 4, _layer_units, verdicts.judge_layers),
    Stage("resume", "exact resume under train.deterministic=true", 3, _resume_units, verdicts.judge_resume),
    Stage("compile", "train.compile with and without kernels", 5, _compile_units, verdicts.judge_compile),
    Stage("input", "the share of the input in a step", 1, _input_units, verdicts.judge_input),
    Stage("nccl", "NCCL with one process, and two where there are two GPUs", 1, _group_units, verdicts.judge_groups),
    Stage("fast", "experiment=cifar10_fast", 5, _fast_units, verdicts.judge_fast),
    Stage("rows", "rows of the paper's tables", 6, _row_units, verdicts.judge_rows),
)  # fmt: skip
