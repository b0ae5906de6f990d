"""torchrun, as a sweep starts it for a point of several processes: it ends with the sweep. Not for import."""

from __future__ import annotations

import os

from convnn.runtime.signals import PARENT, follow_parent


def main() -> None:
    """Become torchrun with this command line."""
    follow_parent()
    os.environ.pop(PARENT, None)  # the processes follow torchrun, which ends them
    from torch.distributed.run import main as torchrun

    torchrun()


if __name__ == "__main__":
    main()
