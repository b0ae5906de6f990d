"""Turn a run whose layers stand at an end of the spectrum back into plain timm weights; see ``--help``."""

from convnn.cli.export import main

if __name__ == "__main__":
    main()
