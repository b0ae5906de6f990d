"""Evaluate a finished run's checkpoint on its test set; see ``--help``."""

from convnn.cli.evaluate import main

if __name__ == "__main__":
    main()
