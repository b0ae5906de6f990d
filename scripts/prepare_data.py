"""Make data ready from files at hand; see ``--help``."""

from convnn.cli.prepare_data import main

if __name__ == "__main__":
    main()
