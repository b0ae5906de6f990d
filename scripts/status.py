"""How far sweeps are; see ``--help``."""

from convnn.cli.status import main

if __name__ == "__main__":
    main()
