"""Draw which neighbours the layers of a run choose, and its diagnostics; see ``--help``."""

from convnn.cli.visualize import main

if __name__ == "__main__":
    main()
