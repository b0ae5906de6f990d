"""Turn a run whose layers stand at an end of the spectrum back into plain timm weights."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import RunOptions, chosen_run, path, run_program, script_options
from convnn.errors import ConfigError

USAGE = """
usage: uv run scripts/export.py run=DIR [checkpoint=last|best] [out=FILE] [data_root=DIR]
       convnn-export run=DIR ...     the same where convnn is installed

Writes the state_dict of the plain model that a run's checkpoint equals, and beside it, as FILE with .json, how to load
it: timm.create_model(MODEL, **KWARGS).load_state_dict(...). Layers at blend 0 with k = kernel area become
convolutions, layers with k = all tokens become attention; a layer that equals no plain one is an error that names it.
Where plain timm has no such network, as with backbone.stem=small, the list "differs" names each module that must be
replaced after timm.create_model, and a warning says so; an empty list was checked by comparing logits.
{options}
Exit codes: 0 written, 1 the checkpoint cannot be used, 2 wrong arguments or layers without a plain equivalent.
"""


@dataclass
class Options(RunOptions):
    """Arguments of this script."""

    out: str | None = path()
    """File; null: exported.pt in the run folder. One that no export wrote, or that was changed since, is never
    replaced."""


def export(argv: list[str]) -> None:
    """Export and print."""
    options: Options = script_options(Options, argv, USAGE)
    folder, config = chosen_run(options)
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


def main() -> None:
    """Run the program."""
    run_program(export)


if __name__ == "__main__":
    main()
