"""Draw which neighbours the layers of a run choose, and its diagnostics."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import RunOptions, chosen_run, path, run_program, script_options
from convnn.errors import ConfigError

USAGE = """
usage: uv run scripts/visualize.py run=DIR [index=N | image=FILE] [queries=ROW,COLUMN;...] [layers=NAME,...] [out=DIR]
       convnn-visualize run=DIR ...     the same where convnn is installed

Draws, as PNG and SVG:
  neighbors    the tokens that chosen pixels mix: a row for each query, a column for each swapped layer
  blends       the same for the first query along the blend axis, from convolution (0) to attention (1)
  weights      what share of the weights each token gets, for layers that weigh their neighbours
  diagnostics  what every layer chose at every epoch of the run: a heat map for each measure
  training     accuracy and loss over the epochs

{options}
"""


@dataclass
class Options(RunOptions):
    """Arguments of this script."""

    index: int = 0
    """Number of an image of the test set."""
    image: str | None = path()
    """Any image file instead, in its own proportions where the model takes them; no data is needed then."""
    queries: str | None = None
    """Pixels of the image as the model takes it, such as ``'queries=16,16;4,20'``; null: three."""
    layers: str | None = None
    """Names from swap.txt, with commas between; null: all, of many six."""
    head: int = 0
    """Of layers that have several, from 0."""
    out: str | None = path()
    """Folder; null: pictures/ in the run folder. Files there that it did not write stay, and are never replaced."""


def pixels_of(text: str | None) -> list[tuple[int, int]]:
    """Return the pixels of ``ROW,COLUMN;ROW,COLUMN``."""
    if text is None:
        return []
    if not re.fullmatch(r"\d+,\d+(;\d+,\d+)*", text):
        raise ConfigError(f"queries={text} must be ROW,COLUMN or several of them with semicolons, in quotes")
    return [(int(row), int(column)) for row, column in (pair.split(",") for pair in text.split(";"))]


def visualize(argv: list[str]) -> None:
    """Draw and list the files."""
    options: Options = script_options(Options, argv, USAGE)
    pixels = pixels_of(options.queries)
    if options.head < 0:
        raise ConfigError(f"head={options.head} must be at least 0")
    folder, config = chosen_run(options)
    from convnn.report.tables import import_pandas

    import_pandas()  # whose extra brings matplotlib too
    from convnn.figures.curves import draw_curves
    from convnn.runs.record import read_record
    from convnn.train.pictures import draw_run, image_of_test_set, read_image_for_model, save_figures
    from convnn.train.restore import load_run

    splits = () if options.image else ("test",)
    run = load_run(config, folder, options.checkpoint, splits=splits, other_data=bool(options.data_root))
    model, side = run.model, run.image_size
    if options.image:
        shown = read_image_for_model(model, Path(options.image), config, run.shape[0], side)
    else:
        assert run.dataset is not None
        shown = image_of_test_set(run.dataset.test, options.index, config.data, side)
    layers = options.layers.split(",") if options.layers else []
    try:
        figures = draw_run(model, shown, pixels, layers, options.head) | draw_curves(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if damage := read_record(folder).damage:
        print(f"warning: no curves: {damage}", file=sys.stderr)
    for picture in save_figures(figures, folder, Path(options.out) if options.out else None):
        print(picture)


def main() -> None:
    """Run the program."""
    run_program(visualize)


if __name__ == "__main__":
    main()
