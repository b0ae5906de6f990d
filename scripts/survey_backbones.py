"""Try the swap on timm's models and write what came of it as docs/backbones.md and docs/results/backbones.csv."""

from __future__ import annotations

import csv
import dataclasses
import fnmatch
import io
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from convnn.cli.program import run_program, script_options
from convnn.config.schema import ATTENTION, CONV
from convnn.errors import ConfigError, first_line
from convnn.models.coverage import Coverage, coverage, families, rounding, runs_with_fewer, stir, transfer_error
from convnn.runtime.files import write_text

USAGE = """
usage: uv run scripts/survey_backbones.py [models=GLOB] [families=GLOB,GLOB] [compute=true] [limit=20]
       [out=docs]

Builds every model of timm that matches without data, and lists which of its convolutions and attention layers a swap
can replace. With the smallest model of each family it also computes, in float64: the logits before and after a swap at
the exact end, and a step with fewer neighbours than there are tokens.
{options}
"""
WITHOUT_PAIRS = ("among channels", "linear attention", "one query", "AttentionPool")
"""Words of the reasons for which attention has no scores of pairs of tokens."""
EXACT = 1e-10
"""Error of logits up to which a transfer is exact."""
LARGEST = 80_000_000
"""Parameters of a model that is computed; of families with larger ones alone, none is."""


@dataclass
class Options:
    """Arguments of this script."""

    models: str = "*"
    """Names of timm's models, with * and ?."""
    families: str = ""
    """Names of the modules that define them, with * and ?, separated by commas: these are done anew, and the rows that
    OUT has of others stay as they are; empty: all, and no row stays."""
    compute: bool = True
    """Compute the smallest model of each family, which takes most of the time."""
    limit: int = 20
    """Seconds for each thing that is computed."""
    out: str = "docs"
    """Folder for backbones.md and results/backbones.csv."""


@dataclass
class Row:
    """One kind of layer in one model."""

    family: str
    model: str
    kind: str
    parameters: int
    layers: int
    """How many of the kind there are."""
    taken: int
    """How many can be replaced with their weights."""
    reasons: str
    """Why the others cannot."""
    error: str = ""
    """Largest difference of logits after the swap, as a share of the largest; above ``EXACT`` with the difference that
    rounding the image makes, in brackets. Or what went wrong; empty: not computed."""
    fewer: str = ""
    """``yes``: a step with fewer neighbours gave finite logits and gradients; what went wrong; empty: not computed."""


def survey(family: str, name: str) -> list[Row]:
    """Return a row for each kind of layer that a model has; it is built without data where it can be."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except (RuntimeError, NotImplementedError, ValueError):  # what computes with its weights as it is built
        model = timm.create_model(name, pretrained=False)
    size = sum(parameter.numel() for parameter in model.parameters())
    found = [coverage(model, kind) for kind in (CONV, ATTENTION)]
    return [Row(family, name, c.kind, size, c.found, len(c.taken), reasons(c)) for c in found if c.found]


def reasons(found: Coverage) -> str:
    """Return why layers cannot be replaced, the most frequent reason first."""
    return "; ".join(text for text, _ in Counter(found.refused.values()).most_common())


def compute(row: Row, limit: int) -> None:
    """Fill in what the smallest model of a family computes before and after a swap, in so many seconds for each."""
    torch.manual_seed(0)
    model = stir(timm.create_model(row.model, pretrained=False)).double().eval()
    image = torch.randn(1, *input_size(model), dtype=torch.float64)
    names = coverage(model, row.kind).taken
    row.error = within_limit(limit, lambda: error_of(model, row.kind, names, image))
    row.fewer = within_limit(limit, lambda: "yes" if runs_with_fewer(model, row.kind, names, image) else "no")


def error_of(model: nn.Module, kind: str, names: Sequence[str], image: torch.Tensor) -> str:
    """Return the error of a transfer, and if it is not below 1e-10, what rounding alone does."""
    error = transfer_error(model, kind, names, image)
    return f"{error:.1e}" if error <= EXACT else f"{error:.1e} ({rounding(model, image):.1e})"


def within_limit(limit: int, ask: Callable[[], str]) -> str:
    """Return an answer, or what went wrong, or that it takes more than so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        return ask()
    except TimeoutError:
        return f"more than {limit} s"
    except Exception as error:  # whatever a model makes of it is a finding
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        signal.alarm(0)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, rows and columns of the images that a model takes."""
    cfg: Any = model.pretrained_cfg
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    return channels, height, width


def smallest(rows: Sequence[Row]) -> Iterator[Row]:
    """Return the rows of the smallest model of each family that has the kind, unless it is large; attention first."""
    for kind in (ATTENTION, CONV):
        for family in dict.fromkeys(row.family for row in rows):
            own = [row for row in rows if row.family == family and row.kind == kind and row.taken]
            least = min(own, key=lambda row: row.parameters, default=None)
            if least is not None and least.parameters <= LARGEST:
                yield least


def csv_of(rows: Sequence[Row]) -> str:
    """Return the rows as CSV."""
    text = io.StringIO()
    names = [field.name for field in dataclasses.fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()


HEAD = """# Backbones

