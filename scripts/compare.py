"""Compare the arms of some sweeps with a baseline; see ``--help``."""

from convnn.cli.compare import main

if __name__ == "__main__":
    main()
