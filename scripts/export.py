"""Turn a run whose layers stand at an end of the spectrum back into plain timm weights."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from convnn.cli.program import guarded, script_options
from convnn.errors import ConfigError

USAGE = """
usage: uv run scripts/export.py run=DIR [checkpoint=last|best] [out=FILE] [data_root=DIR]

Writes the state_dict of the plain timm model that a run's checkpoint equals, for timm.create_model(NAME) and
load_state_dict. Layers at blend 0 with k = kernel area become convolutions, layers with k = all tokens become
attention; a layer that equals no plain one is an error that names it.
  run         run folder, as train.py printed it
  checkpoint  last (default) or best
  out         default DIR/exported.pt
  data_root   where the data is now, if it moved
Exit codes: 0 written, 1 the checkpoint cannot be used, 2 wrong arguments or layers without a plain equivalent.
"""


@dataclass
class Options:
    """Arguments of this script."""

    run: str = MISSING
    checkpoint: str = "last"
    out: str | None = None
    data_root: str | None = None


def main(argv: list[str]) -> None:
    """Export and print."""
    options: Options = script_options(Options, argv, USAGE)
    if options.checkpoint not in ("last", "best"):
        raise ConfigError(f"checkpoint={options.checkpoint} is not one of last, best")
    from convnn.config.load import load_config

    folder = Path(options.run)
    config = load_config(folder)
    if options.data_root:
        config.data.root = options.data_root
    import torch

    from convnn.data.datasets import load_dataset
    from convnn.models.swap import export_layers
    from convnn.runtime.files import write_atomically
    from convnn.train.restore import load_run

    model, _, _ = load_run(config, folder, options.checkpoint, load_dataset(config.data))
    names = export_layers(model)
    out = Path(options.out) if options.out else folder / "exported.pt"
    write_atomically(out, lambda file: torch.save(model.state_dict(), file))
    print(json.dumps({"out": str(out), "model": config.backbone.name, "layers": len(names)}))


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
