"""Write the published figures of the paper's tables as conf/table/*.csv, from the collected result files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from convnn.cli.program import run_program, script_options
from convnn.errors import ConfigError
from convnn.paper.published import TABLE_DIR, PaperRow
from convnn.runtime.files import write_text

USAGE = """
usage: uv run scripts/collect_published.py from=DIR [out=FOLDER]

Reads the figures of the authors' runs and writes the rows of each table, with the overrides of train.py that describe
the run. The same input gives the same files.
{options}
"""

Line = dict[str, str]
DATA = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "ImageNet-1K": "imagenet"}

RANDOM = "candidates drawn anew at evaluation too, as published"
REPEAT = "at ratio 0 the three kinds of similarity are one configuration: repeats with the same seed"
GRID_2D = "points of the grid numbered without the zero ring, so that they lie askew, as published"
GRID_1D = "grid of tokens on one line, CLS included, as published"
OWN_AGAIN = "own token first, and once more among the candidates with the score -0.1, as published"
OWN_ONE = "own token weighed by the score 1, as published"
ROTARY = "no rotary positions, no zero keys beside the sequence"
DROPS = "the authors' dropout stays on at evaluation"
OWN_SCORE = "the own token's similarity counts 1.1 in the softmax, as published"
FARTHEST = "softmax of the squared distance itself, so that the farthest of the neighbours weigh most, as published"
FUSED = "published convolution baseline: with the 1x1 convolution of the hybrid"


@dataclass
class Options:
    """Arguments of this script."""

    from_: str = MISSING
    """Folder of vgg11_branching.csv, vgg11_k.csv, ... with a line per run."""
    out: str | None = None
    """Folder of the tables; null: conf/table."""


# ------------------------------------------------------------------------------------------- from a run to a row


def _dataset(line: Line) -> list[str]:
    name = DATA[line["dataset"]]
    return [] if name == "imagenet" else [f"data={name}"]


def _sampling(line: Line, layout: list[str]) -> tuple[list[str], str, list[str]]:
    """Return the overrides of a run's candidates, their part of the row's name, and notes."""
    count = line["num_samples"]
    if line["sampling"] not in ("random", "spatial"):
        return [], "all", []
    kind = "random" if line["sampling"] == "random" else "grid"
    own = [f"operator.candidates={kind}", f"operator.num_candidates={count}", "operator.self_again=-0.1", *layout]
    if kind == "random":
        return [*own, "operator.eval_candidates=resample"], f"random{count}", [RANDOM, OWN_AGAIN]
    if layout:
        return [*own, "operator.grid_rounding=floor"], f"grid{count}", [GRID_1D, OWN_AGAIN]
    return [*own, "operator.grid_rounding=sheared"], f"grid{count}", [GRID_2D, OWN_AGAIN]


def _hybrid(line: Line) -> tuple[list[str], str, list[str]]:
    """Return the overrides of a branching layer, the name of its neighbours' kind, and notes."""
    ratio = float(line["branch_ratio"])
    own, name = [f"operator.branch_ratio={ratio:g}"], "features"
    notes: list[str] = []
    if ratio == 0:
        return own, name, [FUSED]
    own.append(f"operator.k={line['k']}")
    if line["similarity"] == "Loc_Col":
        own += ["operator.blend=0.5", "operator.mix=concat"]
        name = "coordinates"
    if line["aggregation"] == "Loc_Col":
        own.append("operator.coordinates=true")
        name = "coordinates-both"
    return own, name, notes


def branching(line: Line) -> tuple[str, list[str], list[str]]:
    """Describe a run of the branch ratios."""
    own, kind, notes = _hybrid(line)
    ratio = float(line["branch_ratio"])
    if ratio == 0:  # the columns are empty, the folder's name tells the table's column
        folder = line["source"].rsplit("/", 1)[-1]
        kinds = {"_Loc_Col_Loc_Col_": "coordinates-both", "_Loc_Col_Col_": "coordinates", "_Col_Col_": "features"}
        kind = next(name for part, name in kinds.items() if part in folder)
        notes.append(REPEAT)
    return f"{kind}-r{ratio:g}", own, notes


