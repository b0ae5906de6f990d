"""Train every point of a grid between convolution and attention; see README.md and ``--help``."""

from convnn.cli.sweep import main

if __name__ == "__main__":
    main()
