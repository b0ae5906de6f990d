"""Evaluate a finished run's checkpoint on its test set, a corrupted copy of it, or another folder of images."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import RunOptions, chosen_run, path, run_program, script_options
from convnn.errors import ConfigError
from convnn.ops.settings import number
from convnn.runs.contents import EVALUATIONS

USAGE = """
usage: uv run scripts/evaluate.py run=DIR [data=FOLDER] [corruption=NAME severity=1..5] [limit=N] [out=FOLDER] ...
       convnn-evaluate run=DIR ...     the same where convnn is installed

Prints loss, top-1 and top-5 (percent) of a run's checkpoint on its test set as one line of JSON: the run's own numbers.
Refused if config.yaml is not what the run was trained with, or the test images or classes are not those of the run.
Writes scores.json, per_class.csv (class, images, correct, accuracy), per_image.csv (file or index, label, predicted,
probability) and predictions.npz (arrays index, label, predicted, probabilities).

{options}
With data_root of other images, same_images=false says so. Without out the files go to evaluation/NAME in the run
folder, NAME made of the options; files there that no evaluation wrote are never replaced.
Exit codes: 0 done, 1 the checkpoint cannot be used or a file not be written, 2 wrong arguments.
"""


@dataclass
class Options(RunOptions):
    """Arguments of this script."""

    device: str = "auto"
    """What to compute on, as ``device=`` of train.py."""
    data: str | None = path()
    """Another test set: a folder with a folder of images for each class, or for some; classes go by name. The run's own
    data is not needed then."""
    corruption: str | None = None
    """A corrupted copy of the images: gaussian_noise, gaussian_blur, contrast or jpeg_compression (docs/data.md)."""
    severity: int | None = number(None, 1, 5)
    """Of the corruption; null: 3."""
    limit: int | None = number(None, 1)
    """Only so many images, spread evenly over the classes; the same ones each time."""
    out: str | None = path()
    """Folder for the files; null: in the run folder."""


def evaluate(argv: list[str]) -> None:
    """Evaluate, write the tables, and print."""
    options: Options = script_options(Options, argv, USAGE)
    folder, config = chosen_run(options)
    if options.data and options.data_root:
        raise ConfigError("data= is another test set and data_root= the run's own; give one of them")
    if options.severity and not options.corruption:
        raise ConfigError(f"severity={options.severity} is that of a corruption; give corruption=NAME too")
    config.device = options.device
    from convnn.data.images import READ, reading
    from convnn.train.predictions import write_evaluation
    from convnn.train.restore import Asked, predict_run

    given = Path(options.data) if options.data else None
    asked = Asked(given, options.corruption, options.severity or 3, options.limit)
    with reading(f"data={given}: " if given else READ):
        scores, found, classes = predict_run(
            config, folder, options.checkpoint, asked, other_data=bool(options.data_root)
        )
    others = "" if scores.get("same_images", True) else "other-images"
    name = "-".join(filter(None, [options.checkpoint, others, asked.name]))
    out = Path(options.out) if options.out else folder / EVALUATIONS / name
    try:
        write_evaluation(out, scores, found, classes)
        scores["out"] = str(out)
    except OSError as error:
        if options.out:
            raise
        print(f"warning: {error}; out=FOLDER chooses another place", file=sys.stderr)
    print(json.dumps(scores))


def main() -> None:
    """Run the program."""
    run_program(evaluate)


if __name__ == "__main__":
    main()
