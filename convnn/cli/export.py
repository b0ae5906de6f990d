"""Turn a run whose layers stand at an end of the spectrum back into plain timm weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import RunOptions, chosen_run, run_program, script_options

USAGE = """
usage: uv run scripts/export.py run=DIR [checkpoint=last|best] [out=FILE] [data_root=DIR]
       convnn-export run=DIR ...     the same where convnn is installed

Writes the state_dict of the plain timm model that a run's checkpoint equals, for timm.create_model(NAME) and
load_state_dict. Layers at blend 0 with k = kernel area become convolutions, layers with k = all tokens become
attention; a layer that equals no plain one is an error that names it.
  run         run folder, as train.py printed it
  checkpoint  last (default) or best
  out         default DIR/exported.pt
  data_root   where the data is now, if it moved, or other images of the same classes
Exit codes: 0 written, 1 the checkpoint cannot be used, 2 wrong arguments or layers without a plain equivalent.
"""


@dataclass
class Options(RunOptions):
    """Arguments of this script."""

    out: str | None = None


def export(argv: list[str]) -> None:
    """Export and print."""
    options: Options = script_options(Options, argv, USAGE)
    folder, config = chosen_run(options)
    import torch

    from convnn.models.swap import export_layers
    from convnn.runtime.files import write_atomically
    from convnn.train.restore import load_run

    model = load_run(config, folder, options.checkpoint, splits=(), other_data=bool(options.data_root)).model
    names = export_layers(model)
    out = Path(options.out) if options.out else folder / "exported.pt"
    write_atomically(out, lambda file: torch.save(model.state_dict(), file))
    print(json.dumps({"out": str(out), "model": config.backbone.name, "layers": len(names)}))


def main() -> None:
    """Run the program."""
    run_program(export)


if __name__ == "__main__":
    main()
