"""Tell the classes of image files by a finished run's model; the run folder is all that it needs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import RunOptions, chosen_run, names_and_options, path, run_program
from convnn.errors import ConfigError
from convnn.ops.settings import number
from convnn.text import aligned

USAGE = """
usage: uv run scripts/predict.py run=DIR FILE_OR_FOLDER [FILE_OR_FOLDER ...] [top=N] [csv=FILE] [checkpoint=last|best]
       convnn-predict run=DIR FILE_OR_FOLDER ...     the same where convnn is installed

Prints the class that a run's model gives to each image, and its probability. Images are read, scaled and cut as in an
evaluation. The run's data is not needed.

{options}
The data is needed only for run folders of before they recorded the classes and the size of the images.
Exit codes: 0 done, 1 the checkpoint cannot be used or the file not be written, 2 wrong arguments.
"""


@dataclass
class Options(RunOptions):
    """Arguments of this script."""

    image: str | None = path()
    """An image file, or a folder: all image files in it, at any depth; the same as its name alone."""
    top: int = number(1, 1)
    """Print so many classes of each image, the likeliest first."""
    csv: str | None = path()
    """Write a table too (file, rank, class, probability); a file that is there is not replaced."""
    device: str = "auto"
    """What to compute on, as ``device=`` of train.py."""


def predict(argv: list[str]) -> None:
    """Predict, write the table, and print."""
    names, options = names_and_options(Options, argv, USAGE)
    chosen_run(options)
    places = [*names, *([Path(options.image)] if options.image else [])]
    table = Path(options.csv) if options.csv else None
    if not places:
        raise ConfigError("name an image file or a folder; see --help")
    if table is not None and (table.exists() or not table.parent.is_dir()):
        why = "is there already; choose another file" if table.exists() else "names a folder that is not there"
        raise ConfigError(f"csv={table} {why}")
    from convnn.data.files import image_files

    found_files = [image_files(place) for place in places]  # refused before the model is built
    from convnn.runtime.files import write_atomically
    from convnn.train.finished import load_run
    from convnn.train.predictions import csv_text

    device, root = options.device, options.data_root or None
    run = load_run(options.run, checkpoint=options.checkpoint, device=device, data_root=root)
    # Names are relative to a folder that stands alone; of several places, to the present one.
    images = places[0] if len(places) == 1 else [os.fsdecode(file) for files in found_files for file in files]
    found = run.predict(images, named="image=")
    best = found.top(run.classes, options.top)
    if table is not None:
        rows = [(file, rank, *one) for file, ranked in best for rank, one in enumerate(ranked, 1)]
        text = csv_text(("file", "rank", "class", "probability"), rows)
        write_atomically(table, lambda file: file.write(text))
    print(aligned(("file", *["class", "probability"] * len(best[0][1])), [_row(*one) for one in best]))
    if table is not None:
        print(table, file=sys.stderr)


def _row(file: str, ranked: list[tuple[str, str]]) -> list[str]:
    shown = file.encode(errors="replace").decode()
    return [shown, *(cell for one in ranked for cell in one)]


def main() -> None:
    """Run the program."""
    run_program(predict)


if __name__ == "__main__":
    main()
