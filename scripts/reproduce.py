"""Run the rows of a paper table and compare them with the published figures; see ``--help``."""

from convnn.cli.reproduce import main

if __name__ == "__main__":
    main()
