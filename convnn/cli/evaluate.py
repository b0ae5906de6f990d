"""Evaluate a trained model: on its test set or other images, and at other settings of its layers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.cli.program import RunOptions, chosen_run, path, run_program, script_options
from convnn.errors import ConfigError
from convnn.ops.settings import check_fields, choice, number
from convnn.runs.contents import EVALUATIONS

if TYPE_CHECKING:
    from convnn.cli.moved import Grid
    from convnn.train.restore import Asked

USAGE = """
usage: uv run scripts/evaluate.py run=DIR [data=FOLDER] [corruption=NAME severity=1..5] [limit=N] [out=FOLDER] ...
       uv run scripts/evaluate.py run=DIR operator.k=1,4,9 [operator.KEY=...] [swap=... swap.KEY=...] [layers=each] ...
       uv run scripts/evaluate.py WORDS OF train.py ... out=FOLDER     a backbone with weights of a file, without a run
       convnn-evaluate run=DIR ...     the same where convnn is installed

Prints loss, top-1 and top-5 (percent) of a run's checkpoint on its test set as one line of JSON: the run's own numbers.
Refused if config.yaml is not what the run was trained with, or the test images or classes are not those of the run.
Writes scores.json, per_class.csv (class, images, correct, accuracy), per_image.csv (file or index, label, predicted,
probability) and predictions.npz (arrays index, label, predicted, probabilities).

With words of operator or swap nothing is trained either: the model's layers move to these settings, with its weights,
and a table compares them with the model's own. Lists with commas make a grid. A setting that would change a parameter
is refused: operator.k above that of training where each neighbour has a weight. A run without a swap takes one:
  operator=convnn_attention swap=all_attention operator.aggregation=sum operator.k=1,9,65
  operator.blend=0,0.5,1          (of a run with a swap: its own layers move)
Writes spectrum.csv, spectrum_layers.csv, spectrum.md and pictures (docs/trained_spectrum.md says what is in them).
Without run= all words but those below are of train.py, data=NAME too; the weights are those that backbone loads:
  backbone=vit_base_224 backbone.pretrained=true data=imagenet data.root=DIR out=DIR operator=... swap=... ...

