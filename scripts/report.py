"""Turn the runs below some folders into tables, pictures and one HTML page; see ``--help``."""

from convnn.cli.report import main

if __name__ == "__main__":
    main()