def vgg_k(line: Line) -> tuple[str, list[str], list[str]]:
    """Describe a run of the neighbour counts."""
    own, _, notes = _hybrid(line)
    kernel = line["kernel_size"]
    if kernel != "3":
        own.append(f"operator.branch_kernel={kernel}")
    return (f"k{line['k']}-conv{kernel}" if line["k"] else f"conv{kernel}"), own, notes


def _vgg_kind(line: Line) -> str:
    return {0: "conv", 0.5: "hybrid", 1: "convnn"}[float(line["branch_ratio"])]


def vgg_n(line: Line) -> tuple[str, list[str], list[str]]:
    """Describe a run of the numbers of candidates."""
    own, _, notes = _hybrid(line)
    if not line["k"]:
        return "conv", own, notes
    sampled, name, more = _sampling(line, [])
    return f"{_vgg_kind(line)}-{name}", own + sampled, notes + more


def vgg_lr(line: Line) -> tuple[str, list[str], list[str]]:
    """Describe a run of the learning rates."""
    own, _, notes = _hybrid(line)
    rate = f"{float(line['lr']):g}"
    return f"{_vgg_kind(line)}-lr{rate}", [*own, f"optim.lr={rate}"], notes


def vit(line: Line) -> tuple[str, list[str], list[str]]:
    """Describe a run of an attention layer in a ViT."""
    layer, k = line["layer"].removesuffix("-Triton"), line["k"]
    sequence = ["operator.layout=sequence"]
    if layer == "Attention":
        return "attention", ["operator=mhsa"], []
    if layer == "KvtAttention":
        return f"kvt-k{k}", ["operator=kvt", f"operator.k={k}"], []
    if layer == "LocalAttention":
        own = ["operator=local_window", "operator.num_candidates=128", "operator.head_dim=64", *sequence]
        return "local", own, ["head 64 wide whatever the model's width, as published", ROTARY]
    if layer == "SparseAttention-local":
        own = ["operator=local_window", "operator.num_candidates=24", *sequence]
        return "sparse-local", own, ["24 tokens to either side on one line", DROPS]
    if layer == "SparseAttention-strided":
        own = ["operator=mhsa", "operator.candidates=stride", "operator.num_candidates=14", *sequence]
        note = "every 14th token on one line, which is one column of patches; CLS sees the last column alone"
        return "sparse-strided", own, [note, DROPS]
    sampled, name, notes = _sampling(line, sequence)
    if sampled:
        sampled += ["operator.self_first=true", "operator.self_score=1"]
        notes.append(OWN_ONE)
    own = ["operator=convnn_attention", f"operator.k={k}", "operator.dropout_on=output", *sampled]
    kind = {"standard": "conv", "depthwise-separable": "separable"}.get(line["conv_type"])
    if kind:
        own.append(f"operator.aggregation={kind}")
    return f"convnn-{name}-k{k}" + (f"-{kind}" if kind else ""), own, notes


def vit_base(line: Line) -> tuple[str, list[str], list[str]]:
    """Describe a run of ViT-Base."""
    name, own, notes = vit(line)
    if line["source"].split("/")[-2].endswith("_DepthwiseConv"):
        name += "-repeat"
    if line["layer"].endswith("-Triton"):
        notes.append("run with the authors' fused kernel, the same function")
    if line["heads"] == "1":
        own.append("+backbone.kwargs.num_heads=1")
    return f"h{line['heads']}-{name}", own + _batch(line, "1280", notes), notes


def resnet(line: Line) -> tuple[str, list[str], list[str]]:
    """Describe a run of ResNet-50."""
    kernel = line["kernel_size"]
    notes: list[str] = []
    if line["layer"] == "Conv2d":
        own = ["operator=hybrid", "operator.branch_ratio=0", "operator.branch_fuse=false"]
        name = f"conv{kernel}"
        own += [] if kernel == "3" else [f"operator.branch_kernel={kernel}"]
    elif line["layer"] == "ConvNN":
        name, own = f"convnn-k{line['k']}", ["operator=convnn", f"operator.k={line['k']}"]
    else:
        sampled, kind, notes = _sampling(line, [])
        name, own = f"hybrid-{kind}-k{line['k']}", ["operator=hybrid", f"operator.k={line['k']}", *sampled]
        own += ["operator.bias=true", "operator.branch_bias=false"]
    return name, own + _batch(line, "512", notes), notes