{options}
With data_root of other images, same_images=false says so. Without out the files go to evaluation/NAME in the run
folder, NAME made of the options; files there that no evaluation wrote are never replaced.
Exit codes: 0 done, 1 the checkpoint cannot be used or a file not be written, 2 wrong arguments.
"""


@dataclass
class GivenOptions:
    """Arguments with a run and without."""

    device: str = "auto"
    """What to compute on, as ``device=`` of train.py."""
    corruption: str | None = None
    """A corrupted copy of the images: gaussian_noise, motion_blur, fog, contrast, ...; docs/data.md has all of them."""
    severity: int | None = number(None, 1, 5)
    """Of the corruption; null: 3."""
    limit: int | None = number(None, 1)
    """Only so many, spread evenly over the classes; the same ones each time."""
    layers: str = choice("all", "each")
    """At other settings: ``all`` layers move together, or besides ``each`` alone, while the others stay."""
    out: str | None = path()
    """Folder for the files; null: in the run folder."""


@dataclass
class Options(GivenOptions, RunOptions):
    """Arguments of this script."""

    data: str | None = path()
    """Another test set: a folder with a folder of images for each class, or for some; classes go by name. The run's own
    data is not needed then."""


def evaluate(argv: list[str]) -> None:
    """Evaluate, write the tables, and print."""
    from convnn.cli.moved import of_config, of_layers

    asks = any(arg in ("-h", "--help") for arg in argv)
    if not asks and not any(arg.startswith("run=") for arg in argv) and any(map(of_config, argv)):
        _evaluate_backbone(argv)
        return
    words = [arg for arg in argv if "=" in arg and of_layers(arg)]
    rest = [arg for arg in argv if arg not in words]
    if wrong := next((arg for arg in rest if "." in arg.partition("=")[0] and of_config(arg)), None):
        raise ConfigError(f"{wrong}: of a trained model the words of operator and swap alone can change; leave it out")
    options: Options = script_options(Options, rest, USAGE)
    folder, config = chosen_run(options)
    if options.data and options.data_root:
        raise ConfigError("data= is another test set and data_root= the run's own; give one of them")
    _check(options, moves=bool(words))
    grid = None
    if words:
        from convnn.cli.moved import grid_of_run

        grid = grid_of_run(config, folder, words)
    config.device = options.device
    if grid is not None:
        _evaluate_run_moved(options, grid, folder)
        return
    _evaluate_run(options, config, folder)


def _check(options: GivenOptions, *, moves: bool) -> None:
    if options.severity and not options.corruption:
        raise ConfigError(f"severity={options.severity} is that of a corruption; give corruption=NAME too")
    if options.layers == "each" and not moves:
        raise ConfigError("layers=each moves layers to other settings; say which, such as operator.k=1,4,9")


def _asked(options: GivenOptions, data: str | None) -> Asked:
    from convnn.train.restore import Asked

    return Asked(Path(data) if data else None, options.corruption, options.severity or 3, options.limit)


def _evaluate_run(options: Options, config: Any, folder: Path) -> None:
    from convnn.data.images import READ, reading
    from convnn.train.predictions import write_evaluation
    from convnn.train.restore import predict_run

    asked = _asked(options, options.data)
    with reading(f"data={asked.folder}: " if asked.folder else READ):
        scores, found, classes = predict_run(
            config, folder, options.checkpoint, asked, other_data=bool(options.data_root)
        )
    out = Path(options.out) if options.out else folder / EVALUATIONS / _name(options, asked, scores)
    try:
        write_evaluation(out, scores, found, classes)
        scores["out"] = str(out)
    except OSError as error:
        if options.out:
            raise
        print(f"warning: {error}; out=FOLDER chooses another place", file=sys.stderr)
    print(json.dumps(scores))


def _name(options: Options, asked: Asked, facts: dict[str, Any]) -> str:
    others = "" if facts.get("same_images", True) else "other-images"
    return "-".join(filter(None, [options.checkpoint, others, asked.name]))


def _evaluate_run_moved(options: Options, grid: Grid, folder: Path) -> None:
    from convnn.data.images import READ, reading
    from convnn.report.tables import import_pandas
    from convnn.train.moved import trained_run

    import_pandas()  # whose extra brings matplotlib too
    asked = _asked(options, options.data)
    with reading(f"data={asked.folder}: " if asked.folder else READ):
        trained = trained_run(grid.own, folder, options.checkpoint, asked, other_data=bool(options.data_root))
    name = f"{_name(options, asked, trained.facts)}-{grid.name}" + ("-each" if options.layers == "each" else "")
    out = Path(options.out) if options.out else folder / EVALUATIONS / name
    _write_moved(options, trained, grid, out)


def _evaluate_backbone(argv: Sequence[str]) -> None:
    """Do without a run: the configuration is composed as train.py does it, and the weights are those it loads."""
    from dataclasses import fields

    from convnn.cli.moved import grid_of_backbone, of_layers

    own = {f.name for f in fields(GivenOptions)}
    if wrong := next((arg for arg in argv if arg.partition("=")[0] in ("checkpoint", "data_root")), None):
        raise ConfigError(f"{wrong} is of a run, as run=DIR names one; without one backbone names the weights to load")
    options: GivenOptions = script_options(GivenOptions, [arg for arg in argv if arg.partition("=")[0] in own], USAGE)
    words = [arg for arg in argv if arg.partition("=")[0] not in own]
    check_fields(options, "")
    _check(options, moves=any(map(of_layers, words)))
    if not options.out:
        raise ConfigError("out=FOLDER is needed where there is no run folder to write to")
    grid = grid_of_backbone(words, options.device)
    from convnn.cli.early import check_data_place
    from convnn.data.images import READ, reading
    from convnn.report.tables import import_pandas

    check_data_place(grid.own.data)
    import_pandas()
    from convnn.train.moved import trained_backbone

    with reading(READ):
        trained = trained_backbone(grid.own, _asked(options, None))
    _write_moved(options, trained, grid, Path(options.out))


def _write_moved(options: GivenOptions, trained: Any, grid: Grid, out: Path) -> None:
    from convnn.train.moved import Point, evaluate_points
    from convnn.train.moved_files import as_text, write_rows

    def tell(row: Any) -> None:
        what = row.label if row.moved in ("none", "all") else f"{row.label} in {row.moved} alone"
        print(f"{what}: top-1 {row.top1:.2f} % ({1000 * row.seconds_per_image:.3g} ms an image)", file=sys.stderr)

    points = [Point(*given) for given in grid.points]
    rows = evaluate_points(trained, points, each=options.layers == "each", tell=tell)
    files = write_rows(out, rows, trained.facts)
    print(as_text(rows))
    print(f"\n{len(files)} files in {out}")


def main() -> None:
    """Run the program."""
    run_program(evaluate)


if __name__ == "__main__":
    main()
