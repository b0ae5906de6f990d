"""Turn a run whose layers stand at an end of the spectrum back into plain timm weights."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import RunOptions, chosen_run, path, run_program, script_options
from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.ops.settings import choice

USAGE = """
usage: uv run scripts/export.py run=DIR [format=timm|safetensors|hf|onnx] [out=PLACE] [checkpoint=last|best]
       convnn-export run=DIR ...     the same where convnn is installed

format=timm         the state_dict of the plain model that a run's checkpoint equals, in the file PLACE, and beside it,
                    with .json, how to load it: timm.create_model(MODEL, **KWARGS).load_state_dict(...). Layers at
                    blend 0 with k = kernel area become convolutions, layers with k = all tokens become attention; a
                    layer that equals no plain one is an error that names it. Where plain timm has no such network, as
                    with backbone.stem=small, the list "differs" names each module that must be replaced after
                    timm.create_model, and a warning says so; an empty list was checked by comparing logits.
format=safetensors  the model wherever it stands on the spectrum, as the folder PLACE: model.safetensors, config.json
                    and a model card, README.md; convnn.load_exported(PLACE) loads it. Nothing is pickled.
format=hf           the same as the Hugging Face Hub has models: where the layers stand at an end and timm has such a
                    network, timm.create_model("local-dir:PLACE", pretrained=True) loads it, and hf-hub: once you have
                    uploaded it. Nothing is uploaded; the command that does is printed.
format=onnx         model.onnx, for any number of images, with config.json and a card; compared with the model where
                    onnxruntime is installed (pip install convnn[onnx]).

{options}
Exit codes: 0 written, 1 the checkpoint cannot be used, 2 wrong arguments or layers without a plain equivalent.
"""


@dataclass
class Options(RunOptions):
    """Arguments of this script."""

    format: str = choice("timm", "safetensors", "hf", "onnx")
    """What is written."""
    out: str | None = path()
    """File (format=timm) or folder; null: exported.pt or exported-FORMAT in the run folder. A file that no export
    wrote, or that was changed since, is never replaced."""


def export(argv: list[str]) -> None:
    """Export and print."""
    options: Options = script_options(Options, argv, USAGE)
    folder, config = chosen_run(options)
    (_export_weights if options.format == "timm" else _export_folder)(options, folder, config)


def _export_weights(options: Options, folder: Path, config: Config) -> None:
    """Write plain weights and how timm takes them, and print it."""
    out = Path(options.out) if options.out else folder / "exported.pt"
    if out.suffix == ".json" or out.is_dir():
        raise ConfigError(f"out={out} must be a file for the weights, such as out=weights.pt")
    import torch

    from convnn.models.plain import timm_description
    from convnn.models.swap import export_layers
    from convnn.runtime.files import write_json
    from convnn.runtime.owned import Owner, naming
    from convnn.train.restore import load_run

    run = load_run(config, folder, options.checkpoint, splits=(), other_data=bool(options.data_root))
    model = run.model
    names = export_layers(model)
    found = timm_description(model, config.backbone, len(run.classes), run.shape[0], run.image_size)
    found |= {
        "image_size": run.image_size,
        "mean": config.data.mean,
        "std": config.data.std,
        "classes": run.classes,
    }
    description = out.with_suffix(".json")
    with Owner("export", f".{out.name}.convnn-export").written_aside(out.parent) as aside:
        with naming(aside / out.name):
            torch.save(model.state_dict(), aside / out.name)
        with naming(aside / description.name):
            write_json(aside / description.name, found | {"run": folder.name, "checkpoint": options.checkpoint})
    for change in found["differs"]:
        where = change["module"] or "the model"
        print(f"warning: not plain timm: {where} is {change['here']}, timm has {change['timm']}", file=sys.stderr)
    shown = {key: found[key] for key in ("model", "kwargs", "differs")}
    print(json.dumps({"out": str(out), "description": str(description), "layers": len(names)} | shown))


def _export_folder(options: Options, folder: Path, config: Config) -> None:
    """Write a folder, and print what is in it and how it is loaded and uploaded."""
    out = Path(options.out) if options.out else folder / f"exported-{options.format}"
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} must be a folder for format={options.format}")
    from convnn.train.exported import MANIFEST, write_folder
    from convnn.train.restore import load_run

    run = load_run(config, folder, options.checkpoint, splits=(), other_data=bool(options.data_root))
    found = write_folder(run, config, folder, options.checkpoint, out, options.format)
    upload = shlex.join(["hf", "upload", f"USER/{folder.resolve().name}", str(out), "--exclude", MANIFEST])
    print(json.dumps({"out": str(out), "format": options.format, **found, "upload": upload}))


def main() -> None:
    """Run the program."""
    run_program(export)


if __name__ == "__main__":
    main()