def _batch(line: Line, usual: str, notes: list[str]) -> list[str]:
    size = line["global_batch"]
    if not size:
        notes.append(f"batch size not known, {usual} taken")
    return [] if size in ("", usual) else [f"train.batch_size={size}"]


# ----------------------------------------------------------------------- rows whose runs are in no collected file


REPOSITORY = "Convolutional-Nearest-Neighbor"
NO_FIGURE = "published figure not at hand"


def learned() -> Iterator[PaperRow]:
    """Yield the branching runs of the learned variant."""
    layer = ["projection=linear", "aggregation=separable", "inner_bias=true"]
    layer += ["bias=false", "branch_bias=true"]
    kinds = [
        ("cosine", ["weighting=softmax", "self_score=1.1"], OWN_SCORE),
        ("euclidean", ["similarity=euclidean", "weighting=softmax_far", "self_score=0.1"], FARTHEST),
    ]
    sizes = [(0.5, 129055363, None), (1.0, 125858691, 0.32629281)]
    for data, (kind, own, note), rate, (ratio, params, gflops) in product(
        ("cifar10", "cifar100"), kinds, ("1e-05", "5e-05", "0.0001", "0.0005", "0.001"), sizes
    ):
        settings = [f"operator.{o}" for o in [f"branch_ratio={ratio:g}", *layer, *own]]
        name, overrides = f"{data}-{kind}-r{ratio:g}-lr{rate}", [f"data={data}", f"optim.lr={rate}", *settings]
        if kind == "cosine" and data == "cifar10":
            source = f"{REPOSITORY}:Final_Output/loss_test_cos/VGG11-CIFAR10"
            yield _made(name, overrides, [note], source=source, params=params, gflops=gflops)
        else:
            yield _made(name, overrides, [note])


def shuffled() -> Iterator[PaperRow]:
    """Yield the branching runs with pixel shuffle."""
    published: dict[tuple[str, float], dict[str, Any]] = {
        ("cifar10", 0.5): {
            "params": 199152778, "gflops": 0.30754035, "top1_best": 75.4492, "top1_last": 74.8145,
            "top1_last5_mean": 74.7109, "top5_best": 97.6660,
        },
        ("cifar10", 1.0): {"params": 268289866},
    }  # fmt: skip
    for data in ("cifar10", "cifar100"):
        for ratio in (0.5, 1.0):
            figures = published.get((data, ratio), {})
            folder = f"pixelshuf_test/VGG11-CIFAR10/BranchingConvNN_K9_col_col_br{1000 * ratio:04.0f}_s42"
            yield _made(
                f"{data}-shuffle2-r{ratio:g}",
                [f"data={data}", "operator.shuffle=2", f"operator.branch_ratio={ratio:g}"],
                [],
                source=f"{REPOSITORY}:Final_Output/{folder}",
                **figures,
            )


def types() -> Iterator[PaperRow]:
    """Yield the runs of the kinds of Conv1d in the attention layer."""
    best = {"depthwise": (75.3, 48.4), "conv": (74.0, 47.2), "separable": (71.9, 44.4)}
    for place, data in enumerate(("cifar10", "cifar100")):
        for kind, accuracy in best.items():
            own = ["operator=convnn_attention", "operator.k=9", "operator.dropout_on=output"]
            yield _made(
                f"{data}-convnn-all-k9-{kind}",
                [f"data={data}", *own, f"operator.aggregation={kind}"],
                ["read from a result folder's summary, to one decimal"],
                top1_best=accuracy[place],
                source=f"{REPOSITORY}-Attention:Final_Output/Conv_test---",
            )


def hybrids() -> Iterator[PaperRow]:
    """Yield the runs of hybrid attention."""
    for data in ("cifar10", "cifar100"):
        for ratio in (0.25, 0.5, 0.75):
            own = ["operator=hybrid_attention", "operator.k=9", "operator.dropout_on=output"]
            own.append(f"operator.branch_ratio={ratio:g}")
            source = f"{REPOSITORY}-Attention:Final_Output"
            yield _made(f"{data}-hybrid-r{ratio:g}", [f"data={data}", *own], [], source=source)