What of timm's models a swap can replace, with their weights: `uv run scripts/survey_backbones.py` writes this page and
[results/backbones.csv](results/backbones.csv), a row for each model and kind of layer, here with timm {timm} and torch
{torch}. "All" counts models of which every layer of the kind can be replaced, "some" those of which a part can; the
layers of classifier heads are left out. The error is the largest difference of the logits of the family's smallest
model (at most {largest} million parameters) after a swap at the exact end (convolutions: `k=kernel blend=0`; attention:
all tokens, `aggregation=sum`), as a share of the largest logit, in float64, with random weights in place of those that
would hide a difference. "Fewer" says whether a step with 3 neighbours at blend 0.5 (convolutions) or with 4 (attention)
gave finite logits and gradients, or that it took more than so many seconds; both are empty where nothing was computed.
An error above 1e-10 has in brackets what the logits move by when the image changes by a 10^15th part of itself: with
these random weights such a network magnifies rounding.
[operators.md](operators.md) says what the kinds of attention and convolution become.

"None" of attention is often what has no scores of pairs of tokens: attention among channels, linear
attention, one query for all. The last line leaves out the models that have no other.

"""


def page(rows: Sequence[Row]) -> str:
    """Return the page: a summary, and a table of families for each kind."""
    parts = [HEAD.format(timm=timm.__version__, torch=torch.__version__.split("+")[0], largest=LARGEST // 10**6)]
    parts.append("| kind | models | all | some | none | all, % | all or some, % |\n|---|---|---|---|---|---|---|\n")
    paired = [row for row in rows if row.kind == ATTENTION and not all_without_pairs(row)]
    for label, own in (
        *((kind, [row for row in rows if row.kind == kind]) for kind in (CONV, ATTENTION)),
        ("attention by scores of pairs", paired),
    ):
        count, total = counts(own), max(len(own), 1)
        shares = f"{100 * count[0] / total:.1f} | {100 * (total - count[2]) / total:.1f}"
        parts.append(f"| {label} | {len(own)} | {count[0]} | {count[1]} | {count[2]} | {shares} |\n")
    for kind, title in ((ATTENTION, "Attention"), (CONV, "Convolutions")):
        parts.append(f"\n## {title}\n\n| family | models | all | some | none | error | fewer | not replaced |\n")
        parts.append("|---|---|---|---|---|---|---|---|\n")
        of_kind = [row for row in rows if row.kind == kind]
        for family in dict.fromkeys(row.family for row in of_kind):
            own = [row for row in of_kind if row.family == family]
            done = next((row for row in own if row.error or row.fewer), None)
            cells = [family, len(own), *counts(own), done.error if done else "", done.fewer if done else ""]
            why = "; ".join(dict.fromkeys(text for row in own for text in row.reasons.split("; ") if text))
            parts.append(f"| {' | '.join(map(str, cells))} | {why.replace('|', ' ')} |\n")
    return "".join(parts)


def all_without_pairs(row: Row) -> bool:
    """Return whether a model's attention has no scores of pairs of tokens at all."""
    whys = [why for why in row.reasons.split("; ") if why]
    return row.taken == 0 and all(any(word in why for word in WITHOUT_PAIRS) for why in whys)


def counts(rows: Sequence[Row]) -> tuple[int, int, int]:
    """Return of how many models all, some and none of the layers can be replaced."""
    whole, none = (sum(row.taken == full for row, full in pairs) for pairs in
                   ([(r, r.layers) for r in rows], [(r, 0) for r in rows]))  # fmt: skip
    return whole, len(rows) - whole - none, none


def read(out: Path) -> list[Row]:
    """Return the rows of the table in a folder.

    Raises:
        ConfigError: if there is none, or not of these columns.
    """
    path, numbers = out / "results" / "backbones.csv", ("parameters", "layers", "taken")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            found: list[Any] = list(csv.DictReader(file))
        typed: list[dict[str, Any]] = [{n: int(v) if n in numbers else v for n, v in row.items()} for row in found]
        return [Row(**row) for row in typed]
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"families=: {path} has no rows that could stay: {first_line(error)}") from error


def write(rows: Sequence[Row], out: Path) -> None:
    """Write the page and the table."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    write_text(out / "results" / "backbones.csv", csv_of(rows))
    write_text(out / "backbones.md", page(rows))


def main(argv: list[str]) -> None:
    """Survey, compute and write."""
    options: Options = script_options(Options, argv, USAGE)
    globs = [glob.strip() for glob in options.families.split(",")] if options.families else ["*"]
    every = [(family, name) for family, names in families().items() for name in names]
    wanted = [one for one in every if any(fnmatch.fnmatch(one[0], glob) for glob in globs)]
    chosen = [one for one in wanted if fnmatch.fnmatch(one[1], options.models)]
    if not chosen:
        raise ConfigError(f"models={options.models} families={options.families} match no model of timm")
    kept = read(Path(options.out)) if options.families else []
    done = {family for family, _ in chosen}
    rows = [row for one in tqdm(chosen, "models", file=sys.stderr) for row in survey(*one)]
    rows += [row for row in kept if row.family not in done]
    order = {one: i for i, one in enumerate(every)}
    rows.sort(key=lambda row: order.get((row.family, row.model), len(order)))
    write(rows, Path(options.out))
    if options.compute:
        for row in tqdm([row for row in smallest(rows) if row.family in done], "computed", file=sys.stderr):
            compute(row, options.limit)
            write(rows, Path(options.out))
    print(Path(options.out) / "backbones.md")


if __name__ == "__main__":
    run_program(main)