def _made(
    name: str, overrides: list[str], notes: list[str], *, source: str = f"{REPOSITORY}:Final_Output", **figures: Any
) -> PaperRow:
    """Return a row; what is not among ``figures`` was not at hand."""
    empty = dict.fromkeys(("params", "gflops", "top1_best", "top1_last", "top1_last5_mean", "top5_best"))
    notes = notes if figures.get("top1_best") else [*notes, NO_FIGURE]
    return PaperRow(
        row=name, overrides=tuple(overrides), epochs=150, seed=42, source=source, function="equal",
        note="; ".join(notes), **(empty | figures),
    )  # fmt: skip


MADE: dict[str, Callable[[], Iterator[PaperRow]]] = {
    "vgg11_learned": learned,
    "vgg11_shuffle": shuffled,
    "vit_tiny_types": types,
    "vit_tiny_hybrid": hybrids,
}


# ---------------------------------------------------------------------------------------------- tables and files

Describe = Callable[[Line], tuple[str, list[str], list[str]]]


def _final(lines: list[Line]) -> Iterator[Line]:
    """Yield the runs in the authors' final tables."""
    return (line for line in lines if line.get("in_final_csv", "yes") == "yes")


def collect(source: Path) -> dict[str, list[PaperRow]]:
    """Return the rows of every table.

    Raises:
        ConfigError: if a file is missing.
    """
    read = {name: _read(source / f"{name}.csv") for name in TABLES}
    kvt = [line for line in read["vit_tiny_k"] if line["layer"] == "KvtAttention" and line["k"] == "9"]
    read["vit_tiny_baselines"] += kvt
    found = {
        name: [_row(line, describe, source / f"{name}.csv") for line in _final(read[name])]
        for name, describe in TABLES.items()
    }
    return found | {name: list(rows()) for name, rows in MADE.items()}


TABLES: dict[str, Describe] = {
    "vgg11_branching": branching,
    "vgg11_k": vgg_k,
    "vgg11_n": vgg_n,
    "vgg11_lr": vgg_lr,
    "vit_tiny_baselines": vit,
    "vit_tiny_k": vit,
    "vit_tiny_n": vit,
    "resnet50_imagenet": resnet,
    "vit_base_imagenet": vit_base,
}


def _read(path: Path) -> list[Line]:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _row(line: Line, describe: Describe, path: Path) -> PaperRow:
    name, own, notes = describe(line)

    def figure(key: str) -> float | None:
        return float(line[key]) if line[key] else None

    return PaperRow(
        row=f"{DATA[line['dataset']]}-{name}",
        overrides=(*_dataset(line), *own),
        params=int(line["params"]) if line["params"] else None,
        gflops=figure("gflops"),
        top1_best=figure("top1_best"),
        top1_last=figure("top1_last"),
        top1_last5_mean=figure("top1_last5_mean"),
        top5_best=figure("top5_best"),
        epochs=int(line["epochs"]),
        seed=int(line["seed"]),
        source=line["source"],
        function=_function(name, line, notes),
        note="; ".join(notes),
    )


def _function(name: str, line: Line, notes: list[str]) -> str:
    """Return what ``PaperRow.function`` says of a run; ``tests/paper/test_function.py`` holds it to that."""
    reasons = [note for note in (ROTARY, DROPS) if note in notes]
    if reasons:
        return f"differs: {reasons[0]}"
    return "" if line["dataset"] == "ImageNet-1K" else "equal"


def text_of(rows: list[PaperRow]) -> str:
    """Return rows as the text of a CSV file."""
    out = io.StringIO()
    columns = [f.name for f in fields(PaperRow)]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = {name: getattr(row, name) for name in columns} | {"overrides": " ".join(row.overrides)}
        writer.writerow(["" if values[name] is None else values[name] for name in columns])
    return out.getvalue()


def main(argv: list[str]) -> None:
    """Read, write, and say how many rows each table has."""
    given = [f"from_{arg[4:]}" if arg.startswith("from=") else arg for arg in argv]
    try:
        options: Options = script_options(Options, given, USAGE)
    except ConfigError as error:  # from is a word of Python's own, and so no name of a field
        raise ConfigError(str(error).replace("from_", "from")) from error
    out = Path(options.out) if options.out else TABLE_DIR
    for name, rows in collect(Path(options.from_)).items():
        write_text(out / f"{name}.csv", text_of(rows))
        print(f"{out / name}.csv: {len(rows)} rows")


if __name__ == "__main__":
    run_program(main)
